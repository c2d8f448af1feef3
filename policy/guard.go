// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"fmt"
	"net/netip"
	"slices"
)

// Hook priorities of nftables.
const (
	prioMangle = -150
	prioNAT    = -110 // Docker's own redirect of 127.0.0.11 is at -100
	prioGuard  = 200  // behind every source NAT (100): nothing changes the packet any more
)

// guardCounter counts the packets that the guard has dropped.
const guardCounter = "guard_dropped"

// directSets are the addresses that the guard of one context lets pass by any device.
type directSets struct{ v4, v6 []addrRange }

func newDirectSets(prefixes, fake []netip.Prefix) directSets {
	return directSets{
		v4: subtract(rangesOf(prefixes, false), rangesOf(fake, false)),
		v6: subtract(rangesOf(prefixes, true), rangesOf(fake, true)),
	}
}

// guard builds the nftables of one instance. Prerouting and output tell connections apart and mark them, postrouting is the guard: what is
// captured leaves by its TUN, over loopback, to a direct destination, or not at all. The table has no owner, so it outlives the daemon.
type guard struct {
	spec     Spec
	snap     Snapshot
	direct   map[int]directSets
	contexts []ContextSpec // marked first, global last
	global   bool
	wide     bool // as Spec.wide
	taken    []uint32
	table    NFTable
}

// nftTables returns the guard and, while there are listeners, the redirect of DNS over loopback.
func nftTables(s Spec, snap Snapshot, direct map[int]directSets) []NFTable {
	g := guard{spec: s, snap: snap, direct: direct, wide: s.wide(), table: NFTable{Name: s.Instance.tableName(), counters: []string{guardCounter}}}
	for _, c := range s.Contexts {
		if c.Mode != ModeDisabled && c.Mode != ModeGlobal {
			g.contexts = append(g.contexts, c)
		}
	}
	for _, c := range s.Contexts {
		if c.Mode == ModeGlobal {
			g.contexts, g.global = append(g.contexts, c), true
		}
	}
	if len(g.contexts) == 0 {
		return nil
	}
	g.sets()
	held, holds := g.ports()
	g.prerouting()
	g.output()
	g.clamp()
	g.postrouting()
	tables := []NFTable{g.table}
	if holds {
		tables = append(tables, held)
	}
	if t, ok := g.redirect(); ok {
		tables = append(tables, t)
	}
	if t, ok := g.egress(); ok {
		tables = append(tables, t)
	}
	return tables
}

func (g *guard) chain(c nfChain) { g.table.chains = append(g.table.chains, c) }

func (g *guard) mark(ct bool, value uint32) stMark {
	return stMark{ct: ct, value: value, mask: g.spec.Mask}
}

func (g *guard) set(ct bool, value uint32) stSetMark {
	return stSetMark{ct: ct, value: value, mask: g.spec.Mask}
}

// take returns the jump that gives a packet and its connection a mark and lets it go on its way. The two are marked by two rules: what conntrack
// takes for invalid, or was told to leave alone, has no connection, and a rule that reads the mark of one ends there. Such a packet would get
// neither mark, and leave.
func (g *guard) take(mark uint32) nfStmt {
	name := fmt.Sprintf("take_%08x", mark)
	if !slices.Contains(g.taken, mark) {
		g.taken = append(g.taken, mark)
		g.chain(nfChain{name: name, rules: []nfRule{rule(g.set(true, mark)), rule(g.set(false, mark), accept())}})
	}
	return goTo(name)
}

func (g *guard) sets() {
	add := func(s nfSet) { g.table.sets = append(g.table.sets, s) }
	for _, c := range g.contexts {
		add(nfSet{name: setName("direct4", c), kind: kindAddr4, ranges: g.direct[c.Slot].v4})
		add(nfSet{name: setName("direct6", c), kind: kindAddr6, ranges: g.direct[c.Slot].v6})
	}
	add(nfSet{name: "clients", kind: kindPort, ports: g.snap.Sockets.Clients})
	if !g.wide {
		return
	}
	for _, v6 := range []bool{false, true} {
		kind, suffix := kindTuple4, "4"
		if v6 {
			kind, suffix = kindTuple6, "6"
		}
		add(nfSet{name: "inbound" + suffix, kind: kind, tuples: tuplesOf(g.snap.Sockets.Inbound, v6)})
		add(nfSet{name: "excluded" + suffix, kind: kind, tuples: tuplesOf(g.snap.Excluded.Flows, v6)})
	}
}

func setName(name string, c ContextSpec) string { return fmt.Sprintf("%s_%d", name, c.Slot) }

// prerouting marks the connections that come from outside.
func (g *guard) prerouting() {
	inbound := InboundMark(g.spec.Mask)
	pre := nfChain{name: "prerouting", typ: "filter", hook: "prerouting", priority: prioMangle, rules: []nfRule{
		rule(stIface{name: loopback}, ret()),
	}}
	for _, c := range g.contexts {
		if c.TUN == "" {
			continue
		}
		from := nfChain{name: setName("from", c), rules: g.accelAnswers(c)}
		if c.Mode != ModeGlobal && c.Mode != ModeGateway {
			// The reverse path of what comes out of the TUN is looked up with the context's mark: the main table may have no route at all.
			// What the kernel answers by itself (a reset, say) goes back by the connection's mark.
			ctx := ContextMark(g.spec.Mask, c.Slot)
			from.rules = append(from.rules, rule(g.set(false, ctx), g.set(true, ctx)))
		}
		verdict := ret()
		if len(from.rules) > 0 {
			g.chain(from)
			verdict = goTo(from.name)
		}
		pre.rules = append(pre.rules, rule(stIface{name: c.TUN}, verdict))
	}
	g.forwarded(&pre)
	if g.global {
		// Whatever came in by a real device is checked, accepted and forwarded by the main table, not by the capture rules.
		pre.rules = append(pre.rules, rule(g.set(false, inbound)))
	}
	if g.wide {
		// Nearly all that comes in: the answers to the daemon's own connections, and what goes on coming in by those that are known.
		pre.rules = append(pre.rules, rule(g.mark(true, BypassMark(g.spec.Mask)), ret()), rule(g.mark(true, inbound), ret()))
	}
	pre.rules = append(pre.rules, rule(stToLocal{}, jump("inbound")))
	g.chain(pre)

	// Only what opens a connection counts: conntrack takes the first packet it happens to see of an old connection for a new one, and that
	// may be a reply to something this machine had sent. UDP cannot be told that way: client sockets older than the guard are listed.
	in := nfChain{name: "inbound", rules: g.inputPorts()}
	in.rules = append(in.rules, []nfRule{
		rule(stCtNew{}, stSYN{}, g.set(true, inbound)),
		rule(stCtNew{}, stProto{protoUDP}, stPortNotIn{"clients"}, g.set(true, inbound)),
		rule(stCtNew{}, stICMPType{from: 8, to: 8}, g.set(true, inbound)),
		rule(stCtNew{}, stICMPType{v6: true, from: 128, to: 128}, g.set(true, inbound)),
	}...)
	if g.wide {
		in.rules = append(in.rules,
			rule(stTupleIn{in: true, set: "inbound4"}, g.set(true, inbound)),
			rule(stTupleIn{v6: true, in: true, set: "inbound6"}, g.set(true, inbound)))
	}
	g.chain(in)
}

// inputPorts drops what opens a connection to a port that is not let in. Answers to clients older than the guard look the same.
func (g *guard) inputPorts() []nfRule {
	var ports []uint16
	for _, c := range g.contexts {
		if c.Mode == ModeGlobal {
			ports = c.InputPorts
		}
	}
	if len(ports) == 0 {
		return nil
	}
	g.table.sets = append(g.table.sets, nfSet{name: "input_ports", kind: kindPort, ports: ports})
	return []nfRule{
		rule(stCtNew{}, stSYN{}, stPortNotIn{"input_ports"}, drop()),
		rule(stCtNew{}, stProto{protoUDP}, stPortNotIn{"clients"}, stPortNotIn{"input_ports"}, drop()),
	}
}

// output marks what this machine sends; a changed mark is routed again. It takes privileged marks from whoever has no right to them.
func (g *guard) output() {
	bypass, inbound := BypassMark(g.spec.Mask), InboundMark(g.spec.Mask)
	out := nfChain{name: "output", typ: "route", hook: "output", priority: prioMangle}
	add := func(stmts ...nfStmt) { out.rules = append(out.rules, stmts) }

	// Both ends of what the daemon carries, nearly all that goes out, before anything else is asked.
	if g.accel() {
		add(g.adopted()...)
	}
	if g.wide {
		add(g.mark(false, bypass), g.mark(true, bypass), accept())
	}
	g.accelOutput(&out)
	if g.wide {
		// The connection's mark covers what has no socket any more: time-wait and resets.
		add(g.mark(false, bypass), g.daemon(), g.take(bypass))
		for _, ref := range g.snap.Excluded.Cgroups {
			add(stCgroup{ref}, g.mark(true, inbound), g.set(false, inbound), accept())
			add(stCgroup{ref}, g.take(bypass))
		}
		for _, v6 := range []bool{false, true} {
			name := map[bool]string{false: "excluded4", true: "excluded6"}[v6]
			add(stTupleIn{v6: v6, set: name}, g.take(bypass))
		}
		for _, v6 := range []bool{false, true} {
			name := map[bool]string{false: "inbound4", true: "inbound6"}[v6]
			add(stTupleIn{v6: v6, set: name}, g.take(inbound))
		}
	}
	add(g.mark(true, inbound), g.set(false, inbound), accept())
	// Cgroups made for a context come before selectors: who starts something through a lease means that lease.
	for _, c := range g.contexts {
		ctx := ContextMark(g.spec.Mask, c.Slot)
		for _, ref := range c.Cgroups {
			if c.Mode != ModeGlobal {
				if ref.Only {
					// A packet without a socket any more passes: it goes where its connection has gone.
					add(stCgroup{ref}, stUID{uid: ref.UID, not: true}, stCounter{guardCounter}, drop())
				}
				add(stCgroup{ref}, g.take(ctx))
			}
		}
	}
	g.selection(&out)
	g.exclusion(&out)
	if orphans := g.orphans(); len(orphans.rules) > 1 {
		g.chain(orphans)
		add(jump(orphans.name))
	}
	if g.global {
		// 0x4c to 0x4f in one comparison: nobody else's business. Without a global context nothing depends on them, and they may be another
		// instance's.
		privileged := g.spec.Mask &^ (3 * (g.spec.Mask & -g.spec.Mask))
		add(stMark{value: bypass & privileged, mask: privileged}, g.set(false, 0))
	}
	g.chain(out)
}

// orphans is for time-wait, resets, the last packets of closed sockets: by the connection. Not for those of a living socket elsewhere, which
// may have got the same ports.
func (g *guard) orphans() nfChain {
	out := nfChain{name: "orphans", rules: []nfRule{rule(stOwned{}, ret())}}
	for _, c := range g.contexts {
		mark := ContextMark(g.spec.Mask, c.Slot)
		if c.Mode == ModeGateway {
			continue // nothing of it is this machine's
		}
		if c.Mode == ModeGlobal {
			if len(c.Exclude) == 0 {
				continue
			}
			mark = BypassMark(g.spec.Mask)
		}
		out.rules = append(out.rules, rule(g.mark(true, mark), g.set(false, mark), accept()))
	}
	return out
}

// daemon matches the daemon's own sockets.
func (g *guard) daemon() nfStmt {
	if c := g.snap.Daemon.Cgroup; c != nil {
		return stCgroup{*c}
	}
	return stUID{uid: g.snap.Daemon.UID}
}

// postrouting is the guard itself: the device a packet really leaves by is known only here.
func (g *guard) postrouting() {
	post := nfChain{name: "guard", typ: "filter", hook: "postrouting", priority: prioGuard}
	g.accelGuard(&post)
	if g.global {
		post.rules = append(post.rules,
			rule(g.mark(false, BypassMark(g.spec.Mask)), accept()),
			rule(g.mark(false, InboundMark(g.spec.Mask)), accept()))
	}
	if !g.global {
		post.rules = append(post.rules, rule(g.mark(false, 0), accept()))
	}
	var subs []nfChain
	for _, c := range g.contexts {
		name := setName("guard", c)
		if c.Mode == ModeGlobal {
			post.rules = append(post.rules, rule(stLocal{}, goTo(name)))
		} else {
			post.rules = append(post.rules, rule(g.mark(false, ContextMark(g.spec.Mask, c.Slot)), goTo(name)))
		}
		subs = append(subs, g.contextGuard(c)...)
	}
	// A chain must exist before a rule that jumps to it is added.
	for _, c := range subs {
		g.chain(c)
	}
	g.chain(post)
}

// contextGuard returns the chains of one context, loopback first.
func (g *guard) contextGuard(c ContextSpec) []nfChain {
	lo := nfChain{name: setName("loopback", c)}
	main := nfChain{name: setName("guard", c)}
	dropped := []nfStmt{stCounter{guardCounter}, drop()}
	if c.TUN != "" {
		main.rules = append(main.rules, rule(stIface{out: true, name: c.TUN}, accept()))
	}
	main.rules = append(main.rules, rule(stIface{out: true, name: loopback}, goTo(lo.name)))
	if !c.DNSOff {
		for _, proto := range []uint8{protoUDP, protoTCP} {
			main.rules = append(main.rules, rule(append([]nfStmt{stProto{proto}, stPort{port: 53}}, dropped...)...))
			if c.DNSPort4 != 0 {
				lo.rules = append(lo.rules, rule(stFamily{}, stProto{proto}, stPort{port: c.DNSPort4}, accept()))
			}
			if c.DNSPort6 != 0 {
				lo.rules = append(lo.rules, rule(stFamily{v6: true}, stProto{proto}, stPort{port: c.DNSPort6}, accept()))
			}
			lo.rules = append(lo.rules,
				rule(append([]nfStmt{stProto{proto}, stPort{port: 53}}, dropped...)...),
				// Docker's own redirect of 127.0.0.11 has changed the port: what it was sent to counts.
				rule(append([]nfStmt{stProto{proto}, stCtDNS{}}, dropped...)...))
		}
	}
	lo.rules = append(lo.rules, rule(accept()))
	main.rules = append(main.rules,
		rule(stAddrIn{set: setName("direct4", c)}, accept()),
		rule(stAddrIn{v6: true, set: setName("direct6", c)}, accept()))
	if c.Mode == ModeGlobal {
		main.rules = append(main.rules,
			rule(stFamily{}, stProto{protoUDP}, stPort{src: true, port: 68}, stPort{port: 67}, accept()),
			rule(stFamily{}, stProto{protoIGMP}, accept()),
			rule(stICMPType{v6: true, from: 133, to: 137}, stHops255{}, accept()), // neighbour discovery, also of public neighbours
			rule(stICMPType{v6: true, from: 130, to: 132}, accept()),              // MLD
			rule(stICMPType{v6: true, from: 143, to: 143}, accept()))
	}
	main.rules = append(main.rules, rule(dropped...))
	return []nfChain{lo, main}
}

// redirect leads port 53 over loopback to our listeners: no ip rule can, the table `local` is asked before them all.
func (g *guard) redirect() (NFTable, bool) {
	nat := nfChain{name: "dns", typ: "nat", hook: "output", priority: prioNAT}
	// A packet that nftables has marked is routed again, but that look-up knows no ports (ip_route_me_harder): the DNS rules do not match, and
	// a resolver on the LAN would be direct, so dropped. All DNS of contexts with selectors, and without BPF of all marked ones, is
	// therefore redirected.
	if g.global {
		nat.rules = append(nat.rules,
			rule(g.mark(false, BypassMark(g.spec.Mask)), ret()),
			rule(g.mark(false, InboundMark(g.spec.Mask)), ret()))
	}
	found := false
	for _, c := range g.contexts {
		if c.Mode == ModeGateway {
			continue
		}
		var who []nfStmt
		if c.Mode != ModeGlobal {
			who = append(who, g.mark(false, ContextMark(g.spec.Mask, c.Slot)))
		}
		where := slices.Clone(who)
		if c.Mode == ModeGlobal || g.snap.Features.BPFSockMark && len(c.Select) == 0 || g.snap.Features.BPF && !c.Strict {
			where = append(where, stIface{out: true, name: loopback})
		}
		for _, v6 := range []bool{false, true} {
			port := c.DNSPort4
			if v6 {
				port = c.DNSPort6
			}
			if port == 0 || c.DNSOff || c.TUN == "" {
				continue
			}
			found = true
			for _, proto := range []uint8{protoUDP, protoTCP} {
				nat.rules = append(nat.rules, append(slices.Clone(where), stFamily{v6}, stProto{proto}, stPort{port: 53}, stDNAT{port}))
			}
		}
		if len(who) > 0 {
			nat.rules = append(nat.rules, append(slices.Clone(who), ret())) // never the global context's listener
		}
	}
	return NFTable{Name: g.spec.Instance.tableName() + "-dns", owner: g.snap.Features.NFTOwner, chains: []nfChain{nat}}, found
}

func tuplesOf(ts []Tuple, v6 bool) []Tuple {
	var out []Tuple
	for _, t := range ts {
		if t.Local.Addr().Is6() == v6 {
			out = append(out, t)
		}
	}
	slices.SortFunc(out, func(a, b Tuple) int {
		if c := a.Local.Compare(b.Local); c != 0 {
			return c
		}
		return a.Remote.Compare(b.Remote)
	})
	return slices.Compact(out)
}
