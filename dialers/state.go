// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"github.com/mutex-proxy/mutex/flow"
)

// State is what an operator has decided about an upstream or a pool, whatever its health.
type State uint32

// The states.
const (
	Enabled  State = iota // the zero value
	Draining              // takes nothing new, finishes what is there
	Disabled              // takes nothing new, and what was there has been ended
)

// String returns enabled, draining or disabled.
func (s State) String() string {
	return [...]string{"enabled", "draining", "disabled"}[min(s, Disabled)]
}

// errFull is what a flow to an upstream gets that has as many as it may. A pool goes on to the next member and holds it against nobody.
var errFull = fmt.Errorf("%w: it has as many flows as it may (max_flows)", flow.ErrUpstream)

// places bounds the flows of an upstream, those being opened included. The zero value has no bound.
type places struct {
	most  int64 // 0 = no bound
	taken atomic.Int64
}

// limited is implemented by upstreams that may have a maximum of flows.
type limited interface{ full() bool }

func (p *places) full() bool { return p.most > 0 && p.taken.Load() >= p.most }

// take takes a place, to be given back with leave.
func (p *places) take() error {
	if p.most > 0 && p.taken.Add(1) > p.most {
		p.taken.Add(-1)
		return errFull
	}
	return nil
}

func (p *places) leave() {
	if p.most > 0 {
		p.taken.Add(-1)
	}
}

// errOff is what a flow to an upstream gets that takes nothing new. A pool goes on to the next member and holds it against nobody.
var errOff = fmt.Errorf("%w: switched off by the operator", flow.ErrUpstream)

// switched is implemented by the upstreams and pools of this package.
type switched interface {
	State() State
	SetState(State)
}

// SetState switches an upstream or a pool made by this package; false for another dialer. The state is kept as long as the object is.
func SetState(d flow.Dialer, s State) bool {
	sw, ok := d.(switched)
	if ok {
		sw.SetState(s)
	}
	return ok
}

// gate is whether an upstream takes flows, and what is open through it.
type gate struct {
	switchedTo atomic.Uint32
	active     atomic.Int64

	mu   sync.Mutex
	open map[io.Closer]struct{} // bounded by the flow tables
}

// State returns what the operator has decided.
func (g *gate) State() State { return State(g.switchedTo.Load()) }

func (g *gate) off() bool { return g.switchedTo.Load() != uint32(Enabled) }

// SetState switches. Disabled ends what is open, with RST where it can.
func (g *gate) SetState(s State) {
	g.switchedTo.Store(uint32(s))
	if s == Disabled {
		g.end()
	}
}

// opened counts a connection or an association. One that was opened while the upstream was being disabled is ended like the others.
func (g *gate) opened(c io.Closer) {
	g.active.Add(1)
	g.mu.Lock()
	if g.open == nil {
		g.open = make(map[io.Closer]struct{})
	}
	g.open[c] = struct{}{}
	g.mu.Unlock()
	if g.State() == Disabled {
		g.end()
	}
}

func (g *gate) closed(c io.Closer) {
	g.mu.Lock()
	delete(g.open, c)
	g.mu.Unlock()
	g.active.Add(-1)
}

func (g *gate) end() {
	g.mu.Lock()
	open := make([]io.Closer, 0, len(g.open))
	for c := range g.open {
		open = append(open, c)
	}
	g.mu.Unlock()
	for _, c := range open { // outside the lock: closing takes itself out
		if a, ok := c.(interface{ Abort() }); ok {
			a.Abort()
		} else {
			_ = c.Close()
		}
	}
}
