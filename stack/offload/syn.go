// SPDX-License-Identifier: GPL-3.0-or-later

package offload

import (
	"encoding/binary"
	"errors"
	"net/netip"
)

// SYN is an application's connection request: what of it both ends of the connection must agree on.
type SYN struct {
	Src, Dst   netip.AddrPort // the application, and whom it wants to talk to
	Seq        uint32
	Window     uint16
	Scale      uint8 // window scale, at most 14; only with HasScale
	HasScale   bool
	SACK       bool
	Timestamps bool
	TSVal      uint32 // only with Timestamps
}

// The kinds of TCP options in use (RFC 9293 section 3.2, RFC 7323, RFC 2018).
const (
	optEnd        = 0
	optNop        = 1
	optMSS        = 2
	optScale      = 3
	optSACK       = 4
	optTimestamps = 8
)

const (
	protoTCP  = 6
	ip4Header = 20
	ip6Header = 40
	tcpHeader = 20
	maxScale  = 14   // RFC 7323 section 2.3
	flagSYN   = 0x02 // alone it opens a connection
	flagACK   = 0x10
)

var errSYN = errors.New("not a SYN that can be read")

// ParseSYN reads a SYN: IP header, without IPv4 options or IPv6 extension headers, and TCP header with options. What follows is ignored.
func ParseSYN(b []byte) (SYN, error) {
	var s SYN
	var src, dst netip.Addr
	switch {
	case len(b) >= ip4Header+tcpHeader && b[0] == 4<<4|ip4Header/4 && b[9] == protoTCP:
		src, dst = netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
		b = b[ip4Header:]
	case len(b) >= ip6Header+tcpHeader && b[0]>>4 == 6 && b[6] == protoTCP:
		src, dst = netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
		b = b[ip6Header:]
	default:
		return s, errSYN
	}
	size := int(b[12]>>4) * 4
	if size < tcpHeader || size > len(b) || b[13]&0x17 != flagSYN {
		return s, errSYN
	}
	s.Src = netip.AddrPortFrom(src, binary.BigEndian.Uint16(b))
	s.Dst = netip.AddrPortFrom(dst, binary.BigEndian.Uint16(b[2:]))
	s.Seq = binary.BigEndian.Uint32(b[4:])
	s.Window = binary.BigEndian.Uint16(b[14:])
	if !s.options(b[tcpHeader:size]) {
		return s, errSYN
	}
	return s, nil
}

// options reads the options. Unknown ones are skipped, damaged ones refused: netstack may know what to make of them.
func (s *SYN) options(b []byte) bool {
	for len(b) > 0 {
		switch b[0] {
		case optEnd:
			return true
		case optNop:
			b = b[1:]
			continue
		}
		if len(b) < 2 || b[1] < 2 || int(b[1]) > len(b) {
			return false
		}
		v := b[2:b[1]]
		switch {
		case b[0] == optScale && len(v) == 1:
			s.Scale, s.HasScale = min(v[0], maxScale), true
		case b[0] == optSACK && len(v) == 0:
			s.SACK = true
		case b[0] == optTimestamps && len(v) == 8:
			s.Timestamps, s.TSVal = true, binary.BigEndian.Uint32(v)
		}
		b = b[b[1]:]
	}
	return true
}

// answer is our side of the handshake.
type answer struct {
	seq    uint32
	window uint16
	mss    uint16
	scale  uint8
	ts     uint32
	ttl    uint8
	more   []byte // options of the caller's, a multiple of 4 long
}

// The longest SYN-ACK: IPv6, MSS, SACK, timestamps, window scale, and as many options of the caller's as TCP has room for.
const (
	maxMore    = 16
	maxOptions = 24 + maxMore
	maxAnswer  = ip6Header + tcpHeader + maxOptions
)

// synACK appends the packet that answers s, from the destination to the application, with checksums.
func synACK(b []byte, s *SYN, a *answer) []byte {
	var room [tcpHeader + maxOptions]byte
	t := room[:tcpHeader]
	t = append(t, optMSS, 4, byte(a.mss>>8), byte(a.mss))
	if s.SACK {
		t = append(t, optNop, optNop, optSACK, 2)
	}
	if s.Timestamps {
		t = append(t, optNop, optNop, optTimestamps, 10)
		t = binary.BigEndian.AppendUint32(t, a.ts)
		t = binary.BigEndian.AppendUint32(t, s.TSVal)
	}
	if s.HasScale {
		t = append(t, optNop, optScale, 3, a.scale)
	}
	t = append(t, a.more...)
	binary.BigEndian.PutUint16(t[0:], s.Dst.Port())
	binary.BigEndian.PutUint16(t[2:], s.Src.Port())
	binary.BigEndian.PutUint32(t[4:], a.seq)
	binary.BigEndian.PutUint32(t[8:], s.Seq+1)
	t[12] = byte(len(t) / 4 << 4)
	t[13] = flagSYN | flagACK
	binary.BigEndian.PutUint16(t[14:], a.window)

	at := len(b)
	if s.Src.Addr().Is4() {
		from, to := s.Dst.Addr().As4(), s.Src.Addr().As4()
		b = append(b, 4<<4|ip4Header/4, 0, 0, 0, 0, 0, 0x40, 0, a.ttl, protoTCP, 0, 0)
		b = append(append(b, from[:]...), to[:]...)
		binary.BigEndian.PutUint16(b[at+2:], uint16(ip4Header+len(t)))
		binary.BigEndian.PutUint16(b[at+10:], ^fold(sum(0, b[at:])))
		binary.BigEndian.PutUint16(t[16:], ^fold(sum(pseudo(b[at+12:at+20], len(t)), t)))
		return append(b, t...)
	}
	from, to := s.Dst.Addr().As16(), s.Src.Addr().As16()
	b = append(b, 6<<4, 0, 0, 0, 0, byte(len(t)), protoTCP, a.ttl)
	b = append(append(b, from[:]...), to[:]...)
	binary.BigEndian.PutUint16(t[16:], ^fold(sum(pseudo(b[at+8:at+40], len(t)), t)))
	return append(b, t...)
}

// pseudo is the sum of TCP's pseudo-header, addrs being both addresses.
func pseudo(addrs []byte, length int) uint32 {
	return sum(uint32(protoTCP)+uint32(length), addrs)
}

// sum is the internet checksum before folding (RFC 1071). b has an even length, of at most a header.
func sum(s uint32, b []byte) uint32 {
	for ; len(b) > 1; b = b[2:] {
		s += uint32(b[0])<<8 | uint32(b[1])
	}
	return s
}

func fold(s uint32) uint16 {
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	return uint16(s)
}
