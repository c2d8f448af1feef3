// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"context"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/mutex-proxy/mutex/control/client"
)

// selectorFlags say who is meant, as one entry of a context's select does.
type selectorFlags struct {
	pid    []int
	scope  string
	cgroup []string
	unit   []string
	uid    []string
	gid    []uint
	exe    []string

	containers []string
}

func (f *selectorFlags) register(fl *pflag.FlagSet) {
	fl.IntSliceVar(&f.pid, "pid", nil, "`process` by its ID")
	fl.StringVar(&f.scope, "scope", "", "with --pid and --exe: current or tree (default); with --pid also session or group")
	fl.StringArrayVar(&f.cgroup, "cgroup", nil, "`path` of a cgroup below the cgroup v2 mount, with all below it")
	fl.StringArrayVar(&f.unit, "unit", nil, "systemd `unit`; wildcards * ? [a-z]")
	fl.StringSliceVar(&f.uid, "uid", nil, "`user` by number, or by name")
	fl.UintSliceVar(&f.gid, "gid", nil, "`group` by number")
	fl.StringArrayVar(&f.exe, "exe", nil, "absolute `path` of an executable")
	fl.StringArrayVar(&f.containers, "container", nil, "`container` by name or ID, or the number of a process in it, with all that shares its network; alone")
}

// given reports whether anybody is named.
func (f *selectorFlags) given(cmd *cobra.Command) bool {
	for _, name := range []string{"pid", "cgroup", "unit", "uid", "gid", "exe", "container"} {
		if cmd.Flags().Changed(name) {
			return true
		}
	}
	return false
}

func (f *selectorFlags) selector(*cobra.Command) client.Selector {
	s := client.Selector{PID: f.pid, Scope: f.scope, Cgroup: f.cgroup, Unit: f.unit, Exe: f.exe, Container: f.containers}
	s.UID, s.User = parseIDs(f.uid)
	for _, g := range f.gid {
		s.GID = append(s.GID, uint32(g))
	}
	return s
}

func newAttachCommand(g *globals) *cobra.Command {
	return selectorCommand(g, &cobra.Command{
		Use:   "attach --context NAME (--pid N [--scope current|tree|session|group] | --cgroup PATH | --unit NAME | --uid N | --gid N | --exe PATH | --container NAME|PID)",
		Short: "Capture what already runs, from its next connection on",
		Long: `Adds a selector to a context of the running daemon: whoever matches it is captured from the next connection on. Connections that are
there already stay as they are; with "existing": "reset" in the context they are reset, and made anew through it. It lasts until detach or the
daemon's end, and survives a reload.

With --container everything in the network namespace of a container (Docker, Podman) is captured, by a device inside it; also when it is started again
under that name, as soon as its runtime says so. The upstream is dialled from the daemon's own network. The daemon finds the runtime by DOCKER_HOST.`,
		Example: examples("mprox attach --context work --pid 4242", "mprox attach --context work --unit nginx", "mprox attach --context work --uid alice --exe /usr/bin/curl",
			"mprox attach --context work --container web"),
	}, (*client.Client).Attach)
}

func newDetachCommand(g *globals) *cobra.Command {
	return selectorCommand(g, &cobra.Command{
		Use:     "detach --context NAME (--pid N | --cgroup PATH | --unit NAME | --uid N | --gid N | --exe PATH | --container NAME|PID)",
		Short:   "Let go what was attached to a context, from its next connection on",
		Long:    `Takes a selector out of a context: one that was attached, or one of the configuration, given in the same words.`,
		Example: examples("mprox detach --context work --pid 4242"),
	}, (*client.Client).Detach)
}

func selectorCommand(g *globals, cmd *cobra.Command, call func(*client.Client, context.Context, string, client.Selector) error) *cobra.Command {
	var f selectorFlags
	var name string
	cmd.Args = cobra.NoArgs
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if name == "" || !f.given(cmd) {
			return usageError("give --context NAME and who is meant, such as --pid N")
		}
		return g.ask(cmd, changeTimeout, func(ctx context.Context, c *client.Client) error { return call(c, ctx, name, f.selector(cmd)) })
	}
	cmd.Flags().StringVar(&name, "context", "", "`name` of the context")
	g.completeContextFlag(cmd)
	f.register(cmd.Flags())
	return cmd
}
