// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"
)

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
