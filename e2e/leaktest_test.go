// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/mutex-proxy/mutex/e2e/lab"
)

// TestLeaktest shows that mprox's own leak test passes with the guard intact, alive and dead, for the host and for one context, fails with any
// part of the guard removed, and sends nothing past the upstream itself while it does.
func TestLeaktest(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, true)
	before := l.Snapshot(t)
	m := l.Mprox(t)
	cp := l.Capture(t)
	packets := "" // why AF_PACKET is not tried
	check := func(what string, code int, want string, args ...string) {
		t.Helper()
		r := m.CLI(append([]string{"leaktest", "-o", "json"}, args...)...)
		var report struct {
			Leaks int
			Ways  []struct{ Way, Result, Detail string }
		}
		if err := json.Unmarshal([]byte(r.Stdout), &report); err != nil && code != 2 {
			t.Errorf("%s: %v: %v", what, err, r)
			return
		}
		var leaked, skipped []string
		for _, w := range report.Ways {
			if w.Result == "LEAKED" {
				leaked = append(leaked, w.Way)
			}
			if strings.HasPrefix(w.Way, "AF_PACKET") && w.Result == "skipped" {
				skipped = append(skipped, w.Detail)
			}
		}
		if r.Code != code || len(leaked) != report.Leaks || (code == 7) != (len(leaked) > 0) || code != 2 && len(report.Ways) < 40 {
			t.Errorf("%s: exit %d, want %d; %d ways, leaked: %q, %s", what, r.Code, code, len(report.Ways), leaked, r.Stderr)
		}
		if said := strings.Join(skipped, ";"); code != 2 && !strings.Contains(said, packets) || packets == "" && said != "" {
			t.Errorf("%s: packet sockets: %q, want %q", what, said, packets)
		}
		if want != "" && !strings.Contains(strings.Join(leaked, ";"), want) {
			t.Errorf("%s: %q is not among %q", what, want, leaked)
		}
	}
	packets = "no daemon"
	check("nothing is captured", 7, "TCP, v4")
	packets = ""
	cp.Reset()
	m.UpConfig(globalConfig(s, ""))
	check("alive", 0, "")
	check("alive, a process of the global context", 0, "", "--context", "default")
	l.Client.Run(t, "nft", "flush ruleset")
	lab.Eventually(t, lab.Patience, "the guard is back", func() bool { return len(guardRules(t, l)) > 4 })
	check("repaired", 0, "")
	m.Kill()
	packets = "no daemon"
	check("dead", 0, "")
	upstreamOnly(s).Check(t, cp.Packets())
	l.Client.Run(t, "nft", "delete table inet mprox")
	check("dead, without nftables", 7, "bypass mark and device")
	m.Up("-c", m.ConfigPath())
	packets = ""
	check("whole again", 0, "")
	must(t, m, "down")

	m.UpConfig(fmt.Sprintf(`{ "upstreams": { "p": { "url": %q } }, "contexts": { "work": { "mode": "cgroup", "default": "p" } } }`, s.URL()))
	packets = "while a context captures the whole host"
	check("no global context", 2, "")
	check("one context", 0, "", "--context", "work")
	must(t, m, "down")
	if d := before.Diff(l.Snapshot(t)); d != "" {
		t.Errorf("left behind:\n%s", d)
	}
}
