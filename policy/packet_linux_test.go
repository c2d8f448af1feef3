// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"encoding/binary"
	"net"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

// datagram is a UDP datagram with its IP header, without checksums that anybody on its way looks at.
func datagram(src, dst netip.Addr, port uint16) []byte {
	udp := binary.BigEndian.AppendUint16(nil, 4000)
	udp = binary.BigEndian.AppendUint16(udp, port)
	udp = append(udp, 0, 9, 0, 0, 'x')
	if dst.Is6() {
		h := append([]byte{0x60, 0, 0, 0, 0, byte(len(udp)), protoUDP, 64}, src.AsSlice()...)
		return append(append(h, dst.AsSlice()...), udp...)
	}
	h := append([]byte{0x45, 0, 0, byte(20 + len(udp)), 0, 0, 0, 0, 64, protoUDP, 0, 0}, src.AsSlice()...)
	h = append(h, dst.AsSlice()...)
	sum := uint32(0)
	for i := 0; i < len(h); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(h[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(h[10:], ^uint16(sum))
	return append(h, udp...)
}

// packet sends a frame by an AF_PACKET socket; told is the type that the kernel is told, which need not be the frame's.
func packet(typ int, told uint16, frame []byte) func(*lab) error {
	return func(l *lab) error {
		l.inside()
		fd, err := unix.Socket(unix.AF_PACKET, typ|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		ifi, err := net.InterfaceByName("c0")
		if err != nil {
			return err
		}
		to := &unix.SockaddrLinklayer{Protocol: htons(told), Ifindex: ifi.Index, Halen: 6, Addr: [8]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}}
		return unix.Sendto(fd, frame, 0, to)
	}
}

func ethernet(typ uint16, payload []byte) []byte {
	h := append([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, 2, 0, 0, 0, 0, 1)
	return append(binary.BigEndian.AppendUint16(h, typ), payload...)
}

// packets are ways past all of inet's hooks.
func packets() []way {
	four, six := datagram(client4, remote4, 1201), datagram(netip.MustParseAddr("2001:db8:9::2"), remote6, 1202)
	return []way{
		{"packet socket, v4", "> 198.51.100.1:1201", packet(unix.SOCK_DGRAM, unix.ETH_P_IP, four)},
		{"packet socket, v6", "> 2001:db8:ff::1:1202", packet(unix.SOCK_DGRAM, unix.ETH_P_IPV6, six)},
		{"raw frame, v4", "> 198.51.100.1:1201", packet(unix.SOCK_RAW, unix.ETH_P_IP, ethernet(unix.ETH_P_IP, four))},
		{"raw frame that claims to be ARP", "> 198.51.100.1:1201", packet(unix.SOCK_RAW, unix.ETH_P_ARP, ethernet(unix.ETH_P_IP, four))},
		{"raw frame, v6", "> 2001:db8:ff::1:1202", packet(unix.SOCK_RAW, unix.ETH_P_IPV6, ethernet(unix.ETH_P_IPV6, six))},
		{"packet socket, DNS to the LAN", "> 10.9.0.53:53", packet(unix.SOCK_DGRAM, unix.ETH_P_IP, datagram(client4, netip.MustParseAddr("10.9.0.53"), 53))},
	}
}

// TestPacketSockets shows that AF_PACKET is closed by the egress chain, alive and dead, and by nothing else; and that what must stay on the
// link, a DHCP client's broadcast say, passes.
func TestPacketSockets(t *testing.T) {
	l := newLab(t)
	broadcast := netip.MustParseAddr("255.255.255.255")
	stay := []way{
		{"DHCP discover", "> 255.255.255.255:67", packet(unix.SOCK_DGRAM, unix.ETH_P_IP, datagram(netip.IPv4Unspecified(), broadcast, 67))},
		{"to the LAN", "> 10.9.0.1:1203", packet(unix.SOCK_DGRAM, unix.ETH_P_IP, datagram(client4, lan4, 1203))},
	}
	if got := l.leaks(packets()); len(got) != len(packets()) {
		t.Fatalf("without capture only these get out: %v", got)
	}
	l.up()
	if f, err := l.host.Features(); err != nil || !f.NFTEgress {
		t.Skipf("this kernel has no egress hook, a stated limit: %v", err)
	}
	l.noLeaks(packets())
	l.mustPass(stay)
	l.mustPass(direct())
	l.die()
	l.noLeaks(packets())
	l.mustPass(stay)
	l.sh("nft delete table netdev mprox-egress")
	if got := l.leaks(packets()); len(got) != len(packets()) {
		t.Errorf("with the egress chain gone only these get out: %v", got)
	}
	l.up()
	l.noLeaks(packets())
	l.sh("nft delete table netdev mprox-egress")
	l.await("the egress chain is back", func() bool { return len(l.leaks(packets())) == 0 })
}
