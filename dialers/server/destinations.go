// SPDX-License-Identifier: GPL-3.0-or-later

package server

import (
	"fmt"
	"net/netip"
	"strings"
)

// maxDestinations bounds each list, since every connection goes through both.
const maxDestinations = 1000

// destination is one prefix and what is said about it.
type destination struct {
	prefix netip.Prefix
	allow  bool
	given  bool // not one of the defaults
}

// Destinations returns a Config.Allow. A list has addresses, prefixes, and the words any, loopback, link-local and private. The longest prefix
// that holds an address decides; of two of the same length what is given goes before the defaults, and deny before allow.
//
// By default all is allowed but what only this machine and its links can reach: loopback, link-local (the metadata services of clouds are
// there), and the unspecified addresses, which Linux connects to loopback. Otherwise whoever may use the server could reach services that
// trust the machine itself. Its other addresses, and private networks, are not denied. An IPv6 address that stands for an IPv4 address on the
// other side of a translator or tunnel must be allowed as both.
func Destinations(allow, deny []string) (func(netip.AddrPort) bool, error) {
	list := []destination{{prefix: netip.PrefixFrom(netip.IPv4Unspecified(), 0), allow: true}, {prefix: netip.PrefixFrom(netip.IPv6Unspecified(), 0), allow: true}}
	for _, word := range []string{"loopback", "link-local"} {
		for _, p := range class(word) {
			list = append(list, destination{prefix: p})
		}
	}
	for _, l := range []struct {
		words []string
		allow bool
	}{{allow, true}, {deny, false}} {
		if len(l.words) > maxDestinations {
			return nil, fmt.Errorf("more than %d destinations", maxDestinations)
		}
		for _, w := range l.words {
			ps, err := parseDestination(w)
			if err != nil {
				return nil, err
			}
			for _, p := range ps {
				list = append(list, destination{prefix: p, allow: l.allow, given: true})
			}
		}
	}
	return func(ap netip.AddrPort) bool {
		ip := ap.Addr().Unmap().WithZone("")
		v4, stands := embedded(ip)
		return decide(list, ip) && (!stands || decide(list, v4))
	}, nil
}

// decide looks an address up.
func decide(list []destination, ip netip.Addr) bool {
	var best *destination
	for i := range list {
		if d := &list[i]; d.prefix.Contains(ip) && (best == nil || d.before(best)) {
			best = d
		}
	}
	return best != nil && best.allow
}

// embedded returns the IPv4 address that an IPv6 address stands for: NAT64 (RFC 6052, and RFC 8215 with a prefix of 96 bits), 6to4
// (RFC 3056), IPv4-compatible (RFC 4291 section 2.5.5.1) and IPv4-translated (RFC 2765).
func embedded(ip netip.Addr) (netip.Addr, bool) {
	if !ip.Is6() {
		return netip.Addr{}, false
	}
	b := ip.As16()
	switch {
	case b[0] == 0x20 && b[1] == 0x02:
		return netip.AddrFrom4([4]byte(b[2:6])), true
	case b[0] == 0 && b[1] == 0x64 && b[2] == 0xff && b[3] == 0x9b, // 64:ff9b::/96 and 64:ff9b:1::/48
		[12]byte(b[:12]) == [12]byte{}, [12]byte(b[:12]) == [12]byte{8: 0xff, 9: 0xff}:
		return netip.AddrFrom4([4]byte(b[12:])), true
	}
	return netip.Addr{}, false
}

// before reports whether d decides and not b, where both hold an address.
func (d *destination) before(b *destination) bool {
	switch {
	case d.prefix.Bits() != b.prefix.Bits():
		return d.prefix.Bits() > b.prefix.Bits()
	case d.given != b.given:
		return d.given
	}
	return !d.allow
}

func parseDestination(word string) ([]netip.Prefix, error) {
	if ps := class(word); ps != nil {
		return ps, nil
	}
	if strings.Contains(word, "/") {
		p, err := netip.ParsePrefix(word)
		if err != nil || p != p.Masked() || p.Addr().Is4In6() {
			return nil, fmt.Errorf("%q is not a prefix such as 192.0.2.0/24", word)
		}
		return []netip.Prefix{p}, nil
	}
	ip, err := netip.ParseAddr(word)
	if err != nil || ip.Zone() != "" {
		return nil, fmt.Errorf("%q is neither an address, nor a prefix, nor any, loopback, link-local or private", word)
	}
	ip = ip.Unmap()
	return []netip.Prefix{netip.PrefixFrom(ip, ip.BitLen())}, nil
}

// class returns the prefixes of a word, or nil.
func class(word string) []netip.Prefix {
	var text string
	switch word {
	case "any":
		text = "0.0.0.0/0 ::/0"
	case "loopback":
		text = "127.0.0.0/8 ::1/128 0.0.0.0/8 ::/128"
	case "link-local":
		text = "169.254.0.0/16 fe80::/10 224.0.0.0/24 255.255.255.255/32 ff01::/16 ff02::/16"
	case "private":
		text = "10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 100.64.0.0/10 fc00::/7"
	}
	var out []netip.Prefix
	for s := range strings.FieldsSeq(text) {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}
