// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"net/netip"
	"testing"
)

// captured are ways that must come out of the TUN in global mode.
func captured() []way {
	dns4, dns6 := netip.MustParseAddr("10.9.0.53"), netip.MustParseAddr("fd09::53")
	return []way{
		{"udp4", "udp 10.9.0.2:", udp(remote4, 1001)},
		{"udp6", "udp 2001:db8:9::2:", udp(remote6, 1002)},
		{"tcp4", "> 198.51.100.1:1003", tcp(remote4, 1003)},
		{"tcp6", "> 2001:db8:ff::1:1004", tcp(remote6, 1004)},
		{"icmp4", "icmp/8 10.9.0.2 > 198.51.100.1", ping(remote4)},
		{"icmp6", "ipv6-icmp/128 2001:db8:9::2 > 2001:db8:ff::1", ping(remote6)},
		{"dns to the LAN, udp4", "> 10.9.0.53:53", udp(dns4, 53)},
		{"dns to the LAN, udp6", "> fd09::53:53", udp(dns6, 53)},
		{"dns to the LAN, tcp4", "> 10.9.0.53:53", tcp(dns4, 53)},
		{"dns to the LAN, tcp6", "> fd09::53:53", tcp(dns6, 53)},
		{"public address on the link", "> 2001:db8:9::77:1005", udp(netip.MustParseAddr("2001:db8:9::77"), 1005)},
		{"fake 4", "> 198.18.0.5:1006", tcp(netip.MustParseAddr("198.18.0.5"), 1006)},
		{"fake 6", "> fd4d:5554:4558::5:1007", tcp(netip.MustParseAddr("fd4d:5554:4558::5"), 1007)},
		{"foreign bypass mark", "> 198.51.100.1:1008", udp(remote4, 1008, mark(0x4c000000))},
		{"inbound mark set by hand", "> 198.51.100.1:1009", udp(remote4, 1009, mark(InboundMark(DefaultMask)))},
		{"inbound mark set by hand, v6", "> 2001:db8:ff::1:1010", tcp(remote6, 1010, mark(InboundMark(DefaultMask)))},
		{"another mark", "> 198.51.100.1:1011", tcp(remote4, 1011, mark(0xca6c))},
	}
}

func (l *lab) mustCapture(ways []way) {
	l.t.Helper()
	for _, w := range ways {
		l.tunSeen.reset()
		l.farSeen.reset()
		if err := w.send(l); err != nil {
			l.t.Errorf("%s: %v", w.name, err)
			continue
		}
		l.tunSeen.await(l.t, w.want)
		if l.farSeen.has(w.want) {
			l.t.Errorf("%s: leaked", w.name)
		}
	}
}

func TestGlobalCapture(t *testing.T) {
	l := newLab(t)
	before, _ := l.up()
	t.Log(l.state())
	l.mustCapture(captured())
	_ = before
}
