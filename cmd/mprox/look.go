// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/mutex-proxy/mutex/control/client"
)

func newStatusCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "Show what the daemon does: contexts, upstreams, guard, DNS",
		Long: `Shows the running daemon. Callers who are neither root nor in the control group see only the contexts of their own leases.

With -o csv the counters are printed as "mprox stats --format csv" prints them.`,
		Example: examples("mprox status", "mprox status -o json | jq '.upstreams[] | select(.up | not)'"),
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return g.ask(cmd, callTimeout, func(ctx context.Context, c *client.Client) error {
				if g.output == "csv" {
					return copyCSV(ctx, c, cmd.OutOrStdout())
				}
				st, err := c.Status(ctx)
				if err != nil {
					return err
				}
				if g.output == "json" {
					return writeJSON(cmd.OutOrStdout(), st)
				}
				return writeStatus(cmd.OutOrStdout(), &st)
			})
		},
	}
}

func copyCSV(ctx context.Context, c *client.Client, w io.Writer) error {
	data, err := c.StatsCSV(ctx)
	if err != nil {
		return err
	}
	_, err = w.Write(data)
	return err
}

func writeStatus(w io.Writer, st *client.Status) error {
	fmt.Fprintf(w, "mprox %s, pid %d, up %s\n", printable(st.Version), st.PID, span(st.UptimeSeconds))
	// No path means flags, or a caller who is not told.
	fmt.Fprintf(w, "config  %s, generation %d, loaded %s\n", orDash(st.Config.Path).text, st.Config.Generation, st.Config.LoadedAt.UTC().Format(time.DateTime+" UTC"))
	guard := "NOT ACTIVE"
	if st.Guard.Active {
		guard = "active"
	}
	fmt.Fprintf(w, "guard   %s, %d packets kept in\n", guard, st.Guard.DroppedPackets)
	if g := st.Guard; g.Marking != "" {
		line := g.Marking
		if g.MarkingReason != "" {
			line += ": " + g.MarkingReason
		}
		if g.SelectionFull {
			line += fmt.Sprintf("; FULL: %d sockets denied to processes that could not be followed", g.SelectionDenied)
		}
		fmt.Fprintf(w, "select  %s\n", line)
	}
	fmt.Fprintf(w, "dns     %d queries, %d from cache, %d blocked, %d failed\n", st.DNS.Queries, st.DNS.CacheHits, st.DNS.Blocked, st.DNS.Failures)
	if len(st.Contexts) > 0 {
		fmt.Fprintln(w)
		if err := contextTable(st.Contexts).write(w); err != nil {
			return err
		}
	}
	if len(st.Upstreams) > 0 {
		fmt.Fprintln(w)
		return upstreamTable(st.Upstreams).write(w)
	}
	return nil
}

func contextTable(list []client.ContextStatus) *table {
	t := &table{head: []string{"CONTEXT", "MODE", "ENABLED", "LEASE", "TUN", "DEFAULT", "FLOWS", "TOTAL", "UP", "DOWN", "DROPPED"}}
	for _, c := range list {
		lease := "-"
		if c.Lease {
			lease = "yes"
		}
		t.add(text(c.Name), text(c.Mode), yesNo(c.Enabled), text(lease), orDash(c.TUN), orDash(c.Default),
			number(c.FlowsActive), number(c.FlowsTotal), bytesCell(c.BytesUp), bytesCell(c.BytesDown), number(c.PacketsDropped))
	}
	return t
}

// upstreamTable shows what is known of upstreams. An answer without states, that of status, says nothing of how they authenticate either.
func upstreamTable(list []client.UpstreamStatus) *table {
	whole := slices.ContainsFunc(list, func(u client.UpstreamStatus) bool { return u.State != "" })
	t := &table{head: []string{"UPSTREAM", "UP", "LATENCY", "ACTIVE", "TOTAL", "ERRORS", "UDP", "IPV6", "NAMES", "BIND"}}
	if whole {
		t.head = append(t.head, "AUTH")
	}
	t.head = append(t.head, "URL")
	for _, u := range list {
		latency := cell{text: "-", right: true}
		if u.LatencySeconds > 0 {
			latency.text = span(u.LatencySeconds)
		}
		up := yesNo(u.Up)
		if u.State != "" && u.State != "enabled" {
			up.text += ", " + u.State
		}
		row := []cell{
			text(u.Name), up, latency, number(u.Active), number(u.Total), number(u.Errors),
			text(u.UDP), text(u.IPv6), text(u.RemoteDNS), text(u.Bind),
		}
		if whole {
			row = append(row, orDash(strings.Join(u.Auth, ",")))
		}
		t.add(append(row, text(u.URL))...)
	}
	return t
}

func newStatsCommand(g *globals) *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use:     "stats",
		Short:   "Print the counters of the moment, for machines",
		Long:    "Prints totals and the counters of each context and upstream. CSV has the columns scope,name,metric,value.",
		Example: examples("mprox stats", "mprox stats --format csv >> /var/log/mprox-stats.csv"),
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !cmd.Flags().Changed("format") && g.output == "csv" {
				format = "csv"
			}
			if format != "json" && format != "csv" {
				return usageError("--format %q is neither json nor csv", format)
			}
			return g.ask(cmd, callTimeout, func(ctx context.Context, c *client.Client) error {
				if format == "csv" {
					return copyCSV(ctx, c, cmd.OutOrStdout())
				}
				st, err := c.Stats(ctx)
				if err != nil {
					return err
				}
				return writeJSON(cmd.OutOrStdout(), st)
			})
		},
	}
	cmd.Flags().StringVar(&format, "format", "json", "`format`: json, csv")
	return cmd
}
