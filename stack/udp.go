// SPDX-License-Identifier: GPL-3.0-or-later

package stack

import (
	"encoding/binary"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/mutex-proxy/mutex/flow"
	"github.com/mutex-proxy/mutex/tun"
)

// UDP goes past netstack: the link's reader has verified the datagram, and hands it to the session of the application's socket. Only
// fragments, and packets with options or extension headers, come by netstack, whose transport handler ends in the same place.
//
//	reader ─▶ udpTable.receive ─▶ queue of the session ─▶ goroutine: Handler.UDP(session as source, session as sink)
//	                                                                   replies ─▶ sender.udp ─▶ TUN

// Bounds of what waits for its flow. A queue holds a burst of one socket (the kernel's own default for a socket is 208 KiB, and browsers send QUIC in trains
// of some dozens); all of them together no more than a quarter of a small machine's memory.
const (
	defaultUDPSessions = 32768
	queueDatagrams     = 512
	queueBytes         = 1 << 20
	queuesBytes        = 64 << 20

	slabSmall = 2 << 10 // a datagram of a usual MTU
	slabLarge = 64 << 10
)

// udpTable finds the session of an application's socket.
type udpTable struct {
	s            *Stack
	max          int
	small, large pool
	queued       atomic.Int64 // bytes of slabs in all queues

	mu       sync.Mutex
	sessions map[netip.AddrPort]*udpSession
	closed   bool
	wg       sync.WaitGroup // one a session; Add only under mu while not closed
}

func newUDPTable(s *Stack, limit int) *udpTable {
	return &udpTable{s: s, max: limit, small: pool{size: slabSmall}, large: pool{size: slabLarge}, sessions: map[netip.AddrPort]*udpSession{}}
}

func (t *udpTable) count() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.sessions)
}

// receive queues a copy of the payload for the socket's flow. It never blocks: what does not fit is counted and gone, as on any wire.
func (t *udpTable) receive(src, dst netip.AddrPort, payload []byte) {
	for {
		u := t.session(src)
		if u == nil {
			t.s.count.drop(dropUDPSockets)
			return
		}
		if u.push(dst, payload) {
			return
		}
		// It ended in between and is out of the table by now: the datagram is the first of a new session.
	}
}

// session returns the socket's session, a new one if need be; nil if there is no room for it, or the Stack is closing.
func (t *udpTable) session(src netip.AddrPort) *udpSession {
	t.mu.Lock()
	defer t.mu.Unlock()
	u := t.sessions[src]
	if u == nil && !t.closed && len(t.sessions) < t.max {
		u = &udpSession{t: t, src: src, wake: make(chan struct{}, 1)}
		t.sessions[src] = u
		t.wg.Add(1)
		go u.run()
	}
	if t.closed {
		return nil
	}
	return u
}

// handle takes datagrams that netstack has put together. Of a packet that came through the checked NIC, or was reassembled, nobody has
// verified the checksum.
func (t *udpTable) handle(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	h := header.UDP(pkt.TransportHeader().Slice())
	data := pkt.Data()
	if len(h) < header.UDPMinimumSize || int(h.Length()) != len(h)+data.Size() {
		t.s.count.drop(dropMalformed)
		return true
	}
	src, dst := addrOf(id.RemoteAddress), addrOf(id.LocalAddress)
	if !pkt.RXChecksumValidated {
		if h.Checksum() == 0 && src.Is6() || h.Checksum() != 0 && !h.IsChecksumValid(id.RemoteAddress, id.LocalAddress, data.Checksum()) {
			t.s.count.drop(dropChecksum)
			return true
		}
	}
	slab := t.large.get()
	n := copyData(*slab, pkt)
	t.receive(netip.AddrPortFrom(src, id.RemotePort), netip.AddrPortFrom(dst, id.LocalPort), (*slab)[:n])
	t.large.put(slab)
	return true
}

// close ends all sessions and waits for their flows.
func (t *udpTable) close() {
	t.mu.Lock()
	t.closed = true
	for _, u := range t.sessions {
		u.close()
	}
	t.mu.Unlock()
	t.wg.Wait()
}

// udpSession is one application socket: the queue of what it sent, and the way back to it.
type udpSession struct {
	t    *udpTable
	src  netip.AddrPort
	wake chan struct{} // capacity 1: the queue, the deadline or closed has changed

	mu       sync.Mutex
	ring     []datagram // grows by doubling up to queueDatagrams
	head, n  int
	bytes    int
	closed   bool
	deadline time.Time

	timer *time.Timer // of the reader alone, as is taken: how many datagrams it has had
	taken int
}

type datagram struct {
	dst  netip.AddrPort
	slab *[]byte
	n    int
}

var (
	_ flow.PacketSource = (*udpSession)(nil)
	_ flow.PacketSink   = (*udpSession)(nil)
	_ flow.Waiter       = (*udpSession)(nil)
)

// run is the session's goroutine.
func (u *udpSession) run() {
	defer u.t.wg.Done()
	for {
		taken := u.taken
		u.t.s.cfg.Handler.UDP(u.t.s.ctx, u.src, u, u)
		if u.over(u.taken == taken) {
			return
		}
	}
}

// over ends the session, unless something came while its flow was ending. A Handler that took nothing (idle) is not asked again: it would only
// be busy.
func (u *udpSession) over(idle bool) bool {
	u.t.mu.Lock()
	defer u.t.mu.Unlock()
	u.mu.Lock()
	defer u.mu.Unlock()
	u.deadline = time.Time{}
	if u.n > 0 && !idle && !u.closed {
		return false
	}
	u.closed = true
	delete(u.t.sessions, u.src)
	for u.n > 0 {
		u.t.s.count.drop(dropUDPClosed)
		u.freeLocked(u.popLocked())
	}
	u.ring = nil
	return true
}

func (u *udpSession) close() {
	u.mu.Lock()
	u.closed = true
	u.mu.Unlock()
	u.poke()
}

func (u *udpSession) poke() {
	select {
	case u.wake <- struct{}{}:
	default:
	}
}

// push queues a copy of the payload, or counts its loss. It reports false if the session has ended.
func (u *udpSession) push(dst netip.AddrPort, payload []byte) bool {
	p := &u.t.small
	if len(payload) > slabSmall {
		p = &u.t.large
	}
	u.mu.Lock()
	switch {
	case u.closed:
		u.mu.Unlock()
		return false
	case u.n == queueDatagrams || u.bytes+p.size > queueBytes:
		u.mu.Unlock()
		u.t.s.count.drop(dropUDPQueue)
		return true
	case u.t.queued.Add(int64(p.size)) > queuesBytes:
		u.t.queued.Add(-int64(p.size))
		u.mu.Unlock()
		u.t.s.count.drop(dropUDPMemory)
		return true
	}
	if u.n == len(u.ring) {
		u.growLocked()
	}
	slab := p.get()
	u.ring[(u.head+u.n)%len(u.ring)] = datagram{dst: dst, slab: slab, n: copy(*slab, payload)}
	u.n++
	u.bytes += p.size
	first := u.n == 1
	u.mu.Unlock()
	if first {
		u.poke()
	}
	return true
}

func (u *udpSession) growLocked() {
	ring := make([]datagram, max(4, 2*len(u.ring)))
	for i := range u.n {
		ring[i] = u.ring[(u.head+i)%len(u.ring)]
	}
	u.ring, u.head = ring, 0
}

func (u *udpSession) popLocked() datagram {
	d := u.ring[u.head]
	u.ring[u.head] = datagram{}
	u.head = (u.head + 1) % len(u.ring)
	u.n--
	return d
}

func (u *udpSession) freeLocked(d datagram) {
	size := len(*d.slab)
	u.bytes -= size
	u.t.queued.Add(-int64(size))
	if size == slabSmall {
		u.t.small.put(d.slab)
	} else {
		u.t.large.put(d.slab)
	}
}

// ReadBatch copies what the application has sent into ds, at least one datagram, waiting for it if need be.
func (u *udpSession) ReadBatch(ds []flow.Datagram) (int, error) {
	for {
		if err := u.WaitRead(); err != nil || len(ds) == 0 {
			return 0, err
		}
		u.mu.Lock()
		n := u.takeLocked(ds)
		u.taken += n
		u.mu.Unlock()
		if n > 0 {
			return n, nil
		}
	}
}

// WaitRead waits until ReadBatch has something to return, for readers that hold no buffer meanwhile (flow.Waiter).
func (u *udpSession) WaitRead() error {
	for {
		u.mu.Lock()
		n, deadline, closed := u.n, u.deadline, u.closed
		u.mu.Unlock()
		switch {
		case closed:
			return net.ErrClosed
		case !deadline.IsZero() && !time.Now().Before(deadline):
			return os.ErrDeadlineExceeded
		case n > 0:
			return nil
		}
		u.await(deadline)
	}
}

func (u *udpSession) takeLocked(ds []flow.Datagram) int {
	n := 0
	for n < len(ds) && u.n > 0 {
		d := u.popLocked()
		if len(ds[n].Buf) < d.n {
			u.t.s.count.drop(dropUDPRoom)
		} else {
			copy(ds[n].Buf, (*d.slab)[:d.n])
			ds[n].Buf = ds[n].Buf[:d.n]
			ds[n].Addr = flow.AddrFrom(d.dst)
			n++
		}
		u.freeLocked(d)
	}
	return n
}

func (u *udpSession) await(deadline time.Time) {
	if deadline.IsZero() {
		<-u.wake
		return
	}
	if d := time.Until(deadline); u.timer == nil {
		u.timer = time.NewTimer(d)
	} else {
		u.timer.Reset(d)
	}
	select {
	case <-u.wake:
		u.timer.Stop()
	case <-u.timer.C:
	}
}

// SetReadDeadline bounds ReadBatch, also one under way.
func (u *udpSession) SetReadDeadline(t time.Time) error {
	u.mu.Lock()
	u.deadline = t
	u.mu.Unlock()
	u.poke()
	return nil
}

// Deliver sends the datagrams to the application's socket, each as if from its Addr.
func (u *udpSession) Deliver(ds []flow.Datagram) {
	send := &u.t.s.send
	for len(ds) > 0 {
		src := netip.AddrPortFrom(ds[0].Addr.IP.Unmap(), ds[0].Addr.Port)
		n := 1
		switch {
		case !src.IsValid() || src.Addr().Is4() != u.src.Addr().Is4():
			u.t.s.count.drop(dropUDPReply)
		default:
			if n = send.train(src, ds); n > 1 {
				send.udpTrain(src, u.src, ds[:n])
			} else if !send.udp(src, u.src, ds[0].Buf) {
				u.t.s.count.drop(dropUDPReply)
			}
		}
		ds = ds[n:]
	}
}

// Flush does nothing: a TUN takes one packet a system call, so that Deliver leaves nothing behind.
func (*udpSession) Flush() {}

// Unreachable answers the application's datagram to dst with an ICMP error that quotes it.
func (u *udpSession) Unreachable(dst netip.AddrPort, payload []byte, r flow.Reason) {
	dst = netip.AddrPortFrom(dst.Addr().Unmap(), dst.Port())
	if !dst.IsValid() || dst.Addr().Is4() != u.src.Addr().Is4() {
		u.t.s.count.drop(dropUDPReply)
		return
	}
	payload = payload[:min(len(payload), quoteMax6)]
	quote := make([]byte, 0, header.IPv6MinimumSize+header.UDPMinimumSize+quoteMax6)
	length := header.UDPMinimumSize + len(payload)
	if dst.Addr().Is4() {
		var ip [header.IPv4MinimumSize]byte
		put4(&ip, header.UDPProtocolNumber, u.src.Addr(), dst.Addr(), 0, ip4DontFragment, length)
		quote = append(quote, ip[:]...)
	} else {
		var ip [header.IPv6MinimumSize]byte
		put6(&ip, header.UDPProtocolNumber, u.src.Addr(), dst.Addr(), length)
		quote = append(quote, ip[:]...)
	}
	quote = binary.BigEndian.AppendUint16(quote, u.src.Port())
	quote = binary.BigEndian.AppendUint16(quote, dst.Port())
	quote = binary.BigEndian.AppendUint16(quote, uint16(length))
	quote = append(quote, 0, 0) // the checksum, which nobody verifies in a quotation
	u.t.s.send.unreachable(append(quote, payload...), r)
}

// A slab holds the largest datagram.
var _ = [1]struct{}{}[(tun.MaxPacket-header.UDPMinimumSize)/(slabLarge+1)]
