// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/mutex-proxy/mutex/cmd/mprox/daemon"
	"github.com/mutex-proxy/mutex/config"
	"github.com/mutex-proxy/mutex/control/client"
)

func newExplainCommand(g *globals) *cobra.Command {
	var r client.ExplainRequest
	var uid, gid int64
	cmd := &cobra.Command{
		Use:   "explain tcp|udp HOST:PORT",
		Short: "Say which rule decides about a flow, and why",
		Long: `Tries the rules on a flow that need not exist, and prints each condition with the reason why it did or did not match, the upstream, the
member of the pool that would be tried first, and the way through the kernel.

Without --context it is the context that would capture the process given by --pid, or described by --uid, --gid, --exe and --cgroup: those with
selectors first, by name, then the global one; what is not given, no selector matches. Where none captures it, it goes directly.

It asks the running daemon; with --config FILE it asks that file instead, which need not be in force.`,
		Example: examples("mprox explain tcp example.com:443", "mprox explain tcp example.com:443 --uid 1000", "mprox explain udp 192.0.2.7:53 --context work --uid 1000",
			"mprox explain tcp example.com:443 --config ./candidate.json -o json"),
		Args:      cobra.ExactArgs(2),
		ValidArgs: []string{"tcp", "udp"},
		RunE: func(cmd *cobra.Command, args []string) error {
			r.Network, r.Dest = args[0], args[1]
			if r.Network != "tcp" && r.Network != "udp" {
				return usageError("%q is neither tcp nor udp", r.Network)
			}
			if cmd.Flags().Changed("uid") {
				r.UID = &uid
			}
			if cmd.Flags().Changed("gid") {
				r.GID = &gid
			}
			e, err := explain(cmd, g, r)
			if err != nil {
				return err
			}
			switch g.output {
			case "json":
				return writeJSON(cmd.OutOrStdout(), e)
			case "csv":
				return writeCSV(cmd.OutOrStdout(), e.Conditions)
			}
			return writeExplanation(cmd.OutOrStdout(), &r, &e)
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&r.Context, "context", "", "`name` of the context (default: the one that captures the process)")
	g.completeContextFlag(cmd)
	fl.Int64Var(&uid, "uid", 0, "user `id` of the process")
	fl.Int64Var(&gid, "gid", 0, "group `id` of the process")
	fl.IntVar(&r.PID, "pid", 0, "`id` of the process")
	fl.StringVar(&r.Exe, "exe", "", "`path` of the program")
	fl.StringVar(&r.Cgroup, "cgroup", "", "`path` of the cgroup")
	fl.StringVar(&r.Protocol, "protocol", "", "`protocol` as detection would name it")
	fl.StringVar(&r.SNI, "sni", "", "`name` in the TLS handshake")
	return cmd
}

// explain asks the file given by -c, else the daemon.
func explain(cmd *cobra.Command, g *globals, r client.ExplainRequest) (e client.Explanation, err error) {
	if g.configGiven {
		cfg, err := config.Load(g.config, "")
		if err != nil {
			return e, err
		}
		return daemon.Explain(cfg, r)
	}
	err = g.ask(cmd, callTimeout, func(ctx context.Context, c *client.Client) error {
		e, err = c.Explain(ctx, r)
		return err
	})
	return e, err
}

func writeExplanation(w io.Writer, r *client.ExplainRequest, e *client.Explanation) error {
	target := e.Upstream
	if target == "" {
		target = "nothing: it is blocked"
	}
	if e.Member != "" && e.Member != e.Upstream {
		target += " (" + e.Member + " first)"
	}
	if e.Rule == daemon.NotCaptured {
		fmt.Fprintf(w, "%s %s goes directly: %s\n", r.Network, printable(r.Dest), e.Rule)
	} else {
		fmt.Fprintf(w, "%s %s goes to %s by %s\n", r.Network, printable(r.Dest), printable(target), printable(e.Rule))
	}
	if e.NameSource != "" {
		fmt.Fprintf(w, "name    %s\n", printable(e.NameSource))
	}
	if e.Kernel.Device != "" {
		fmt.Fprintf(w, "kernel  mark %s, table %d, device %s\n", orDash(e.Kernel.Mark).text, e.Kernel.Table, printable(e.Kernel.Device))
	}
	if len(e.Conditions) == 0 {
		return nil
	}
	fmt.Fprintln(w)
	t := &table{head: []string{"RULE", "KEY", "VALUE", "MATCH", "REASON"}}
	for _, c := range e.Conditions {
		t.add(text(c.Rule), orDash(c.Key), orDash(c.Value), yesNo(c.Result), orDash(c.Reason))
	}
	return t.write(w)
}
