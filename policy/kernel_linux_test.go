// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

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
		{"DNS rules and guard", "nft delete table inet mprox; for f in -4 -6; do ip $f rule del priority 8650; ip $f rule del priority 8651; done", captured},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			l := newLab(t)
			l.up()
			l.die()
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

// connect opens a TCP connection from the far side, and returns both ends.
func (l *lab) fromFar(ln net.Listener, to netip.Addr) (far, near net.Conn) {
	l.t.Helper()
	port := ln.Addr().(*net.TCPAddr).Port
	l.inFar(func() {
		d := net.Dialer{Timeout: 3 * time.Second}
		if remote4.Is4() == to.Is4() {
			d.LocalAddr = &net.TCPAddr{IP: remote4.AsSlice()}
		} else {
			d.LocalAddr = &net.TCPAddr{IP: remote6.AsSlice()}
		}
		var err error
		if far, err = d.Dial("tcp", netip.AddrPortFrom(to, uint16(port)).String()); err != nil {
			l.t.Fatalf("from far: %v", err)
		}
	})
	l.t.Cleanup(func() { far.Close() })
	near, err := ln.Accept()
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { near.Close() })
	return far, near
}

// echo proves that a connection carries data both ways.
func (l *lab) echo(a, b net.Conn) {
	l.t.Helper()
	for _, dir := range [][2]net.Conn{{a, b}, {b, a}} {
		if _, err := dir[0].Write([]byte("ping")); err != nil {
			l.t.Fatal(err)
		}
		_ = dir[1].SetReadDeadline(time.Now().Add(5 * time.Second))
		if _, err := io.ReadFull(dir[1], make([]byte, 4)); err != nil {
			l.t.Fatalf("connection is cut: %v", err)
		}
	}
}

// TestInbound: connections from outside, older and younger than the start, live while the daemon starts, works, is dead and is cleaned up.
func TestInbound(t *testing.T) {
	for _, rp := range []string{"0", "1", "2"} {
		t.Run("rp_filter "+rp, func(t *testing.T) {
			l := newLab(t)
			l.sh("for d in all c0; do echo " + rp + " > /proc/sys/net/ipv4/conf/$d/rp_filter; done")
			ln, err := net.Listen("tcp", ":0")
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			a1, b1 := l.fromFar(ln, client4)
			a2, b2 := l.fromFar(ln, client6)
			before, _ := l.up()
			all := func() {
				t.Helper()
				l.echo(a1, b1)
				l.echo(b2, a2)
				for _, to := range []netip.Addr{client4, client6} {
					far, near := l.fromFar(ln, to)
					l.echo(near, far)
				}
			}
			all()
			l.die()
			all()
			l.cleanup()
			all()
			if after := l.state(); after != before {
				t.Errorf("not as before:\n%s\n\nwas:\n%s", after, before)
			}
		})
	}
}

// TestInboundUDP: a server on the wildcard address answers from the address it was asked at, and pings are answered.
func TestInboundUDP(t *testing.T) {
	l := newLab(t)
	l.up()
	pc, err := net.ListenPacket("udp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	port := pc.LocalAddr().(*net.UDPAddr).Port
	for _, to := range []netip.Addr{client4, client6} {
		from := remote4
		if to.Is6() {
			from = remote6
		}
		l.inFar(func() {
			if err := udp(to, port, local(from, 5300))(l); err != nil {
				t.Fatal(err)
			}
		})
		b := make([]byte, 64)
		_ = pc.SetReadDeadline(time.Now().Add(3 * time.Second))
		_, peer, err := pc.ReadFrom(b)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := pc.WriteTo([]byte("y"), peer); err != nil {
			t.Fatal(err)
		}
		l.farSeen.await(t, fmt.Sprintf("udp %s:%d > %s:5300", to, port, from))
		l.inFar(func() {
			if err := ping(to, local(from, 0))(l); err != nil {
				t.Fatal(err)
			}
		})
		l.farSeen.await(t, map[bool]string{true: "icmp/0 ", false: "ipv6-icmp/129 "}[to.Is4()]+to.String()+" > "+from.String())
	}
}

// TestOldClients: what this machine had opened itself before the start is no inbound connection, whatever conntrack sees first.
func TestOldClients(t *testing.T) {
	l := newLab(t)
	var far net.Conn
	var ln net.Listener
	var err error
	l.inFar(func() { ln, err = net.Listen("tcp", "198.51.100.1:0") })
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	near, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer near.Close()
	if far, err = ln.Accept(); err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	us, err := net.ListenPacket("udp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer us.Close()
	var them net.PacketConn
	l.inFar(func() { them, err = net.ListenPacket("udp", "198.51.100.1:7000") })
	if err != nil {
		t.Fatal(err)
	}
	defer them.Close()
	port := us.LocalAddr().(*net.UDPAddr).Port
	l.up()
	if _, err := far.Write([]byte("data")); err != nil { // the first packet that conntrack sees comes from outside
		t.Fatal(err)
	}
	if _, err := io.ReadFull(near, make([]byte, 4)); err != nil {
		t.Fatal(err)
	}
	if _, err := them.WriteTo([]byte("data"), &net.UDPAddr{IP: client4.AsSlice(), Port: port}); err != nil {
		t.Fatal(err)
	}
	if _, _, err := us.ReadFrom(make([]byte, 16)); err != nil {
		t.Fatal(err)
	}
	l.marker()
	l.farSeen.reset()
	_, _ = near.Write([]byte("leak"))
	_, _ = us.WriteTo([]byte("leak"), them.LocalAddr())
	l.tunSeen.await(t, "> 198.51.100.1:7000")
	l.marker()
	if l.farSeen.has("> 198.51.100.1:") {
		t.Errorf("leaked: %v", l.farSeen.list())
	}
}

// TestLoopbackDNS: port 53 over loopback is answered by our listener, and by nobody while the daemon is dead.
func TestLoopbackDNS(t *testing.T) {
	l := newLab(t)
	asked := newSeen()
	serve := func(addr, name string) uint16 {
		pc, err := net.ListenPacket("udp", addr)
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			b := make([]byte, 64)
			for {
				n, from, err := pc.ReadFrom(b)
				if err != nil {
					return
				}
				asked.add(name + " " + string(b[:n]))
				_, _ = pc.WriteTo([]byte(name), from)
			}
		}()
		t.Cleanup(func() { pc.Close(); <-done })
		return uint16(pc.LocalAddr().(*net.UDPAddr).Port)
	}
	serve("127.0.0.53:53", "resolved")
	serve("10.9.0.2:53", "dnsmasq")
	serve("[::1]:53", "local6")
	docker := serve("127.0.0.11:0", "docker")
	l.sh(fmt.Sprintf(`nft add table ip docker; nft 'add chain ip docker out { type nat hook output priority -100; }'
		nft add rule ip docker out ip daddr 127.0.0.11 udp dport 53 dnat to 127.0.0.11:%d`, docker))
	p4, p6 := serve("127.0.0.1:0", "ours"), serve("[::1]:0", "ours")
	ask := func(server string) string {
		c, err := net.Dial("udp", net.JoinHostPort(server, "53"))
		if err != nil {
			return err.Error()
		}
		defer c.Close()
		if _, err := c.Write([]byte(server)); err != nil {
			return "blocked"
		}
		_ = c.SetReadDeadline(time.Now().Add(time.Second))
		b := make([]byte, 64)
		n, err := c.Read(b)
		if err != nil {
			return err.Error()
		}
		return string(b[:n])
	}
	servers := map[string]string{"127.0.0.53": "resolved", "127.0.0.11": "docker", "10.9.0.2": "dnsmasq", "::1": "local6"}
	for s, want := range servers {
		if got := ask(s); got != want {
			t.Fatalf("before: %s answered by %q, want %q", s, got, want)
		}
	}
	l.up(func(c *ContextSpec) { c.DNSPort4, c.DNSPort6 = p4, p6 })
	spec := l.m.spec
	spec.Contexts[0].DNSPort4, spec.Contexts[0].DNSPort6 = p4, p6
	if err := l.m.Apply(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	for s := range servers {
		if got := ask(s); got != "ours" {
			t.Errorf("%s answered by %q, want ours", s, got)
		}
	}
	l.die()
	asked.reset()
	for s := range servers {
		if got := ask(s); got != "blocked" {
			t.Errorf("dead: %s answered by %q", s, got)
		}
	}
	if got := asked.list(); len(got) > 0 {
		t.Errorf("dead: asked %v", got)
	}
	l.cleanup()
	for s, want := range servers {
		if got := ask(s); got != want {
			t.Errorf("after: %s answered by %q, want %q", s, got, want)
		}
	}
}

// TestStop: every way to stop leaves what it says, and nothing else.
func TestStop(t *testing.T) {
	l := newLab(t)
	l.sh(`nft add table inet other; nft 'add chain inet other c { type filter hook output priority 0; }'; ip rule add priority 5000 fwmark 0xca6c lookup 51820
		ip route add 203.0.113.0/24 via 10.9.0.1 table 51820`)
	before, _ := l.up()
	if err := l.m.Close(t.Context(), StopBlock); err != nil {
		t.Fatal(err)
	}
	l.host.Close()
	l.tun.Close()
	l.noLeaks(captured())
	l.noLeaks(escapes())
	l.m = nil
	l.cleanup()
	l.awaitState(func(s string) bool { return s == before })
	before, _ = l.up()
	if err := l.m.Close(t.Context(), StopConfigured); err != nil {
		t.Fatal(err)
	}
	l.tun.Close()
	l.awaitState(func(s string) bool { return s == before })
	entries, err := os.ReadDir(l.dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(entries) > 0 {
		t.Errorf("left in the directory: %v", entries)
	}
}

// TestAdopt: the next daemon takes over what a killed one has left, without an open moment, and undoes all of it.
func TestAdopt(t *testing.T) {
	l := newLab(t)
	before, _ := l.up()
	l.die()
	stop := make(chan struct{})
	sending := make(chan struct{})
	h := l.spawn(l.outside())
	go func() { // the whole time, one datagram after the other
		defer close(sending)
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
				h.do("udp %s 6000", remote4)
				h.do("udp %s 6001 0 c0", remote6)
			}
		}
	}()
	l.farSeen.reset()
	l.start()
	spec := l.spec(ModeGlobal)
	if err := l.m.Prepare(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	l.openTUN("mprox0")
	spec.Contexts[0].TUN = "mprox0"
	if err := l.m.Apply(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	l.tunSeen.await(t, "> 198.51.100.1:6000")
	close(stop)
	<-sending
	l.marker()
	if l.farSeen.has(":6000") || l.farSeen.has(":6001") {
		t.Errorf("leaked: %v", l.farSeen.list())
	}
	l.mustCapture(captured())
	if err := l.m.Close(t.Context(), StopOpen); err != nil {
		t.Fatal(err)
	}
	l.tun.Close()
	l.awaitState(func(s string) bool { return s == before })
}

// TestRepair: what others delete is back within a second.
func TestRepair(t *testing.T) {
	l := newLab(t)
	l.up()
	whole := l.state()
	for object, remove := range map[string]string{
		"rule":  "ip rule del priority 8653; ip -6 rule del priority 8650",
		"route": `ip route del unreachable default table 19760 metric 9999; ip route flush table 19920; ip -6 route flush table 19760`,
		"nft":   "nft flush ruleset",
		"link":  "ip link set mprox0 down",
	} {
		was := l.m.Stats().Restored[object]
		l.sh(remove)
		start := time.Now()
		l.awaitState(func(s string) bool { return s == whole })
		if d := time.Since(start); d > time.Second {
			t.Errorf("%s: took %s", object, d)
		}
		if got := l.m.Stats().Restored[object]; got == was {
			t.Errorf("%s: not counted", object)
		}
	}
	l.mustCapture(captured())
	l.noLeaks(escapes())
}

// TestFollow: routes and addresses of the links are followed.
func TestFollow(t *testing.T) {
	l := newLab(t)
	l.up()
	l.sh("ip addr add 192.168.7.2/24 dev c0")
	l.awaitState(func(s string) bool {
		return strings.Contains(s, "192.168.7.0/24 dev c0 table 19920") && strings.Contains(s, "10.9.0.0/24, 192.168.7.0/24")
	})
	l.sh("ip addr del 10.9.0.2/24 dev c0; ip route replace default via 192.168.7.1")
	l.awaitState(func(s string) bool {
		return strings.Contains(s, "default dev mprox0 table 19760 proto 77 scope link src 192.168.7.2")
	})
}

// TestConflict: whoever was there first stays, and is named.
func TestConflict(t *testing.T) {
	for _, tt := range []struct{ name, add, want string }{
		{"priority", "ip rule add priority 8100 lookup 77", "8100"},
		{"mark", "ip rule add priority 100 fwmark 0x51000000/0xff000000 lookup 77", "0x51000000"},
		{"table", "ip route add 203.0.113.0/24 via 10.9.0.1 table 19800", "203.0.113.0/24"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l := newLab(t)
			l.sh(tt.add)
			before := l.start()
			err := l.m.Prepare(t.Context(), l.spec(ModeGlobal))
			if !errors.Is(err, ErrConflict) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want a conflict with %s", err, tt.want)
			}
			if after := l.state(); after != before {
				t.Errorf("changed something:\n%s", after)
			}
		})
	}
}

// TestSecond: one daemon a namespace, whatever its socket is called.
func TestSecond(t *testing.T) {
	l := newLab(t)
	l.up()
	spec := l.spec(ModeGlobal)
	spec.Instance = InstanceFor(filepath.Join(l.dir, "other", "b.sock"))
	m := NewManager(Config{Host: l.host, LockDir: l.dir})
	if err := m.Prepare(t.Context(), spec); !errors.Is(err, ErrConflict) || !strings.Contains(err.Error(), "mprox.sock") {
		t.Errorf("got %v, want a conflict that names the first", err)
	}
	r, err := Cleanup(t.Context(), Config{Host: l.host, LockDir: l.dir}, l.spec(ModeGlobal).Instance)
	if err != nil || r.Skipped == "" {
		t.Errorf("cleanup beside a living daemon: %+v, %v", r, err)
	}
	l.mustCapture(captured())
}

// TestDamagedJournal: cleanup says so, and removes what carries our marks.
func TestDamagedJournal(t *testing.T) {
	l := newLab(t)
	l.up()
	l.die()
	file := l.spec(ModeGlobal).Instance.Journal
	good, err := readJournal(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(`{"version": 1, "socket": `), 0o600); err != nil {
		t.Fatal(err)
	}
	host, err := NewLinuxHost()
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	_, err = Cleanup(t.Context(), Config{Host: host, LockDir: l.dir}, l.spec(ModeGlobal).Instance)
	if !errors.Is(err, ErrJournal) {
		t.Errorf("got %v, want ErrJournal", err)
	}
	if s := l.state(); strings.Contains(s, "proto 77") || strings.Contains(s, "inet mprox") {
		t.Errorf("left:\n%s", s)
	}
	// This process is still in the daemon's cgroup; the good journal knows.
	if err := good.write(file); err != nil {
		t.Fatal(err)
	}
}
