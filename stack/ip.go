// SPDX-License-Identifier: GPL-3.0-or-later

package stack

import (
	"encoding/binary"
	"net/netip"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/mutex-proxy/mutex/flow"
	"github.com/mutex-proxy/mutex/tun"
)

// ttl of the packets made here: what Linux uses (RFC 1700).
const ttl = 64

// sender makes the IP packets that do not come from netstack: UDP replies, echo replies, ICMP errors. It is safe for concurrent use and
// allocates nothing but for ICMP errors.
type sender struct {
	link *link
	id   atomic.Uint32 // of the next packet that is sent in fragments
}

// fits says whether length bytes of transport header and payload go in one packet.
func (s *sender) fits(v4 bool, length int) bool {
	if v4 {
		return header.IPv4MinimumSize+length <= s.link.mtu
	}
	return header.IPv6MinimumSize+length <= s.link.mtu
}

// udp sends one datagram. It reports false if it is longer than UDP over that address family can be.
func (s *sender) udp(src, dst netip.AddrPort, payload []byte) bool {
	length := header.UDPMinimumSize + len(payload)
	v4 := src.Addr().Is4()
	if length > tun.MaxPacket || v4 && length > tun.MaxPacket-header.IPv4MinimumSize {
		return false
	}
	var head [header.UDPMinimumSize]byte
	binary.BigEndian.PutUint16(head[0:], src.Port())
	binary.BigEndian.PutUint16(head[2:], dst.Port())
	binary.BigEndian.PutUint16(head[4:], uint16(length))
	sum := pseudoSum(header.UDPProtocolNumber, src.Addr(), dst.Addr(), length)
	var h tun.Header
	if s.fits(v4, length) && s.link.dev.Load().Offload() {
		// The kernel completes it, or, on the way to a socket of this machine, never has to.
		h.Flags = tun.NeedsChecksum
		h.CsumStart = header.IPv6MinimumSize
		if v4 {
			h.CsumStart = header.IPv4MinimumSize
		}
		h.CsumOffset = udpChecksum
	} else {
		sum = ^checksum.Checksum(payload, checksum.Checksum(head[:], sum))
		if sum == 0 {
			sum = 0xffff // 0 means none (RFC 768)
		}
	}
	binary.BigEndian.PutUint16(head[6:], sum)
	s.ip(&h, header.UDPProtocolNumber, src.Addr(), dst.Addr(), head[:], payload)
	return true
}

// trainMax bounds the datagrams of a train that is sent: header and payloads then fit in one system call of tun.Queue.Write without a copy.
const trainMax = 28

// train returns how many of ds, which come from src, can leave as one packet that the kernel splits (USO): at least 1. All but the last are
// of one size, and none needs fragments.
func (s *sender) train(src netip.AddrPort, ds []flow.Datagram) int {
	size := len(ds[0].Buf)
	if !s.link.dev.Load().USO() || size == 0 || !s.fits(src.Addr().Is4(), header.UDPMinimumSize+size) {
		return 1
	}
	total, n := header.IPv6MinimumSize+header.UDPMinimumSize+size, 1
	for n < len(ds) && n < trainMax {
		next := len(ds[n].Buf)
		if next == 0 || next > size || total+next > tun.MaxPacket || ds[n].Addr.Port != src.Port() || ds[n].Addr.IP.Unmap() != src.Addr() {
			break
		}
		n++
		if total += next; next < size {
			break
		}
	}
	return n
}

// udpTrain sends datagrams that train has found to go together: one walk through the kernel instead of one each. The application's socket
// gets them one by one, or, if it has asked for that with UDP_GRO, as they come.
func (s *sender) udpTrain(src, dst netip.AddrPort, ds []flow.Datagram) {
	v4 := src.Addr().Is4()
	length := header.UDPMinimumSize
	var room [2 + trainMax][]byte
	for i := range ds {
		room[2+i] = ds[i].Buf
		length += len(ds[i].Buf)
	}
	h := tun.Header{Flags: tun.NeedsChecksum, GSOType: tun.GSOUDP, GSOSize: uint16(len(ds[0].Buf)), CsumOffset: udpChecksum}
	var head [header.UDPMinimumSize]byte
	binary.BigEndian.PutUint16(head[0:], src.Port())
	binary.BigEndian.PutUint16(head[2:], dst.Port())
	binary.BigEndian.PutUint16(head[4:], uint16(length))
	binary.BigEndian.PutUint16(head[6:], pseudoSum(header.UDPProtocolNumber, src.Addr(), dst.Addr(), length))
	var ip [header.IPv6MinimumSize]byte
	h.CsumStart = uint16(len(ip))
	if v4 {
		h.CsumStart = header.IPv4MinimumSize
		put4((*[header.IPv4MinimumSize]byte)(ip[:]), header.UDPProtocolNumber, src.Addr(), dst.Addr(), 0, ip4DontFragment, length)
	} else {
		put6(&ip, header.UDPProtocolNumber, src.Addr(), dst.Addr(), length)
	}
	h.HdrLen = h.CsumStart + header.UDPMinimumSize
	room[0], room[1] = ip[:h.CsumStart], head[:]
	s.link.send(queueHash(src.Addr(), dst.Addr()), &h, room[:2+len(ds)]...)
}

// ip sends the transport header head and the payload, in fragments if they do not fit; h must then ask for nothing.
func (s *sender) ip(h *tun.Header, proto tcpip.TransportProtocolNumber, src, dst netip.Addr, head, payload []byte) {
	length := len(head) + len(payload)
	if src.Is4() {
		if s.fits(true, length) {
			s.ip4(h, proto, src, dst, 0, ip4DontFragment, head, payload)
			return
		}
		id := uint16(s.id.Add(1))
		room := (s.link.mtu - header.IPv4MinimumSize) &^ 7
		for at := 0; at < length; at += room {
			a, b, more := part(head, payload, at, room)
			field := uint16(at / 8)
			if more {
				field |= ip4MoreFragments
			}
			s.ip4(h, proto, src, dst, id, field, a, b)
		}
		return
	}
	if s.fits(false, length) {
		s.ip6(h, proto, src, dst, nil, head, payload)
		return
	}
	// RFC 8200 section 4.5.
	var ext [header.IPv6FragmentHeaderSize]byte
	ext[0] = byte(proto)
	binary.BigEndian.PutUint32(ext[4:], s.id.Add(1))
	room := (s.link.mtu - header.IPv6MinimumSize - len(ext)) &^ 7
	for at := 0; at < length; at += room {
		a, b, more := part(head, payload, at, room)
		field := uint16(at)
		if more {
			field |= 1
		}
		binary.BigEndian.PutUint16(ext[2:], field)
		s.ip6(h, ipv6Fragment, src, dst, ext[:], a, b)
	}
}

// The flags of IPv4's fragment field (RFC 791 section 3.1), and the next-header value of an IPv6 fragment header.
const (
	ip4DontFragment  = 0x4000
	ip4MoreFragments = 0x2000
	ipv6Fragment     = tcpip.TransportProtocolNumber(header.IPv6FragmentHeader)
)

// part returns n bytes from offset at of head and payload taken as one, in two pieces, and whether bytes follow.
func part(head, payload []byte, at, n int) (a, b []byte, more bool) {
	end := min(at+n, len(head)+len(payload))
	if at < len(head) {
		a = head[at:min(end, len(head))]
	}
	if end > len(head) {
		b = payload[max(at-len(head), 0) : end-len(head)]
	}
	return a, b, end < len(head)+len(payload)
}

func (s *sender) ip4(h *tun.Header, proto tcpip.TransportProtocolNumber, src, dst netip.Addr, id, field uint16, a, b []byte) {
	var ip [header.IPv4MinimumSize]byte
	put4(&ip, proto, src, dst, id, field, len(a)+len(b))
	s.link.send(queueHash(src, dst), h, ip[:], a, b)
}

func put4(ip *[header.IPv4MinimumSize]byte, proto tcpip.TransportProtocolNumber, src, dst netip.Addr, id, field uint16, length int) {
	ip[0] = header.IPv4Version<<4 | header.IPv4MinimumSize/4
	binary.BigEndian.PutUint16(ip[ip4Length:], uint16(len(ip)+length))
	binary.BigEndian.PutUint16(ip[4:], id)
	binary.BigEndian.PutUint16(ip[ip4Fragment:], field)
	ip[8] = ttl
	ip[ip4Protocol] = byte(proto)
	*(*[4]byte)(ip[12:]) = src.As4()
	*(*[4]byte)(ip[16:]) = dst.As4()
	binary.BigEndian.PutUint16(ip[10:], ^checksum.Checksum(ip[:], 0))
}

func (s *sender) ip6(h *tun.Header, next tcpip.TransportProtocolNumber, src, dst netip.Addr, ext, a, b []byte) {
	var ip [header.IPv6MinimumSize]byte
	put6(&ip, next, src, dst, len(ext)+len(a)+len(b))
	s.link.send(queueHash(src, dst), h, ip[:], ext, a, b)
}

func put6(ip *[header.IPv6MinimumSize]byte, next tcpip.TransportProtocolNumber, src, dst netip.Addr, length int) {
	ip[0] = header.IPv6Version << 4
	binary.BigEndian.PutUint16(ip[ip6Length:], uint16(length))
	ip[ip6Next] = byte(next)
	ip[7] = ttl
	*(*[16]byte)(ip[8:]) = src.As16()
	*(*[16]byte)(ip[24:]) = dst.As16()
}

// queueHash spreads pairs of addresses over the queues. All fragments of a datagram must get the same one.
func queueHash(src, dst netip.Addr) uint32 {
	a, b := src.As16(), dst.As16()
	return binary.BigEndian.Uint32(a[12:]) ^ binary.BigEndian.Uint32(b[12:])
}

// How much of the packet an ICMP error quotes: as much as fits without exceeding the packet every host can receive (RFC 1812 section
// 4.3.2.3, RFC 4443 section 3.1).
const (
	quoteMax4 = 576 - header.IPv4MinimumSize - header.ICMPv4MinimumSize
	quoteMax6 = header.IPv6MinimumMTU - header.IPv6MinimumSize - icmp6ErrorSize

	icmp6ErrorSize = 8
)

// unreachable answers the packet quote (IP header, transport header, some payload) with the ICMP destination unreachable message of
// the reason, as if its destination had sent it; ReasonDrop sends nothing. What an application sees of it: flow.Reason.
func (s *sender) unreachable(quote []byte, r flow.Reason) {
	if r == flow.ReasonDrop || len(quote) < header.IPv4MinimumSize {
		return
	}
	if quote[0]>>4 == header.IPv4Version {
		src, dst := netip.AddrFrom4([4]byte(quote[12:16])), netip.AddrFrom4([4]byte(quote[16:20]))
		head := make([]byte, header.ICMPv4MinimumSize)
		head[0] = byte(header.ICMPv4DstUnreachable)
		head[1] = byte(code4(r))
		quote = quote[:min(len(quote), quoteMax4)]
		binary.BigEndian.PutUint16(head[2:], ^checksum.Checksum(quote, checksum.Checksum(head, 0)))
		s.ip(&tun.Header{}, header.ICMPv4ProtocolNumber, dst, src, head, quote)
		return
	}
	if len(quote) < header.IPv6MinimumSize {
		return
	}
	src, dst := netip.AddrFrom16([16]byte(quote[8:24])), netip.AddrFrom16([16]byte(quote[24:40]))
	head := make([]byte, icmp6ErrorSize)
	head[0] = byte(header.ICMPv6DstUnreachable)
	head[1] = byte(code6(r))
	quote = quote[:min(len(quote), quoteMax6)]
	sum := pseudoSum(header.ICMPv6ProtocolNumber, dst, src, len(head)+len(quote))
	binary.BigEndian.PutUint16(head[2:], ^checksum.Checksum(quote, checksum.Checksum(head, sum)))
	s.ip(&tun.Header{}, header.ICMPv6ProtocolNumber, dst, src, head, quote)
}

func code4(r flow.Reason) header.ICMPv4Code {
	switch r {
	case flow.ReasonRefused:
		return header.ICMPv4PortUnreachable
	case flow.ReasonNetUnreachable:
		return header.ICMPv4NetUnreachable
	case flow.ReasonProhibited:
		return header.ICMPv4AdminProhibited
	}
	return header.ICMPv4HostUnreachable
}

func code6(r flow.Reason) header.ICMPv6Code {
	switch r {
	case flow.ReasonRefused:
		return header.ICMPv6PortUnreachable
	case flow.ReasonNetUnreachable:
		return header.ICMPv6NetworkUnreachable
	case flow.ReasonProhibited:
		return header.ICMPv6Prohibited
	}
	return header.ICMPv6AddressUnreachable
}
