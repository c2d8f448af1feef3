// SPDX-License-Identifier: GPL-3.0-or-later

package routing

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/mutex-proxy/mutex/flow"
)

// outcome is the set of results that a condition can still have. A condition on something that is not known yet has several; the logic is
// Kleene's, with no < unknown < yes, so that what nobody knows matches neither a rule nor its inversion.
type outcome uint8

const (
	no outcome = 1 << iota
	unknown
	yes
)

func and(a, b outcome) outcome {
	out := (a | b) & no
	out |= a & b & yes
	if a&unknown != 0 && b&(unknown|yes) != 0 || b&unknown != 0 && a&(unknown|yes) != 0 {
		out |= unknown
	}
	return out
}

func not(a outcome) outcome { return a&no<<2 | a&unknown | a&yes>>2 }

func or(a, b outcome) outcome { return not(and(not(a), not(b))) }

// protocolUnknown is what the handler sets Flow.Protocol to when it looked at the payload in vain; "" means that it did not look.
const protocolUnknown = "unknown"

// condition is one key of a rule: either a test of the flow or nested sets.
type condition struct {
	key   string
	value string     // for Explain
	needs flow.Needs // what must be known before test can be asked
	test  func(f *flow.Flow) bool
	have  func(f *flow.Flow) string // for Explain: what the flow has
	sets  []*matchSet
	all   bool // sets: all must match, else one
}

// matchSet is a compiled Match.
type matchSet struct {
	conds   []condition
	invert  bool
	negated bool // by the not that holds the set: part of invert, told apart for Explain
}

// eval returns what the set can come to, and what is not known yet. final means that the owner has been looked up: it is known or never
// will be.
func (s *matchSet) eval(f *flow.Flow, final bool) (outcome, flow.Needs) {
	out, needs := yes, flow.Needs(0)
	for i := range s.conds {
		o, n := s.conds[i].eval(f, final)
		if out = and(out, o); out == no {
			needs = 0
			break
		}
		needs |= n
	}
	if s.invert {
		out = not(out)
	}
	return out, needs
}

func (c *condition) eval(f *flow.Flow, final bool) (outcome, flow.Needs) {
	if c.sets != nil {
		return c.evalSets(f, final)
	}
	switch {
	case c.needs == flow.NeedApp && f.App.Method == "":
		if final {
			return unknown, 0
		}
		return no | unknown | yes, flow.NeedApp
	case c.needs == flow.NeedPayload && f.Protocol == "" && f.Network != flow.ICMP:
		return no | yes, flow.NeedPayload
	case c.test(f):
		return yes, 0
	}
	return no, 0
}

func (c *condition) evalSets(f *flow.Flow, final bool) (outcome, flow.Needs) {
	out, needs, done := yes, flow.Needs(0), no
	if !c.all {
		out, done = no, yes
	}
	for _, s := range c.sets {
		o, n := s.eval(f, final)
		if c.all {
			out = and(out, o)
		} else {
			out = or(out, o)
		}
		if out == done {
			return out, 0
		}
		needs |= n
	}
	return out, needs
}

// The tests. Each is a function of the flow alone, so that a compiled table stays pure.

func testNetwork(want uint8) func(*flow.Flow) bool {
	return func(f *flow.Flow) bool { return want&(1<<f.Network) != 0 }
}

func networkByName(name string) (flow.Network, bool) {
	for _, n := range []flow.Network{flow.TCP, flow.UDP, flow.ICMP} {
		if n.String() == name {
			return n, true
		}
	}
	return 0, false
}

func haveNetwork(f *flow.Flow) string { return "network is " + f.Network.String() }

func hasPorts(f *flow.Flow) bool { return f.Network == flow.TCP || f.Network == flow.UDP }

func testPort(s portSet) func(*flow.Flow) bool {
	return func(f *flow.Flow) bool { return hasPorts(f) && s.contains(f.Dst.Port) }
}

func testSourcePort(s portSet) func(*flow.Flow) bool {
	return func(f *flow.Flow) bool { return hasPorts(f) && s.contains(f.Src.Port()) }
}

func havePort(f *flow.Flow) string {
	if !hasPorts(f) {
		return "an icmp flow has no ports"
	}
	return fmt.Sprintf("port is %d", f.Dst.Port)
}

func haveSourcePort(f *flow.Flow) string {
	if !hasPorts(f) {
		return "an icmp flow has no ports"
	}
	return fmt.Sprintf("source port is %d", f.Src.Port())
}

// dstIP returns the destination address as the prefix tables want it; invalid if only the name is known.
func dstIP(f *flow.Flow) netip.Addr { return f.Dst.IP.Unmap().WithZone("") }

func haveIP(f *flow.Flow) string {
	if !f.Dst.IP.IsValid() {
		return "the flow is known by name only"
	}
	return "address is " + f.Dst.IP.String()
}

func haveSource(f *flow.Flow) string { return "source is " + f.Src.Addr().String() }

func testDomain(s *domainSet) func(*flow.Flow) bool {
	return func(f *flow.Flow) bool { return f.Dst.Host != "" && s.contains(f.Dst.Host) }
}

func testKeywords(words []string) func(*flow.Flow) bool {
	return func(f *flow.Flow) bool {
		for _, w := range words {
			if strings.Contains(f.Dst.Host, w) {
				return true
			}
		}
		return false
	}
}

func haveHost(f *flow.Flow) string {
	if f.Dst.Host == "" {
		return "the flow has no name"
	}
	if src := f.HostSource.String(); src != "" {
		return "name is " + f.Dst.Host + " (" + src + ")"
	}
	return "name is " + f.Dst.Host
}

// testApp is a test of the owner, which is known when it is asked.
func testApp[T comparable](get func(*flow.App) T, want map[T]bool) func(*flow.Flow) bool {
	return func(f *flow.Flow) bool { return want[get(&f.App)] }
}

func appUID(a *flow.App) uint32 { return a.UID }
func appGID(a *flow.App) uint32 { return a.GID }
func appPID(a *flow.App) int    { return a.PID }
func appExe(a *flow.App) string { return a.Exe }

func appProcess(a *flow.App) string { return a.Exe[strings.LastIndexByte(a.Exe, '/')+1:] }

func haveApp(what string, get func(*flow.App) string) func(*flow.Flow) string {
	return func(f *flow.Flow) string {
		if f.App.Method == "" {
			return "the owner of the flow is not known"
		}
		return what + " is " + get(&f.App)
	}
}

// testCgroup matches the cgroups and everything below them.
func testCgroup(paths []string) func(*flow.Flow) bool {
	return func(f *flow.Flow) bool {
		for _, p := range paths {
			if rest, ok := strings.CutPrefix(f.App.Cgroup, p); ok && (rest == "" || rest[0] == '/' || p == "/") {
				return true
			}
		}
		return false
	}
}

// testUnit matches a unit that is any element of the cgroup path, as systemd lays them out: slices, services, scopes.
func testUnit(units map[string]bool) func(*flow.Flow) bool {
	return func(f *flow.Flow) bool {
		rest := f.App.Cgroup
		for rest != "" {
			i := strings.LastIndexByte(rest, '/')
			if units[rest[i+1:]] {
				return true
			}
			rest = rest[:max(i, 0)]
		}
		return false
	}
}

// unitName completes a unit's name as systemctl does.
func unitName(s string) string {
	for _, suffix := range []string{".service", ".slice", ".scope", ".socket", ".mount", ".timer", ".target"} {
		if strings.HasSuffix(s, suffix) {
			return s
		}
	}
	return s + ".service"
}

func testProtocol(want map[string]bool) func(*flow.Flow) bool {
	return func(f *flow.Flow) bool { return f.Protocol != protocolUnknown && want[f.Protocol] }
}

func haveProtocol(f *flow.Flow) string {
	if f.Protocol == "" {
		return "the protocol is not known before payload is seen"
	}
	return "protocol is " + f.Protocol
}
