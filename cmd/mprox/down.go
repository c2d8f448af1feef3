// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"github.com/mutex-proxy/mutex/config"
	"github.com/mutex-proxy/mutex/control/client"
	"github.com/mutex-proxy/mutex/policy"
)

func newDownCommand(g *globals) *cobra.Command {
	var closed bool
	cmd := &cobra.Command{
		Use:   "down",
		Short: "Stop the daemon and undo everything",
		Long: `Stops the daemon and returns when it has undone what it had changed on this machine, save what on_stop: block keeps. Where no daemon runs it
removes whatever a crash has left behind, as "mprox cleanup" does. A daemon that hangs, and so gives no sign of life for 5 seconds, is killed, and
cleaned up after in the same way; one that answers and takes long to stop is not. With --keep-closed everything captured stays blocked until the
next "mprox up", for an upgrade, and nothing is killed.

A service manager may start a killed daemon again: stop the service there.`,
		Example: examples("sudo mprox down", "sudo mprox down --keep-closed && install mprox /usr/local/bin/ && sudo mprox up"),
		Args:    cobra.NoArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return takeDown(cmd, g, closed) },
	}
	cmd.Flags().BoolVar(&closed, "keep-closed", false, "leave what is captured blocked, whatever on_stop says")
	return cmd
}

func newCleanupCommand(g *globals) *cobra.Command {
	var survivors bool
	cmd := &cobra.Command{
		Use:   "cleanup",
		Short: "Remove what a crashed daemon has left behind",
		Long: `Removes, without a daemon, the rules, routes, nftables, cgroups and settings that a killed daemon has left in this network namespace, and so
lets the traffic it had captured go again. Does nothing to an instance whose daemon lives. It is what ExecStopPost= of a service runs.`,
		Example: examples("sudo mprox cleanup", "sudo mprox cleanup --socket /run/mprox/other.sock"),
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if survivors {
				return cleanupAfterSurvivors(cmd.Context(), policy.InstanceFor(g.socketPath()))
			}
			return cleanupAll(cmd, g)
		},
	}
	cmd.Flags().BoolVar(&survivors, "survivors", false, "wait until the last captured process has ended, then clean up after this instance alone")
	return cmd
}

// cleanupAfterSurvivors is what an ended `mprox run` leaves behind when its command has left processes behind.
func cleanupAfterSurvivors(ctx context.Context, in policy.Instance) error {
	host, err := policy.NewLinuxHost()
	if err != nil {
		return err
	}
	cfg := policy.Config{Host: host}
	err = policy.WaitSurvivors(ctx, cfg, in)
	if err == nil {
		_, err = policy.Cleanup(ctx, cfg, in)
	}
	return errors.Join(err, host.Close())
}

// cleanupAll cleans up after the instance of the socket, and after the engines of `mprox run` beside it.
func cleanupAll(cmd *cobra.Command, g *globals) error {
	log, err := g.logger(config.Log{Level: "warn", Format: "text"})
	if err != nil {
		return err
	}
	socket, err := g.instance()
	if err != nil {
		return err
	}
	var errs []error
	for _, in := range slices.Concat([]policy.Instance{policy.InstanceFor(socket)}, policy.ContainersOf(socket), runsBeside(socket)) {
		r, err := g.cleanup(cmd.Context(), in)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		printReport(cmd.OutOrStdout(), in, r)
		if r.Skipped == "" {
			removeDeadSocket(cmd.Context(), in.Socket, log)
		}
	}
	return errors.Join(errs...)
}

func cleanupInstance(ctx context.Context, in policy.Instance) (policy.Report, error) {
	host, err := policy.HostFor(in)
	if errors.Is(err, fs.ErrNotExist) {
		return policy.Report{Removed: []string{"journal of a container that is gone"}}, nil
	}
	if err != nil {
		return policy.Report{}, err
	}
	r, err := policy.Cleanup(ctx, policy.Config{Host: host}, in)
	return r, errors.Join(err, host.Close())
}

// runsBeside finds the engines of `mprox run` that have left a journal or a socket in the socket's directory.
func runsBeside(socket string) []policy.Instance {
	dir := filepath.Dir(socket)
	names := make(map[string]struct{})
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil // no directory, no runs
	}
	for _, e := range entries {
		name, isSocket := strings.CutSuffix(e.Name(), ".sock")
		name, isJournal := strings.CutSuffix(name, ".state.json")
		if strings.HasPrefix(name, "run-") && (isSocket || isJournal) {
			names[name] = struct{}{}
		}
	}
	var list []policy.Instance
	for name := range names {
		if path := filepath.Join(dir, name+".sock"); path != socket {
			list = append(list, policy.InstanceFor(path))
		}
	}
	slices.SortFunc(list, func(a, b policy.Instance) int { return strings.Compare(a.Socket, b.Socket) })
	return list
}

func printReport(w io.Writer, in policy.Instance, r policy.Report) {
	if r.Skipped != "" {
		fmt.Fprintf(w, "%s: nothing done: %s\n", printable(in.Socket), printable(r.Skipped))
		return
	}
	for _, line := range r.Removed {
		fmt.Fprintln(w, "removed", printable(line))
	}
}

// removeDeadSocket removes the socket of an instance that has just been found dead.
func removeDeadSocket(ctx context.Context, socket string, log *zap.Logger) {
	c := client.New(socket)
	defer c.Close()
	if _, err := c.Status(ctx); !errors.Is(err, client.ErrUnreachable) {
		return
	}
	if info, err := os.Lstat(socket); err != nil || info.Mode().Type() != fs.ModeSocket {
		return
	}
	if err := os.Remove(socket); err != nil && !errors.Is(err, fs.ErrNotExist) {
		log.Warn("the dead daemon's socket stays", zap.Error(err))
	}
}
