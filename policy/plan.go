// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"fmt"
	"slices"
	"strings"
)

// Where a rule stands inside the block of priorities that is ours. Marked contexts come before the global one, each with four rules.
const (
	rulesPerSlot = 4
	prioAccel    = rulesPerSlot * MaxContexts // one a slot: no priority is shared by two instances
	prioBypass   = prioAccel + MaxContexts
	prioInbound  = prioBypass + 1
	prioDHCP     = prioBypass + 2
	prioServers  = prioBypass + 3
	prioExcluded = prioBypass + 4
	prioDNS      = prioBypass + 10
	prioDirect   = prioBypass + 12
	prioCapture  = prioBypass + 13
	prioEnd      = prioBypass + 59 // where bypass and inbound jump to: on to the main table, past our rules only
	ruleBlock    = 1000
)

const (
	protoICMP   = 1
	protoIGMP   = 2
	protoTCP    = 6
	protoUDP    = 17
	protoICMPv6 = 58
)

// maxServerPorts bounds the ip rules for listening ports that had connections at the start. More than that many is not one administrator's
// ssh: the others are still answered while the daemon lives.
const maxServerPorts = 64

// txQueueLen holds the bursts that 500, the kernel's default, loses: of UDP, and what 10,000 connections send that are closed at the same moment. A
// reset is not repeated: lost, it leaves a flow until keep-alive asks.
const txQueueLen = 20000

// Plan is everything an instance wants to be true of the kernel. It is a value: equal plans print equally.
type Plan struct {
	Rules   []Rule
	Routes  []Route
	Tables  []NFTable
	Links   []LinkSpec
	Sysctls []Sysctl
	Select  *Selection // nil = no BPF
}

// Sysctl is one setting. Own: of a device of ours, gone with it, so nothing has to be restored.
type Sysctl struct {
	Key, Value string
	Own        bool
}

// NewPlan works out what spec needs on a machine as snap shows it. It is pure. ErrConflict names who uses what is ours.
func NewPlan(spec Spec, snap Snapshot) (*Plan, error) {
	spec = spec.withDefaults()
	if err := spec.validate(); err != nil {
		return nil, err
	}
	if err := conflicts(spec, snap); err != nil {
		return nil, err
	}
	if err := checkSelect(spec, snap); err != nil {
		return nil, err
	}
	p := &Plan{}
	direct := map[int]directSets{}
	for _, c := range spec.Contexts {
		if c.Mode == ModeDisabled {
			continue
		}
		routes, prefixes := directRoutes(spec, c, snap)
		p.Routes = append(append(p.Routes, captureRoutes(spec, c, snap)...), routes...)
		p.Routes = append(p.Routes, accelRoutes(spec, c, snap)...)
		direct[c.Slot] = newDirectSets(prefixes, c.Fake)
		p.Rules = append(p.Rules, contextRules(spec, c, snap)...)
		p.Rules = append(p.Rules, accelRules(spec, c, snap)...)
		if c.TUN != "" {
			l := LinkSpec{Name: c.TUN, MTU: c.MTU, TxQLen: txQueueLen, Addr4: c.Addr4}
			if snap.IPv6 {
				l.Addr6 = c.Addr6
			}
			p.Links = append(p.Links, l)
		}
	}
	slices.SortFunc(p.Routes, compareRoutes)
	slices.SortFunc(p.Rules, compareRules)
	p.Sysctls = sysctls(spec, snap)
	p.Tables = nftTables(spec, snap, direct)
	p.Select = newSelection(spec, snap)
	return p, nil
}

// contextRules are the ip rules of one context, in each family.
func contextRules(s Spec, c ContextSpec, snap Snapshot) []Rule {
	var out []Rule
	for _, v6 := range families(snap) {
		add := func(offset int, r Rule) {
			r.V6, r.Priority, r.Protocol = v6, s.RulePriority+offset, Protocol
			if r.Goto != 0 {
				r.Goto += s.RulePriority
			}
			out = append(out, r)
		}
		base, dns, direct, capture := Rule{Local: c.Mode != ModeGateway}, prioDNS, prioDirect, prioCapture
		if c.Mode == ModeGlobal {
			add(prioBypass, Rule{Mark: BypassMark(s.Mask), Mask: s.Mask, Goto: prioEnd})
			if snap.Features.BPF && len(c.Exclude) > 0 {
				add(prioExcluded, Rule{Mark: ExcludedMark(s.Mask), Mask: s.Mask, Goto: prioEnd})
			}
			add(prioInbound, Rule{Mark: InboundMark(s.Mask), Mask: s.Mask, Goto: prioEnd})
			if !v6 {
				// Renewal is unicast; everything else of DHCP is on a raw socket or, in IPv6, multicast on the link.
				add(prioDHCP, Rule{Local: true, IPProto: protoUDP, Sport: 68, Dport: 67, Goto: prioEnd})
			}
			for _, port := range serverPorts(snap.Sockets.Inbound) {
				// Sockets accepted before the start carry no mark, and a look-up that fails (daemon dead) ends before nft could help.
				add(prioServers, Rule{Local: true, IPProto: protoTCP, Sport: port, Goto: prioEnd})
			}
			add(prioEnd, Rule{Nop: true})
		} else {
			base.Mark, base.Mask = ContextMark(s.Mask, c.Slot), s.Mask
			dns = rulesPerSlot * c.Slot
			direct, capture = dns+2, dns+3
		}
		with := func(proto uint8, dport uint16, table int) Rule {
			r := base
			r.IPProto, r.Dport, r.Table = proto, dport, table
			return r
		}
		if !c.DNSOff {
			add(dns, with(protoUDP, 53, s.Table(c.Slot)))
			add(dns+1, with(protoTCP, 53, s.Table(c.Slot)))
		}
		add(direct, with(0, 0, s.DirectTable(c.Slot)))
		add(capture, with(0, 0, s.Table(c.Slot)))
	}
	return out
}

// serverPorts are the local ports of connections that came in before the start.
func serverPorts(ts []Tuple) []uint16 {
	var ports []uint16
	for _, t := range ts {
		ports = append(ports, t.Local.Port())
	}
	slices.Sort(ports)
	ports = slices.Compact(ports)
	return ports[:min(len(ports), maxServerPorts)]
}

// sysctls are the settings that capture needs. Marked contexts need none of the machine's.
func sysctls(s Spec, snap Snapshot) []Sysctl {
	var out []Sysctl
	global := false
	for _, c := range s.Contexts {
		global = global || c.Mode == ModeGlobal
		if c.TUN == "" || c.Mode == ModeDisabled {
			continue
		}
		own := func(key, value string) {
			out = append(out, Sysctl{Key: strings.ReplaceAll(key, "DEV", c.TUN), Value: value, Own: true})
		}
		// Replies come back by the TUN from addresses that the main table reaches by the uplink: strict filtering would drop them. The
		// greater of this and conf/all counts.
		rp := "0"
		if snap.RPFilter["all"] != 0 {
			rp = "2"
		}
		own("net/ipv4/conf/DEV/rp_filter", rp)
		own("net/ipv4/conf/DEV/src_valid_mark", "1")
		if snap.IPv6 {
			own("net/ipv6/conf/DEV/disable_ipv6", "0")
			own("net/ipv6/conf/DEV/addr_gen_mode", "1") // none: no link-local address, no router solicitations
			own("net/ipv6/conf/DEV/accept_ra", "0")
		}
	}
	out = append(out, forwarding(s, snap)...)
	if !global {
		return out
	}
	// Sockets accepted from a marked SYN keep its mark: what inbound connections send is routed past us, also with the daemon dead.
	out = append(out, Sysctl{Key: "net/ipv4/tcp_fwmark_accept", Value: "1"})
	for _, l := range snap.Links {
		if l.Loopback || ownDevice(s, l.Name) || snap.RPFilter["all"] == 0 && snap.RPFilter[l.Name] == 0 || snap.SrcValid["all"] != 0 {
			continue
		}
		// The reverse path of what arrives there is looked up with the mark that prerouting gives it, not through the capture rules.
		out = append(out, Sysctl{Key: "net/ipv4/conf/" + l.Name + "/src_valid_mark", Value: "1"})
	}
	return out
}

// String is the plan in the notation of ip(8), nft(8) and sysctl(8).
func (p *Plan) String() string {
	var b strings.Builder
	section := func(name string, lines []string) {
		if len(lines) > 0 {
			fmt.Fprintf(&b, "# %s\n%s\n", name, strings.Join(lines, "\n"))
		}
	}
	var rules4, rules6, routes4, routes6, links, sys []string
	for _, r := range p.Rules {
		if r.V6 {
			rules6 = append(rules6, r.String())
		} else {
			rules4 = append(rules4, r.String())
		}
	}
	for _, r := range p.Routes {
		if r.V6() {
			routes6 = append(routes6, r.String())
		} else {
			routes4 = append(routes4, r.String())
		}
	}
	for _, l := range p.Links {
		line := fmt.Sprintf("%s mtu %d qlen %d addr %s/32", l.Name, l.MTU, l.TxQLen, l.Addr4)
		if l.Addr6.IsValid() {
			line += fmt.Sprintf(" %s/128", l.Addr6)
		}
		links = append(links, line)
	}
	for _, s := range p.Sysctls {
		line := s.Key + " = " + s.Value
		if !s.Own {
			line += " (restored)"
		}
		sys = append(sys, line)
	}
	section("ip rule", rules4)
	section("ip -6 rule", rules6)
	section("ip route", routes4)
	section("ip -6 route", routes6)
	section("link", links)
	section("sysctl", sys)
	if p.Select != nil {
		b.WriteString("# bpf\n" + p.Select.String())
	}
	for _, t := range p.Tables {
		b.WriteString(t.String())
	}
	return b.String()
}

func compareRules(a, b Rule) int {
	key := func(r Rule) []int {
		v6 := 0
		if r.V6 {
			v6 = 1
		}
		return []int{v6, r.Priority, int(r.IPProto), int(r.Sport), int(r.Dport)}
	}
	return slices.Compare(key(a), key(b))
}
