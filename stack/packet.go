// SPDX-License-Identifier: GPL-3.0-or-later

package stack

import (
	"encoding/binary"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/mutex-proxy/mutex/tun"
)

// verdict is where a packet goes from the link.
type verdict uint8

const (
	dropped        verdict = iota // packet.why says why
	toUDP                         // a whole, verified UDP datagram or a train of them: past netstack, to its socket's session
	toNetstack                    // netstack may skip the checksums: the kernel vouches for them
	toNetstackSlow                // netstack must verify everything: forwarded traffic, fragments, anything unusual
)

// packet is what the link has to know of a packet. Slices alias the read buffer.
type packet struct {
	verdict verdict
	why     drop
	proto   tcpip.NetworkProtocolNumber
	length  int  // of the IP packet; bytes after it are padding
	headers int  // bytes of IP and TCP header, at most headersMax; 0 if it is not TCP or has more
	syn     bool // it opens a TCP connection

	src, dst netip.AddrPort // toUDP, or syn
	payload  []byte         // toUDP only, as is segment
	segment  int            // bytes of each datagram of the payload, but for the last, which may be shorter; at least 1, unless there is no payload
}

// IPv4 and IPv6 field offsets that gVisor's header package does not export (RFC 791 section 3.1, RFC 8200 section 3).
const (
	ip4Length   = 2
	ip4Fragment = 6
	ip4Protocol = 9
	ip6Length   = 4
	ip6Next     = 6

	ip4FragmentMask = 0x3fff // more-fragments flag and offset
)

func (p *packet) drop(d drop) { p.verdict, p.why = dropped, d }

// parse classifies the packet b, of which it changes nothing but a checksum that the kernel has left open in an unusual place. It never panics, and
// lets nothing pass to UDP, or to netstack as verified, that netstack's own checks would reject.
func (p *packet) parse(b []byte, h *tun.Header) {
	*p = packet{}
	if len(b) == 0 {
		p.drop(dropMalformed)
		return
	}
	switch b[0] >> 4 {
	case header.IPv4Version:
		p.parse4(b, h)
	case header.IPv6Version:
		p.parse6(b, h)
	default:
		p.drop(dropMalformed)
	}
}

func (p *packet) parse4(b []byte, h *tun.Header) {
	p.proto = header.IPv4ProtocolNumber
	if len(b) < header.IPv4MinimumSize {
		p.drop(dropMalformed)
		return
	}
	hlen := int(b[0]&0xf) * 4
	p.length = int(binary.BigEndian.Uint16(b[ip4Length:]))
	if hlen < header.IPv4MinimumSize || p.length < hlen || p.length > len(b) {
		p.drop(dropMalformed)
		return
	}
	b = b[:p.length]
	// The kernel sets it on everything it sends itself, and has verified what it forwards; packet sockets write what they like.
	if checksum.Checksum(b[:hlen], 0) != 0xffff {
		p.drop(dropChecksum)
		return
	}
	src := netip.AddrFrom4([4]byte(b[12:16]))
	dst := netip.AddrFrom4([4]byte(b[16:20]))
	if d, bad := badAddress(src, dst); bad {
		p.drop(d)
		return
	}
	fragment := binary.BigEndian.Uint16(b[ip4Fragment:])&ip4FragmentMask != 0
	p.transport(b, h, hlen, tcpip.TransportProtocolNumber(b[ip4Protocol]), fragment, hlen == header.IPv4MinimumSize, src, dst)
}

func (p *packet) parse6(b []byte, h *tun.Header) {
	p.proto = header.IPv6ProtocolNumber
	if len(b) < header.IPv6MinimumSize {
		p.drop(dropMalformed)
		return
	}
	p.length = header.IPv6MinimumSize + int(binary.BigEndian.Uint16(b[ip6Length:]))
	if p.length > len(b) {
		p.drop(dropMalformed)
		return
	}
	b = b[:p.length]
	src := netip.AddrFrom16([16]byte(b[8:24]))
	dst := netip.AddrFrom16([16]byte(b[24:40]))
	if d, bad := badAddress(src, dst); bad {
		p.drop(d)
		return
	}
	at, next := behindOptions(b)
	p.transport(b, h, at, next, next == ipv6Fragment, at == header.IPv6MinimumSize, src, dst)
}

// maxExtensions bounds the extension headers that are looked behind: applications have one, or two (RFC 8200 section 4.1).
const maxExtensions = 4

// behindOptions returns where in an IPv6 packet what follows its options and routing headers begins, and what that is.
func behindOptions(b []byte) (int, tcpip.TransportProtocolNumber) {
	at, next := header.IPv6MinimumSize, tcpip.TransportProtocolNumber(b[ip6Next])
	for range maxExtensions {
		switch header.IPv6ExtensionHeaderIdentifier(next) {
		case header.IPv6HopByHopOptionsExtHdrIdentifier, header.IPv6RoutingExtHdrIdentifier, header.IPv6DestinationOptionsExtHdrIdentifier:
		default:
			return at, next
		}
		if len(b) < at+2 {
			break
		}
		length := 8 * (int(b[at+1]) + 1)
		if len(b) < at+length {
			break
		}
		next = tcpip.TransportProtocolNumber(b[at])
		at += length
	}
	return at, tcpip.TransportProtocolNumber(header.IPv6NoNextHeaderIdentifier) // netstack looks further
}

// badAddress finds addresses that must not be on the link (RFC 1122 section 3.2.1.3, RFC 4291 section 2.5), and the ones no proxy carries.
func badAddress(src, dst netip.Addr) (drop, bool) {
	switch {
	case dst.IsMulticast(), dst == broadcast4():
		return dropMulticast, true
	case src.IsMulticast(), src == broadcast4(), src.IsUnspecified(), dst.IsUnspecified(), src.IsLoopback(), dst.IsLoopback(),
		src.Is4In6(), dst.Is4In6():
		return dropMartian, true
	}
	return 0, false
}

func broadcast4() netip.Addr { return netip.AddrFrom4([4]byte{255, 255, 255, 255}) }

// transport decides by the transport protocol, whose header is at b[at:], direct if there is nothing between it and the IP header.
func (p *packet) transport(b []byte, h *tun.Header, at int, proto tcpip.TransportProtocolNumber, fragment, direct bool, src, dst netip.Addr) {
	if h.GSOType != tun.GSONone && (fragment || !p.trainOK(h, proto, direct)) {
		p.drop(dropOffload)
		return
	}
	vouched := !fragment && vouched(h, at, proto)
	if !vouched && h.Flags&tun.NeedsChecksum != 0 && !complete(b, h) {
		p.drop(dropOffload)
		return
	}
	p.verdict = toNetstackSlow
	switch {
	case fragment:
	case proto == header.UDPProtocolNumber && direct:
		p.udp(b[at:], h, vouched, src, dst)
	case proto == header.TCPProtocolNumber && len(b) >= at+header.TCPMinimumSize:
		if n := at + int(b[at+header.TCPDataOffset]>>4)*4; n >= at+header.TCPMinimumSize && n <= min(len(b), headersMax) {
			p.headers = n
		}
		const opens = header.TCPFlagSyn | header.TCPFlagAck
		if h := header.TCP(b[at:]); h.Flags()&opens == header.TCPFlagSyn {
			p.syn, p.src, p.dst = true, netip.AddrPortFrom(src, h.SourcePort()), netip.AddrPortFrom(dst, h.DestinationPort())
		}
		if vouched {
			p.verdict = toNetstack
		}
	case proto == header.UDPProtocolNumber && vouched: // options before it: by netstack
		p.verdict = toNetstack
	}
}

// trainOK says whether the kernel may have made a train of this packet: of UDP behind options it does not.
func (p *packet) trainOK(h *tun.Header, proto tcpip.TransportProtocolNumber, direct bool) bool {
	switch {
	case proto == header.UDPProtocolNumber:
		return direct && h.GSOType == tun.GSOUDP && h.GSOSize > 0
	case proto != header.TCPProtocolNumber:
		return false
	case p.proto == header.IPv4ProtocolNumber:
		return h.GSOType == tun.GSOTCP4
	}
	return h.GSOType == tun.GSOTCP6
}

// Offsets of the checksum in the headers of TCP (RFC 9293 section 3.1) and UDP (RFC 768).
const (
	tcpChecksum = 16
	udpChecksum = 6
)

// vouched says whether the kernel answers for the checksum of the TCP or UDP header at at: it has verified it, or has not computed it yet, because
// this machine made the packet. The stack claims receive checksum offload, so what neither holds for must be verified by someone.
func vouched(h *tun.Header, at int, proto tcpip.TransportProtocolNumber) bool {
	offset := uint16(udpChecksum)
	switch proto {
	case header.TCPProtocolNumber:
		offset = tcpChecksum
	case header.UDPProtocolNumber:
	default:
		return false
	}
	if h.Flags&tun.NeedsChecksum == 0 {
		return h.Flags&tun.ChecksumValid != 0
	}
	return int(h.CsumStart) == at && h.CsumOffset == offset
}

// complete puts in the checksum that the kernel has left open behind IP options, extension headers and in protocols that the link does not know, as a
// network device would: netstack then verifies it as any other. It reports false if its place is not in the packet, or the packet is a train, which it
// would not be the checksum of.
func complete(b []byte, h *tun.Header) bool {
	start := int(h.CsumStart)
	at := start + int(h.CsumOffset)
	if start < header.IPv4MinimumSize || at+2 > len(b) || h.GSOType != tun.GSONone {
		return false
	}
	sum := ^checksum.Checksum(b[start:], 0) // the sum of the pseudo-header stands in its place
	if sum == 0 {
		sum = 0xffff // the same number, and not UDP's "none"
	}
	binary.BigEndian.PutUint16(b[at:], sum)
	return true
}

// udp checks a UDP datagram, b being its header and everything after (RFC 768, RFC 8200 section 8.1). Of a train (what an application has
// sent with UDP_SEGMENT) the header is that of all of it; its checksum can only be the kernel's to answer for.
func (p *packet) udp(b []byte, h *tun.Header, verified bool, src, dst netip.Addr) {
	if len(b) < header.UDPMinimumSize || int(binary.BigEndian.Uint16(b[4:])) != len(b) {
		p.drop(dropMalformed)
		return
	}
	train := h.GSOType != tun.GSONone
	if !verified && (train || !udpChecksumOK(b, src, dst)) {
		p.drop(dropChecksum)
		return
	}
	p.verdict = toUDP
	p.src = netip.AddrPortFrom(src, binary.BigEndian.Uint16(b))
	p.dst = netip.AddrPortFrom(dst, binary.BigEndian.Uint16(b[2:]))
	p.payload = b[header.UDPMinimumSize:]
	p.segment = len(p.payload)
	if train {
		p.segment = min(p.segment, int(h.GSOSize))
	}
}

func udpChecksumOK(b []byte, src, dst netip.Addr) bool {
	if b[6]|b[7] == 0 {
		return src.Is4() // IPv4 may go without
	}
	return checksum.Checksum(b, pseudoSum(header.UDPProtocolNumber, src, dst, len(b))) == 0xffff
}

// pseudoSum returns the sum of the pseudo-header of a transport protocol, not complemented.
func pseudoSum(proto tcpip.TransportProtocolNumber, src, dst netip.Addr, length int) uint16 {
	var sum uint16
	if src.Is4() {
		s, d := src.As4(), dst.As4()
		sum = checksum.Checksum(d[:], checksum.Checksum(s[:], 0))
	} else {
		s, d := src.As16(), dst.As16()
		sum = checksum.Checksum(d[:], checksum.Checksum(s[:], 0))
	}
	return checksum.Combine(checksum.Combine(sum, uint16(proto)), uint16(length))
}
