// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/control/client"
)

// healthLimit keeps the whole command, with its start, below the 2 s that are promised.
const healthLimit = 1800 * time.Millisecond

func newHealthcheckCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "healthcheck",
		Short: "Exit 0 if the daemon is healthy, within two seconds",
		Long: `Asks the daemon whether everything that must hold does: devices, guard, upstreams. Exit code 7 means that something does not, or that there
was no answer in time; 5 that there is no daemon. Made for HEALTHCHECK of a container and for scripts.`,
		Example: examples("mprox healthcheck", "mprox healthcheck -o json", "HEALTHCHECK --interval=10s --timeout=3s CMD [\"mprox\", \"healthcheck\"]"),
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return g.ask(cmd, healthLimit, func(ctx context.Context, c *client.Client) error {
				h, err := c.Health(ctx)
				switch {
				case errors.Is(err, context.DeadlineExceeded), errors.Is(err, unix.EAGAIN): // or it has not taken calls for long
					return exitError{exitCheck, fmt.Errorf("the daemon has not answered within %s", healthLimit)}
				case err != nil:
					return err
				case g.output == "json":
					err = writeJSON(cmd.OutOrStdout(), h)
				case g.output == "csv":
					err = writeCSV(cmd.OutOrStdout(), h.Checks)
				default:
					err = checkTable(h.Checks).write(cmd.OutOrStdout())
				}
				if err == nil && !h.Healthy {
					err = exitError{exitCheck, fmt.Errorf("not healthy: %s", failing(h.Checks))}
				}
				return err
			})
		},
	}
}

func checkTable(list []client.Check) *table {
	t := &table{head: []string{"CHECK", "OK", "MESSAGE"}}
	for _, c := range list {
		t.add(text(c.Name), yesNo(c.OK), orDash(c.Message))
	}
	return t
}

// failing names what is wrong in one line.
func failing(list []client.Check) string {
	var parts []string
	for _, c := range list {
		if !c.OK {
			parts = append(parts, c.Name+": "+c.Message)
		}
	}
	if len(parts) == 0 {
		return "the daemon has not finished starting, or its checks are not shown to this user"
	}
	return strings.Join(parts, ", ")
}
