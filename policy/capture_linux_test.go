// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"context"
	"errors"
	"net/netip"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// captured are ways that must come out of the TUN in global mode.
func captured() []way {
	dns4, dns6 := netip.MustParseAddr("10.9.0.53"), netip.MustParseAddr("fd09::53")
	return []way{
		{"udp4", "> 198.51.100.1:1001", udp(remote4, 1001)},
		{"udp6", "> 2001:db8:ff::1:1002", udp(remote6, 1002)},
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
		{"another mark", "> 198.51.100.1:1011", tcp(remote4, 1011, mark(0xca6c))},
	}
}

// forged are marks that somebody with CAP_NET_ADMIN sets: nftables takes them off again.
func forged() []way {
	return []way{
		{"a mark beside bypass", "> 198.51.100.1:1108", udp(remote4, 1108, mark(0x4c000000))},
		{"inbound mark set by hand", "> 198.51.100.1:1109", udp(remote4, 1109, mark(InboundMark(DefaultMask)))},
		{"inbound mark set by hand, v6", "> 2001:db8:ff::1:1110", tcp(remote6, 1110, mark(InboundMark(DefaultMask)))},
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
	l.up()
	l.mustCapture(captured())
	l.mustCapture(forged())
	l.resetStays()
	// The source is what it would be without us.
	l.tunSeen.reset()
	l.mustCapture([]way{
		{"source 4", "udp 10.9.0.2:", udp(remote4, 1201)}, {"source 6", "udp 2001:db8:9::2:", udp(remote6, 1202)},
	})
}

// escapes are ways around routes and rules. None may reach the far side, whether the daemon lives or not.
func escapes() []way {
	c0 := device("c0")
	return []way{
		{"bound to the device, udp4", "> 198.51.100.1:2001", udp(remote4, 2001, c0)},
		{"bound to the device, udp6", "> 2001:db8:ff::1:2002", udp(remote6, 2002, c0)},
		{"bound to the device, tcp4", "> 198.51.100.1:2003", tcp(remote4, 2003, c0)},
		{"bound to the device, tcp6", "> 2001:db8:ff::1:2004", tcp(remote6, 2004, c0)},
		{"bound to the device, icmp4", "icmp/8 10.9.0.2 > 198.51.100.1", ping(remote4, c0)},
		{"bound to the device, icmp6", "> 2001:db8:ff::1", ping(remote6, c0)},
		{"unicast if, udp4", "> 198.51.100.1:2005", udp(remote4, 2005, unicastIf("c0"))},
		{"unicast if, udp6", "> 2001:db8:ff::1:2006", udp(remote6, 2006, unicastIf("c0"))},
		{"unicast if, tcp6", "> 2001:db8:ff::1:2007", tcp(remote6, 2007, unicastIf("c0"))},
		{"bound to the device, dns to the LAN, udp4", "> 10.9.0.53:53", udp(netip.MustParseAddr("10.9.0.53"), 53, c0)},
		{"bound to the device, dns to the LAN, udp6", "> fd09::53:53", udp(netip.MustParseAddr("fd09::53"), 53, c0)},
		{"bound to the device, public neighbour", "> 2001:db8:9::1:2008", udp(netip.MustParseAddr("2001:db8:9::1"), 2008, c0)},
		{"global multicast 6", "> ff0e::1:2009", udp(netip.MustParseAddr("ff0e::1"), 2009, c0)},
		{"marked as inbound and bound", "> 2001:db8:ff::1:2010", udp(remote6, 2010, c0, mark(InboundMark(DefaultMask)))},
		{"marked as unused and bound", "> 2001:db8:ff::1:2011", udp(remote6, 2011, c0, mark(0x4f000000))},
	}
}

// direct are ways that must reach the far side, daemon alive or not.
func direct() []way {
	return []way{
		{"LAN, udp4", "udp 10.9.0.2:", udp(lan4, 3001)},
		{"LAN, tcp4", "> 10.9.0.1:3002", tcp(lan4, 3002)},
		{"LAN, udp6", "udp fd09::2:", udp(lan6, 3003)},
		{"LAN, icmp4", "icmp/8 10.9.0.2 > 10.9.0.1", ping(lan4)},
		{"LAN, icmp6", "ipv6-icmp/128 fd09::2 > fd09::1", ping(lan6)},
		{"mDNS 4", "> 224.0.0.251:5353", udp(netip.MustParseAddr("224.0.0.251"), 5353)},
		{"mDNS 6", "> ff02::fb:5353", udp(netip.MustParseAddr("ff02::fb"), 5353, device("c0"))},
		{"broadcast", "> 255.255.255.255:3004", udp(netip.MustParseAddr("255.255.255.255"), 3004, broadcast)},
		{"subnet broadcast", "> 10.9.0.255:3005", udp(netip.MustParseAddr("10.9.0.255"), 3005, broadcast)},
		{"DHCP renewal", "udp 10.9.0.2:68 > 198.51.100.1:67", udp(remote4, 67, local(client4, 68))},
	}
}

func broadcast(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_BROADCAST, 1) }

func local(a netip.Addr, port int) func(int) error {
	return func(fd int) error {
		return errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1), unix.Bind(fd, sockaddr(a, port)))
	}
}

// leaks tries ways, and returns those that got out. A packet that went nowhere is noticed by a marker that is sent after it.
func (l *lab) leaks(ways []way) []string {
	l.t.Helper()
	var out []string
	for _, w := range ways {
		l.farSeen.reset()
		_ = w.send(l) // refused is as good as lost
		l.marker()
		if l.farSeen.has(w.want) {
			out = append(out, w.name)
		}
	}
	return out
}

// marker sends a datagram that is always direct, and waits for it.
func (l *lab) marker() {
	l.t.Helper()
	if err := udp(lan4, 9)(l); err != nil {
		l.t.Fatalf("marker: %v", err)
	}
	l.farSeen.await(l.t, "> 10.9.0.1:9")
}

func (l *lab) noLeaks(ways []way) {
	l.t.Helper()
	for _, name := range l.leaks(ways) {
		l.t.Errorf("leaked: %s", name)
	}
}

func (l *lab) mustPass(ways []way) {
	l.t.Helper()
	for _, w := range ways {
		l.farSeen.reset()
		if err := w.send(l); err != nil {
			l.t.Errorf("%s: %v", w.name, err)
			continue
		}
		l.farSeen.await(l.t, w.want)
	}
}

func TestEscapesAndDirect(t *testing.T) {
	l := newLab(t)
	l.up()
	l.noLeaks(escapes())
	l.mustPass(direct())
}

// TestTunnelVision adds what a DHCP server could: routes more specific than any default.
func TestTunnelVision(t *testing.T) {
	l := newLab(t)
	_, spec := l.up()
	l.sh(`ip route add 0.0.0.0/1 via 10.9.0.1; ip route add 128.0.0.0/1 via 10.9.0.1; ip route add 198.51.100.0/25 via 10.9.0.1
		ip -6 route add 2000::/3 via 2001:db8:9::1; ip -6 route add 2001:db8:ff::/64 via 2001:db8:9::1; ip route add 198.51.100.1/32 dev c0`)
	if err := l.m.Apply(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	l.mustCapture(captured())
	l.noLeaks(escapes())
}

// TestDead proves that nothing captured leaves once the daemon has been killed.
func TestDead(t *testing.T) {
	l := newLab(t)
	before, _ := l.up()
	l.die()
	l.noLeaks(captured())
	l.noLeaks(forged())
	l.noLeaks(escapes())
	l.mustPass(direct())
	l.cleanup()
	if after := l.state(); after != before {
		t.Errorf("not as before:\n%s\n\nwas:\n%s", after, before)
	}
	if got := l.leaks(captured()); len(got) == 0 {
		t.Error("nothing passes after cleanup: these tests prove nothing")
	}
}

// cleanup is `mprox cleanup`.
func (l *lab) cleanup() Report {
	l.t.Helper()
	host, err := NewLinuxHost()
	if err != nil {
		l.t.Fatal(err)
	}
	defer host.Close()
	r, err := Cleanup(context.Background(), Config{Host: host, LockDir: l.dir}, InstanceFor(filepath.Join(l.dir, "mprox.sock")))
	if err != nil {
		l.t.Fatal(err)
	}
	return r
}

// TestGuardsMatter takes one guard at a time away from a dead daemon: the leak test must notice.
func TestGuardsMatter(t *testing.T) {
	tests := []struct {
		name   string
		remove string
		ways   func() []way
	}{
		{"guard table", "nft delete table inet mprox", escapes},
		{"guard's last rule", `nft -a list chain inet mprox guard_0 | sed -n 's/.*counter name "guard_dropped" drop # handle //p' | tail -1 | xargs nft delete rule inet mprox guard_0 handle`, escapes},
		{"guard's hook", "nft flush chain inet mprox guard", escapes},
		{"guard's DNS rule", `nft -a list chain inet mprox guard_0 | sed -n 's/.*dport 53 .* # handle //p' | xargs -n1 nft delete rule inet mprox guard_0 handle`, escapes},
		{"marks cleared", "nft flush chain inet mprox output", escapes},
		{"rules and guard", "nft delete table inet mprox; for f in -4 -6; do for i in $(ip $f rule | grep -c 'proto 77' | xargs seq); do ip $f rule del proto 77; done; done", captured},
		{"closed routes and guard", "nft delete table inet mprox; ip route flush table 19760; ip -6 route flush table 19760", captured},
		{"DNS rules and guard", "nft delete table inet mprox; for f in -4 -6; do ip $f rule del priority 8810; ip $f rule del priority 8811; done", captured},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			l := newLab(t)
			l.up()
			l.die()
			l.sh("nft delete table netdev mprox-egress || true") // stops the same a second time: see TestPacketSockets
			l.sh(tt.remove)
			if got := l.leaks(tt.ways()); len(got) == 0 {
				t.Errorf("nothing leaks without it\n%s", l.state())
			} else {
				t.Logf("leaks: %v", got)
			}
		})
	}
}

// TestAnyOneMissing: in global mode no single one of nft, rules, routes is what capture of ordinary sockets hangs on.
func TestAnyOneMissing(t *testing.T) {
	for name, remove := range map[string]string{
		"nft":    "nft flush ruleset",
		"rules":  "for f in -4 -6; do ip $f rule flush; ip $f rule add priority 0 lookup local; ip $f rule add priority 32766 lookup main; done",
		"routes": "ip route flush table 19760; ip -6 route flush table 19760; ip route flush table 19920; ip -6 route flush table 19920",
	} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t)
			l.up()
			l.die()
			l.sh(remove)
			l.noLeaks(captured())
		})
	}
}

// TestBypass: the bypass mark counts for the daemon's own cgroup only, which is this process's.
func TestBypass(t *testing.T) {
	l := newLab(t)
	l.up()
	bypass := BypassMark(DefaultMask)
	mine := []way{
		{"udp4", "> 198.51.100.1:4001", udp(remote4, 4001, mark(bypass))},
		{"udp6", "> 2001:db8:ff::1:4002", udp(remote6, 4002, mark(bypass))},
		{"tcp4", "> 198.51.100.1:4003", tcp(remote4, 4003, mark(bypass))},
		{"tcp6", "> 2001:db8:ff::1:4004", tcp(remote6, 4004, mark(bypass))},
		{"dns", "> 10.9.0.53:53", udp(netip.MustParseAddr("10.9.0.53"), 53, mark(bypass))},
	}
	l.mustPass(mine)
	h := l.spawn(l.outside())
	theirs := []way{
		h.way("udp4", "> 198.51.100.1:4101", "udp %s 4101 %d", remote4, bypass), h.way("tcp6", "> 2001:db8:ff::1:4102", "tcp %s 4102 %d", remote6, bypass),
	}
	l.mustCapture(theirs)
	theirs = append(theirs, h.way("dns", "> 10.9.0.53:53", "udp 10.9.0.53 53 %d", bypass),
		h.way("udp6 bound", "> 2001:db8:ff::1:4103", "udp %s 4103 %d c0", remote6, bypass),
		h.way("udp4 bound", "> 198.51.100.1:4104", "udp %s 4104 %d c0", remote4, bypass))
	l.noLeaks(theirs)
	l.die()
	l.noLeaks(theirs)
}
