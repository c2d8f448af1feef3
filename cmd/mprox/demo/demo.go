// SPDX-License-Identifier: GPL-3.0-or-later

// Package demo shows the main job of mprox on a network of its own: a client's namespace, and one with a proxy and an origin, joined by a
// veth pair. It is not a test (those are in e2e) and not part of the daemon; cmd/mprox calls Run for `mprox demo`, and the roles of
// roles.go for the processes that Run starts from the same binary.
package demo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/control/client"
)

const (
	proxyUser = "demo"
	proxyPass = "demo-password"
	// step bounds each wait of the demo; the whole of it takes seconds.
	step = 10 * time.Second
)

// ErrFailed is returned when the demo ran and something it showed was not as it should be.
var ErrFailed = errors.New("demo: something above did not go as it should")

// demo is one run: the network, its processes, and where it tells the story.
type demo struct {
	out     io.Writer
	dir     string
	self    string
	net     *network
	capture *capture
	engine  *exec.Cmd
	ended   chan struct{} // closed when the engine has
	clean   bool          // nothing of the engine is left in the kernel
	failed  bool
}

// Run plays the demo and writes its story to out. It needs CAP_NET_ADMIN and CAP_SYS_ADMIN. When it returns, also because ctx ended,
// nothing of it is left on the machine.
func Run(ctx context.Context, out io.Writer) (err error) {
	d := &demo{out: out}
	if d.self, err = os.Executable(); err != nil {
		return err
	}
	if d.dir, err = os.MkdirTemp("", "mprox-demo-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(d.dir)) }()
	if d.net, err = newNetwork(); err != nil {
		return err
	}
	defer d.net.Close()
	defer func() { err = errors.Join(err, d.cleanUp()) }()
	fmt.Fprintln(out, "mprox demo: everything happens in private network namespaces; this machine's own network is not touched.")
	if d.capture, err = startCapture(d.net.far); err != nil {
		return err
	}
	defer d.capture.Close()
	for _, part := range []func(context.Context) error{d.startFar, d.startEngine, d.flows, d.throughput, d.kill} {
		if err := part(ctx); err != nil {
			return err
		}
	}
	d.leaks()
	if d.failed {
		return ErrFailed
	}
	fmt.Fprintln(out, "\nDone. Nothing is left behind.")
	return nil
}

func (d *demo) title(format string, args ...any) {
	fmt.Fprintf(d.out, "\n── "+format+"\n", args...)
}

func (d *demo) show(ok bool, name, detail string, took time.Duration) {
	sign := "✓"
	if !ok {
		sign, d.failed = "✗", true
	}
	line := fmt.Sprintf("   %s %-36s %s", sign, name, detail)
	if took > 0 {
		line += fmt.Sprintf("  (%s)", took.Round(100*time.Microsecond))
	}
	fmt.Fprintln(d.out, line)
}

// process starts this binary in a namespace; its standard error becomes a file of the demo, shown when something goes wrong.
func (d *demo) process(n *namespace, name string, args ...string) (*exec.Cmd, error) {
	log, err := os.Create(filepath.Join(d.dir, name+".log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(d.self, args...) //nolint:noctx // ended by name, in order, by the demo
	cmd.Stderr = log
	return cmd, n.start(cmd)
}

func (d *demo) startFar(ctx context.Context) error {
	d.title("Three hosts: client %s ── proxy %s (SOCKS5) ── origin %s, %s", hostOf(clientV4), hostOf(farV4), hostOf(originV4), hostOf(originV6))
	if _, err := d.process(d.net.far, "far", "demo", "far", d.dir); err != nil {
		return err
	}
	return until(ctx, "the proxy", func() error {
		return d.net.far.do(func() error {
			c, err := dial(ctx, "tcp", proxyAddr())
			if err == nil {
				c.Close()
			}
			return err
		})
	})
}

func (d *demo) startEngine(ctx context.Context) error {
	d.title("mprox up --proxy socks5h://%s:***@%s", proxyUser, proxyAddr())
	begin := time.Now()
	var err error
	if d.engine, err = d.process(d.net.client, "engine", "up", "--socket", d.socket(), "--state-dir", d.dir,
		"--proxy", fmt.Sprintf("socks5h://%s:%s@%s", proxyUser, proxyPass, proxyAddr())); err != nil {
		return err
	}
	d.ended = make(chan struct{})
	go func() {
		defer close(d.ended)
		_ = d.engine.Wait() // it is stopped or killed by us: how it ended says nothing
	}()
	if err := until(ctx, "mprox up", func() error { return d.healthy(ctx) }); err != nil {
		log, _ := os.ReadFile(filepath.Join(d.dir, "engine.log"))
		return fmt.Errorf("%w\n%s", err, log)
	}
	d.show(true, "capturing the whole client host", "IPv4, IPv6, DNS; ready", time.Since(begin))
	return nil
}

func (d *demo) healthy(ctx context.Context) error {
	c := client.New(d.socket())
	defer c.Close()
	h, err := c.Health(ctx)
	if err == nil && !h.Healthy {
		err = fmt.Errorf("not healthy: %v", h.Checks)
	}
	return err
}

func (d *demo) flows(ctx context.Context) error {
	d.title("Programs on the client, none of which knows of a proxy")
	if err := d.client(ctx, "checks", d.showResult); err != nil {
		return err
	}
	return nil
}

// client runs a set of checks as a process of the client's namespace.
func (d *demo) client(ctx context.Context, set string, each func(result)) error {
	cmd := exec.CommandContext(ctx, d.self, "demo", "client", set)
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := d.net.client.start(cmd); err != nil {
		return err
	}
	dec := json.NewDecoder(out)
	for {
		var r result
		if err := dec.Decode(&r); err != nil {
			break
		}
		each(r)
	}
	return cmd.Wait()
}

func (d *demo) showResult(r result) { d.show(r.OK, r.Name, r.Detail, r.Took) }

// throughput downloads for a moment and shows the flow table meanwhile.
func (d *demo) throughput(ctx context.Context) error {
	d.title("mprox flows, while a download runs")
	done := make(chan error, 1)
	var figure result
	go func() { done <- d.client(ctx, "bulk", func(r result) { figure = r }) }()
	c := client.New(d.socket())
	defer c.Close()
	err := until(ctx, "the download in the flow table", func() error {
		flows, err := c.Flows(ctx)
		if err != nil {
			return err
		}
		for _, f := range flows {
			if f.State == "established" && f.BytesDown > 0 && f.Host == originName {
				fmt.Fprintf(d.out, "   %-4s %-22s → %-22s %-14s via %-8s %s\n", f.Network, f.Src, f.Dst, f.Host, f.Upstream, f.State)
				return nil
			}
		}
		return errors.New("not there yet")
	})
	if err := errors.Join(err, <-done); err != nil {
		return err
	}
	d.showResult(figure)
	return nil
}

// kill takes the engine away without warning and lets the programs try again.
func (d *demo) kill(ctx context.Context) error {
	d.title("kill -9 of the engine: the direct way exists, and the guard keeps everybody off it")
	if err := d.engine.Process.Kill(); err != nil {
		return err
	}
	<-d.ended
	if err := d.client(ctx, "blocked", d.showResult); err != nil {
		return err
	}
	err := d.cleanUp()
	d.show(err == nil, "mprox cleanup", "removes what the killed engine left", 0)
	return nil
}

// cleanUp ends the engine if it still runs and removes what it may have left: the namespaces take most of it with them, its cgroup not.
func (d *demo) cleanUp() error {
	if d.clean || d.engine == nil {
		return nil
	}
	d.clean = true
	_ = d.engine.Process.Signal(unix.SIGTERM) // it may have ended
	select {
	case <-d.ended:
	case <-time.After(step):
		_ = d.engine.Process.Kill()
		<-d.ended
	}
	cleanup, err := d.process(d.net.client, "cleanup", "cleanup", "--socket", d.socket(), "--state-dir", d.dir)
	if err != nil {
		return err
	}
	if err := cleanup.Wait(); err != nil {
		log, _ := os.ReadFile(filepath.Join(d.dir, "cleanup.log"))
		return fmt.Errorf("demo: cleanup: %w\n%s", err, log)
	}
	return nil
}

func (d *demo) leaks() {
	packets, leaked := d.capture.Close()
	detail := fmt.Sprintf("%d packets on the client's uplink, all of them to the proxy", packets)
	if len(leaked) > 0 {
		detail = fmt.Sprintf("%d of %d packets went elsewhere: %v", len(leaked), packets, leaked)
	}
	d.title("What a capture on the client's uplink saw, from start to end")
	d.show(len(leaked) == 0 && packets > 0, "nothing leaked", detail, 0)
}

func (d *demo) socket() string { return filepath.Join(d.dir, "mprox.sock") }

func proxyAddr() string { return hostOf(farV4) + ":1080" }

// until repeats try until it succeeds, and says what was waited for when it does not in time.
func until(ctx context.Context, what string, try func() error) error {
	ctx, cancel := context.WithTimeout(ctx, step)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		err := try()
		if err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			if errors.Is(ctx.Err(), context.Canceled) {
				return ctx.Err()
			}
			return fmt.Errorf("demo: %s did not come up in %s: %w", what, step, err)
		}
	}
}

// htons is a number in network byte order, as AF_PACKET wants its protocol.
func htons(v uint16) uint16 { return v<<8 | v>>8 }
