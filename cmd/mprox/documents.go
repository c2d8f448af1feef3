// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"os"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

func newCompletionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "completion bash|zsh|fish",
		Short: "Print the completion script of a shell",
		Example: examples("mprox completion bash > /etc/bash_completion.d/mprox", `mprox completion zsh > "${fpath[1]}/_mprox"`,
			"mprox completion fish > ~/.config/fish/completions/mprox.fish"),
		ValidArgs: []string{"bash", "zsh", "fish"},
		Args:      cobra.MatchAll(cobra.ExactArgs(1), cobra.OnlyValidArgs),
		RunE: func(cmd *cobra.Command, args []string) error {
			root, w := cmd.Root(), cmd.OutOrStdout()
			switch args[0] {
			case "zsh":
				return root.GenZshCompletion(w)
			case "fish":
				return root.GenFishCompletion(w, true)
			}
			return root.GenBashCompletionV2(w, true)
		},
	}
}

func newManCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "man DIR",
		Short:   "Write the manual pages into a directory",
		Example: examples("mprox man /usr/local/share/man/man8"),
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := os.MkdirAll(args[0], 0o755); err != nil {
				return err
			}
			root := cmd.Root()
			root.DisableAutoGenTag = true // so that the pages are the same whenever they are made
			return doc.GenManTree(root, &doc.GenManHeader{Section: "8", Source: "mprox", Manual: "MUTEX"}, args[0])
		},
	}
}
