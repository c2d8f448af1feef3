// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"strings"
	"unsafe"
)

// takeArgs returns a copy of the command line and overwrites the passwords of proxy URLs in the original, which is what ps and
// /proc/PID/cmdline show to every user of the machine.
func takeArgs(args []string) []string {
	out := make([]string, len(args))
	for i, a := range args {
		out[i] = strings.Clone(a)
		start, end := passwordIn(a)
		if start < end {
			// The runtime's os.Args points into the memory that the kernel gave the process, which is writable; nobody else holds it yet.
			b := unsafe.Slice(unsafe.StringData(a), len(a))
			for j := start; j < end; j++ {
				b[j] = '*'
			}
		}
	}
	return out
}

// passwordIn returns where the password of a proxy URL starts and ends. It is generous: up to the last @, so that one that was not
// percent-encoded is hidden too.
func passwordIn(arg string) (start, end int) {
	scheme := strings.Index(arg, "://")
	end = strings.LastIndexByte(arg, '@')
	if scheme < 0 || end < scheme {
		return 0, 0
	}
	colon := strings.IndexByte(arg[scheme+3:end], ':')
	if colon < 0 {
		return 0, 0
	}
	return scheme + 3 + colon + 1, end
}
