// SPDX-License-Identifier: GPL-3.0-or-later

// Command mprox sends the traffic of a host, or of one command, through a proxy: honestly and fail-closed.
//
// This package is the command line: one file a command, nothing but parsing, asking the daemon and printing. What the daemon is made of is
// put together in cmd/mprox/daemon.
package main

import (
	"os"
)

func main() {
	os.Exit(execute(newGlobals(), takeArgs(os.Args[1:]), os.Stdout, os.Stderr))
}
