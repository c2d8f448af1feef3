// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mutex-proxy/mutex/e2e/lab"
)

// nftRule is a rule of the guard as nft(8) lists it.
type nftRule struct {
	Table, Chain, Text string
	Handle             int
}

// guardRules lists the rules of the client's nftables that stop something: those that drop, and those that take a mark away.
func guardRules(t *testing.T, l *lab.Lab) []nftRule {
	t.Helper()
	out, err := l.Client.Output(t.Context(), "nft", "-a", "list", "ruleset")
	if err != nil {
		t.Fatal(err)
	}
	var rules []nftRule
	var table, chain string
	for line := range strings.Lines(out) {
		line = strings.TrimSpace(line)
		text, handle, _ := strings.Cut(line, " # handle ")
		switch {
		case strings.HasPrefix(line, "table "):
			table = strings.TrimSuffix(strings.TrimPrefix(text, "table "), " {")
		case strings.HasPrefix(line, "chain "):
			chain = strings.TrimSuffix(strings.TrimPrefix(text, "chain "), " {")
		case strings.HasSuffix(text, " drop"), stripsMark.MatchString(text):
			r := nftRule{Table: table, Chain: chain, Text: text}
			if _, err := fmt.Sscan(handle, &r.Handle); err == nil {
				rules = append(rules, r)
			}
		}
	}
	return rules
}

// stripsMark matches a rule that clears the bits of the mask.
var stripsMark = regexp.MustCompile(`meta mark .*meta mark set (meta|mark) ?.*& 0x00ffffff( |$)`)

// TestGuardRulesMatter removes each rule of the guard, one at a time, while the daemon is dead, and shows that something leaks: so each is
// needed, and the leak test would find its absence.
func TestGuardRulesMatter(t *testing.T) {
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, false)
	traps := allTraps(t, l)
	cp := l.Capture(t)
	m := l.Mprox(t)
	m.WriteConfig(globalConfig(s, `"dns": { "mode": "fakeip" },`))
	revive := func() { // the next start repairs what the test has broken
		m.Up("-c", m.ConfigPath())
		m.Kill()
		cp.Reset()
		for _, tr := range traps {
			tr.Reset()
		}
	}
	leaked := func() (n int, example string) {
		l.Client.Probe(lab.Probes())
		leaks := upstreamOnly(s).Leaks(cp.Packets())
		if len(leaks) > 0 {
			example = leaks[0].String()
		}
		n = len(leaks)
		for _, tr := range traps {
			for _, name := range tr.Names() {
				n++
				example = "query for " + name
			}
		}
		return n, example
	}
	// As Docker does for its resolver: port 53 is gone before the guard sees the query.
	l.Client.Run(t, "nft", "add table ip docker; add chain ip docker out { type nat hook output priority -100; }; "+
		"add rule ip docker out ip daddr 127.0.0.11 udp dport 53 dnat to 127.0.0.11:5354; add rule ip docker out ip daddr 127.0.0.11 tcp dport 53 dnat to 127.0.0.11:5354")
	traps = append(traps, lab.NewTrap(t, l.Client, netipAddrPort("127.0.0.11:5354")))
	revive()
	if n, example := leaked(); n > 0 {
		t.Errorf("%d leaks with the whole guard: %s", n, example)
	}
	l.Client.Run(t, "nft", "delete table netdev mprox-egress")
	rules := guardRules(t, l)
	if len(rules) < 4 {
		t.Fatalf("only %d rules found that stop something: %+v", len(rules), rules)
	}
	for i := range rules {
		revive()
		// The second layer, for AF_PACKET, would stop much of what the first lets through: policy's tests take it away on its own.
		l.Client.Run(t, "nft", "delete table netdev mprox-egress")
		rules := guardRules(t, l) // handles change with every start
		if i >= len(rules) {
			t.Fatalf("the guard had %d rules more", i+1-len(rules))
		}
		r := rules[i]
		// The table is listed with its family first: "inet mprox".
		l.Client.Run(t, "nft", fmt.Sprintf("delete rule %s %s handle %d", r.Table, r.Chain, r.Handle))
		if p, ok := partner(r, rules); ok {
			l.Client.Run(t, "nft", fmt.Sprintf("delete rule %s %s handle %d", p.Table, p.Chain, p.Handle))
		}
		n, example := leaked()
		t.Logf("without %q in %s: %d leaks, e.g. %s", r.Text, r.Chain, n, example)
		if n == 0 {
			t.Errorf("nothing leaks without %q in chain %s", r.Text, r.Chain)
		}
	}
}

// partner returns the rule that stops the same queries as r, by what they were sent to at first: with r alone gone, it still does.
func partner(r nftRule, rules []nftRule) (nftRule, bool) {
	if !strings.HasPrefix(r.Chain, "loopback") || strings.Contains(r.Text, "ct original") {
		return nftRule{}, false
	}
	proto, _, _ := strings.Cut(r.Text, " ")
	i := slices.IndexFunc(rules, func(o nftRule) bool {
		return o.Chain == r.Chain && strings.Contains(o.Text, "ct original") && strings.Contains(o.Text, proto)
	})
	if i < 0 {
		return nftRule{}, false
	}
	return rules[i], true
}

// TestGuardLayers removes whole layers while the daemon is dead: without nftables the routes still stop what asks them, without rules and
// routes nftables stops everything, without both everything leaks.
func TestGuardLayers(t *testing.T) {
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, false)
	before := l.Snapshot(t)
	lab.NewTrap(t, l.Client, lab.LoopbackResolvers()...)
	cp := l.Capture(t)
	m := l.Mprox(t)
	m.WriteConfig(globalConfig(s, `"dns": { "mode": "fakeip" },`))
	dropNFT := func() { l.Client.Run(t, "nft", "flush", "ruleset") }
	dropRules := func() { removeRules(t, l, before) }
	dropRoutes := func() { removeRoutes(t, l, before) }
	plain := slices.DeleteFunc(lab.Probes(), func(p lab.Probe) bool {
		return !strings.HasSuffix(p.Name, " plain") && p.Name != "icmp4" && p.Name != "icmp6" || strings.HasPrefix(p.Name, "dns")
	})
	for _, c := range []struct {
		name   string
		remove []func()
		probes []lab.Probe
		leaks  bool
	}{
		{"nothing removed", nil, lab.Probes(), false},
		{"no nftables, plain sockets", []func(){dropNFT}, plain, false},
		{"no nftables, bound sockets", []func(){dropNFT}, lab.Probes(), true},
		{"no rules", []func(){dropRules}, plain, false},
		{"no routes", []func(){dropRoutes}, plain, false},
		{"no rules, no routes", []func(){dropRules, dropRoutes}, lab.Probes(), false},
		{"nothing left", []func(){dropNFT, dropRules, dropRoutes}, plain, true},
	} {
		m.Up("-c", m.ConfigPath())
		m.Kill()
		cp.Reset()
		for _, f := range c.remove {
			f()
		}
		l.Client.Probe(c.probes)
		leaks := upstreamOnly(s).Leaks(cp.Packets())
		if (len(leaks) > 0) != c.leaks {
			t.Errorf("%s: %d leaks: %v", c.name, len(leaks), leaks[:min(len(leaks), 5)])
		}
	}
	// And the next start makes it whole again.
	m.Up("-c", m.ConfigPath())
	checkProxied(t, l)
}

// TestRestoresWhileAlive removes what a living daemon has put into the kernel, as network managers and firewalls do: it comes back, nothing
// leaks meanwhile by plain sockets.
func TestRestoresWhileAlive(t *testing.T) {
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, false)
	before := l.Snapshot(t)
	m := l.Mprox(t)
	m.WriteConfig(fmt.Sprintf(`{ "http": { "listen": "127.0.0.1:9464" }, "upstreams": { "p": { "url": %q } }, "contexts": { "default": { "mode": "global", "default": "p" } } }`, s.URL()))
	m.Up("-c", m.ConfigPath())
	whole := l.Snapshot(t)
	restored := func(object string) (n float64) {
		t.Helper()
		for line := range strings.Lines(mustCurl(t, l, "http://127.0.0.1:9464/metrics")) {
			if rest, ok := strings.CutPrefix(line, fmt.Sprintf("mprox_kernel_state_restored_total{object=%q} ", object)); ok {
				_, _ = fmt.Sscan(rest, &n)
			}
		}
		return n
	}
	for name, remove := range map[string]func(){
		"rule":  func() { removeRules(t, l, before) },
		"route": func() { removeRoutes(t, l, before) },
		"nft":   func() { l.Client.Run(t, "nft", "flush", "ruleset") },
		"link":  func() { l.Client.Run(t, "ip", "link", "set", "mprox0", "down") },
	} {
		count := restored(name)
		remove()
		began := time.Now()
		var diff string
		if !lab.Poll(lab.Patience, func() bool { diff = whole.Diff(l.Snapshot(t)); return diff == "" }) {
			t.Errorf("%s removed, and not restored:\n%s", name, diff)
		}
		took := time.Since(began)
		t.Logf("%s: whole again within %s", name, took)
		if took > time.Second {
			t.Errorf("%s: whole again after %s, want a second at most", name, took)
		}
		if restored(name) <= count {
			t.Errorf("%s: not counted", name)
		}
	}
	checkProxied(t, l)
	if r := m.CLI("down"); r.Code != 0 {
		t.Errorf("down: %v", r)
	}
	if d := before.Diff(l.Snapshot(t)); d != "" {
		t.Errorf("left behind:\n%s", d)
	}
}

// removeRules deletes the ip rules that were not there before.
func removeRules(t *testing.T, l *lab.Lab, before lab.Snapshot) {
	t.Helper()
	for fam, key := range map[string]string{"-4": "rule4", "-6": "rule6"} {
		for _, line := range l.Snapshot(t)[key] {
			if slices.Contains(before[key], line) {
				continue
			}
			pref, _, _ := strings.Cut(line, ":")
			for { // several may share a priority
				if _, err := l.Client.Output(t.Context(), "ip", fam, "rule", "del", "pref", pref); err != nil {
					break
				}
			}
		}
	}
}

// removeRoutes empties the routing tables that were not there before.
func removeRoutes(t *testing.T, l *lab.Lab, before lab.Snapshot) {
	t.Helper()
	for fam, key := range map[string]string{"-4": "route4", "-6": "route6"} {
		for _, line := range l.Snapshot(t)[key] {
			_, table, ok := strings.Cut(line, " table ")
			if !ok || slices.Contains(before[key], line) {
				continue
			}
			table, _, _ = strings.Cut(table, " ")
			if table != "local" {
				_, _ = l.Client.Output(t.Context(), "ip", fam, "route", "flush", "table", table)
			}
		}
	}
}
