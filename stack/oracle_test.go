// SPDX-License-Identifier: GPL-3.0-or-later

package stack

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"testing"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"github.com/mutex-proxy/mutex/tun"
)

// oracle is a netstack that says what came out of it as a TCP segment or a UDP datagram, past all of gVisor's own checks. That of nicChecked is
// the slow path, which verifies everything.
type oracle struct {
	nic *nic
	got arrival
}

// arrival is what came out; the zero value is nothing.
type arrival struct {
	proto    tcpip.TransportProtocolNumber
	src, dst netip.AddrPort
	data     string // of TCP with its header but for the checksum
}

func newOracle(tb testing.TB, n *nic) *oracle {
	tb.Helper()
	o := &oracle{nic: n}
	ns := stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, ipv6.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol},
	})
	tb.Cleanup(ns.Destroy)
	ns.SetTransportProtocolHandler(udp.ProtocolNumber, func(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
		h := header.UDP(pkt.TransportHeader().Slice())
		length, sum := header.UDPValid(h, func() uint16 { return pkt.Data().Checksum() }, uint16(pkt.Data().Size()), pkt.NetworkProtocolNumber,
			id.RemoteAddress, id.LocalAddress, pkt.RXChecksumValidated)
		if length && sum {
			o.arrived(header.UDPProtocolNumber, id, nil, pkt)
		}
		return true
	})
	ns.SetTransportProtocolHandler(tcp.ProtocolNumber, func(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
		h := header.TCP(pkt.TransportHeader().Slice())
		_, sum, ok := header.TCPValid(h, func() uint16 { return pkt.Data().Checksum() }, uint16(pkt.Data().Size()),
			id.RemoteAddress, id.LocalAddress, pkt.RXChecksumValidated)
		if ok && sum {
			head := bytes.Clone(h)
			head[tcpChecksum], head[tcpChecksum+1] = 0, 0
			o.arrived(header.TCPProtocolNumber, id, head, pkt)
		}
		return true
	})
	for _, err := range []tcpip.Error{ns.CreateNIC(1, o.nic), ns.SetPromiscuousMode(1, true), ns.SetSpoofing(1, true)} {
		if err != nil {
			tb.Fatal(err)
		}
	}
	return o
}

func (o *oracle) arrived(proto tcpip.TransportProtocolNumber, id stack.TransportEndpointID, head []byte, pkt *stack.PacketBuffer) {
	data := make([]byte, pkt.Data().Size())
	copyData(data, pkt)
	o.got = arrival{proto, netip.AddrPortFrom(addrOf(id.RemoteAddress), id.RemotePort), netip.AddrPortFrom(addrOf(id.LocalAddress), id.LocalPort), string(head) + string(data)}
}

// take returns what gVisor makes of the packet.
func (o *oracle) take(b []byte) arrival {
	o.got = arrival{}
	proto := header.IPv4ProtocolNumber
	if b[0]>>4 == 6 {
		proto = header.IPv6ProtocolNumber
	}
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(b)})
	o.nic.dispatcher.DeliverNetworkPacket(proto, pkt)
	pkt.DecRef()
	return o.got
}

// open makes of b what the kernel's contract says of the flags: with NeedsChecksum the sum of the pseudo-header stands in the checksum's place, with
// ChecksumValid the right checksum. It is what a fuzzer would hardly hit upon. Packets without a TCP or UDP header where one is expected stay.
func open(b []byte, h *tun.Header) {
	proto, at, offset, ok := checksumAt(b)
	if !ok || h.Flags&(tun.NeedsChecksum|tun.ChecksumValid) == 0 {
		return
	}
	n := totalLength(b)
	src, dst := endpoints(b)
	field := b[at+offset:]
	sum := pseudoSum(proto, src, dst, n-at)
	binary.BigEndian.PutUint16(field, sum)
	if h.Flags&tun.NeedsChecksum == 0 {
		finish(b[:n], at, offset)
	}
}

// finish computes the checksum of b[at:] as a network device does.
func finish(b []byte, at, offset int) {
	v := ^sum(b[at:])
	if v == 0 {
		v = 0xffff
	}
	binary.BigEndian.PutUint16(b[at+offset:], v)
}

// checksumAt returns where the transport header starts, and where in it the checksum is, if it is TCP or UDP.
func checksumAt(b []byte) (proto tcpip.TransportProtocolNumber, at, offset int, ok bool) {
	v4 := b[0]>>4 == 4
	if len(b) < header.IPv4MinimumSize || !v4 && len(b) < header.IPv6MinimumSize {
		return 0, 0, 0, false
	}
	n := totalLength(b)
	if n > len(b) || n < header.IPv4MinimumSize {
		return 0, 0, 0, false
	}
	if v4 {
		proto, at = tcpip.TransportProtocolNumber(b[ip4Protocol]), int(b[0]&0xf)*4
	} else {
		at, proto = behindOptions(b[:n])
	}
	switch proto {
	case header.TCPProtocolNumber:
		offset = tcpChecksum
	case header.UDPProtocolNumber:
		offset = udpChecksum
	default:
		return 0, 0, 0, false
	}
	return proto, at, offset, at+offset+2 <= n
}

func totalLength(b []byte) int {
	if b[0]>>4 == 4 {
		return int(binary.BigEndian.Uint16(b[ip4Length:]))
	}
	return header.IPv6MinimumSize + int(binary.BigEndian.Uint16(b[ip6Length:]))
}

func endpoints(b []byte) (src, dst netip.Addr) {
	if b[0]>>4 == 4 {
		return netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
	}
	return netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
}

// FuzzParse: nothing panics, every slice is inside the packet, and what the whole link lets out, past netstack or through it, gVisor's slow path lets
// out too, with every checksum that the kernel has left open put in where the kernel says.
func FuzzParse(f *testing.F) {
	for _, b := range samples() {
		f.Add(b, uint8(0), uint8(0), uint16(0), uint16(0), uint16(0))
		f.Add(b, uint8(tun.NeedsChecksum), uint8(tun.GSOTCP4), uint16(1460), uint16(20), uint16(16))
		f.Add(b, uint8(tun.NeedsChecksum), uint8(tun.GSOUDP), uint16(3), uint16(20), uint16(6))
		f.Add(b, uint8(tun.NeedsChecksum), uint8(0), uint16(0), uint16(40), uint16(6))
		f.Add(b, uint8(tun.NeedsChecksum), uint8(0), uint16(0), uint16(24), uint16(4))
		f.Add(b, uint8(tun.ChecksumValid), uint8(0), uint16(0), uint16(0), uint16(0))
	}
	l := &link{count: &counters{}}
	fast, checked, slow := newOracle(f, newTrusted(l)), newOracle(f, newChecked(l)), newOracle(f, newChecked(l))
	var past arrival
	ns := stack.New(stack.Options{}) // it has no connections: no SYN waits for the end of one
	f.Cleanup(ns.Destroy)
	r := &reader{link: l, trusted: fast.nic, checked: checked.nic, reuse: &reuse{ns: ns}, udp: func(src, dst netip.AddrPort, payload []byte) {
		past = arrival{header.UDPProtocolNumber, src, dst, past.data + string(payload)}
	}}
	f.Cleanup(r.close)
	f.Fuzz(func(t *testing.T, b []byte, flags, gso uint8, size, start, offset uint16) {
		if len(b) == 0 || len(b) > tun.MaxPacket {
			return
		}
		h := tun.Header{Flags: flags, GSOType: gso, GSOSize: size, CsumStart: start, CsumOffset: offset}
		b = bytes.Clone(b)
		open(b, &h)
		past, fast.got, checked.got = arrival{}, arrival{}, arrival{}
		r.Packet(&h, copy(r.Buffer(), b))
		p := &r.pkt
		if p.verdict == dropped {
			return
		}
		if p.length > len(b) || p.headers > p.length || p.headers > headersMax || len(p.payload) > p.length {
			t.Fatalf("%+v", p)
		}
		got := past
		for _, o := range []*oracle{fast, checked} {
			if o.got != (arrival{}) {
				got = o.got
			}
		}
		if flags&tun.NeedsChecksum != 0 {
			finish(b[:p.length], int(start), int(offset))
		}
		if want := slow.take(b[:p.length]); got != want { // always asked, so that it has the same fragments; padding confuses it
			t.Fatalf("header %+v, packet % x\ngot     %+v\ngVisor: %+v", h, b, got, want)
		}
	})
}
