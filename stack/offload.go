// SPDX-License-Identifier: GPL-3.0-or-later

package stack

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/mutex-proxy/mutex/flow"
	"github.com/mutex-proxy/mutex/stack/offload"
	"github.com/mutex-proxy/mutex/tun"
)

// This file joins the connection requests that netstack's front holds with package offload. The front has everything that is needed: the SYN as
// it came. From then on netstack does not see the flow, and tcpFront.handle gets what of it comes through the TUN all the same.

var (
	_ flow.Adopter = (*pending)(nil)
	_ flow.Splicer = (*adopted)(nil)
)

var errNoOffload = errors.New("offload: not for this context")

const (
	// answerAgain is the time between two answers to stray packets of one flow.
	answerAgain = 100 * time.Millisecond
	// strayGap is longer than a kernel's longest pause between two retransmissions (TCP_RTO_MAX): what comes later is another story.
	strayGap = 2 * time.Minute
)

// adoptions are the flows of a Stack that are in the kernel.
type adoptions struct {
	engine *offload.Engine // nil = none

	mu   sync.Mutex
	byID map[stack.TransportEndpointID]*adopted // bounded by the flow table, and by what is still being closed
}

// adopted is a flow in the kernel.
type adopted struct {
	*offload.Conn
	t      *tcpFront
	id     stack.TransportEndpointID
	seq    uint32 // of its SYN
	answer []byte // the SYN-ACK
	last   time.Time
	strays int  // answers in a row, none more than strayGap after the last
	again  bool // the next stray packet is answered at once
}

// Adopt implements flow.Adopter.
func (p *pending) Adopt() (flow.Splicer, error) {
	a := &p.t.adopted
	if a.engine == nil {
		return nil, errNoOffload
	}
	syn, err := offload.ParseSYN(p.syn.quote[:p.syn.n])
	if err != nil {
		return nil, fmt.Errorf("offload: %w", err)
	}
	if !p.done.CompareAndSwap(false, true) {
		return nil, errAnswered
	}
	c := &adopted{t: p.t, id: p.id, seq: syn.Seq}
	c.Conn, err = a.engine.Adopt(&syn, func(b []byte) error {
		c.answer = b
		a.put(c) // before the application can send anything
		return p.t.s.link.answer(b)
	})
	if err != nil {
		a.drop(c)
		if !errors.Is(err, flow.ErrGone) {
			p.done.Store(false)
			return nil, err
		}
	}
	p.req.Complete(false)
	p.t.forget(p.id)
	if err != nil {
		return nil, err
	}
	p.t.open.Add(1)
	return c, nil
}

// Close implements flow.Conn.
func (c *adopted) Close() error {
	c.forget()
	return c.Conn.Close()
}

// Abort implements flow.Conn.
func (c *adopted) Abort() {
	c.forget()
	c.Conn.Abort()
}

func (c *adopted) forget() {
	if c.t.adopted.drop(c) {
		c.t.open.Add(-1)
		if c.Answered() {
			c.t.late.note(c.id, c.seq)
		}
	}
}

func (a *adoptions) put(c *adopted) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.byID == nil {
		a.byID = make(map[stack.TransportEndpointID]*adopted)
	}
	a.byID[c.id] = c
}

// drop forgets c, and reports whether it was known.
func (a *adoptions) drop(c *adopted) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.byID[c.id] != c {
		return false
	}
	delete(a.byID, c.id)
	return true
}

// stray deals with a packet that came through the TUN although its flow is in the kernel: a SYN that was sent again before the answer arrived;
// or the kernel has lost sight of the flow. The answer, sent again, helps in both cases: it tells an application that waits, and makes the guard
// recognize the flow, so that what the application sends again finds its way. Where conntrack knows the flow, but has not seen some of it (nftables
// were flushed: it takes what follows for invalid, and the guard cannot match it), an answer does not help, and it has to forget it first. It reports false if the packet is
// none of an adopted flow's.
func (a *adoptions) stray(id stack.TransportEndpointID, h header.TCP) (answer []byte, forget, ok bool) {
	if a.engine == nil {
		return nil, false, false
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	c := a.byID[id]
	const mask = header.TCPFlagSyn | header.TCPFlagAck
	syn := h.Flags()&mask == header.TCPFlagSyn
	if c == nil || syn && h.SequenceNumber() != c.seq {
		return nil, false, false // a new connection with the same ports
	}
	now := time.Now()
	switch gap := now.Sub(c.last); {
	case c.again:
	case gap < answerAgain:
		return nil, false, true
	case gap > strayGap:
		c.strays = 0
	}
	c.last = now
	c.strays++
	// Forgotten, the flow cannot be recognized by an answer before the application's next packet has made conntrack aware of it: what it sends
	// in return for this answer. That is answered at once.
	forget = !syn && c.strays%2 == 0
	c.again = forget
	return c.answer, forget, true
}

// answer writes a packet of ours and says whether the kernel has taken it.
func (l *link) answer(b []byte) error {
	var h tun.Header
	if err := l.dev.Load().Queues()[0].Write(&h, b); err != nil {
		l.count.drop(dropWrite)
		return os.NewSyscallError("tun: writev", err)
	}
	l.count.packetsOut.Add(1)
	l.count.bytesOut.Add(uint64(len(b)))
	return nil
}
