// SPDX-License-Identifier: GPL-3.0-or-later

package routing

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/gaissmai/bart"
)

// newPrefixSet returns the set of the prefixes. The second result is the index of the first invalid prefix, or -1.
func newPrefixSet(prefixes []netip.Prefix) (*bart.Lite, int) {
	set := &bart.Lite{}
	for i, p := range prefixes {
		p, ok := normalPrefix(p)
		if !ok {
			return nil, i
		}
		set.Insert(p)
	}
	return set, -1
}

// normalPrefix masks the prefix and turns v4-mapped ones (::ffff:0:0/96 and longer) into IPv4, as flow addresses are.
func normalPrefix(p netip.Prefix) (netip.Prefix, bool) {
	if p.IsValid() && p.Addr().Is4In6() && p.Bits() >= 96 {
		p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
	}
	return p.Masked(), p.IsValid()
}

// class is a set of address classes.
type class uint8

const (
	classLoopback class = 1 << iota
	classLinkLocal
	classMulticast
	classPrivate
	classOnLink // this host and its links, beside what the classes above cover: unspecified, broadcast, Input.Local
	classPublic // none of the above

	// classLocal is everything that never leaves the links of this machine.
	classLocal = classLoopback | classLinkLocal | classMulticast | classOnLink
)

// classNames are the classes as bypass writes them.
func classByName(name string) (class, bool) {
	switch name {
	case "local":
		return classLocal, true
	case "private":
		return classPrivate, true
	case "link-local":
		return classLinkLocal, true
	case "multicast":
		return classMulticast, true
	case "loopback":
		return classLoopback, true
	case "public":
		return classPublic, true
	}
	return 0, false
}

// ClassPrefixes returns the prefixes of an address class, for the kernel's tables: local, private, link-local, multicast or loopback. The
// class public, which is all the rest, and unknown names have none. Fake ranges inside a class are the caller's to leave out.
func ClassPrefixes(name string) []netip.Prefix {
	want, _ := classByName(name)
	var out []netip.Prefix
	for _, c := range []struct {
		class    class
		prefixes []string
	}{
		{classLoopback, []string{"127.0.0.0/8", "::1/128"}},
		{classLinkLocal, []string{"169.254.0.0/16", "fe80::/10"}},
		{classMulticast, []string{"224.0.0.0/4", "ff00::/8"}},
		{classPrivate, []string{"10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7"}},
		{classOnLink, []string{"0.0.0.0/32", "255.255.255.255/32", "::/128"}},
	} {
		if c.class&want == 0 {
			continue
		}
		for _, p := range c.prefixes {
			out = append(out, netip.MustParsePrefix(p))
		}
	}
	return out
}

// classifier tells the classes of an address.
type classifier struct {
	fake  *bart.Lite
	local *bart.Lite
}

// defaultFake are the ranges that are fake unless others are configured. They are left out of the classes always: the v6 one lies in
// fc00::/7, and a range that was fake before a restart may still be in an application's cache.
func defaultFake() []netip.Prefix {
	return []netip.Prefix{netip.MustParsePrefix("198.18.0.0/15"), netip.MustParsePrefix("fd4d:5554:4558::/64")}
}

// of returns the classes of an address, none for fake and invalid ones.
func (c *classifier) of(ip netip.Addr) class {
	if !ip.IsValid() || c.fake.Contains(ip) {
		return 0
	}
	var out class
	switch {
	case ip.IsLoopback():
		out = classLoopback
	case ip.IsLinkLocalUnicast():
		out = classLinkLocal
	case ip.IsMulticast():
		out = classMulticast
	case ip.IsUnspecified(), ip == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		out = classOnLink
	case ip.IsPrivate():
		out = classPrivate
	}
	if c.local.Contains(ip) {
		out |= classOnLink
	}
	if out == 0 {
		out = classPublic
	}
	return out
}

// portSet is sorted, disjoint ranges.
type portSet []PortRange

func newPortSet(ranges []PortRange) (portSet, int, error) {
	for i, r := range ranges {
		switch {
		case r.From == 0:
			return nil, i, errors.New("ports are 1 to 65535")
		case r.From > r.To:
			return nil, i, fmt.Errorf("the range %d-%d ends before it starts", r.From, r.To)
		}
	}
	sorted := slices.Clone(ranges)
	slices.SortFunc(sorted, func(a, b PortRange) int { return cmp.Compare(a.From, b.From) })
	out := sorted[:0]
	for _, r := range sorted {
		if n := len(out); n > 0 && int(r.From) <= int(out[n-1].To)+1 {
			out[n-1].To = max(out[n-1].To, r.To)
			continue
		}
		out = append(out, r)
	}
	return portSet(out), 0, nil
}

func (s portSet) contains(port uint16) bool {
	lo, hi := 0, len(s)
	for lo < hi {
		mid := int(uint(lo+hi) >> 1)
		switch {
		case port < s[mid].From:
			hi = mid
		case port > s[mid].To:
			lo = mid + 1
		default:
			return true
		}
	}
	return false
}
