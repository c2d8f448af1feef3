// SPDX-License-Identifier: GPL-3.0-or-later

package stack

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"github.com/mutex-proxy/mutex/flow"
)

// A connection request, from SYN to answer:
//
//	SYN ─▶ tcpFront.handle ─▶ forwarder ─▶ goroutine: Handler.TCP(pending)
//	        │ full: drop, the         ├─ Accept ─▶ SYN-ACK, wait for the ACK ─▶ conn
//	        │ sender tries again      ├─ Reject ─▶ RST, ICMP unreachable, or nothing
//	        └ repeated SYN: swallowed └─ neither: nothing
//
// Before that it may have to wait for the end of the last connection with the same ports: reuse.go.

// Bounds of what waits for an answer. The forwarder alone has one in total, under which a single host that scans shuts out all others.
const (
	defaultPendingTCP = 16384
	sourceShare       = 2 // one source may have 1/sourceShare of it
)

// Keep-alive, on the application's side. It finds hosts behind a gateway that vanished, and containers that were killed; an application of this
// machine that dies has its kernel say so. Idle connections of hours stay up as long as somebody answers.
const (
	keepAliveIdle     = 5 * time.Minute
	keepAliveInterval = 30 * time.Second
	keepAliveCount    = 5
)

// Buffers of a connection, in bytes. The window advertised is half of the receive buffer, which at 1 MiB fills 4 Gbit/s at 1 ms: this side of the
// proxy is never farther away than a LAN. All of it is used only when one side stands still.
const (
	bufferMax    = 1 << 20
	bufferMin    = 64 << 10
	bufferBudget = 256 << 20
)

// bufferSize returns the size of each of a connection's two buffers when it is the n-th open one: a fair share of the budget. What n stalled
// connections can hold grows with the budget times the logarithm of n up to 2,048 of them, and by 128 KiB each beyond.
func bufferSize(n int64) int64 {
	return min(max(bufferBudget/2/max(n, 1), bufferMin), bufferMax)
}

// syn is one unanswered connection request.
type syn struct {
	quote [128]byte // its IP and TCP header, for ICMP: at most 60 + 60 bytes over IPv4
	n     int
	seq   uint32
}

// tcpFront stands in front of netstack's forwarder: it holds what the forwarder does not keep (the SYN itself) or not bound (a source's share).
type tcpFront struct {
	s         *Stack
	max       int
	handshake time.Duration // 0 = handshakeTime
	fwd       *tcp.Forwarder
	open      atomic.Int64 // accepted and not closed connections
	adopted   adoptions
	reuse     *reuse
	late      late

	mu        sync.Mutex
	pending   map[stack.TransportEndpointID]*syn
	perSource map[tcpip.Address]int
	closed    bool
	wg        sync.WaitGroup // one for each pending request; Add only under mu while not closed
}

func (t *tcpFront) pendingCount() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.pending)
}

// handle takes TCP packets for which there is no connection. False makes netstack answer with RST.
func (t *tcpFront) handle(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	h := header.TCP(pkt.TransportHeader().Slice())
	if len(h) < header.TCPMinimumSize {
		return false
	}
	if answer, forget, ok := t.adopted.stray(id, h); ok {
		if forget && t.s.cfg.Forget != nil {
			t.s.cfg.Forget(netip.AddrPortFrom(addrOf(id.RemoteAddress), id.RemotePort), netip.AddrPortFrom(addrOf(id.LocalAddress), id.LocalPort))
		}
		if answer != nil {
			_ = t.s.link.answer(answer)
		}
		return true
	}
	const mask = header.TCPFlagSyn | header.TCPFlagAck | header.TCPFlagRst | header.TCPFlagFin
	switch flags := h.Flags() & mask; {
	case flags&(header.TCPFlagSyn|header.TCPFlagAck) != header.TCPFlagSyn:
		return false
	case flags != header.TCPFlagSyn: // SYN with RST or FIN: nobody sends that in good faith
		t.s.count.drop(dropMalformed)
		return true
	case t.late.is(id, h.SequenceNumber()):
		return true
	}
	switch taken, why := t.reserve(id, pkt); {
	case !taken && why == numDrops: // asked before; the answer is on its way
		return true
	case !taken:
		t.s.count.drop(why)
		return true
	}
	if !t.fwd.HandlePacket(id, pkt) { // wrong checksum
		t.release(id)
		return false
	}
	return true
}

// reserve notes the request. The forwarder's own table must never hold one that ours does not: it swallows a SYN it knows, and ours would
// then wait for ever. So ours is written before, and cleared after.
func (t *tcpFront) reserve(id stack.TransportEndpointID, pkt *stack.PacketBuffer) (bool, drop) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, ok := t.pending[id]; ok || t.closed {
		return false, numDrops
	}
	switch {
	case len(t.pending) >= t.max:
		return false, dropSYNFlood
	case t.perSource[id.RemoteAddress] >= max(t.max/sourceShare, 1):
		return false, dropSYNSource
	}
	p := &syn{seq: header.TCP(pkt.TransportHeader().Slice()).SequenceNumber()}
	p.n = copy(p.quote[:], pkt.NetworkHeader().Slice())
	p.n += copy(p.quote[p.n:], pkt.TransportHeader().Slice())
	t.pending[id] = p
	t.perSource[id.RemoteAddress]++
	t.wg.Add(1)
	return true, 0
}

func (t *tcpFront) release(id stack.TransportEndpointID) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.forgetLocked(id)
	t.wg.Done()
}

func (t *tcpFront) forget(id stack.TransportEndpointID) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.forgetLocked(id)
}

func (t *tcpFront) forgetLocked(id stack.TransportEndpointID) {
	if _, ok := t.pending[id]; !ok {
		return
	}
	delete(t.pending, id)
	if t.perSource[id.RemoteAddress]--; t.perSource[id.RemoteAddress] == 0 {
		delete(t.perSource, id.RemoteAddress)
	}
}

// serve is the goroutine of one request.
func (t *tcpFront) serve(req *tcp.ForwarderRequest) {
	defer t.wg.Done()
	id := req.ID()
	t.mu.Lock()
	p := &pending{t: t, req: req, id: id, syn: t.pending[id]}
	t.mu.Unlock()
	src := netip.AddrPortFrom(addrOf(id.RemoteAddress), id.RemotePort)
	orig := netip.AddrPortFrom(addrOf(id.LocalAddress), id.LocalPort)
	growStack(id.RemotePort)
	t.s.cfg.Handler.TCP(t.s.ctx, src, orig, p)
	p.Reject(flow.ReasonDrop) // no effect if it was answered
}

// growStack makes the goroutine's stack as large as a dial needs while there is little on it: it would be copied twice otherwise, with all the
// frames that are on it by then.
//
//go:noinline
func growStack(at uint16) byte {
	var b [6 << 10]byte
	return b[at%uint16(len(b))]
}

// close makes handle swallow what still comes.
func (t *tcpFront) close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closed = true
}

// pending is an unanswered SYN, as the flow sees it.
type pending struct {
	t    *tcpFront
	req  *tcp.ForwarderRequest
	id   stack.TransportEndpointID
	syn  *syn
	done atomic.Bool
}

var _ flow.Pending = (*pending)(nil)

var errAnswered = errors.New("the connection request has been answered already")

// Accept sends the SYN-ACK and waits until the application's kernel has acknowledged it: microseconds, or, if it is gone or never was
// there, handshakeTime or until the Stack is closed.
func (p *pending) Accept() (flow.Conn, error) {
	if !p.done.CompareAndSwap(false, true) {
		return nil, errAnswered
	}
	c := newConn(p.t, p.id)
	c.opened, c.seq = true, p.syn.seq
	overdue := time.AfterFunc(cmp.Or(p.t.handshake, handshakeTime), p.t.abandon(p.id))
	ep, err := p.req.CreateEndpoint(&c.queue)
	overdue.Stop()
	p.req.Complete(false)
	p.t.forget(p.id)
	if err != nil {
		return nil, fmt.Errorf("accept: %w", errorOf(err))
	}
	c.start(ep)
	return c, nil
}

// abandon ends a handshake that is under way: netstack itself would go on for two minutes, whatever its options say.
func (t *tcpFront) abandon(id stack.TransportEndpointID) func() {
	return func() {
		if ep := t.s.ns.FindTransportEndpoint(familyOf(id), tcp.ProtocolNumber, id, nicTrusted); ep != nil {
			ep.Abort()
		}
	}
}

// Reject answers no. Only the first call of Accept and Reject counts.
func (p *pending) Reject(r flow.Reason) {
	if !p.done.CompareAndSwap(false, true) {
		return
	}
	p.req.Complete(r == flow.ReasonRefused)
	p.t.forget(p.id)
	if r != flow.ReasonRefused {
		p.t.s.send.unreachable(p.syn.quote[:p.syn.n], r)
	}
}

// setTCPOptions tunes netstack's TCP.
func setTCPOptions(ns *stack.Stack) error {
	sack := tcpip.TCPSACKEnabled(true)                       // a lost packet costs one retransmission, not a window
	recovery := tcpip.TCPRecovery(0)                         // RACK takes 13 to 15 % of the CPU of a download, on a link that does not reorder
	moderate := tcpip.TCPModerateReceiveBufferOption(true)   // so that the SYN-ACK's window scale allows bufferMax; fixed after accept
	noDelay := tcpip.TCPDelayEnabled(false)                  // Nagle would hold back what the upstream has already sent
	timeWait := tcpip.TCPTimeWaitTimeoutOption(0)            // a SYN that reuses a tuple in TIME_WAIT is lost: 1 s at 1 ms, 12 s at 60 s
	linger := tcpip.TCPLingerTimeoutOption(30 * time.Second) // FIN_WAIT_2 after both sides of the relay have ended: the application has stopped caring
	cc := tcpip.CongestionControlOption("reno")              // there is no congestion on a TUN; the cheapest
	receive := tcpip.TCPReceiveBufferSizeRangeOption{Min: 4 << 10, Default: bufferMin, Max: bufferMax}
	send := tcpip.TCPSendBufferSizeRangeOption{Min: 4 << 10, Default: bufferMin, Max: bufferMax}
	for _, o := range []tcpip.SettableTransportProtocolOption{
		&sack, &recovery, &moderate, &noDelay, &timeWait, &linger, &cc, &receive, &send,
	} {
		if err := ns.SetTransportProtocolOption(tcp.ProtocolNumber, o); err != nil {
			return fmt.Errorf("tcp option %T: %s", o, err)
		}
	}
	return nil
}

// handshakeTime is how long a SYN-ACK waits for its acknowledgement, three repetitions included (after 1, 3 and 7 s). The application's kernel answers
// the first, or is not there; until it is given up, the request holds a connection of the upstream.
const handshakeTime = 10 * time.Second
