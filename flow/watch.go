// SPDX-License-Identifier: GPL-3.0-or-later

package flow

import (
	"slices"
	"sync"
	"sync/atomic"
)

// EventType says what happened to a flow.
type EventType uint8

// The events of a flow's life.
const (
	FlowStarted EventType = iota + 1 // it has been decided
	FlowEnded
)

// Event is one step in the life of a flow.
type Event struct {
	Type   EventType
	Info   Info
	Result string // of FlowEnded
}

// Watch is one subscription to a table's events.
type Watch struct {
	C <-chan Event // closed by Close

	from    *watchers
	dropped atomic.Uint64
	mu      sync.Mutex
	c       chan Event
	closed  bool
}

// watchers are a table's subscribers. Publishing costs one atomic load when there are none.
type watchers struct {
	watchMu sync.Mutex
	list    atomic.Pointer[[]*Watch]
	missed  atomic.Uint64
}

// Watch subscribes to the starts and ends of flows. The channel holds buffer events (at least 1); events that a slow reader has no room
// for are dropped and counted, a flow never waits for one.
func (t *Table) Watch(buffer int) *Watch {
	c := make(chan Event, max(1, buffer))
	w := &Watch{C: c, c: c, from: &t.watchers}
	t.change(func(l []*Watch) []*Watch { return append(l, w) })
	return w
}

// Dropped returns how many events this subscriber was too slow for.
func (w *Watch) Dropped() uint64 { return w.dropped.Load() }

// Close ends the subscription and closes C. It is idempotent.
func (w *Watch) Close() {
	w.from.change(func(l []*Watch) []*Watch { return slices.DeleteFunc(l, func(x *Watch) bool { return x == w }) })
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.closed {
		w.closed = true
		close(w.c)
	}
}

func (ws *watchers) change(f func([]*Watch) []*Watch) {
	ws.watchMu.Lock()
	defer ws.watchMu.Unlock()
	var l []*Watch
	if p := ws.list.Load(); p != nil {
		l = slices.Clone(*p)
	}
	l = f(l)
	ws.list.Store(&l)
}

func (ws *watchers) publish(ev Event) {
	p := ws.list.Load()
	if p == nil {
		return
	}
	for _, w := range *p {
		if !w.send(ev) {
			w.dropped.Add(1)
			ws.missed.Add(1)
		}
	}
}

func (ws *watchers) watcherStats() (n int, missed uint64) {
	if p := ws.list.Load(); p != nil {
		n = len(*p)
	}
	return n, ws.missed.Load()
}

func (w *Watch) send(ev Event) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return true
	}
	select {
	case w.c <- ev:
		return true
	default:
		return false
	}
}
