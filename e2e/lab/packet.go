// SPDX-License-Identifier: GPL-3.0-or-later

package lab

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"
)

// errNoAnswer: such a probe has no way to be answered.
var errNoAnswer = errors.New("no answer")

// packetProbe sends a UDP datagram by an AF_PACKET socket on eth0, past all that routes and marks.
func packetProbe(src, dst netip.Addr, port uint16) error {
	proto := uint16(unix.ETH_P_IP)
	if dst.Is6() {
		proto = unix.ETH_P_IPV6
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	ifi, err := net.InterfaceByName("eth0")
	if err != nil {
		return err
	}
	to := &unix.SockaddrLinklayer{Protocol: htons(proto), Ifindex: ifi.Index, Halen: 6, Addr: [8]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}}
	if err := unix.Sendto(fd, datagram(src, dst, port), 0, to); err != nil {
		return err
	}
	return errNoAnswer
}

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
