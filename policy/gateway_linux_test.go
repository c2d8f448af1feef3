// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"encoding/binary"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	vnl "github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// in runs f in a namespace of another host, on the test's thread.
func (l *lab) in(ns *os.File, f func()) {
	l.t.Helper()
	if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
		l.t.Fatal(err)
	}
	defer func() {
		if err := unix.Setns(int(l.client.Fd()), unix.CLONE_NEWNET); err != nil {
			l.t.Error(err)
		}
	}()
	f()
}

// neighbour makes a host behind the lab's client, which is its router: NET.2 and NET.3 and the same of IPv6, over the device dev.
func (l *lab) neighbour(dev, net4, net6 string) *os.File {
	l.t.Helper()
	ns := newNetns(l.t)
	if err := unix.Setns(int(l.client.Fd()), unix.CLONE_NEWNET); err != nil {
		l.t.Fatal(err)
	}
	if err := vnl.LinkAdd(&vnl.Veth{LinkAttrs: vnl.LinkAttrs{Name: dev}, PeerName: "e0", PeerNamespace: vnl.NsFd(int(ns.Fd()))}); err != nil {
		l.t.Fatal(err)
	}
	r := strings.NewReplacer("DEV", dev, "NET4", net4, "NET6", net6)
	l.sh(r.Replace(`for i in accept_dad dad_transmits; do echo 0 > /proc/sys/net/ipv6/conf/DEV/$i; done
		ip link set DEV up; ip addr add NET4.1/24 dev DEV; ip addr add NET6::1/64 dev DEV nodad`))
	l.in(ns, func() {
		out, err := exec.Command("/bin/sh", "-ec", r.Replace(`for i in accept_dad dad_transmits; do echo 0 > /proc/sys/net/ipv6/conf/e0/$i; done
			ip link set lo up; ip link set e0 up; ip addr add NET4.2/24 dev e0; ip addr add NET4.3/24 dev e0
			ip addr add NET6::3/64 dev e0 nodad; ip addr add NET6::2/64 dev e0 nodad; ip route add default via NET4.1; ip -6 route add default via NET6::1`)).CombinedOutput()
		if err != nil {
			l.t.Fatalf("%v\n%s", err, out)
		}
	})
	return ns
}

// from makes ways those of another host.
func (l *lab) from(ns *os.File, ways []way) []way {
	for i := range ways {
		send := ways[i].send
		ways[i].send = func(*lab) (err error) {
			l.in(ns, func() { err = send(nil) })
			return err
		}
	}
	return ways
}

// hostWays are what a host sends to the world. at4 and at6 are its addresses.
func hostWays(at4, at6 string) []way {
	b4, b6 := local(netip.MustParseAddr(at4), 0), local(netip.MustParseAddr(at6), 0)
	dns4, dns6 := netip.MustParseAddr("10.9.0.53"), netip.MustParseAddr("fd09::53")
	return []way{
		{"udp4", "> 198.51.100.1:8001", udp(remote4, 8001, b4)},
		{"udp6", "> 2001:db8:ff::1:8002", udp(remote6, 8002, b6)},
		{"tcp4", "> 198.51.100.1:8003", tcp(remote4, 8003, b4)},
		{"tcp6", "> 2001:db8:ff::1:8004", tcp(remote6, 8004, b6)},
		{"icmp4", "icmp/8 " + at4 + " > 198.51.100.1", ping(remote4, b4)},
		{"icmp6", "ipv6-icmp/128 " + at6 + " > 2001:db8:ff::1", ping(remote6, b6)},
		{"dns 4", "> 198.51.100.1:53", udp(remote4, 53, b4)},
		{"dns 6", "> 2001:db8:ff::1:53", tcp(remote6, 53, b6)},
		{"dns to the LAN 4", "> 10.9.0.53:53", udp(dns4, 53, b4)},
		{"dns to the LAN 6", "> fd09::53:53", tcp(dns6, 53, b6)},
	}
}

// TestGateway: two hosts behind this one are captured, one of them by its address; its other address is not, nor is this machine itself.
func TestGateway(t *testing.T) {
	l := newLab(t)
	a, b := l.neighbour("g1", "192.168.50", "fd50"), l.neighbour("g2", "192.168.60", "fd60")
	forwarding := func() string { return l.sh("cat /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv6/conf/all/forwarding") }
	l.sh("echo 0 > /proc/sys/net/ipv4/ip_forward; echo 0 > /proc/sys/net/ipv6/conf/all/forwarding")
	before := l.start()
	spec := l.spec(ModeGateway)
	spec.Contexts[0].Select = []Selector{
		{Interfaces: []string{"g1"}},
		{Interfaces: []string{"g2"}, Sources: []netip.Prefix{netip.MustParsePrefix("192.168.60.2/32"), netip.MustParsePrefix("fd60::2/128")}},
	}
	l.enforce(&spec)
	if got := forwarding(); got != "1\n1\n" {
		t.Errorf("forwarding is %q", got)
	}
	l.mustCapture(l.from(a, hostWays("192.168.50.2", "fd50::2")))
	l.mustCapture(l.from(b, hostWays("192.168.60.2", "fd60::2")))
	l.mustPass(l.from(b, hostWays("192.168.60.3", "fd60::3")))
	l.mustPass(captured2())
	l.answers(a)

	// Private networks that this machine is in are reached directly, and so is this machine.
	l.mustPass(l.from(a, []way{{"LAN", "> 10.9.0.1:8100", udp(lan4, 8100)}, {"LAN 6", "> fd09::1:8101", tcp(lan6, 8101)}}))
	ln, err := net.Listen("tcp", ":8200")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	l.in(a, func() {
		for _, addr := range []string{"192.168.50.1:8200", "[fd50::1]:8200"} {
			c, err := net.DialTimeout("tcp", addr, 3*time.Second)
			if err != nil {
				t.Error(err)
				continue
			}
			c.Close()
		}
	})

	l.die()
	l.noLeaks(l.from(a, hostWays("192.168.50.2", "fd50::2")))
	l.noLeaks(l.from(b, hostWays("192.168.60.2", "fd60::2")))
	l.mustPass(l.from(b, hostWays("192.168.60.3", "fd60::3")))
	l.cleanup()
	if after := l.state(); after != before || forwarding() != "0\n0\n" {
		t.Errorf("not as before, forwarding %q:\n%s\n\nwas:\n%s", forwarding(), after, before)
	}
}

// answers: what comes out of the TUN reaches the host that it is for.
func (l *lab) answers(ns *os.File) {
	l.t.Helper()
	var c *net.UDPConn
	l.in(ns, func() {
		var err error
		if c, err = net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(192, 168, 50, 2), Port: 8300}); err != nil {
			l.t.Fatal(err)
		}
	})
	defer c.Close()
	p := []byte{
		0x45, 0, 0, 29, 0, 1, 0, 0, 64, 17, 0, 0, 198, 51, 100, 1, 192, 168, 50, 2,
		0x1f, 0x90, 0x20, 0x6c, 0, 9, 0, 0, 'x', // from port 8080 to 8300, without a checksum
	}
	binary.BigEndian.PutUint16(p[10:], checksum(p[:20]))
	if _, err := l.tun.Write(p); err != nil {
		l.t.Fatal(err)
	}
	if err := c.SetReadDeadline(time.Now().Add(3 * time.Second)); err != nil {
		l.t.Fatal(err)
	}
	buf := make([]byte, 10)
	if n, from, err := c.ReadFromUDP(buf); err != nil || n != 1 || from.Port != 8080 {
		l.t.Errorf("%d bytes from %v: %v", n, from, err)
	}
}
