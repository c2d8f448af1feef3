// SPDX-License-Identifier: GPL-3.0-or-later

package routing

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/gaissmai/bart"

	"github.com/mutex-proxy/mutex/flow"
)

// bypassSet is the compiled Bypass: what goes to direct before any rule is asked. Entries keep the order of the configuration: addresses,
// ports, networks.
type bypassSet struct {
	classifier *classifier
	prefixes   bart.Table[int] // prefix → index into entries; the longest match is the one that is named
	anyClass   class           // union of the entries' classes: most flows are dismissed by it
	ports      portSet         // union of the entries' ports
	networks   uint8           // union of the entries' networks
	entries    []bypassEntry
}

// bypassEntry is one member of one of the lists. Exactly one of prefix, class, ports and network is set.
type bypassEntry struct {
	key      string // address, port, network
	value    string
	decision flow.Decision
	prefix   netip.Prefix
	class    class
	ports    portSet
	network  flow.Network
}

func (c *compiler) bypass(b *Bypass) *bypassSet {
	path := contextPath(c.in.Context) + ".bypass"
	if len(b.Address)+len(b.Port)+len(b.Network) == 0 {
		return &bypassSet{classifier: c.class}
	}
	direct := c.in.Upstreams["direct"]
	if direct == nil {
		c.fail(path, fmt.Errorf("there is no upstream named direct"))
	}
	s := &bypassSet{classifier: c.class}
	add := func(e bypassEntry, i int) {
		e.decision = flow.Decision{Action: flow.Forward, Via: direct, Rule: "bypass." + e.key + "[" + strconv.Itoa(i) + "]"}
		s.entries = append(s.entries, e)
	}
	for i, a := range b.Address {
		e := bypassEntry{key: "address", value: a}
		if cl, ok := classByName(a); ok {
			e.class = cl
			s.anyClass |= cl
		} else if p, err := parseAddress(a); err != nil {
			c.fail(at(path, "address", i), err)
		} else {
			e.prefix = p
			s.prefixes.Insert(p, len(s.entries))
		}
		add(e, i)
	}
	for i, r := range b.Port {
		set, _, err := newPortSet([]PortRange{r})
		if err != nil {
			c.fail(at(path, "port", i), err)
			continue
		}
		add(bypassEntry{key: "port", value: r.String(), ports: set}, i)
	}
	if set, _, err := newPortSet(b.Port); err == nil {
		s.ports = set
	}
	s.networks = c.networkSet(path, b.Network)
	for i, name := range b.Network {
		n, _ := networkByName(name)
		add(bypassEntry{key: "network", value: name, network: n}, i)
	}
	return s
}

// bypassRules are the lists of Bypass for which a flow's owner or payload must be known first: they are rules, before all others.
func (c *compiler) bypassRules(b *Bypass) []compiledRule {
	path := contextPath(c.in.Context) + ".bypass"
	var out []compiledRule
	for _, r := range []struct {
		key string
		m   Match
	}{{"process", Match{Process: b.Process}}, {"protocol", Match{Protocol: b.Protocol}}} {
		if len(r.m.Process)+len(r.m.Protocol) == 0 {
			continue
		}
		name := "bypass." + r.key
		out = append(out, compiledRule{
			set: c.match(path, &r.m, 0), decision: c.decision(path, name, "direct"), sniff: flow.Decision{Action: flow.Sniff, Rule: name},
		})
	}
	return out
}

// parseAddress reads an address or a CIDR.
func parseAddress(s string) (netip.Prefix, error) {
	var p netip.Prefix
	a, err := netip.ParseAddr(s)
	if err == nil {
		p = netip.PrefixFrom(a.WithZone(""), a.BitLen())
	} else if p, err = netip.ParsePrefix(s); err != nil {
		return p, fmt.Errorf("%q is not an address, a CIDR, or one of local, private, link-local, multicast, loopback, public", s)
	}
	p, _ = normalPrefix(p)
	return p, nil
}

// decide returns the decision of the first entry that matches. The unions dismiss a flow without a look at the entries.
func (s *bypassSet) decide(f *flow.Flow) (flow.Decision, bool) {
	if len(s.entries) == 0 {
		return flow.Decision{}, false
	}
	ip := dstIP(f)
	if i, ok := s.prefixes.Lookup(ip); ok {
		return s.entries[i].decision, true
	}
	var cl class
	if s.anyClass != 0 {
		cl = s.classifier.of(ip) & s.anyClass
	}
	if cl == 0 && s.networks&(1<<f.Network) == 0 && (!hasPorts(f) || !s.ports.contains(f.Dst.Port)) {
		return flow.Decision{}, false
	}
	for i := range s.entries {
		if e := &s.entries[i]; e.match(f, ip, cl) {
			return e.decision, true
		}
	}
	return flow.Decision{}, false
}

func (e *bypassEntry) match(f *flow.Flow, ip netip.Addr, cl class) bool {
	switch e.key {
	case "address":
		return e.class&cl != 0 || e.prefix.IsValid() && e.prefix.Contains(ip)
	case "port":
		return hasPorts(f) && e.ports.contains(f.Dst.Port)
	}
	return e.network == f.Network
}

// explain returns a line for each entry up to the one that decides.
func (s *bypassSet) explain(f *flow.Flow, decided string) []Condition {
	ip := dstIP(f)
	cl := s.classifier.of(ip)
	var out []Condition
	for i := range s.entries {
		e := &s.entries[i]
		have := haveNetwork
		switch e.key {
		case "address":
			have = haveIP
		case "port":
			have = havePort
		}
		c := Condition{Rule: e.decision.Rule, Key: e.key, Value: e.value, Result: resultNo, Reason: have(f)}
		if e.match(f, ip, cl) {
			c.Result = resultYes
		}
		if e.class != 0 && ip.IsValid() {
			c.Reason += ", which is " + strings.Join(cl.names(), ", ")
		}
		out = append(out, c)
		if e.decision.Rule == decided {
			break
		}
	}
	return out
}

// names returns the names of the classes, or what it means that there are none.
func (cl class) names() []string {
	var out []string
	for _, name := range []string{"private", "link-local", "multicast", "loopback", "public"} {
		if c, _ := classByName(name); c&cl != 0 {
			out = append(out, name)
		}
	}
	if cl&classLocal != 0 {
		out = append(out, "local")
	}
	if len(out) == 0 {
		out = append(out, "a fake address")
	}
	return out
}
