// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"net/netip"
	"slices"
)

// lastAddr is the highest address of a prefix.
func lastAddr(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := range b {
		if host := 8*(i+1) - p.Bits(); host > 0 {
			b[i] |= byte(0xff >> max(0, 8-host))
		}
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// rangesOf turns the prefixes of one family into ascending, disjoint ranges that do not touch: the kernel refuses interval sets with
// overlapping elements.
func rangesOf(prefixes []netip.Prefix, v6 bool) []addrRange {
	var in []addrRange
	for _, p := range prefixes {
		if p.Addr().Is6() == v6 {
			p = p.Masked()
			in = append(in, addrRange{p.Addr(), lastAddr(p)})
		}
	}
	slices.SortFunc(in, func(a, b addrRange) int { return a.from.Compare(b.from) })
	var out []addrRange
	for _, r := range in {
		if n := len(out); n > 0 && (!out[n-1].to.Less(r.from) || out[n-1].to.Next() == r.from) {
			if out[n-1].to.Less(r.to) {
				out[n-1].to = r.to
			}
			continue
		}
		out = append(out, r)
	}
	return out
}

// subtract removes the addresses of cut (ascending, disjoint) from rs.
func subtract(rs, cut []addrRange) []addrRange {
	for _, c := range cut {
		var out []addrRange
		for _, r := range rs {
			if r.to.Less(c.from) || c.to.Less(r.from) {
				out = append(out, r)
				continue
			}
			if r.from.Less(c.from) {
				out = append(out, addrRange{r.from, c.from.Prev()})
			}
			if c.to.Less(r.to) {
				out = append(out, addrRange{c.to.Next(), r.to})
			}
		}
		rs = out
	}
	return rs
}
