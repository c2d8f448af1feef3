// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/mutex-proxy/mutex/control/client"
)

// appsEvery is how often --watch looks.
const appsEvery = time.Second

func newAppsCommand(g *globals) *cobra.Command {
	var watch bool
	cmd := &cobra.Command{
		Use:   "apps",
		Short: "List the processes that have flows, with their bytes",
		Long: `Lists the processes behind the live flows, the busiest first. With --watch it goes on, once a second, until Ctrl-C; with -o json each line is
then a JSON array.`,
		Example: examples("mprox apps", "mprox apps --watch"),
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if watch {
				return watchApps(cmd, g)
			}
			return g.ask(cmd, callTimeout, func(ctx context.Context, c *client.Client) error {
				list, err := c.Apps(ctx)
				if err != nil {
					return err
				}
				return show(g, cmd.OutOrStdout(), list, appTable)
			})
		},
	}
	cmd.Flags().BoolVar(&watch, "watch", false, "go on, once a second")
	return cmd
}

func appTable(list []client.AppUsage) *table {
	t := &table{head: []string{"PID", "UID", "EXE", "CGROUP", "METHOD", "FLOWS", "UP", "DOWN"}}
	for _, a := range list {
		pid, uid := cell{text: "-", right: true}, cell{text: "-", right: true}
		if a.App.PID != 0 {
			pid.text = fmt.Sprint(a.App.PID)
		}
		if a.App.UID >= 0 {
			uid.text = fmt.Sprint(a.App.UID)
		}
		t.add(pid, uid, orDash(a.App.Exe), orDash(a.App.Cgroup), orDash(a.App.Method), number(a.Flows), bytesCell(a.BytesUp), bytesCell(a.BytesDown))
	}
	return t
}

// watchApps prints until Ctrl-C, which is a good end.
func watchApps(cmd *cobra.Command, g *globals) error {
	if g.output == "csv" {
		return usageError("--watch prints tables or, with -o json, JSON lines; not csv")
	}
	return g.watch(cmd, func(ctx context.Context, c *client.Client) error {
		tick := time.NewTicker(appsEvery)
		defer tick.Stop()
		for {
			list, err := c.Apps(ctx)
			if ctx.Err() != nil {
				return nil
			}
			if err == nil {
				err = printApps(cmd.OutOrStdout(), list, g.output == "json")
			}
			if err != nil {
				return err
			}
			select {
			case <-ctx.Done():
				return nil
			case <-tick.C:
			}
		}
	})
}

func printApps(w io.Writer, list []client.AppUsage, asJSON bool) error {
	if asJSON {
		return json.NewEncoder(w).Encode(list)
	}
	if _, err := fmt.Fprintln(w, time.Now().Format(time.TimeOnly)); err != nil {
		return err
	}
	return appTable(list).write(w)
}
