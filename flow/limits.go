// SPDX-License-Identifier: GPL-3.0-or-later

package flow

import (
	"context"
	"errors"
	"time"

	"golang.org/x/time/rate"
)

// ErrRate is why a flow does not begin: too many have in this second.
var ErrRate = errors.New("too many new flows a second")

// Limits bounds what the flows of a Table do together; 0 = no bound.
type Limits struct {
	NewFlows  int    // a second; as many may begin at once
	Bandwidth uint64 // payload bytes a second, each way
}

const (
	// A connection takes its turn with the bytes of 5 ms, so that many share a bandwidth evenly and none waits long; limitBurst may pass at once.
	limitTurn, limitTurnMin = 200, 1 << 10    // turns a second; bytes
	limitBurst, limitLeast  = 20, 4 << 10     // bursts a second; bytes
	limitDebt               = time.Second / 4 // a datagram that would have to wait longer is dropped: nothing holds it meanwhile
)

// limits are Limits in force.
type limits struct {
	Limits
	flows    *rate.Limiter
	up, down *rate.Limiter // nil = any bandwidth
	turn     int
}

// SetLimits changes the bounds. That of new flows counts at once, also for other handlers of the table. A bandwidth counts for connections that begin
// after it, and for all datagrams; what it lets pass from then on, for connections that have one already, too.
func (t *Table) SetLimits(l Limits) {
	old := t.limits.Load()
	if old != nil && old.Limits == l {
		return
	}
	n := &limits{Limits: l, turn: bufferSize}
	if l.NewFlows > 0 {
		n.flows = rate.NewLimiter(rate.Limit(l.NewFlows), l.NewFlows)
	}
	if b := l.Bandwidth; b > 0 {
		burst := int(min(max(b/limitBurst, limitLeast), 1<<30))
		n.up, n.down = rate.NewLimiter(rate.Limit(b), burst), rate.NewLimiter(rate.Limit(b), burst)
		n.turn = int(min(max(b/limitTurn, limitTurnMin), bufferSize))
	}
	t.limits.Store(n)
}

// begins reports whether one more flow may begin now.
func (t *Table) begins() bool {
	flows := t.limits.Load().flows
	return flows == nil || flows.AllowN(t.cfg.Now(), 1)
}

// paced reports whether bytes have to come by here, for their bandwidth is limited.
func (t *Table) paced() bool { return t.way(true) != nil }

// way is the limiter of a direction; nil = none.
func (t *Table) way(upload bool) *rate.Limiter {
	l := t.limits.Load()
	if upload {
		return l.up
	}
	return l.down
}

// passes reports whether a datagram of n bytes may go on now.
func (t *Table) passes(upload bool, n int) bool {
	w := t.way(upload)
	if w == nil {
		return true
	}
	now := t.cfg.Now()
	r := w.ReserveN(now, min(n, w.Burst()))
	if r.DelayFrom(now) <= limitDebt {
		return true
	}
	r.CancelAt(now)
	t.drop(dropRate, 1)
	return false
}

// turn is how much of a connection may be read next.
func (t *Table) turn() int { return t.limits.Load().turn }

// wait returns when n bytes of a connection, at most a turn, may go on, or with the cause of ctx's end.
func (t *Table) wait(ctx context.Context, upload bool, n int) error {
	if w := t.way(upload); w != nil && w.WaitN(ctx, min(n, w.Burst())) != nil {
		return context.Cause(ctx)
	}
	return nil
}
