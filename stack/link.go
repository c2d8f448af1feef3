// SPDX-License-Identifier: GPL-3.0-or-later

package stack

import (
	"net/netip"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/mutex-proxy/mutex/tun"
)

// The link is the fast path between a TUN queue and netstack.
//
//	           readv                                  ┌─ toUDP ─────────▶ udpTable (no netstack)
//	TUN queue ───────▶ reader.Buffer ─▶ packet.parse ─┼─ toNetstack ────▶ NIC trusted ─▶ TCP processors
//	           64 KiB                                 └─ toNetstackSlow ▶ NIC checked ─▶ TCP, fragments, ICMP, the rest
//	TUN queue ◀─────── link.send ◀─┬── WritePackets, from whichever goroutine sends
//	           writev              ├── writeShakes: SYN-ACKs
//	                               └── heldAcks: ACKs that no reply has taken with it in time
//
// Up: a train of segments arrives as one packet of up to 64 KiB and goes to netstack as one, without being copied. Down: netstack makes
// trains itself (HostGSOSupported) and the kernel splits them, or better, does not.
//
// There are two NICs because netstack asks the NIC, not the packet, whether checksums have been verified. Both write to the same device.
const (
	nicTrusted tcpip.NICID = 1
	nicChecked tcpip.NICID = 2
)

// copyMax is the size in bytes up to which a packet is copied into a view of its own. Above, the read buffer itself is handed over, which
// costs a fresh one, and gVisor clears those: as much work as copying half of it. It also bounds the memory a short segment can hold
// in a receive queue to four times its size.
const copyMax = 16 << 10

// link is what both NICs share.
type link struct {
	dev    atomic.Pointer[tun.Device] // Replace changes it
	mtu    int
	count  *counters
	shakes chan handshake // SYN-ACKs for writeShakes
	acks   heldAcks
}

func newLink(dev *tun.Device, count *counters) *link {
	l := &link{mtu: dev.MTU(), count: count, shakes: make(chan handshake, shakesMax)}
	l.dev.Store(dev)
	l.acks.write = func(hash uint32, h *tun.Header, b []byte) { l.send(hash, h, b) }
	return l
}

// shakesMax bounds the SYN-ACKs that wait to be written; the ones beyond are written at once.
const shakesMax = 256

// handshake is a SYN-ACK that waits to be written: at most an IPv6 header and the longest TCP header.
type handshake struct {
	h    tun.Header
	hash uint32
	n    int
	b    [header.IPv6MinimumSize + header.TCPHeaderMaximumSize]byte
}

// shake leaves a SYN-ACK to writeShakes. netstack sends it with the endpoint locked. Written there and then, the application's kernel answers
// and its application wakes up before the write returns, and netstack's processor, with that answer in its hands, spins on the lock until
// it does: more than half of the CPU of a connection. It reports false if the packet has to be written by the caller.
func (l *link) shake(hash uint32, h *tun.Header, pieces [][]byte) bool {
	s := handshake{h: *h, hash: hash}
	for _, p := range pieces {
		if s.n+len(p) > len(s.b) {
			return false
		}
		s.n += copy(s.b[s.n:], p)
	}
	select {
	case l.shakes <- s:
		return true
	default:
		return false
	}
}

// writeShakes writes what shake leaves, until done. What is left then belongs to connections that are being reset.
func (l *link) writeShakes(done <-chan struct{}) {
	for {
		select {
		case s := <-l.shakes:
			l.send(s.hash, &s.h, s.b[:s.n])
		case <-done:
			return
		}
	}
}

// isSYNACK says whether the packet answers a SYN.
func isSYNACK(pkt *stack.PacketBuffer) bool {
	const both = header.TCPFlagSyn | header.TCPFlagAck
	h := header.TCP(pkt.TransportHeader().Slice())
	return pkt.TransportProtocolNumber == header.TCPProtocolNumber && len(h) >= header.TCPMinimumSize && h.Flags()&both == both
}

// send writes one packet, given in pieces that stay the caller's. All packets of one hash leave by one queue, and so in order.
func (l *link) send(hash uint32, h *tun.Header, pieces ...[]byte) {
	queues := l.dev.Load().Queues()
	q := queues[0]
	if len(queues) > 1 {
		q = queues[hash%uint32(len(queues))]
	}
	if q.Write(h, pieces...) != nil {
		l.count.drop(dropWrite)
		return
	}
	n := 0
	for _, p := range pieces {
		n += len(p)
	}
	l.count.packetsOut.Add(1)
	l.count.bytesOut.Add(uint64(n))
}

// nic is the link as netstack sees it.
type nic struct {
	*link
	name         string
	capabilities stack.LinkEndpointCapabilities
	dispatcher   stack.NetworkDispatcher // set by CreateNIC, before the readers start, and cleared after they ended
}

var (
	_ stack.LinkEndpoint = (*nic)(nil)
	_ stack.GSOEndpoint  = (*nic)(nil) // a wrapper that hides this method set costs eleven times the CPU on downloads
)

// newTrusted returns the NIC for packets whose checksums the kernel answers for. It must not claim transmit offload: netstack would then
// leave SYN-ACK, RST and ICMP without checksums. TCP data needs none all the same, by GSO.NeedsCsum.
func newTrusted(l *link) *nic {
	return &nic{link: l, name: "trusted", capabilities: stack.CapabilityRXChecksumOffload}
}

// newChecked returns the NIC for packets whose checksums netstack has to verify.
func newChecked(l *link) *nic { return &nic{link: l, name: "checked"} }

// WritePackets writes from the caller's goroutine: one system call a packet or train, no queue but for SYN-ACKs. netstack retransmits what
// is lost.
func (n *nic) WritePackets(pkts stack.PacketBufferList) (int, tcpip.Error) {
	for _, pkt := range pkts.AsSlice() {
		n.write(pkt)
	}
	return pkts.Len(), nil
}

func (n *nic) write(pkt *stack.PacketBuffer) {
	var h tun.Header
	if gso := &pkt.GSOOptions; gso.Type != stack.GSONone && gso.NeedsCsum {
		h.Flags = tun.NeedsChecksum
		h.CsumStart = gso.L3HdrLen
		h.CsumOffset = gso.CsumOffset
		if pkt.Data().Size() > int(gso.MSS) {
			h.GSOType = tun.GSOTCP4
			if gso.Type == stack.GSOTCPv6 {
				h.GSOType = tun.GSOTCP6
			}
			h.GSOSize = gso.MSS
			h.HdrLen = uint16(pkt.HeaderSize())
		}
	}
	var room [24][]byte // on the stack: a header and the views of some writes
	pieces := room[:0]
	views, skip := pkt.AsViewList()
	for v := views.Front(); v != nil; v = v.Next() {
		b := v.AsSlice()
		if skip >= len(b) {
			skip -= len(b)
			continue
		}
		pieces = append(pieces, b[skip:])
		skip = 0
	}
	if pkt.TransportProtocolNumber == header.TCPProtocolNumber {
		if n.acks.hold(pkt, &h, pieces) || pkt.Data().Size() == 0 && isSYNACK(pkt) && n.shake(pkt.Hash, &h, pieces) {
			return
		}
	}
	n.send(pkt.Hash, &h, pieces...)
}

// MTU returns the device's MTU.
func (n *nic) MTU() uint32 { return uint32(n.mtu) }

// SetMTU does nothing: the MTU is fixed when the device is opened.
func (*nic) SetMTU(uint32) {}

// MaxHeaderLength returns 0: the virtio-net header is not part of netstack's packet.
func (*nic) MaxHeaderLength() uint16 { return 0 }

// LinkAddress returns none: a TUN has no link layer.
func (*nic) LinkAddress() tcpip.LinkAddress { return "" }

// SetLinkAddress does nothing.
func (*nic) SetLinkAddress(tcpip.LinkAddress) {}

// Capabilities says which checksums netstack need not verify.
func (n *nic) Capabilities() stack.LinkEndpointCapabilities { return n.capabilities }

// Attach is netstack's word where to deliver packets.
func (n *nic) Attach(d stack.NetworkDispatcher) { n.dispatcher = d }

// IsAttached reports whether Attach gave a dispatcher.
func (n *nic) IsAttached() bool { return n.dispatcher != nil }

// Wait returns at once: the readers belong to the Stack.
func (*nic) Wait() {}

// ARPHardwareType returns none.
func (*nic) ARPHardwareType() header.ARPHardwareType { return header.ARPHardwareNone }

// AddHeader does nothing.
func (*nic) AddHeader(*stack.PacketBuffer) {}

// ParseHeader does nothing.
func (*nic) ParseHeader(*stack.PacketBuffer) bool { return true }

// Close does nothing: the device belongs to the caller of New.
func (*nic) Close() {}

// SetOnCloseAction does nothing.
func (*nic) SetOnCloseAction(func()) {}

// GSOMaxSize returns the largest train in bytes, with its headers.
func (*nic) GSOMaxSize() uint32 { return tun.MaxPacket }

// SupportedGSO says who splits trains: the kernel, unless the device was opened without offloads.
func (n *nic) SupportedGSO() stack.SupportedGSO {
	if n.dev.Load().Offload() {
		return stack.HostGSOSupported
	}
	return stack.GSONotSupported
}

// reader is the receiving end of one queue.
type reader struct {
	link             *link
	trusted, checked *nic
	udp              func(src, dst netip.AddrPort, payload []byte) // must not keep payload, nor block
	reuse            *reuse

	view *buffer.View // the read buffer; nil after it went to netstack
	buf  []byte       // its bytes
	pkt  packet
}

var _ tun.Receiver = (*reader)(nil)

// Buffer returns the read buffer: a view of gVisor's, so that a large packet can be handed over as it is.
func (r *reader) Buffer() []byte {
	if r.view == nil {
		r.view = buffer.NewViewSize(buffer.MaxChunkSize)
		r.buf = r.view.AsSlice()
	}
	return r.buf
}

// Packet passes on what was read.
func (r *reader) Packet(h *tun.Header, n int) {
	r.link.count.packetsIn.Add(1)
	r.link.count.bytesIn.Add(uint64(n))
	p := &r.pkt
	switch p.parse(r.buf[:n], h); p.verdict {
	case toUDP:
		rest := p.payload
		for len(rest) > p.segment {
			r.udp(p.src, p.dst, rest[:p.segment])
			rest = rest[p.segment:]
		}
		r.udp(p.src, p.dst, rest)
	case toNetstack:
		r.deliver(r.trusted, p)
	case toNetstackSlow:
		r.deliver(r.checked, p)
	case dropped:
		r.link.count.drop(p.why)
	}
}

// deliver gives the packet to netstack, which queues TCP segments to its processor goroutines: handled here, in the reader, an
// acknowledgement that frees a window would be waited for by the very goroutine that has to read it.
func (r *reader) deliver(n *nic, p *packet) {
	if p.syn && r.reuse.hold(n, p, r.buf[:p.length]) {
		return
	}
	var payload buffer.Buffer
	if p.length <= copyMax {
		payload = buffer.MakeWithData(r.buf[:p.length])
	} else {
		big := r.view
		r.view = nil
		big.CapLength(p.length)
		if p.headers > 0 {
			// The headers in a view of their own: with them in the same chunk as the payload, pulling them up would clone all
			// 64 KiB as soon as the chunk is shared (8 to 13 % of the CPU).
			payload = buffer.MakeWithView(headerView(r.buf[:p.headers]))
			big.TrimFront(p.headers)
		}
		_ = payload.Append(big) // fails only when it has to copy
	}
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: payload})
	n.dispatcher.DeliverNetworkPacket(p.proto, pkt)
	pkt.DecRef()
}

// headersMax is the largest chunk for headers: that of IPv4 and TCP with all options has 120 bytes.
const headersMax = 128

// headerView copies b, at most headersMax bytes, to the end of a chunk: into room behind it Append would copy the first bytes of the payload,
// which would then leave by two system calls, the first for a few bytes.
func headerView(b []byte) *buffer.View {
	size := 64 // the two smallest chunks gVisor pools
	if len(b) > size {
		size = headersMax
	}
	v := buffer.NewViewSize(size)
	v.TrimFront(size - len(b))
	copy(v.AsSlice(), b)
	return v
}

// Idle does nothing: no packet waits for another one.
func (*reader) Idle() {}

// close gives the read buffer back.
func (r *reader) close() {
	if r.view != nil {
		r.view.Release()
		r.view, r.buf = nil, nil
	}
}
