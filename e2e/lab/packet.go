// SPDX-License-Identifier: GPL-3.0-or-later

package lab

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// errNoAnswer: such a probe has no way to be answered.
var errNoAnswer = errors.New("no answer")

// packetProbe sends a UDP datagram by an AF_PACKET socket on eth0, past all that routes and marks.
func packetProbe(dst netip.Addr, port uint16) error {
	fd, to, err := packetSocket(dst)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.Sendto(fd, datagram(clientOf(dst), dst, port), 0, to); err != nil {
		return err
	}
	return errNoAnswer
}

// packetSocket returns an AF_PACKET socket, and where on eth0 it shall send IP packets of dst's family.
func packetSocket(dst netip.Addr) (fd int, to *unix.SockaddrLinklayer, err error) {
	proto := uint16(unix.ETH_P_IP)
	if dst.Is6() {
		proto = unix.ETH_P_IPV6
	}
	ifi, err := net.InterfaceByName("eth0")
	if err != nil {
		return -1, nil, err
	}
	fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	return fd, &unix.SockaddrLinklayer{Protocol: htons(proto), Ifindex: ifi.Index, Halen: 6, Addr: [8]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}}, err
}

// headerSocket returns a raw socket whose packets begin with their IP header. Of IPv4 the kernel is asked not to put fragments together.
func headerSocket(dst netip.Addr) (int, error) {
	af, _ := sockaddr(dst, 0)
	fd, err := unix.Socket(af, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err == nil && dst.Is4() {
		err = unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_NODEFRAG, 1)
	}
	return fd, err
}

// headerIncluded sends packets as they are, from the network layer on.
func headerIncluded(dst netip.Addr, control func(fd int) error, packets ...[]byte) error {
	fd, err := headerSocket(dst)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if control != nil {
		if err := control(fd); err != nil {
			return err
		}
	}
	_, sa := sockaddr(dst, 0)
	for _, p := range packets {
		if err := unix.Sendto(fd, p, 0, sa); err != nil {
			return err
		}
	}
	return errNoAnswer
}

// clientOf is the client's address of dst's family.
func clientOf(dst netip.Addr) netip.Addr {
	if dst.Is4() {
		return ClientV4
	}
	return ClientV6
}

// fragments are the two halves of a UDP datagram, the second of which has no ports. They differ in their number from one to the next, so that
// none is taken for a part of another.
func fragments(src, dst netip.Addr, port uint16) [][]byte {
	id := uint16(fragmentID.Add(1))
	whole := datagram(src, dst, port)
	if dst.Is4() {
		whole = append(whole, make([]byte, 7)...) // 16 bytes of payload: fragments end at multiples of 8
		first, second := slices.Clone(whole[:28]), append(slices.Clone(whole[:20]), whole[28:]...)
		for offset, p := range map[uint16][]byte{0x2000: first, 1: second} { // more fragments; 8 bytes on
			binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
			binary.BigEndian.PutUint16(p[4:], id)
			binary.BigEndian.PutUint16(p[6:], offset)
			binary.BigEndian.PutUint16(p[10:], 0)
			binary.BigEndian.PutUint16(p[10:], ipChecksum(p[:20]))
		}
		return [][]byte{first, second}
	}
	var out [][]byte
	for _, part := range []struct {
		offset uint16
		b      []byte
	}{{1, whole[40:48]}, {8, append(slices.Clone(whole[48:]), make([]byte, 7)...)}} { // offset in bytes, then the flag of more
		h := slices.Clone(whole[:40])
		h[6] = unix.IPPROTO_FRAGMENT
		ext := binary.BigEndian.AppendUint16([]byte{unix.IPPROTO_UDP, 0}, part.offset)
		ext = binary.BigEndian.AppendUint32(ext, uint32(id))
		binary.BigEndian.PutUint16(h[4:], uint16(len(ext)+len(part.b)))
		out = append(out, append(append(h, ext...), part.b...))
	}
	return out
}

var fragmentID atomic.Uint32

// datagram is a UDP datagram of one byte with its IP header; the UDP checksum is left out.
func datagram(src, dst netip.Addr, port uint16) []byte {
	udp := binary.BigEndian.AppendUint16(nil, 4000)
	udp = append(binary.BigEndian.AppendUint16(udp, port), 0, 9, 0, 0, 'x')
	if dst.Is6() {
		h := append([]byte{0x60, 0, 0, 0, 0, byte(len(udp)), unix.IPPROTO_UDP, 64}, src.AsSlice()...)
		return append(append(h, dst.AsSlice()...), udp...)
	}
	h := append([]byte{0x45, 0, 0, byte(20 + len(udp)), 0, 0, 0, 0, 64, unix.IPPROTO_UDP, 0, 0}, src.AsSlice()...)
	h = append(h, dst.AsSlice()...)
	binary.BigEndian.PutUint16(h[10:], ipChecksum(h))
	return append(h, udp...)
}

// ipChecksum is that of an IPv4 header whose own is zero.
func ipChecksum(h []byte) uint16 {
	sum := uint32(0)
	for i := 0; i < len(h); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(h[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}
