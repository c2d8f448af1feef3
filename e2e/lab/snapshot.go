// SPDX-License-Identifier: GPL-3.0-or-later

package lab

import (
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// Snapshot is everything a capture could have changed in the client's namespace and on the machine, as sorted text lines by object.
type Snapshot map[string][]string

// volatileSysctl matches values that change by themselves.
var volatileSysctl = regexp.MustCompile(`^(net/netfilter/nf_conntrack_count|net/ipv6/conf/[^/]+/stable_secret|net/unix/|net/ipv[46]/route/flush|net/netfilter/nf_log/)`)

// Snapshot reads the state of the client's kernel: links, addresses, rules, routes of all tables, nftables, sysctls; and of the machine:
// cgroups and BPF pins of the client's namespace.
func (l *Lab) Snapshot(t *testing.T) Snapshot {
	t.Helper()
	s := Snapshot{}
	for name, args := range map[string][]string{
		"link":   {"ip", "-o", "link", "show"},
		"addr":   {"ip", "-o", "addr", "show"},
		"rule4":  {"ip", "-4", "rule", "show"},
		"rule6":  {"ip", "-6", "rule", "show"},
		"route4": {"ip", "-4", "route", "show", "table", "all"},
		"route6": {"ip", "-6", "route", "show", "table", "all"},
		"nft":    {"nft", "-s", "list", "ruleset"}, // stateless: counters are not state
	} {
		out, err := l.Client.Output(t.Context(), args...)
		if err != nil {
			t.Fatal(err)
		}
		s[name] = strings.Split(strings.TrimSpace(out), "\n")
	}
	err := l.Client.Do(func() error {
		return filepath.WalkDir("/proc/sys/net", func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return nil //nolint:nilerr // entries of interfaces come and go
			}
			key := strings.TrimPrefix(path, "/proc/sys/")
			if volatileSysctl.MatchString(key) {
				return nil
			}
			if b, err := os.ReadFile(path); err == nil {
				s["sysctl"] = append(s["sysctl"], key+" = "+strings.TrimSpace(string(b)))
			}
			return nil
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	// Machine-wide objects carry the identity of the namespace that they act on: others' labs must not count.
	id := l.Client.inode()
	s["cgroup"] = named(cgroupRoot(), id)
	s["bpf"] = named("/sys/fs/bpf", id)
	s["bpf-attached"] = attached()
	slices.Sort(s["link"])
	return s
}

// named lists what is below a directory and bears a name.
func named(root, name string) []string {
	var out []string
	if root == "" {
		return nil
	}
	_ = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == root {
			return nil //nolint:nilerr // cgroups come and go
		}
		if strings.Contains(d.Name(), name) {
			out = append(out, path)
		}
		return nil
	})
	return out
}

// attached lists the BPF programs on cgroups, where the tool to list them is installed.
func attached() []string {
	if _, err := exec.LookPath("bpftool"); err != nil {
		return nil
	}
	out, err := exec.Command("bpftool", "cgroup", "tree").Output()
	if err != nil {
		return nil
	}
	return strings.Split(strings.TrimSpace(string(out)), "\n")
}

// Diff says what is in one snapshot and not in the other, one line each; empty when they are the same.
func (s Snapshot) Diff(after Snapshot) string {
	var b strings.Builder
	keys := make([]string, 0, len(s))
	for k := range s {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	for _, k := range keys {
		for _, line := range s[k] {
			if !slices.Contains(after[k], line) {
				fmt.Fprintf(&b, "%s: gone: %s\n", k, line)
			}
		}
		for _, line := range after[k] {
			if !slices.Contains(s[k], line) {
				fmt.Fprintf(&b, "%s: left: %s\n", k, line)
			}
		}
		if b.Len() == 0 && len(s[k]) != len(after[k]) {
			fmt.Fprintf(&b, "%s: %d lines, were %d\n", k, len(after[k]), len(s[k]))
		}
	}
	return b.String()
}
