// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"fmt"
	"slices"
	"strings"
)

// egressSuffix ends the name of the table of the netdev family, and tells it from those of the inet family.
const egressSuffix = "-egress"

// prioEgress is the place among the chains of a device's egress hook: first or last is the same, nobody behind us brings a packet back.
const prioEgress = 0

func ofNetdev(table string) bool { return strings.HasSuffix(table, egressSuffix) }

// tableNames are all the tables that an instance may have, the guard last: it is the last to go.
func tableNames(base string) []string {
	return []string{base + "-dns", base + egressSuffix, base + portsSuffix, base}
}

// egress is the guard of what never passes the inet hooks: AF_PACKET sockets, with CAP_NET_RAW. On the devices of the main table's default
// routes it drops IP packets of this namespace's sockets that nothing has marked and whose destination is not direct: the inet guard has let
// none such pass. Frames that are bridged or come from other namespaces (macvlan) belong to no socket of ours, and pass.
//
// It knows no cgroups and no connections, so it is the global context's alone, and whoever may set marks may pass it.
func (g *guard) egress() (NFTable, bool) {
	t := NFTable{Name: g.spec.Instance.tableName() + egressSuffix, counters: []string{guardCounter}}
	i := slices.IndexFunc(g.contexts, func(c ContextSpec) bool { return c.Mode == ModeGlobal })
	devices := g.uplinks()
	if i < 0 || !g.snap.Features.NFTEgress || len(devices) == 0 {
		return t, false
	}
	direct := g.direct[g.contexts[i].Slot]
	t.sets = []nfSet{{name: "direct4", kind: kindAddr4, ranges: direct.v4}, {name: "direct6", kind: kindAddr6, ranges: direct.v6}}
	dropped := []nfStmt{stCounter{guardCounter}, drop()}
	t.chains = []nfChain{
		{name: "ip", rules: []nfRule{
			rule(stFrameAddrIn{set: "direct4"}, accept()),
			rule(stProto{protoUDP}, stPort{src: true, port: 68}, stPort{port: 67}, accept()),
			rule(stProto{protoIGMP}, accept()),
			rule(dropped...),
		}},
		{name: "ip6", rules: []nfRule{
			rule(stFrameAddrIn{v6: true, set: "direct6"}, accept()),
			rule(dropped...),
		}},
	}
	if !g.contexts[i].DNSOff {
		for n := range t.chains {
			dns := []nfRule{
				rule(append([]nfStmt{stProto{protoUDP}, stPort{port: 53}}, dropped...)...),
				rule(append([]nfStmt{stProto{protoTCP}, stPort{port: 53}}, dropped...)...),
			}
			t.chains[n].rules = append(dns, t.chains[n].rules...)
		}
	}
	for _, l := range devices {
		typ := func(proto uint16) nfStmt { return stFrameType{proto: proto, ethernet: l.Ethernet} }
		c := nfChain{name: fmt.Sprintf("egress_%d", l.Index), typ: "filter", hook: "egress", device: l.Name, priority: prioEgress, rules: []nfRule{
			rule(stMark{mask: g.spec.Mask, not: true}, accept()),
			rule(stOwned{}, typ(etherIPv4), goTo("ip")),
			rule(stOwned{}, typ(etherIPv6), goTo("ip6")),
		}}
		if l.Ethernet {
			// A tag could hide anything; the kernel's own are not in the frame yet.
			c.rules = append(c.rules, rule(append([]nfStmt{stOwned{}, typ(ether8021Q)}, dropped...)...), rule(append([]nfStmt{stOwned{}, typ(ether8021AD)}, dropped...)...))
		}
		t.chains = append(t.chains, c)
	}
	return t, true
}

// EtherTypes (IEEE 802 numbers).
const (
	etherIPv4   = 0x0800
	etherIPv6   = 0x86dd
	ether8021Q  = 0x8100
	ether8021AD = 0x88a8
)

// uplinks are the devices that default routes of the main table lead to.
func (g *guard) uplinks() []Link {
	var out []Link
	for _, r := range mainRoutes(g.spec, g.snap) {
		if r.Dst.Bits() > 1 { // 0/1 and 128/1 are a default route in two halves
			continue
		}
		i := slices.IndexFunc(g.snap.Links, func(l Link) bool { return l.Name == r.Dev && !l.Loopback })
		if i >= 0 && !slices.Contains(out, g.snap.Links[i]) {
			out = append(out, g.snap.Links[i])
		}
	}
	slices.SortFunc(out, func(a, b Link) int { return a.Index - b.Index })
	return out
}
