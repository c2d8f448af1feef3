// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"os/signal"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/cmd/mprox/demo"
)

func newDemoCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Show the main job on a private network, leaving nothing behind",
		Long: `Makes two network namespaces of its own, a proxy and an origin in one, and captures everything in the other: real clients' flows, a
refused port that is refused, a flow table, a throughput figure, and the guard holding when the engine is killed. A capture on the
client's uplink says whether anything leaked. Needs root; does not touch this machine's own network.`,
		Example: "  mprox demo",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), unix.SIGINT, unix.SIGTERM)
			defer stop()
			return demo.Run(ctx, cmd.OutOrStdout())
		},
	}
	far := &cobra.Command{
		Use: "far DIR", Hidden: true, Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return demo.Far(cmd.Context(), args[0]) },
	}
	client := &cobra.Command{
		Use: "client SET", Hidden: true, Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return demo.Client(cmd.Context(), args[0]) },
	}
	cmd.AddCommand(far, client)
	return cmd
}
