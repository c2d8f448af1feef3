// SPDX-License-Identifier: GPL-3.0-or-later

package lab

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// maxCaptured bounds the packets kept; a test that sends more asks for a capture it does not need.
	maxCaptured = 1 << 17
	// sentinelType is the first EtherType for local experiments (IEEE 802): the client sends one such frame to mark a point in time.
	sentinelType = 0x88b5
	snapLen      = 256
)

// Packet is what a frame on the client's uplink said.
type Packet struct {
	At           time.Time
	EtherType    uint16
	Src, Dst     netip.Addr
	Proto        uint8 // IP protocol, after extension headers
	SPort, DPort uint16
	ICMPType     uint8
	Fragment     bool   // not the first fragment: no ports
	DNSName      string // the question of a DNS query over UDP
}

// String describes the packet in one line.
func (p Packet) String() string {
	at := p.At.Format("15:04:05.000000")
	switch p.Proto {
	case unix.IPPROTO_TCP, unix.IPPROTO_UDP:
		name := map[uint8]string{unix.IPPROTO_TCP: "tcp", unix.IPPROTO_UDP: "udp"}[p.Proto]
		return fmt.Sprintf("%s %s %s → %s %s", at, name, netip.AddrPortFrom(p.Src, p.SPort), netip.AddrPortFrom(p.Dst, p.DPort), p.DNSName)
	}
	return fmt.Sprintf("%s ethertype %#04x proto %d type %d fragment %v %s → %s", at, p.EtherType, p.Proto, p.ICMPType, p.Fragment, p.Src, p.Dst)
}

// Capture records every frame that leaves the client by its uplink, at the far end of the cable: what is recorded has truly left.
type Capture struct {
	t      *testing.T
	lab    *Lab
	fd     int
	wg     sync.WaitGroup
	mu     sync.Mutex
	pkts   []Packet
	marks  int // sentinels seen
	over   bool
	closed bool
}

// Capture starts a capture; it ends with the test.
func (l *Lab) Capture(t *testing.T) *Capture {
	t.Helper()
	c := &Capture{t: t, lab: l}
	err := l.Router.Do(func() (err error) {
		c.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(htons(unix.ETH_P_ALL)))
		if err != nil {
			return err
		}
		ifi, err := net.InterfaceByName("c0")
		if err != nil {
			return err
		}
		if err := unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20); err != nil {
			return err
		}
		if err := unix.SetsockoptTimeval(c.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 50_000}); err != nil {
			return err
		}
		return unix.Bind(c.fd, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL), Ifindex: ifi.Index})
	})
	if err != nil {
		t.Fatalf("capture: %v", err)
	}
	c.wg.Go(c.loop)
	t.Cleanup(c.close)
	return c
}

func (c *Capture) close() {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.wg.Wait()
	unix.Close(c.fd)
}

func (c *Capture) loop() {
	buf := make([]byte, snapLen)
	for {
		n, from, err := unix.Recvfrom(c.fd, buf, 0)
		c.mu.Lock()
		if c.closed {
			c.mu.Unlock()
			return
		}
		if err == nil {
			if sa, ok := from.(*unix.SockaddrLinklayer); ok && sa.Pkttype != unix.PACKET_OUTGOING {
				c.addLocked(buf[:n])
			}
		}
		c.mu.Unlock()
	}
}

func (c *Capture) addLocked(frame []byte) {
	p := parseFrame(frame)
	p.At = time.Now()
	switch {
	case p.EtherType == sentinelType:
		c.marks++
	case len(c.pkts) < maxCaptured:
		c.pkts = append(c.pkts, p)
	default:
		c.over = true
	}
}

// Packets returns all that left the client until now. It fails the test if the capture missed a packet.
func (c *Capture) Packets() []Packet {
	c.t.Helper()
	c.mark()
	c.mu.Lock()
	defer c.mu.Unlock()
	st, err := unix.GetsockoptTpacketStats(c.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS)
	if err != nil || st.Drops != 0 || c.over {
		c.t.Fatalf("capture is incomplete: %v, %+v, over %v", err, st, c.over)
	}
	return slices.Clone(c.pkts)
}

// Reset forgets what was captured until now.
func (c *Capture) Reset() {
	c.t.Helper()
	c.mark()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pkts = nil
}

// mark sends a frame from the client and waits until it is captured: then all that the client sent before is captured as well.
func (c *Capture) mark() {
	c.t.Helper()
	c.mu.Lock()
	want := c.marks + 1
	c.mu.Unlock()
	err := c.lab.Client.Do(func() error {
		ifi, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		frame := make([]byte, 60)
		copy(frame, "\xff\xff\xff\xff\xff\xff")
		copy(frame[6:], ifi.HardwareAddr)
		binary.BigEndian.PutUint16(frame[12:], sentinelType)
		return unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Protocol: htons(sentinelType), Ifindex: ifi.Index, Halen: 6})
	})
	if err != nil {
		c.t.Fatalf("capture: sentinel: %v", err)
	}
	Eventually(c.t, 5*time.Second, "sentinel frame in the capture", func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		return c.marks >= want
	})
}

// Allow is what may leave the client while its traffic is captured.
type Allow struct {
	Upstreams []netip.AddrPort // TCP there; with UDP also datagrams to any port of that host but 53
	UDP       bool
	Direct    []netip.Prefix   // anything but DNS
	Resolvers []netip.AddrPort // queries for Names only
	Names     []string
	Flows     []netip.AddrPort // local address and port of inbound connections: their replies
}

// Leaks returns the packets that no line of the allow-list covers.
func (a Allow) Leaks(pkts []Packet) []Packet {
	return slices.DeleteFunc(slices.Clone(pkts), a.allows)
}

// Check fails the test for every packet that has leaked.
func (a Allow) Check(t *testing.T, pkts []Packet) {
	t.Helper()
	leaks := a.Leaks(pkts)
	for i, p := range leaks {
		if i == 20 {
			t.Errorf("… and %d more", len(leaks)-i)
			break
		}
		t.Errorf("leak: %v", p)
	}
}

func (a Allow) allows(p Packet) bool {
	if p.EtherType == unix.ETH_P_ARP || p.linkLocalService() {
		return true
	}
	if p.EtherType != unix.ETH_P_IP && p.EtherType != unix.ETH_P_IPV6 {
		return false
	}
	dst := netip.AddrPortFrom(p.Dst, p.DPort)
	tcp, udp := p.Proto == unix.IPPROTO_TCP, p.Proto == unix.IPPROTO_UDP
	if (tcp || udp) && slices.Contains(a.Resolvers, dst) {
		return tcp || slices.Contains(a.Names, p.DNSName)
	}
	if (tcp || udp) && slices.Contains(a.Flows, netip.AddrPortFrom(p.Src, p.SPort)) {
		return true
	}
	if (tcp || udp) && p.DPort == 53 {
		return false
	}
	for _, u := range a.Upstreams {
		if tcp && dst == u || udp && a.UDP && p.Dst == u.Addr() {
			return true
		}
		// The kernel's own word to the upstream, whose datagram came when the socket had just gone.
		if a.UDP && p.Dst == u.Addr() && (p.Proto == unix.IPPROTO_ICMP && p.ICMPType == 3 || p.Proto == unix.IPPROTO_ICMPV6 && p.ICMPType == 1) {
			return true
		}
	}
	return slices.ContainsFunc(a.Direct, func(d netip.Prefix) bool { return d.Contains(p.Dst) })
}

// linkLocalService reports whether the packet only serves the link: neighbour discovery, group membership, DHCP, mDNS.
func (p Packet) linkLocalService() bool {
	switch p.Proto {
	case unix.IPPROTO_ICMPV6:
		nd := p.ICMPType >= 133 && p.ICMPType <= 137
		mld := p.ICMPType >= 130 && p.ICMPType <= 132 || p.ICMPType == 143
		return nd || mld && p.Dst.IsMulticast()
	case unix.IPPROTO_IGMP:
		return p.Dst.IsMulticast()
	case unix.IPPROTO_UDP:
		dhcp4 := p.SPort == 68 && p.DPort == 67
		dhcp6 := p.SPort == 546 && p.DPort == 547 && p.Dst.IsMulticast()
		return dhcp4 || dhcp6 || p.DPort == 5353 && p.Dst.IsMulticast()
	}
	return false
}

// parseFrame reads an Ethernet frame as far as it goes; what is missing stays zero.
func parseFrame(b []byte) Packet {
	var p Packet
	if len(b) < 14 {
		return p
	}
	p.EtherType = binary.BigEndian.Uint16(b[12:])
	b = b[14:]
	switch {
	case p.EtherType == unix.ETH_P_IP && len(b) >= 20:
		p.Src, p.Dst = netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
		p.Proto = b[9]
		p.Fragment = binary.BigEndian.Uint16(b[6:])&0x1fff != 0
		b = b[min(len(b), int(b[0]&15)*4):]
	case p.EtherType == unix.ETH_P_IPV6 && len(b) >= 40:
		p.Src, p.Dst = netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
		p.Proto, b = b[6], b[40:]
		b = p.skipExtensions(b)
	default:
		return p
	}
	if p.Fragment {
		return p
	}
	switch p.Proto {
	case unix.IPPROTO_TCP, unix.IPPROTO_UDP:
		if len(b) >= 8 {
			p.SPort, p.DPort = binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:])
		}
		if p.Proto == unix.IPPROTO_UDP && p.DPort == 53 && len(b) > 20 {
			p.DNSName = questionName(b[20:])
		}
	case unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6:
		if len(b) > 0 {
			p.ICMPType = b[0]
		}
	}
	return p
}

// skipExtensions walks IPv6 extension headers to the transport header.
func (p *Packet) skipExtensions(b []byte) []byte {
	for len(b) >= 8 {
		switch p.Proto {
		case unix.IPPROTO_HOPOPTS, unix.IPPROTO_ROUTING, unix.IPPROTO_DSTOPTS:
			p.Proto, b = b[0], b[min(len(b), int(b[1])*8+8):]
		case unix.IPPROTO_FRAGMENT:
			p.Fragment = binary.BigEndian.Uint16(b[2:])&^7 != 0
			p.Proto, b = b[0], b[8:]
			if p.Fragment {
				return nil
			}
		default:
			return b
		}
	}
	return b
}

// questionName reads the labels of a DNS question.
func questionName(b []byte) string {
	var labels []string
	for len(b) > 0 && b[0] != 0 && int(b[0]) < len(b) {
		n := int(b[0])
		labels = append(labels, string(b[1:1+n]))
		b = b[1+n:]
	}
	return strings.ToLower(strings.Join(labels, "."))
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }
