// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/cmd/mprox/daemon"
	"github.com/mutex-proxy/mutex/config"
	"github.com/mutex-proxy/mutex/control"
	"github.com/mutex-proxy/mutex/control/client"
	"github.com/mutex-proxy/mutex/policy"
)

var errInterrupted = errors.New("interrupted before the command began")

func newRunCommand(g *globals) *cobra.Command {
	var r client.LeaseRequest
	cmd := &cobra.Command{
		Use:   "run [--proxy URL... | --context NAME] -- COMMAND [ARG...]",
		Short: "Run one command, and all it starts, through a proxy",
		Long: `Runs COMMAND and all its descendants through a proxy; everything else on the machine is left alone. With a daemon running it is a
lease on it, without one mprox is its own engine for as long as COMMAND lives. What outlives COMMAND, or mprox, is blocked, not freed.

The exit status is COMMAND's; 125 means that mprox failed, 126 that COMMAND could not be executed, 127 that it was not found.`,
		Example: `  mprox run --proxy socks5h://192.0.2.10:1080 -- curl https://example.com/
  mprox run --proxy http://user:password@proxy.example:3128 -- bash
  mprox run --context work -- ssh build.example`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, argv []string) error {
			if (len(r.Proxies) == 0) == (r.Context == "") {
				return runFailed(usageError("give either --proxy URL or --context NAME"))
			}
			ws, code, err := run(cmd.Context(), g, r, argv)
			if err != nil {
				return exitError{code, err}
			}
			exitAs(ws)
			return nil
		},
	}
	fl := cmd.Flags()
	fl.SetInterspersed(false) // what follows the command is the command's
	fl.StringArrayVar(&r.Proxies, "proxy", nil, "proxy `URL`; repeated, the proxies are a pool")
	fl.StringVar(&r.Context, "context", "", "`name` of a context of the running daemon")
	g.completeContextFlag(cmd)
	fl.StringArrayVar(&r.DNS, "dns", nil, "DNS `server` asked through the proxy; repeatable")
	fl.StringArrayVar(&r.Bypass, "bypass", nil, "address, prefix or class that stays direct; repeatable")
	fl.StringVar(&r.Strategy, "strategy", "", "how a proxy of the pool is chosen: round-robin, failover")
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return runFailed(flagError(err)) })
	return cmd
}

// runFailed is a failure of mprox itself, as opposed to the command's.
func runFailed(err error) error { return exitError{exitRunFailed, err} }

// run captures a cgroup, by a lease on the daemon or with an engine of its own, and runs the command in it.
func run(ctx context.Context, g *globals, r client.LeaseRequest, argv []string) (unix.WaitStatus, int, error) {
	c := client.New(g.socketPath())
	defer c.Close()
	user := os.Geteuid() != 0
	if user {
		r.PID = os.Getpid() // who is not root cannot start anything in another cgroup: the daemon moves us there, and COMMAND inherits it
	}
	var lease *client.HeldLease
	err := attended(ctx, c, func(ctx context.Context, c *client.Client) (err error) {
		lease, err = c.Lease(ctx, r)
		return err
	})
	switch {
	case err == nil:
		defer func() { _ = lease.Close() }() // the daemon ends it with the connection, whatever Close says
		if user {
			return runIn(argv, -1)
		}
		dir, err := os.Open(lease.Cgroup)
		if err != nil {
			return 0, exitRunFailed, fmt.Errorf("the lease's cgroup: %w", err)
		}
		defer dir.Close()
		return runIn(argv, int(dir.Fd()))
	case !errors.Is(err, client.ErrUnreachable), errors.Is(err, client.ErrSilent):
		return 0, exitRunFailed, err
	case r.Context != "":
		return 0, exitRunFailed, fmt.Errorf("context %s: %w", r.Context, err)
	}
	return runAlone(ctx, g, r, argv)
}

// runIn runs the command in the cgroup until it ends.
func runIn(argv []string, cgroup int) (unix.WaitStatus, int, error) {
	ch, code, err := startChild(argv, cgroup)
	if err != nil {
		return 0, code, err
	}
	ws, err := ch.wait()
	if err != nil {
		return 0, exitRunFailed, err
	}
	return ws, 0, nil
}

// runAlone runs the command with an engine in this process: a daemon without contexts, and one lease on it.
func runAlone(ctx context.Context, g *globals, r client.LeaseRequest, argv []string) (ws unix.WaitStatus, code int, err error) {
	log, err := g.logger(config.Log{Level: "warn", Format: "text"})
	if err != nil {
		return 0, exitRunFailed, err
	}
	// Until the command has begun, Ctrl-C is for us: what has been set up so far is undone. From then on it is the command's.
	setup, begun := signal.NotifyContext(ctx, unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	defer begun()
	socket := filepath.Join(filepath.Dir(g.socketPath()), fmt.Sprintf("run-%d.sock", os.Getpid()))
	d := daemon.New(daemon.Options{Config: config.OnRequest(), Socket: socket, Version: version, Log: log})
	up := make(chan struct{})
	ended := make(chan error, 1)
	go func() { ended <- d.Run(ctx, func() { close(up) }) }()
	defer func() {
		d.Stop()
		if stopErr := <-ended; stopErr != nil {
			log.Error("not everything was undone: run mprox cleanup --socket "+socket, zap.Error(stopErr))
		}
		if err := leaveReaper(socket); err != nil {
			log.Error("when the last process has ended, run mprox cleanup --socket "+socket, zap.Error(err))
		}
	}()
	select {
	case err := <-ended:
		ended <- nil
		return 0, exitRunFailed, err
	case <-setup.Done():
		return 0, exitRunFailed, errInterrupted
	case <-up:
	}
	l, err := d.Lease(setup, r, control.Peer{PID: os.Getpid(), Trusted: true})
	if err != nil {
		return 0, exitRunFailed, err
	}
	defer func() {
		if err := l.Close(); err != nil {
			log.Error("lease not undone", zap.Error(err))
		}
	}()
	if setup.Err() != nil {
		return 0, exitRunFailed, errInterrupted
	}
	return runIn(argv, l.FD())
}

// leaveReaper starts a process that waits for what the command has left running, and then removes the marks and the guard that block it.
// There is none when nothing is left: then the journal has gone with the engine.
func leaveReaper(socket string) error {
	if _, err := os.Stat(policy.InstanceFor(socket).Journal); err != nil {
		return nil // the journal was the last thing to go
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.Command(self, "cleanup", "--survivors", "--socket", socket) //nolint:noctx // it outlives us on purpose
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	return cmd.Process.Release()
}
