// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
)

// version is set by the linker (-X main.version=...), see the Makefile.
var version = "devel"

type versionInfo struct {
	Version  string `json:"version"`
	Revision string `json:"revision"` // of the source; "" when it was not built from a checkout
	Go       string `json:"go"`
	OS       string `json:"os"`
	Arch     string `json:"arch"`
}

func newVersionCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:     "version",
		Short:   "Print the version",
		Example: examples("mprox version", "mprox version -o json"),
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			v := versionInfo{Version: version, Go: runtime.Version(), OS: runtime.GOOS, Arch: runtime.GOARCH}
			if info, ok := debug.ReadBuildInfo(); ok {
				for _, s := range info.Settings {
					if s.Key == "vcs.revision" {
						v.Revision = s.Value
					}
				}
			}
			switch g.output {
			case "json":
				return writeJSON(cmd.OutOrStdout(), v)
			case "csv":
				return writeCSV(cmd.OutOrStdout(), []versionInfo{v})
			}
			fmt.Fprintf(cmd.OutOrStdout(), "mprox %s %s/%s %s\n", v.Version, v.OS, v.Arch, v.Go)
			return nil
		},
	}
}
