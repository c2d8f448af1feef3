// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"context"
	"time"

	"github.com/spf13/cobra"

	"github.com/mutex-proxy/mutex/control/client"
)

// completeTimeout bounds what a shell waits for names after TAB.
const completeTimeout = time.Second

// completeNames completes one name, of what the daemon lists; without a daemon there is nothing to complete.
func completeNames[T any](g *globals, list func(*client.Client, context.Context) ([]T, error), name func(T) string) cobra.CompletionFunc {
	return func(cmd *cobra.Command, _ []string, _ string) (names []cobra.Completion, _ cobra.ShellCompDirective) {
		_ = g.ask(cmd, completeTimeout, func(ctx context.Context, c *client.Client) error {
			all, err := list(c, ctx)
			for _, one := range all {
				names = append(names, name(one))
			}
			return err
		})
		return names, cobra.ShellCompDirectiveNoFileComp
	}
}

func (g *globals) completeUpstream() cobra.CompletionFunc {
	return firstOnly(completeNames(g, (*client.Client).Upstreams, func(u client.UpstreamStatus) string { return u.Name }))
}

func (g *globals) completeContext() cobra.CompletionFunc {
	return completeNames(g, (*client.Client).Contexts, func(c client.ContextStatus) string { return c.Name })
}

// firstOnly completes the first argument and no other.
func firstOnly(f cobra.CompletionFunc) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, typed string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return f(cmd, args, typed)
	}
}

// completeContextFlag completes the flag --context of cmd.
func (g *globals) completeContextFlag(cmd *cobra.Command) {
	_ = cmd.RegisterFlagCompletionFunc("context", g.completeContext()) // an error would mean that there is no such flag
}
