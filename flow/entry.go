// SPDX-License-Identifier: GPL-3.0-or-later

package flow

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
)

// How a flow ended. They are the values of the result label of mprox_flows_total.
const (
	ResultOK       = "ok"       // both sides had their say, or a UDP flow was idle
	ResultBlocked  = "blocked"  // by rule
	ResultDropped  = "dropped"  // by rule
	ResultFailed   = "failed"   // never established; the error says why
	ResultReset    = "reset"    // established, then broken by one side
	ResultIdle     = "idle"     // half-closed for too long
	ResultEvicted  = "evicted"  // the longest idle flow of a full table
	ResultKilled   = "killed"   // on request
	ResultReloaded = "reloaded" // the new rules block it
	ResultShutdown = "shutdown" // the context ended
)

// maxErr bounds the error text kept with a flow: some of it may be an upstream's.
const maxErr = 300

// entry is one flow in the table. Its owner is the goroutine that added it, which calls finish exactly when the flow is over.
type entry struct {
	t     *Table
	id    uint64
	since int64 // when it was added, on the table's clock
	kill  func(error)

	up, down               Counter // towards the upstream, towards the application
	packetsUp, packetsDown atomic.Uint64

	killed   atomic.Bool
	slotless atomic.Bool

	mu      sync.Mutex
	info    Info // without the counters
	decided bool
	result  string
	reason  string // of a failure to connect
	done    bool
}

// last returns when the flow last moved a byte, on the table's clock.
func (e *entry) last() int64 { return max(e.since, e.up.at.Load(), e.down.at.Load()) }

// end asks the owner to end the flow.
func (e *entry) end(cause error) {
	if e.killed.CompareAndSwap(false, true) {
		e.setState(StateClosing)
		e.kill(cause)
	}
}

// giveSlot gives the flow's slot back, once.
func (e *entry) giveSlot() bool {
	if !e.slotless.CompareAndSwap(false, true) {
		return false
	}
	e.t.slots.Add(-1)
	return true
}

// decide notes the decision and shows the flow to others from now on. The table keeps a copy of f.
func (e *entry) decide(f *Flow, d Decision) {
	e.mu.Lock()
	if e.done {
		e.mu.Unlock()
		return
	}
	first := !e.decided
	e.decided = true
	e.info.Flow = *f
	e.info.Rule = d.Rule
	switch d.Action {
	case Forward:
		e.info.Upstream, e.info.State = d.Via.Name(), StateEstablishing
	case Resolve:
		e.info.Upstream = "dns"
	case Drop:
		e.info.Upstream = "drop"
	default:
		e.info.Upstream = "reject"
	}
	i := e.infoLocked()
	e.mu.Unlock()
	if first {
		e.t.publish(Event{Type: FlowStarted, Info: i})
	}
}

// snapshot returns a copy; ok is false while the flow is not decided.
func (e *entry) snapshot() (i Info, ok bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.infoLocked(), e.decided && !e.done
}

func (e *entry) infoLocked() Info {
	i := e.info
	i.BytesUp, i.BytesDown = e.up.Load(), e.down.Load()
	i.PacketsUp, i.PacketsDown = e.packetsUp.Load(), e.packetsDown.Load()
	return i
}

func (e *entry) setState(s string) {
	e.mu.Lock()
	e.info.State = s
	e.mu.Unlock()
}

// early notes that the application is answered before an upstream has.
func (e *entry) early() {
	e.mu.Lock()
	e.info.Handshake = HandshakeEarly
	e.mu.Unlock()
}

// path notes which way the flow's bytes take.
func (e *entry) path(path, reason string) {
	e.mu.Lock()
	e.info.Path, e.info.PathReason = path, reason
	e.mu.Unlock()
}

// established notes that the flow runs, and how long the upstream took.
func (e *entry) established(connect time.Duration) {
	e.mu.Lock()
	if e.info.State != StateClosing {
		e.info.State = StateEstablished
	}
	e.info.Connect = connect
	e.mu.Unlock()
}

// outcome notes how the flow ends; the first call counts. A cause of ours (ErrKilled ...) in err outranks result.
func (e *entry) outcome(result string, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.result != "" {
		return
	}
	e.result = result
	if err == nil {
		return
	}
	e.result = resultOf(err, result)
	e.info.Err = err.Error()
	if len(e.info.Err) > maxErr {
		e.info.Err = e.info.Err[:maxErr]
	}
	if e.result == ResultFailed {
		e.reason = ReasonOf(err).String()
	}
}

// resultOf maps the cause that ended a flow from outside to its result.
func resultOf(err error, otherwise string) string {
	switch {
	case errors.Is(err, ErrKilled), errors.Is(err, ErrDisabled):
		return ResultKilled
	case errors.Is(err, ErrEvicted), errors.Is(err, ErrShort):
		return ResultEvicted
	case errors.Is(err, ErrRules):
		return ResultReloaded
	case errors.Is(err, ErrIdle):
		return ResultIdle
	case errors.Is(err, ErrClosed), errors.Is(err, context.Canceled):
		return ResultShutdown
	}
	return otherwise
}

// finish takes the flow out of the table, adds it to the totals and tells the log, the metrics and the watchers. Only the first call does.
func (e *entry) finish() {
	e.mu.Lock()
	if e.done {
		e.mu.Unlock()
		return
	}
	e.done = true
	if e.result == "" {
		e.result = ResultOK
	}
	e.info.State, e.info.End = StateClosed, e.t.cfg.Now()
	i, result, reason := e.infoLocked(), e.result, e.reason
	e.mu.Unlock()

	s := &e.t.shard[e.id%shards]
	s.mu.Lock()
	delete(s.live, e.id)
	s.sums.add(&i, result)
	s.mu.Unlock()
	e.giveSlot()

	e.log(&i, result, reason)
	e.t.cfg.Recorder.FlowEnded(&i, result)
	e.t.publish(Event{Type: FlowEnded, Info: i, Result: result})
}

// log writes the one line of a flow.
func (e *entry) log(i *Info, result, reason string) {
	line := e.t.cfg.Log.Check(zap.InfoLevel, "flow")
	if line == nil {
		return
	}
	fields := []zap.Field{
		zap.Uint64("id", i.ID), zap.Stringer("network", i.Network),
		zap.Stringer("src", i.Src), zap.Stringer("dst", i.Orig), zap.String("host", i.Dst.Host),
		zap.String("rule", i.Rule), zap.String("upstream", i.Upstream), zap.String("result", result),
		zap.Duration("duration", i.End.Sub(i.Start)), zap.Duration("connect", i.Connect),
		zap.Uint64("bytes_up", i.BytesUp), zap.Uint64("bytes_down", i.BytesDown),
	}
	if i.App.Method != "" {
		fields = append(fields, zap.Int("pid", i.App.PID), zap.String("exe", i.App.Exe))
	}
	if i.Handshake != HandshakeHonest {
		fields = append(fields, zap.String("handshake", i.Handshake))
	}
	if i.Path == PathKernel {
		fields = append(fields, zap.String("path", i.Path))
	}
	if reason != "" {
		fields = append(fields, zap.String("reason", reason))
	}
	if i.Err != "" {
		fields = append(fields, zap.String("error", i.Err))
	}
	line.Write(fields...)
}
