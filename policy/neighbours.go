// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"slices"
	"strings"
)

// neighbour is software that has rules, routes, marks or devices of its own on many machines, and how it is known.
type neighbour struct {
	name    string
	links   []string          // prefixes of device names
	ownRule func(r Rule) bool // may be nil
	tables  func(t int) bool  // may be nil
}

func between(n, from, to int) bool { return n >= from && n <= to }

// neighbours are the known ones. Sources: tailscale wgengine/router, wg-quick(8), the defaults of cilium pkg/datapath/linux, calico felix,
// Mullvad's talpid-routing, sing-box's and mihomo's auto-route, dae's control plane.
func neighbours() []neighbour {
	return []neighbour{
		{name: "Docker", links: []string{"docker", "br-"}},
		{name: "libvirt", links: []string{"virbr"}},
		{
			name: "Tailscale", links: []string{"tailscale"},
			ownRule: func(r Rule) bool {
				return between(r.Priority, 5200, 5299) || r.Mask == 0xff0000 && r.Mark&^0xc0000 == 0
			},
			tables: func(t int) bool { return t == 52 },
		},
		{
			name: "wg-quick", links: []string{"wg"},
			ownRule: func(r Rule) bool {
				return strings.Contains(r.Other, "not") && r.Mask == 0xffffffff || r.Mark != 0 && r.Mark == uint32(r.Table)
			},
			tables: func(t int) bool { return between(t, 51820, 51899) },
		},
		{
			name: "Cilium", links: []string{"cilium_", "lxc"},
			ownRule: func(r Rule) bool { return r.Mask == 0xf00 }, tables: func(t int) bool { return between(t, 2004, 2005) },
		},
		{name: "Calico", links: []string{"cali", "vxlan.calico"}, ownRule: func(r Rule) bool {
			return r.Mask&0xffff == 0 && r.Mask&0xffff0000 != 0 && r.Mask != 0xff0000 && r.Mask&0xff0000 != 0
		}},
		{name: "Flannel", links: []string{"flannel", "cni"}},
		{name: "Mullvad VPN", ownRule: func(r Rule) bool { return r.Mark == 0x6d6f6c65 }, tables: func(t int) bool { return t == 0x6d6f6c65 }},
		{name: "dae", links: []string{"dae"}, ownRule: func(r Rule) bool { return r.Mask == 0x8000000 }, tables: func(t int) bool { return t == 2023 }},
		{name: "sing-box or mihomo", ownRule: func(r Rule) bool { return between(r.Priority, 9000, 9010) }, tables: func(t int) bool { return t == 2022 }},
	}
}

// ownerOf names the software that a foreign rule is known to come from; "" if it is not known.
func ownerOf(r Rule) string {
	for _, n := range neighbours() {
		if n.ownRule != nil && n.ownRule(r) || n.tables != nil && r.Table != 0 && n.tables(r.Table) {
			return n.name
		}
	}
	return ""
}

// ownerOfRoute does the same for a route, by the table or the device.
func ownerOfRoute(r Route) string {
	for _, n := range neighbours() {
		if n.tables != nil && n.tables(r.Table) || slices.ContainsFunc(n.links, func(p string) bool { return strings.HasPrefix(r.Dev, p) }) {
			return n.name
		}
	}
	return ""
}

// Neighbours names the other network software that snap shows, in a fixed order: what is of it is left alone.
func Neighbours(snap Snapshot) []string {
	var out []string
	for _, n := range neighbours() {
		found := slices.ContainsFunc(snap.Links, func(l Link) bool {
			return slices.ContainsFunc(n.links, func(p string) bool { return strings.HasPrefix(l.Name, p) })
		}) || slices.ContainsFunc(snap.Rules, func(r Rule) bool { return r.Protocol != Protocol && ownerOf(r) == n.name })
		if found {
			out = append(out, n.name)
		}
	}
	return out
}
