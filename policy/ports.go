// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import "strings"

// portsSuffix ends the name of the table of the bridge family.
const portsSuffix = "-ports"

// prioPorts comes before br_netfilter (0), which runs the chains of the inet family for frames that are bridged, too, and there before conntrack (-200): what
// is dropped opens no connection.
const prioPorts = -310

func ofBridge(table string) bool { return strings.HasSuffix(table, portsSuffix) }

// ports closes the bridges of container runtimes to containers of which it is not known yet who they are. A container's port, the veth on its bridge, is new
// whenever the container is started, and the kernel does not give its index to another: so however late we are, nobody passes for somebody else, as
// with an address. But only chains of the bridge family see ports, and only those of the inet family the bridge's name (without CONFIG_NFT_BRIDGE_META). So
// the one gives what is known a mark, which no packet has from elsewhere, and the other drops what has none.
//
// Neighbour discovery passes, as ARP does: it never leaves the link, and would be missed for a whole second.
func (g *guard) ports() (NFTable, bool) {
	t := NFTable{Name: g.spec.Instance.tableName() + portsSuffix}
	holds := false
	for _, c := range g.contexts {
		holds = holds || c.Containers
	}
	if !holds {
		return t, false
	}
	known := ExcludedMark(g.spec.Mask)
	t.sets = []nfSet{{name: "known", kind: kindIndex, index: g.spec.Ports}}
	t.chains = []nfChain{{name: "ports", typ: "filter", hook: "prerouting", priority: prioPorts, rules: []nfRule{
		rule(stIndexIn{set: "known"}, g.set(false, known), ret()),
		rule(stKind{kind: "veth"}, ret()),
		rule(g.set(false, known)), // the bridge's way out, a virtual machine
	}}}
	g.table.sets = append(g.table.sets, nfSet{name: "bridges", kind: kindName, names: g.spec.Bridges})
	g.chain(nfChain{name: "held", rules: []nfRule{
		rule(g.mark(false, known), g.set(false, 0), ret()),
		rule(stNameIn{set: "bridges"}, ret()),
		rule(stICMPType{v6: true, from: 133, to: 137}, stHops255{}, ret()),
		rule(stCounter{guardCounter}, drop()),
	}})
	g.chain(nfChain{name: "ports", typ: "filter", hook: "prerouting", priority: prioPorts, rules: []nfRule{rule(stKind{kind: "bridge"}, goTo("held"))}})
	return t, true
}
