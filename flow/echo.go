// SPDX-License-Identifier: GPL-3.0-or-later

package flow

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

const (
	// echoFresh is how long an answer is repeated without looking again: five pings of the usual one a second.
	echoFresh = 5 * time.Second
	// maxEchoes bounds the destinations remembered or being probed.
	maxEchoes = 1024
	// probesPerSecond and probeBurst bound the connections that pings cause: through a proxy a sweep of pings is a port scan in its name.
	// Probes beyond wait for their turn, within the dial time-out.
	probesPerSecond = 20
	probeBurst      = 40
)

// echoPorts are tried one after the other. Somebody who refuses is alive too.
func echoPorts() [2]uint16 { return [...]uint16{443, 80} }

// echoKey is what the answer to an echo request depends on.
type echoKey struct {
	dst    netip.Addr
	action Action
	via    Dialer
}

// echoProbe is an answer, or the attempt at one.
type echoProbe struct {
	done   chan struct{} // closed when the fields below are final
	alive  bool
	reason Reason
	expiry time.Time
}

// echoCache is the answers of the last seconds.
type echoCache struct {
	limit *rate.Limiter
	mu    sync.Mutex
	m     map[echoKey]*echoProbe
}

func newEchoCache() echoCache {
	return echoCache{limit: rate.NewLimiter(probesPerSecond, probeBurst), m: make(map[echoKey]*echoProbe)}
}

// Echo says whether an echo request from src is to be answered; if not, r says how it is refused.
//
// No upstream carries ICMP. The honest answer is whether anybody is there: a TCP connection through the upstream that the rules choose is
// accepted or refused by the destination itself. Each probe is a flow; requests answered from memory are not.
func (h *Handler) Echo(ctx context.Context, src, dst netip.Addr) (alive bool, r Reason) {
	switch h.tuning.Load().ICMP {
	case ICMPHonest:
	case ICMPDrop:
		return false, ReasonDrop
	default:
		return false, ReasonProhibited
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	leave, ok := h.enter(cancel)
	if !ok {
		return false, ReasonHostUnreachable
	}
	defer leave()

	f := h.newFlow(ICMP, netip.AddrPortFrom(src, 0), netip.AddrPortFrom(dst, 0))
	release, err := h.name(f)
	if err != nil {
		return false, ReasonHostUnreachable
	}
	defer release()
	d := h.ask(h.rules.Load(), f)
	p, mine := h.echo.get(echoKey{dst, d.Action, d.Via}, h.cfg.Now())
	switch {
	case p == nil: // as many as may be are being probed
		return false, ReasonHostUnreachable
	case mine:
		p.alive, p.reason = h.probe(ctx, cancel, f)
		p.expiry = h.cfg.Now().Add(echoFresh)
		close(p.done)
	}
	select {
	case <-p.done:
		return p.alive, p.reason
	case <-ctx.Done():
		return false, ReasonHostUnreachable
	}
}

// get returns a fresh answer, or the probe that is under way, or (mine) a new probe for the caller to make. nil if there is no room.
func (c *echoCache) get(k echoKey, now time.Time) (p *echoProbe, mine bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if p = c.m[k]; p != nil && !p.stale(now) {
		return p, false
	}
	if p == nil && len(c.m) >= maxEchoes && !c.makeRoomLocked(now) {
		return nil, false
	}
	p = &echoProbe{done: make(chan struct{})}
	c.m[k] = p
	return p, true
}

// makeRoomLocked forgets what is stale, or else the oldest answer. Probes under way are kept: others wait for them.
func (c *echoCache) makeRoomLocked(now time.Time) bool {
	var oldest echoKey
	var expiry time.Time
	for k, p := range c.m {
		switch {
		case p.stale(now):
			delete(c.m, k)
		case p.finished() && (expiry.IsZero() || p.expiry.Before(expiry)):
			oldest, expiry = k, p.expiry
		}
	}
	if len(c.m) >= maxEchoes && !expiry.IsZero() {
		delete(c.m, oldest)
	}
	return len(c.m) < maxEchoes
}

func (p *echoProbe) finished() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

func (p *echoProbe) stale(now time.Time) bool { return p.finished() && !now.Before(p.expiry) }

// probe is the life of an echo flow.
func (h *Handler) probe(ctx context.Context, cancel context.CancelCauseFunc, f *Flow) (alive bool, r Reason) {
	e, err := h.table.add(f, cancel)
	if err != nil {
		return false, ReasonHostUnreachable
	}
	defer e.finish()
	d := h.decide(f, e)
	switch d.Action {
	case Forward:
	case Drop:
		e.outcome(ResultDropped, nil)
		return false, ReasonDrop
	default:
		e.outcome(ResultBlocked, nil)
		return false, ReasonProhibited
	}
	if err := h.awaitProbe(ctx); err != nil {
		e.outcome(ResultFailed, because(ctx, err))
		return false, ReasonOf(err)
	}
	begin := h.cfg.Now()
	err = h.knock(ctx, d.Via, f.Dst)
	if err != nil && ReasonOf(err) != ReasonRefused {
		h.blame(ctx, d.Via, err)
		e.outcome(ResultFailed, because(ctx, err))
		return false, ReasonOf(err)
	}
	e.established(h.cfg.Now().Sub(begin))
	return true, 0
}

// awaitProbe waits for the turn of a probe.
func (h *Handler) awaitProbe(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, h.dialTimeout())
	defer cancel()
	if err := h.echo.limit.Wait(ctx); err != nil {
		return fmt.Errorf("%w: too many probes: %w", ErrTimeout, err)
	}
	return nil
}

// knock connects to the ports in turn until one answers, for good or ill. All attempts share the dial time-out; the first has half of it.
func (h *Handler) knock(ctx context.Context, via Dialer, dst Addr) error {
	ctx, cancel := context.WithTimeoutCause(ctx, h.dialTimeout(), ErrTimeout)
	defer cancel()
	var err error
	for i, port := range echoPorts() {
		dst.Port = port
		err = h.knockOnce(ctx, via, dst, h.dialTimeout()/time.Duration(2-i))
		if err == nil || ReasonOf(err) == ReasonRefused || errors.Is(err, ErrUpstream) || ctx.Err() != nil {
			return err
		}
	}
	return err
}

func (h *Handler) knockOnce(ctx context.Context, via Dialer, dst Addr, limit time.Duration) error {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, ErrTimeout)
	defer cancel()
	if err := takeTurn(ctx, h.dials); err != nil {
		return err
	}
	defer h.dials.give()
	c, err := via.Dial(ctx, dst)
	if err == nil {
		c.Close()
	}
	return err
}
