// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/mutex-proxy/mutex/control/client"
)

func newFlowsCommand(g *globals) *cobra.Command {
	var watch bool
	cmd := &cobra.Command{
		Use:   "flows",
		Short: "List the live flows, or watch them start and end",
		Long: `Lists the live flows: TCP connections, UDP associations towards one destination, ICMP echo exchanges. With --watch it goes on, one line
when a flow starts and one when it ends, until Ctrl-C; with -o json each line is a JSON object.`,
		Example: examples("mprox flows", "mprox flows -o json | jq '.[] | select(.bytes_down > 1e6)'", "mprox flows --watch", "mprox flows kill 42"),
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if watch {
				return watchFlows(cmd, g)
			}
			return g.ask(cmd, callTimeout, func(ctx context.Context, c *client.Client) error {
				list, err := c.Flows(ctx)
				if err != nil {
					return err
				}
				return show(g, cmd.OutOrStdout(), list, flowTable)
			})
		},
	}
	cmd.Flags().BoolVar(&watch, "watch", false, "go on, and print each flow when it starts and when it ends")
	cmd.AddCommand(newFlowsKillCommand(g))
	return cmd
}

func newFlowsKillCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:     "kill ID...",
		Short:   "End flows with a reset",
		Example: examples("mprox flows kill 42", "mprox flows kill 42 43"),
		Args:    cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ids := make([]uint64, len(args))
			for i, a := range args {
				id, err := strconv.ParseUint(a, 10, 64)
				if err != nil || id == 0 {
					return usageError("%q is not the ID of a flow", a)
				}
				ids[i] = id
			}
			return g.ask(cmd, callTimeout, func(ctx context.Context, c *client.Client) error {
				var errs []error
				for _, id := range ids {
					if err := c.KillFlow(ctx, id); err != nil {
						errs = append(errs, err)
					}
				}
				return errors.Join(errs...)
			})
		},
	}
}

func flowTable(list []client.Flow) *table {
	t := &table{head: []string{"ID", "CONTEXT", "NET", "SOURCE", "DESTINATION", "UPSTREAM", "RULE", "STATE", "AGE", "UP", "DOWN", "ERROR"}}
	for _, f := range list {
		age := cell{text: span(f.DurationSeconds), right: true}
		t.add(number(f.ID), text(f.Context), text(f.Network), text(f.Src), text(destination(&f)), orDash(f.Upstream), orDash(f.Rule),
			text(f.State), age, bytesCell(f.BytesUp), bytesCell(f.BytesDown), orDash(f.Error))
	}
	return t
}

// destination is the name, where there is one, with the port.
func destination(f *client.Flow) string {
	if f.Host == "" {
		return f.Dst
	}
	port := ""
	for i := len(f.Dst) - 1; i >= 0; i-- {
		if f.Dst[i] == ':' {
			port = f.Dst[i:]
			break
		}
	}
	return f.Host + port
}

// watchFlows prints until Ctrl-C, which is a good end.
func watchFlows(cmd *cobra.Command, g *globals) error {
	if g.output == "csv" {
		return usageError("--watch prints a table or, with -o json, JSON lines; not csv")
	}
	return g.watch(cmd, func(ctx context.Context, c *client.Client) error {
		return printFlows(cmd.OutOrStdout(), c.WatchFlows(ctx), g.output == "json")
	})
}

func printFlows(w io.Writer, flows iter.Seq2[client.Flow, error], asJSON bool) error {
	for f, err := range flows {
		switch {
		case err != nil && errors.Is(err, context.Canceled):
			return nil
		case err != nil:
			return err
		case asJSON:
			err = json.NewEncoder(w).Encode(f)
		default:
			_, err = fmt.Fprintln(w, flowLine(&f))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// flowLine is one line of --watch: columns of a table would have to be known before the flows are.
func flowLine(f *client.Flow) string {
	at := f.Start
	if f.State == "closed" {
		at = at.Add(time.Duration(f.DurationSeconds * float64(time.Second)))
	}
	line := fmt.Sprintf("%s %-11s #%d %s %s %s > %s via %s (%s)", at.Local().Format("15:04:05.000"), f.State, f.ID, f.Context, f.Network,
		f.Src, destination(f), orDash(f.Upstream).text, orDash(f.Rule).text)
	if f.State == "closed" {
		line += fmt.Sprintf(" up %s down %s in %s", size(f.BytesUp), size(f.BytesDown), span(f.DurationSeconds))
	}
	if f.Error != "" {
		line += ": " + f.Error
	}
	return printable(line)
}
