// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strconv"

	"github.com/spf13/cobra"
	"github.com/tailscale/hujson"

	"github.com/mutex-proxy/mutex/control/client"
)

func newContextsCommand(g *globals) *cobra.Command {
	var of int
	cmd := &cobra.Command{
		Use:   "contexts",
		Short: "List the contexts, add, remove and switch them, ask who captures a process",
		Long: `Lists the contexts: who is captured, and how much they have moved. With --of PID says which context the next connection of that process
belongs to, and why. Contexts are asked in this order: leases, then those with selectors by name, then the global one.

What add, rm, enable and disable change is in force at once, survives a reload, and ends with the daemon: the configuration file stays as it is.`,
		Example: examples("mprox contexts", "mprox contexts --of 4242", "mprox contexts add work --proxy socks5h://192.0.2.10:1080 --uid 1000", "mprox contexts disable work"),
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return g.ask(cmd, callTimeout, func(ctx context.Context, c *client.Client) error {
				if cmd.Flags().Changed("of") {
					return showCapture(ctx, c, g, cmd.OutOrStdout(), of)
				}
				list, err := c.Contexts(ctx)
				if err != nil {
					return err
				}
				return show(g, cmd.OutOrStdout(), list, contextTable)
			})
		},
	}
	cmd.Flags().IntVar(&of, "of", 0, "say which context captures the process with this `PID`, and why")
	simple := func(use, short string, call func(context.Context, *client.Client, string) error) *cobra.Command {
		return &cobra.Command{
			Use: use + " NAME", Short: short, Args: cobra.ExactArgs(1), ValidArgsFunction: firstOnly(g.completeContext()), Example: examples("mprox contexts " + use + " work"),
			RunE: func(cmd *cobra.Command, args []string) error {
				return g.ask(cmd, changeTimeout, func(ctx context.Context, c *client.Client) error { return call(ctx, c, args[0]) })
			},
		}
	}
	cmd.AddCommand(
		newContextsAddCommand(g),
		simple("rm", "End a context and its flows", func(ctx context.Context, c *client.Client, n string) error { return c.RemoveContext(ctx, n) }),
		simple("enable", "Let a context capture again", func(ctx context.Context, c *client.Client, n string) error { return c.EnableContext(ctx, n) }),
		simple("disable", "End a context's flows and capture nobody for it", func(ctx context.Context, c *client.Client, n string) error { return c.DisableContext(ctx, n) }),
	)
	return cmd
}

func showCapture(ctx context.Context, c *client.Client, g *globals, w io.Writer, pid int) error {
	got, err := c.Process(ctx, pid)
	if err != nil {
		return err
	}
	switch g.output {
	case "json":
		return writeJSON(w, got)
	case "csv":
		return writeCSV(w, got.Verdicts)
	}
	where := "is not captured"
	if got.Context != "" {
		where = "belongs to " + got.Context
	}
	fmt.Fprintf(w, "process %d (%s) %s: %s\n", got.PID, printable(got.Name), printable(where), printable(got.Reason))
	if len(got.Verdicts) == 0 {
		return nil
	}
	fmt.Fprintln(w)
	t := &table{head: []string{"CONTEXT", "MATCH", "REASON"}}
	for _, v := range got.Verdicts {
		t.add(text(v.Context), yesNo(v.Matched), text(v.Reason))
	}
	return t.write(w)
}

// contextFlags are what the command line can say of a new context.
type contextFlags struct {
	selectorFlags
	request  client.ContextRequest
	file     string
	mode     string
	upstream string
	existing string
	dns      []string
	bypass   []string
}

func newContextsAddCommand(g *globals) *cobra.Command {
	var f contextFlags
	cmd := &cobra.Command{
		Use:   "add NAME (--proxy URL... | --default UPSTREAM | --file FILE)",
		Short: "Add a context to the running daemon",
		Long: `Adds a context that lives until it is removed or the daemon ends. --file holds what would stand at contexts.NAME of a configuration file;
the flags lie on top of it. Without a selector and without --mode the context captures nobody until something is attached to it.`,
		Example: examples("mprox contexts add work --proxy socks5h://192.0.2.10:1080 --uid 1000", "mprox contexts add ci --default eu --unit 'build-*.service'",
			"mprox contexts add lab --file lab.json"),
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			f.request.Name = args[0]
			if err := f.build(cmd); err != nil {
				return err
			}
			return g.ask(cmd, changeTimeout, func(ctx context.Context, c *client.Client) error {
				st, err := c.AddContext(ctx, f.request)
				if err != nil {
					return err
				}
				return show(g, cmd.OutOrStdout(), []client.ContextStatus{st}, contextTable)
			})
		},
	}
	fl := cmd.Flags()
	fl.StringArrayVar(&f.request.Proxies, "proxy", nil, "proxy `URL`; repeated, the proxies are a pool")
	fl.StringVar(&f.request.Strategy, "strategy", "", "how a proxy of the pool is chosen: round-robin, failover")
	fl.StringVar(&f.upstream, "default", "", "`upstream` or pool of the configuration, in the place of --proxy")
	fl.StringVar(&f.file, "file", "", "`file` with the context, as at contexts.NAME of a configuration (- = standard input)")
	fl.StringVar(&f.mode, "mode", "", "who is captured: process, cgroup, global, gateway, disabled (default process)")
	fl.StringVar(&f.existing, "existing", "", "connections older than the capture: keep, reset")
	fl.StringArrayVar(&f.dns, "dns", nil, "DNS `server` asked through the proxy; repeatable")
	fl.StringArrayVar(&f.bypass, "bypass", nil, "address, prefix or class that stays direct; repeatable")
	f.register(fl)
	return cmd
}

// build makes the request of file and flags.
func (f *contextFlags) build(cmd *cobra.Command) error {
	doc := map[string]any{}
	if f.file != "" {
		var data []byte
		var err error
		if f.file == "-" {
			data, err = io.ReadAll(io.LimitReader(cmd.InOrStdin(), maxContextFile))
		} else {
			data, err = os.ReadFile(f.file)
		}
		if err != nil {
			return err
		}
		if data, err = hujson.Standardize(data); err != nil {
			return exitError{exitConfig, fmt.Errorf("%s: %w", f.file, err)}
		}
		if err := json.Unmarshal(data, &doc); err != nil {
			return exitError{exitConfig, fmt.Errorf("%s: %w", f.file, err)}
		}
	}
	set := func(key string, value any, given bool) {
		if given {
			doc[key] = value
		}
	}
	s := f.selector(cmd)
	set("select", []client.Selector{s}, f.given(cmd))
	set("default", f.upstream, f.upstream != "")
	set("existing", f.existing, f.existing != "")
	set("dns", map[string]any{"servers": f.dns}, len(f.dns) > 0)
	set("bypass", map[string]any{"address": f.bypass}, len(f.bypass) > 0)
	if _, said := doc["mode"]; f.mode != "" || !said {
		doc["mode"] = "process"
		set("mode", f.mode, f.mode != "")
	}
	if len(f.request.Proxies) == 0 && doc["default"] == nil {
		return usageError("give --proxy URL, --default UPSTREAM, or a --file that names one")
	}
	var err error
	f.request.Context, err = json.Marshal(doc)
	return err
}

// maxContextFile is more than the daemon takes, which then says so.
const maxContextFile = 1 << 20

// parseIDs reads numbers that may be users or groups.
func parseIDs(list []string) (ids []uint32, names []string) {
	for _, s := range list {
		if n, err := strconv.ParseUint(s, 10, 32); err == nil {
			ids = append(ids, uint32(n))
		} else {
			names = append(names, s)
		}
	}
	return ids, names
}
