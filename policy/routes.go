// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"cmp"
	"net/netip"
	"slices"
)

// mainTable is where routes come from: RT_TABLE_MAIN.
const mainTable = 254

const (
	// closedMetric is behind any other default route of a table: it answers when the TUN's route has vanished with the daemon.
	closedMetric = 9999
	// metric6 is what the kernel gives an IPv6 route without a metric. It is written out, so that what is read back is equal.
	metric6 = 1024
)

func defaultDst(v6 bool) netip.Prefix {
	if v6 {
		return netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	}
	return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
}

// captureRoutes fills table T: the TUN, and behind it nothing.
func captureRoutes(s Spec, c ContextSpec, snap Snapshot) []Route {
	var out []Route
	for _, v6 := range families(snap) {
		dst := defaultDst(v6)
		if c.TUN != "" {
			// src: a server that is bound to no address answers with the address of the route that its reply is first looked up by.
			r := Route{Table: s.Table(c.Slot), Dst: dst, Dev: c.TUN, Src: uplinkAddr(s, snap, v6), Protocol: Protocol}
			if v6 {
				r.Metric = metric6
			} else {
				r.LinkOnly = true
			}
			out = append(out, r)
		}
		out = append(out, Route{Table: s.Table(c.Slot), Dst: dst, Type: RouteUnreachable, Metric: closedMetric, Protocol: Protocol})
	}
	return out
}

// directRoutes fills table D, and returns the prefixes that the guard lets pass by any device.
func directRoutes(s Spec, c ContextSpec, snap Snapshot) ([]Route, []netip.Prefix) {
	d := s.DirectTable(c.Slot)
	var routes []Route
	direct := []netip.Prefix{
		// Link-local, whatever the device: no router forwards these (RFC 5771 section 4, RFC 4291 sections 2.5.6 and 2.7).
		netip.MustParsePrefix("224.0.0.0/24"), netip.MustParsePrefix("255.255.255.255/32"),
		netip.MustParsePrefix("fe80::/10"), netip.MustParsePrefix("ff01::/16"), netip.MustParsePrefix("ff02::/16"),
	}
	add := func(r Route, dst netip.Prefix) {
		r.Table, r.Dst, r.Protocol = d, dst, Protocol
		routes = append(routes, r)
		direct = append(direct, dst)
	}
	main := mainRoutes(s, snap)
	for _, r := range main {
		if !r.Via.IsValid() && isLocalPrefix(r.Dst) {
			add(r, r.Dst)
		}
	}
	for _, p := range c.Direct {
		p = p.Masked()
		direct = append(direct, p)
		bypassRoutes(main, p, add)
	}
	if up, ok := uplink(s, snap, false); ok {
		for _, p := range direct[:2] {
			routes = append(routes, Route{Table: d, Dst: p, Dev: up.Dev, LinkOnly: true, Protocol: Protocol})
		}
	}
	for _, p := range c.Fake {
		p = p.Masked()
		if !p.Addr().Is6() || snap.IPv6 {
			r := Route{Table: d, Dst: p, Type: RouteThrow, Protocol: Protocol}
			if p.Addr().Is6() {
				r.Metric = metric6
			}
			routes = append(routes, r)
		}
	}
	slices.SortFunc(routes, compareRoutes)
	return slices.Compact(routes), direct
}

// bypassRoutes copies how the main table reaches a prefix: the routes inside it, and the longest one around it cut down to it.
func bypassRoutes(main []Route, p netip.Prefix, add func(Route, netip.Prefix)) {
	around := -1
	var cover []Route
	exact := false
	for _, r := range main {
		switch {
		case r.Dst.Addr().Is6() != p.Addr().Is6():
		case r.Dst.Bits() >= p.Bits() && p.Contains(r.Dst.Addr()):
			add(r, r.Dst)
			exact = exact || r.Dst.Bits() == p.Bits()
		case r.Dst.Contains(p.Addr()) && r.Dst.Bits() > around:
			around, cover = r.Dst.Bits(), []Route{r}
		case r.Dst.Contains(p.Addr()) && r.Dst.Bits() == around:
			cover = append(cover, r)
		}
	}
	if exact {
		return
	}
	for _, r := range cover {
		add(r, p)
	}
}

// mainRoutes are the routes of the main table over devices that are not ours, of families that are there.
func mainRoutes(s Spec, snap Snapshot) []Route {
	var out []Route
	for _, r := range snap.Routes {
		if r.Table == mainTable && r.Type == RouteUnicast && r.Dev != "" && !ownDevice(s, r.Dev) && (snap.IPv6 || !r.V6()) {
			r.Dst = r.Dst.Masked()
			out = append(out, r)
		}
	}
	slices.SortFunc(out, compareRoutes)
	return out
}

// isLocalPrefix reports whether all of p is private (RFC 1918, RFC 4193) or link-local. A public prefix is never direct because it is
// on-link: whoever runs the DHCP server would choose what leaks.
func isLocalPrefix(p netip.Prefix) bool {
	local := func(a netip.Addr) bool { return a.IsPrivate() || a.IsLinkLocalUnicast() }
	return p.Bits() > 0 && local(p.Masked().Addr()) && local(lastAddr(p)) && p.Bits() >= minLocalBits(p)
}

// minLocalBits is the length of the well-known prefix that p must not be wider than.
func minLocalBits(p netip.Prefix) int {
	for _, w := range []string{"10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16", "fc00::/7", "fe80::/10"} {
		if wp := netip.MustParsePrefix(w); wp.Contains(p.Addr()) {
			return wp.Bits()
		}
	}
	return p.Addr().BitLen()
}

// uplink is the main table's best default route.
func uplink(s Spec, snap Snapshot, v6 bool) (Route, bool) {
	var best Route
	found := false
	for _, r := range mainRoutes(s, snap) {
		if r.V6() == v6 && r.Dst.Bits() == 0 && (!found || r.Metric < best.Metric) {
			best, found = r, true
		}
	}
	return best, found
}

// uplinkAddr is the source that traffic to everywhere has without us; invalid when there is none.
func uplinkAddr(s Spec, snap Snapshot, v6 bool) netip.Addr {
	up, ok := uplink(s, snap, v6)
	if ok && up.Src.IsValid() {
		return up.Src
	}
	names := map[int]string{}
	for _, l := range snap.Links {
		names[l.Index] = l.Name
	}
	// The kernel prefers the gateway's subnet (IPv4), and an address of the destination's kind, so a global one (IPv6, RFC 6724 rule 6).
	var best netip.Addr
	bestScore := 0
	for _, a := range snap.Addrs {
		ip := a.Prefix.Addr()
		if a.Unusable || ip.Is6() != v6 || ip.IsLoopback() || ownDevice(s, names[a.Link]) {
			continue
		}
		score := 1
		if ok && names[a.Link] == up.Dev {
			score += 4
		}
		if v6 && !ip.IsPrivate() || !v6 && up.Via.IsValid() && a.Prefix.Contains(up.Via) {
			score += 2
		}
		if score > bestScore {
			best, bestScore = ip, score
		}
	}
	return best
}

func ownDevice(s Spec, name string) bool {
	return slices.ContainsFunc(s.Contexts, func(c ContextSpec) bool { return c.TUN != "" && c.TUN == name })
}

func families(snap Snapshot) []bool {
	if snap.IPv6 {
		return []bool{false, true}
	}
	return []bool{false}
}

func compareRoutes(a, b Route) int {
	return cmp.Or(cmp.Compare(a.Table, b.Table), a.Dst.Addr().Compare(b.Dst.Addr()), cmp.Compare(a.Dst.Bits(), b.Dst.Bits()),
		cmp.Compare(a.Metric, b.Metric), cmp.Compare(a.Dev, b.Dev), a.Via.Compare(b.Via), cmp.Compare(a.Type, b.Type), a.Src.Compare(b.Src))
}
