// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"fmt"
	"math/bits"
	"slices"
)

// Adopted flows: connections whose far end, as the application sees it, is a socket of this machine (package stack/offload). Their packets
// have to be delivered locally, though they are addressed to the whole world.
//
//	SYN of the application ─▶ TUN, as ever
//	SYN-ACK written into the TUN with TTL AccelTTL ─▶ prerouting: ct mark ACCEL
//	every later packet of the connection ─▶ output: ct mark ACCEL → mark ACCEL ─▶ ip rule ─▶ table A: local default dev lo
//
// So conntrack remembers which flows are adopted, flow by flow, with no call of ours for each, and it also knows the packets that have no
// socket any more (resets, time-wait). The mark is no way out: whoever carries it is delivered here (table A has nothing else), and the guard
// drops it on any device but lo. A SYN is never led there: it opens a new connection, which has to be asked about.
//
// Where BPF can be had, the application's socket bears the mark itself (shortcut_linux.go), so that its packets need not be routed twice.

// markAccel is the value of adopted flows inside the mask: together with inbound, bypass and the unused 0x4c one comparison tells it from
// contexts.
const markAccel = 0x4f

// AccelTTL is the TTL, or hop limit, by which the guard knows the SYN-ACK of an adopted flow among all that comes out of a TUN. Netstack
// writes 64.
const AccelTTL = 77

// AccelMark is the mark of adopted flows within the mask.
func AccelMark(mask uint32) uint32 { return markAccel << bits.TrailingZeros32(mask) }

// AccelTable is the context's table A, in which everything is local.
func (s Spec) AccelTable(slot int) int { return s.TableBase + 2*MaxContexts + slot }

// adopts says whether flows of the context can be adopted: those of other hosts cannot, and without a device there are none. The rules stay
// for as long as the context, so that what a dead daemon has adopted stays here.
func (c ContextSpec) adopts() bool {
	return c.Offload && c.Mode != ModeGateway && c.Mode != ModeDisabled
}

func accelRoutes(s Spec, c ContextSpec, snap Snapshot) []Route {
	if !c.adopts() {
		return nil
	}
	var out []Route
	for _, v6 := range families(snap) {
		r := Route{Table: s.AccelTable(c.Slot), Dst: defaultDst(v6), Type: RouteLocal, Dev: loopback, Protocol: Protocol}
		if v6 {
			r.Metric = metric6
		}
		out = append(out, r)
	}
	return out
}

func accelRules(s Spec, c ContextSpec, snap Snapshot) []Rule {
	if !c.adopts() {
		return nil
	}
	var out []Rule
	for _, v6 := range families(snap) {
		out = append(out, Rule{
			V6: v6, Priority: s.RulePriority + prioAccel + c.Slot, Protocol: Protocol, Mark: AccelMark(s.Mask), Mask: s.Mask, Table: s.AccelTable(c.Slot),
		})
	}
	return out
}

// accel says whether any flow of the instance can be adopted.
func (g *guard) accel() bool {
	return slices.ContainsFunc(g.contexts, ContextSpec.adopts)
}

// accelAnswers recognizes what the daemon answers an adopted flow with. The mark is the one that the reverse path is looked up with.
func (g *guard) accelAnswers(c ContextSpec) []nfRule {
	if !c.adopts() {
		return nil
	}
	var out []nfRule
	for _, v6 := range []bool{false, true} {
		r := rule(stTTL{v6: v6, ttl: AccelTTL}, stSYNACK{}, g.set(true, AccelMark(g.spec.Mask)))
		if c.Mode != ModeGlobal {
			r = append(r, g.set(false, ContextMark(g.spec.Mask, c.Slot)))
		}
		out = append(out, append(r, ret()))
	}
	return out
}

// adopted lets packets go that bear the mark already and are on their way, but for those that open a connection.
func (g *guard) adopted() nfRule {
	mark := AccelMark(g.spec.Mask)
	return rule(g.mark(false, mark), g.mark(true, mark), stIface{out: true, name: loopback}, stSYN{not: true}, accept())
}

// accelOutput leads adopted flows to their sockets. It stands before everything that captures: these packets are not captured a second time, and
// the daemon's end of them must not give their connection the bypass mark.
func (g *guard) accelOutput(out *nfChain) {
	if !g.accel() {
		return
	}
	mark := AccelMark(g.spec.Mask)
	g.chain(nfChain{name: "opening", rules: []nfRule{
		// Of a socket that has kept the mark: any server of this machine would seem to be the one that is meant.
		rule(g.mark(false, mark), stCounter{guardCounter}, drop()),
		rule(g.set(true, 0)),
	}})
	g.chain(nfChain{name: "adopted", rules: []nfRule{
		rule(stSYN{}, goTo("opening")),
		// An IPv6 socket keeps its route as long as that route is there, though table A, which was gone when it was looked up, has come back. A packet
		// that has been changed is routed again; that it cannot go far does no harm on lo.
		rule(g.mark(false, mark), stIface{out: true, not: true, name: loopback}, stSetHopLimit(1)),
		rule(g.set(false, mark), g.set(true, mark), accept()),
	}})
	out.rules = append(out.rules,
		rule(g.mark(true, mark), jump("adopted")),
		// When conntrack was flushed meanwhile.
		rule(stProto{protoTCP}, g.mark(false, mark), jump("adopted")))
}

// accelGuard lets adopted flows pass on lo, and nowhere else.
func (g *guard) accelGuard(post *nfChain) {
	if !g.accel() {
		return
	}
	mark := AccelMark(g.spec.Mask)
	post.rules = append(post.rules,
		rule(g.mark(false, mark), stIface{out: true, name: loopback}, accept()),
		rule(g.mark(false, mark), stCounter{guardCounter}, drop()))
}

type (
	// stTTL matches the TTL or hop limit.
	stTTL struct {
		v6  bool
		ttl uint8
	}
	stSYNACK struct{} // SYN and ACK, neither RST nor FIN
	// stSetHopLimit sets the hop limit; it matches IPv6 alone.
	stSetHopLimit uint8
)

func (s stTTL) String() string {
	if s.v6 {
		return fmt.Sprintf("ip6 hoplimit %d", s.ttl)
	}
	return fmt.Sprintf("ip ttl %d", s.ttl)
}

func (s stSetHopLimit) String() string { return fmt.Sprintf("ip6 hoplimit set %d", uint8(s)) }

func (stSYNACK) String() string { return "tcp flags & (fin | syn | rst | ack) == syn | ack" }
