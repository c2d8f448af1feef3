// SPDX-License-Identifier: GPL-3.0-or-later

package stack

import (
	"encoding/binary"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/mutex-proxy/mutex/tun"
)

// Delayed acknowledgements (RFC 1122 section 4.2.3.2), which netstack does not have: it answers each request with an ACK of its own,
// microseconds before the reply that could have carried it, and a FIN likewise. A packet to the TUN is the dearest thing a short connection
// does (a system call that includes the receiving kernel), and it is made with the endpoint locked. So an ACK of little data is held for a
// moment; the next packet of its connection takes its place.
//
// Not held: the ACK of more than a small segment (the sender's window may wait for it), the second in a row (every second segment is
// acknowledged), and those that acknowledge nothing new (window updates, duplicates, keep-alive).
const (
	// ackDelay is far below any retransmission timer and below what an application without TCP_NODELAY notices that writes its request in
	// two pieces: the second waits for the ACK of the first.
	ackDelay = time.Millisecond
	// ackSmall is the most bytes that a held ACK acknowledges: less than a full segment.
	ackSmall = 1200
	// ackSlots bounds the connections that are looked after, 80 KiB of them; two in one slot are as if there were none of this.
	ackSlots = 512
	// ackTCPMax is a TCP header with a timestamp. Anything more is a SACK, and tells of a loss.
	ackTCPMax = 32
)

// heldAcks are the ACKs that wait.
type heldAcks struct {
	write func(hash uint32, h *tun.Header, b []byte)
	slots [ackSlots]ackSlot

	mu     sync.Mutex
	due    []uint16 // slots to look at when the timer fires
	timer  *time.Timer
	armed  bool
	closed bool

	flushing sync.Mutex // held while the timer's function runs
}

// ackSlot is one connection's: what it has acknowledged, and an ACK that waits, if n is not 0.
type ackSlot struct {
	mu     sync.Mutex
	hash   uint32 // of the connection, and its ports: who confuses two all the same costs one of them a retransmission
	ports  uint32
	acked  uint32
	listed bool // in due
	n      int
	h      tun.Header
	b      [header.IPv6MinimumSize + ackTCPMax]byte
}

// hold looks at a TCP packet that is about to be written, given in pieces. It reports true if it keeps the packet.
func (a *heldAcks) hold(pkt *stack.PacketBuffer, h *tun.Header, pieces [][]byte) bool {
	t := header.TCP(pkt.TransportHeader().Slice())
	if len(t) < header.TCPMinimumSize {
		return false
	}
	ports, ack := binary.BigEndian.Uint32(t), t.AckNumber()
	i := pkt.Hash % ackSlots
	s := &a.slots[i]
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.hash != pkt.Hash || s.ports != ports {
		if s.n == 0 {
			s.hash, s.ports, s.acked = pkt.Hash, ports, ack
		}
		return false
	}
	news := ack - s.acked
	waited := s.n > 0
	s.acked, s.n = ack, 0 // what waited is superseded
	if waited || news == 0 || news > ackSmall || t.Flags() != header.TCPFlagAck || len(t) > ackTCPMax || pkt.Data().Size() > 0 {
		return false
	}
	n := 0
	for _, p := range pieces {
		if n+len(p) > len(s.b) { // options in the network header: none of ours
			return false
		}
		n += copy(s.b[n:], p)
	}
	if !s.listed && !a.list(uint16(i)) {
		return false
	}
	s.n, s.h, s.listed = n, *h, true
	return true
}

// list has a slot looked at in ackDelay, at most. False after close.
func (a *heldAcks) list(i uint16) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return false
	}
	a.due = append(a.due, i)
	if !a.armed {
		a.armed = true
		if a.timer == nil {
			a.timer = time.AfterFunc(ackDelay, a.flush)
		} else {
			a.timer.Reset(ackDelay)
		}
	}
	return true
}

// flush writes what waits.
func (a *heldAcks) flush() {
	a.flushing.Lock()
	defer a.flushing.Unlock()
	a.mu.Lock()
	var due [ackSlots]uint16
	n := copy(due[:], a.due)
	a.due, a.armed = a.due[:0], false
	if a.closed {
		n = 0
	}
	a.mu.Unlock()
	for _, i := range due[:n] {
		s := &a.slots[i]
		s.mu.Lock()
		s.listed = false
		if s.n > 0 {
			a.write(s.hash, &s.h, s.b[:s.n])
			s.n = 0
		}
		s.mu.Unlock()
	}
}

// close makes hold keep nothing more, and waits for flush. What waits belongs to connections that are being reset.
func (a *heldAcks) close() {
	a.mu.Lock()
	a.closed = true
	if a.timer != nil {
		a.timer.Stop()
	}
	a.mu.Unlock()
	a.flushing.Lock()
	defer a.flushing.Unlock()
}
