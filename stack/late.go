// SPDX-License-Identifier: GPL-3.0-or-later

package stack

import (
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

const (
	// lateMax bounds the connections that are remembered.
	lateMax = 4096
	// lateTime is how long: a packet is not read later than that.
	lateTime = 10 * time.Second
)

// late remembers the connections that ended last, by their SYNs. A SYN that the application's kernel has repeated while the answer was on its way is
// read, on a machine that has no time, when everything is over. It would open another connection at the upstream, for nobody; and an
// application's socket in TIME_WAIT acknowledges the answer, so that nothing but keep-alive would end it.
type late struct {
	mu   sync.Mutex
	syns map[stack.TransportEndpointID]lateSYN
	ring []stack.TransportEndpointID // what is in syns, and maybe twice, the oldest at next once it is full
	next int
}

type lateSYN struct {
	seq   uint32
	until time.Time
}

// note remembers the SYN of a connection that the application has taken, and that is over.
func (l *late) note(id stack.TransportEndpointID, seq uint32) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.syns == nil {
		l.syns = map[stack.TransportEndpointID]lateSYN{}
	}
	if len(l.ring) < lateMax {
		l.ring = append(l.ring, id)
	} else {
		delete(l.syns, l.ring[l.next])
		l.ring[l.next] = id
		l.next = (l.next + 1) % lateMax
	}
	l.syns[id] = lateSYN{seq, time.Now().Add(lateTime)}
}

// is says whether a SYN is that of a connection that has ended.
func (l *late) is(id stack.TransportEndpointID, seq uint32) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	s, ok := l.syns[id]
	return ok && s.seq == seq && time.Now().Before(s.until)
}
