// SPDX-License-Identifier: GPL-3.0-or-later

package routing

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"regexp"
	"strings"
	"testing"

	"github.com/mutex-proxy/mutex/flow"
)

// The slow matcher: what the keys mean, written down as simply as possible. Kleene's logic with 0, 1 (unknown), 2.

func slowMatch(m *Match, f *flow.Flow) int {
	out := 2
	conj := func(v int) { out = min(out, v) }
	truth := func(given int, ok func(i int) bool) {
		if given == 0 {
			return
		}
		v := 0
		for i := range given {
			if ok(i) {
				v = 2
			}
		}
		conj(v)
	}
	host, ip := f.Dst.Host, f.Dst.IP
	truth(len(m.Domain), func(i int) bool {
		d := m.Domain[i]
		switch {
		case strings.HasPrefix(d, "*."):
			return strings.HasSuffix(host, d[1:]) && host != d[1:]
		case strings.HasPrefix(d, "+."):
			return host == d[2:] || strings.HasSuffix(host, d[1:])
		}
		return host == d
	})
	truth(len(m.DomainSuffix), func(i int) bool {
		d := m.DomainSuffix[i]
		return host == d || strings.HasSuffix(host, "."+strings.TrimPrefix(d, "."))
	})
	truth(len(m.DomainKeyword), func(i int) bool { return strings.Contains(host, m.DomainKeyword[i]) })
	truth(len(m.DomainRegex), func(i int) bool {
		return host != "" && regexp.MustCompile(m.DomainRegex[i]).MatchString(host)
	})
	truth(len(m.IPCIDR), func(i int) bool { return m.IPCIDR[i].Contains(ip) })
	truth(len(m.SourceCIDR), func(i int) bool { return m.SourceCIDR[i].Contains(f.Src.Addr()) })
	ports := f.Network != flow.ICMP
	truth(len(m.Port), func(i int) bool { return ports && m.Port[i].From <= f.Dst.Port && f.Dst.Port <= m.Port[i].To })
	truth(len(m.SourcePort), func(i int) bool {
		return ports && m.SourcePort[i].From <= f.Src.Port() && f.Src.Port() <= m.SourcePort[i].To
	})
	truth(len(m.Network), func(i int) bool { return m.Network[i] == f.Network.String() })
	if len(m.UID) > 0 && f.App.Method == "" {
		conj(1)
	} else {
		truth(len(m.UID), func(i int) bool { return m.UID[i] == f.App.UID })
	}
	for i := range m.And {
		conj(slowMatch(&m.And[i], f))
	}
	if len(m.Or) > 0 {
		v := 0
		for i := range m.Or {
			v = max(v, slowMatch(&m.Or[i], f))
		}
		conj(v)
	}
	for i := range m.Not {
		conj(2 - slowMatch(&m.Not[i], f))
	}
	if m.Invert {
		return 2 - out
	}
	return out
}

// The generators draw from small alphabets, so that rules and flows meet often.

func randomName(r *rand.Rand) string {
	labels := make([]string, 1+r.IntN(4))
	for i := range labels {
		labels[i] = string(rune('a' + r.IntN(3)))
	}
	return strings.Join(labels, ".")
}

func randomIP(r *rand.Rand) netip.Addr {
	if r.IntN(2) == 0 {
		return netip.AddrFrom4([4]byte{11, byte(r.IntN(4)), 0, byte(r.IntN(4))})
	}
	return netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 15: byte(r.IntN(8))})
}

func randomPrefix(r *rand.Rand) netip.Prefix {
	ip := randomIP(r)
	p, _ := ip.Prefix(r.IntN(ip.BitLen() + 1))
	return p
}

func some[T any](r *rand.Rand, chance int, draw func() T) []T {
	if r.IntN(chance) != 0 {
		return nil
	}
	out := make([]T, 1+r.IntN(6))
	for i := range out {
		out[i] = draw()
	}
	return out
}

func randomMatch(r *rand.Rand, depth int) Match {
	port := func() PortRange {
		from := uint16(1 + r.IntN(30))
		return PortRange{from, from + uint16(r.IntN(5))}
	}
	for {
		m := Match{
			Domain: some(r, 4, func() string {
				return []string{"", "", "*.", "+."}[r.IntN(4)] + randomName(r)
			}),
			DomainSuffix:  some(r, 5, func() string { return []string{"", "", "."}[r.IntN(3)] + randomName(r) }),
			DomainKeyword: some(r, 12, func() string { return string(rune('a' + r.IntN(3))) }),
			DomainRegex:   some(r, 12, func() string { return "^" + string(rune('a'+r.IntN(3))) }),
			IPCIDR:        some(r, 5, func() netip.Prefix { return randomPrefix(r) }),
			SourceCIDR:    some(r, 10, func() netip.Prefix { return randomPrefix(r) }),
			Port:          some(r, 6, port),
			SourcePort:    some(r, 12, port),
			Network:       some(r, 6, func() string { return []string{"tcp", "udp", "icmp"}[r.IntN(3)] }),
			UID:           some(r, 6, func() uint32 { return uint32(r.IntN(3)) }),
			Invert:        r.IntN(8) == 0,
		}
		if depth > 0 {
			sub := func() Match { return randomMatch(r, depth-1) }
			m.And, m.Or, m.Not = some(r, 12, sub), some(r, 12, sub), some(r, 12, sub)
		}
		if len(m.Domain)+len(m.DomainSuffix)+len(m.DomainKeyword)+len(m.DomainRegex)+len(m.IPCIDR)+len(m.SourceCIDR)+len(m.Port)+
			len(m.SourcePort)+len(m.Network)+len(m.UID)+len(m.And)+len(m.Or)+len(m.Not) > 0 {
			return m
		}
	}
}

func randomFlow(r *rand.Rand) *flow.Flow {
	f := &flow.Flow{
		Network: flow.Network(1 + r.IntN(3)),
		Src:     netip.AddrPortFrom(randomIP(r), uint16(1+r.IntN(32))),
		Dst:     flow.Addr{Port: uint16(1 + r.IntN(32))},
	}
	if r.IntN(3) > 0 {
		f.Dst.Host = randomName(r)
	}
	if f.Dst.Host == "" || r.IntN(2) == 0 {
		f.Dst.IP = randomIP(r)
	}
	if r.IntN(2) == 0 {
		f.App = flow.App{UID: uint32(r.IntN(3)), Method: "test"}
	}
	return f
}

func TestAgainstSlowMatcher(t *testing.T) {
	t.Parallel()
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 1))
	hits := map[string]int{}
	for range 400 {
		in := Input{Context: "default", Default: "reject", Upstreams: upstreams}
		for range 1 + r.IntN(5) {
			in.Rules = append(in.Rules, Rule{Match: randomMatch(r, 2), Upstream: "eu"})
		}
		table, err := Compile(in)
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		for range 100 {
			f := randomFlow(r)
			want := "default"
			for i := range in.Rules {
				if slowMatch(&in.Rules[i].Match, f) == 2 {
					want = fmt.Sprintf("rules[%d]", i)
					break
				}
			}
			hits[want]++
			if got := table.Decide(f); got.Rule != want {
				t.Fatalf("seed %d: got %s, want %s\nflow %+v\nrules %+v\n%+v", seed, got.Rule, want, f, in.Rules, table.Explain(f))
			}
			explained := table.Explain(f)
			if last := explained[len(explained)-1]; last.Rule != want {
				t.Fatalf("seed %d: explain ends with %s, want %s", seed, last.Rule, want)
			}
			checkNeeds(t, table, f)
		}
	}
	if hits["default"] == 0 || hits["rules[0]"] == 0 || hits["rules[2]"] == 0 {
		t.Errorf("seed %d: the input is one-sided: %v", seed, hits)
	}
}

// checkNeeds: if Needs does not ask for the owner, no owner can change the decision.
func checkNeeds(t *testing.T, table *Table, f *flow.Flow) {
	t.Helper()
	if f.App.Method != "" || table.Needs(f) != 0 {
		return
	}
	want := table.Decide(f)
	g := *f
	for uid := range uint32(4) {
		g.App = flow.App{UID: uid, Method: "test"}
		if got := table.Decide(&g); got != want {
			t.Fatalf("no owner was asked for, but uid %d changes %s into %s\nflow %+v", uid, want.Rule, got.Rule, f)
		}
	}
}

func TestKleene(t *testing.T) {
	t.Parallel()
	values := []outcome{no, unknown, yes}
	for a := outcome(1); a < 8; a++ {
		for b := outcome(1); b < 8; b++ {
			var wantAnd, wantOr outcome
			for _, x := range values {
				for _, y := range values {
					if a&x != 0 && b&y != 0 {
						wantAnd |= min(x, y)
						wantOr |= max(x, y)
					}
				}
			}
			if and(a, b) != wantAnd || or(a, b) != wantOr {
				t.Errorf("%03b %03b: and %03b want %03b, or %03b want %03b", a, b, and(a, b), wantAnd, or(a, b), wantOr)
			}
		}
	}
}

func FuzzDomain(f *testing.F) {
	for _, s := range []string{"a.example", "*.a.example", "+.a.example", ".a", "a..b", "A.B.", "*.*.x", "xn--bcher-kva.example", "_srv.x", "\xff", "+.", "*.", "1.2.3.4", "::1"} {
		f.Add(s, "b.a.example")
	}
	f.Fuzz(func(t *testing.T, pattern, host string) {
		set := &domainSet{}
		if set.addPattern(pattern) == nil {
			set.contains(host)
			name := strings.ToLower(strings.TrimSuffix(strings.TrimPrefix(strings.TrimPrefix(pattern, "*."), "+."), "."))
			if wild := strings.HasPrefix(pattern, "*."); set.contains(name) == wild {
				t.Errorf("%q: contains(%q) = %v", pattern, name, !wild)
			}
			if below := strings.HasPrefix(pattern, "*.") || strings.HasPrefix(pattern, "+."); set.contains("x."+name) != below {
				t.Errorf("%q: contains(x.%q) = %v", pattern, name, !below)
			}
		}
		suffixes := &domainSet{}
		if suffixes.addSuffix(pattern) == nil {
			suffixes.contains(host)
		}
	})
}

func FuzzRegex(f *testing.F) {
	for _, s := range []string{"^a", "(", "a{1000}{1000}", "(?i)x", `\pL+`, "((((((((", "[^", "a**", "(a|b|c)*d"} {
		f.Add(s, "a.example")
	}
	f.Fuzz(func(_ *testing.T, expr, host string) {
		if re, err := compileRegex(expr); err == nil && len(host) <= maxName {
			re.MatchString(host)
		}
	})
}

// benchTable is a table of the size of a large hand-written configuration: 50 rules, 10,000 names, 10,000 prefixes.
func benchTable(tb testing.TB) (*Table, []*flow.Flow) {
	tb.Helper()
	r := rand.New(rand.NewPCG(1, 2))
	in := Input{
		Context: "default", DNS: true, Default: "eu", Upstreams: upstreams,
		Bypass: Bypass{Address: []string{"local", "private", "198.51.100.0/24"}, Port: []PortRange{{123, 123}}},
	}
	for i := range 50 {
		m := Match{}
		switch i % 5 {
		case 0:
			for j := range 1000 {
				m.DomainSuffix = append(m.DomainSuffix, fmt.Sprintf("n%d.r%d.example", j, i))
			}
		case 1:
			for range 1000 {
				p, _ := netip.AddrFrom4([4]byte{byte(100 + i), byte(r.IntN(256)), byte(r.IntN(256)), 0}).Prefix(16 + r.IntN(9))
				m.IPCIDR = append(m.IPCIDR, p)
			}
		case 2:
			m.Port = []PortRange{{uint16(1000 + i), uint16(1000 + i)}, {6881, 6889}}
			m.Network = []string{"udp"}
		case 3:
			m.UID = []uint32{uint32(5000 + i)}
		case 4:
			m.Or = []Match{{DomainRegex: []string{`^cdn\d+\.x$`}}, {Process: []string{"curl"}}}
			if raceEnabled {
				m.Or = m.Or[1:]
			}
		}
		in.Rules = append(in.Rules, Rule{Match: m, Upstream: "us"})
	}
	table, err := Compile(in)
	if err != nil {
		tb.Fatal(err)
	}
	flows := []*flow.Flow{newFlow(tb, "tcp", "www.example.com:443"), newFlow(tb, "tcp", "203.0.113.9:443"), newFlow(tb, "udp", "10.0.0.1:443"), newFlow(tb, "udp", "x.n7.r40.example=192.0.2.1:443")}
	for _, f := range flows {
		f.App = app
	}
	return table, flows
}

func TestDecideDoesNotAllocate(t *testing.T) {
	table, flows := benchTable(t)
	unowned := *flows[0]
	unowned.App = flow.App{}
	for _, f := range append(flows, &unowned) {
		if n := testing.AllocsPerRun(200, func() {
			table.Decide(f)
			table.Needs(f)
		}); n != 0 {
			t.Errorf("%s: %v allocations", f.Dst, n)
		}
	}
}

func BenchmarkDecide(b *testing.B) {
	table, flows := benchTable(b)
	for _, f := range flows {
		b.Run(f.Dst.String(), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				table.Decide(f)
			}
		})
	}
}

func BenchmarkDomainSet(b *testing.B) {
	s := &domainSet{}
	for i := range 100_000 {
		s.add(fmt.Sprintf("n%d.example", i), true, true)
	}
	b.ReportAllocs()
	for b.Loop() {
		s.contains("www.n4711.example")
	}
}

func BenchmarkCompile(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		benchTable(b)
	}
}
