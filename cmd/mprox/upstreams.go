// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/mutex-proxy/mutex/control/client"
	"github.com/mutex-proxy/mutex/dialers"
)

// testTimeout is a little longer than what the daemon allows itself for a test.
const testTimeout = 35 * time.Second

func newUpstreamsCommand(g *globals) *cobra.Command {
	list := func(cmd *cobra.Command, _ []string) error {
		return g.ask(cmd, callTimeout, func(ctx context.Context, c *client.Client) error {
			list, err := c.Upstreams(ctx)
			if err != nil {
				return err
			}
			return show(g, cmd.OutOrStdout(), list, upstreamTable)
		})
	}
	cmd := &cobra.Command{
		Use:   "upstreams",
		Short: "List, test and switch the upstreams",
		Long: `Lists the upstreams and pools: whether they work, how fast, and what they carry. The subcommands test one, and decide whether it takes flows;
what they decide holds until the daemon stops or the upstream's configuration changes.`,
		Example: examples("mprox upstreams", "mprox upstreams list -o json", "mprox upstreams test paris", "mprox upstreams drain paris"),
		Args:    cobra.NoArgs,
		RunE:    list,
	}
	cmd.AddCommand(&cobra.Command{
		Use:     "list",
		Short:   "List the upstreams",
		Example: examples("mprox upstreams list"),
		Args:    cobra.NoArgs,
		RunE:    list,
	})
	cmd.AddCommand(newUpstreamTestCommand(g))
	for _, s := range []struct {
		name, short string
		do          func(*client.Client, context.Context, string) error
	}{
		{"enable", "Let an upstream or a pool take flows again", (*client.Client).EnableUpstream},
		{"disable", "Give an upstream or a pool nothing new, and end its flows", (*client.Client).DisableUpstream},
		{"drain", "Give an upstream or a pool nothing new, and let its flows finish", (*client.Client).DrainUpstream},
	} {
		cmd.AddCommand(&cobra.Command{
			Use:     s.name + " NAME",
			Short:   s.short,
			Example: examples("mprox upstreams " + s.name + " paris"),
			Args:    cobra.ExactArgs(1),

			ValidArgsFunction: g.completeUpstream(),
			RunE: func(cmd *cobra.Command, args []string) error {
				return g.ask(cmd, callTimeout, func(ctx context.Context, c *client.Client) error { return s.do(c, ctx, args[0]) })
			},
		})
	}
	return cmd
}

func newUpstreamTestCommand(g *globals) *cobra.Command {
	var target string
	cmd := &cobra.Command{
		Use:   "test NAME",
		Short: "Go through a connection step by step: what took how long, and what the server said",
		Long: `Opens a connection to the target through an upstream, or through each member of a pool, and closes it. Each step is shown with its time and what
the server said. What is disabled or drained can be tested too. Exit status 1 if a step has failed.`,
		Example: examples("mprox upstreams test paris", "mprox upstreams test eu --target 192.0.2.80:80 -o json"),
		Args:    cobra.ExactArgs(1),

		ValidArgsFunction: g.completeUpstream(),
		RunE: func(cmd *cobra.Command, args []string) error {
			if dst, err := dialers.ParseAddr(target); err != nil || dst.Port == 0 {
				return usageError("--target %q is not HOST:PORT, such as %s", target, client.DefaultTestTarget)
			}
			return g.ask(cmd, testTimeout, func(ctx context.Context, c *client.Client) error {
				t, err := c.TestUpstream(ctx, args[0], target)
				if err != nil {
					return err
				}
				if err := writeUpstreamTest(g, cmd.OutOrStdout(), &t); err != nil {
					return err
				}
				if !t.OK {
					return fmt.Errorf("the test of %s has failed: no connection to %s", t.Name, target)
				}
				return nil
			})
		},
	}
	cmd.Flags().StringVar(&target, "target", client.DefaultTestTarget, "`host:port` to connect to through the upstream")
	return cmd
}

func writeUpstreamTest(g *globals, w io.Writer, t *client.UpstreamTest) error {
	if g.output == "json" {
		return writeJSON(w, t)
	}
	return show(g, w, t.Steps, func(steps []client.TestStep) *table {
		tab := &table{head: []string{"UPSTREAM", "STEP", "TIME", "OK", "ANSWER"}}
		for _, s := range steps {
			answer := s.Says
			if !s.OK {
				answer = s.Error
			}
			took := cell{text: fmt.Sprintf("%.1f ms", s.Seconds*1000), right: true}
			tab.add(text(s.Upstream), text(s.Step), took, yesNo(s.OK), orDash(answer))
		}
		return tab
	})
}
