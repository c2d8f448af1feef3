// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/mutex-proxy/mutex/flow"
)

const (
	defaultRetry    = 2
	defaultFailures = 3
	defaultEject    = 30 * time.Second
	// maxEject bounds the back-off: a member that was down over night is back five minutes after it is up, at the latest.
	maxEject = 5 * time.Minute
	// probeTime is how long one flow has to find out whether an ejected member is back before another one may.
	probeTime = 10 * time.Second
	// maxMembers bounds a pool.
	maxMembers = 4096
	// minStagger and maxStagger bound the head start of an attempt that has not failed: below, a slow destination is asked for twice for
	// nothing; above, an application has given up.
	minStagger = 500 * time.Millisecond
	maxStagger = 3 * time.Second
)

// PoolConfig is how a pool behaves. The zero value of a field means its default.
type PoolConfig struct {
	Retry    int           // how many other members are tried for one flow; 2, negative = none
	Hedge    time.Duration // when the next attempt starts beside one that still runs; 0 = an even share of the dial time, 0.5 to 3 s
	Failures int           // consecutive failures that eject a member; 3
	Eject    time.Duration // for how long, doubled each time up to 5 min; 30 s
	Log      *zap.Logger
	Now      func() time.Time
}

// Pool is several upstreams under one name. While an application's SYN is held, members are tried until one answers. A member that fails
// time and again is ejected for a while: asked last, not never, since a pool whose members are all ejected must notice the first that is
// back. When all fail, so does the flow; a pool never goes direct.
type Pool struct {
	*poolState
	via []flow.Dialer // the members, as the context of this view sees them
}

// poolState is what all contexts share.
type poolState struct {
	name, strategy string
	cfg            PoolConfig
	members        []*member
	order          []int         // in which members are gone through
	turns          []uint16      // of a weighted pool: the places at which to start, one after the other
	next           atomic.Uint64 // the turn
}

// member is one upstream and its passive health.
type member struct {
	flow.Dialer
	gauged           gauged // nil if the upstream does not say
	weight, priority int

	faults       atomic.Int32 // consecutive: 2 for a failure of the upstream, 1 for a silence that may be the destination's
	ejections    atomic.Int32 // in a row, for the back-off
	ejectedUntil atomic.Int64 // Unix ns; 0 = in
}

// NewPool returns a pool of upstreams. Members may be pools.
func NewPool(name, strategy string, members []flow.Dialer, cfg PoolConfig) (flow.Dialer, error) {
	if len(members) == 0 {
		return nil, fmt.Errorf("pool %s: no members", name)
	}
	if strategy == "" {
		strategy = RoundRobin
	}
	if !slices.Contains(strategies(), strategy) {
		return nil, fmt.Errorf("pool %s: strategy %s: %w: use one of %s", name, strategy, flow.ErrNotSupported, strings.Join(strategies(), " "))
	}
	if len(members) > maxMembers {
		return nil, fmt.Errorf("pool %s: more than %d members", name, maxMembers)
	}
	if cfg.Retry == 0 {
		cfg.Retry = defaultRetry
	}
	if cfg.Failures <= 0 {
		cfg.Failures = defaultFailures
	}
	if cfg.Eject <= 0 {
		cfg.Eject = defaultEject
	}
	if cfg.Log == nil {
		cfg.Log = zap.NewNop()
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	p := &poolState{name: name, strategy: strategy, cfg: cfg}
	for _, d := range members {
		p.members = append(p.members, newMember(d))
	}
	p.order, p.turns = arrange(strategy, p.members)
	return &Pool{p, members}, nil
}

// Name returns the name in the configuration.
func (p *Pool) Name() string { return p.name }

// withNames returns the pool for one context; health and turns stay shared.
func (p *Pool) withNames(r resolver) flow.Dialer {
	via := make([]flow.Dialer, len(p.via))
	for i, d := range p.via {
		via[i] = withResolver(d, r)
	}
	return &Pool{p.poolState, via}
}

// DialContext is Dial for golang.org/x/net/proxy.
func (p *Pool) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	return dialContext(ctx, p, network, address)
}

// Members returns the status of each member; Up is false for an ejected one.
func (p *Pool) Members() []Status {
	out := make([]Status, len(p.members))
	for i, m := range p.members {
		out[i] = StatusOf(m.Dialer)
		out[i].Up = out[i].Up && m.ejectedUntil.Load() == 0
	}
	return out
}

// Status sums the members up: up if one is, the latency of the fastest that is up, and capable of what one of them is capable of.
func (p *Pool) Status() Status {
	s := Status{Name: p.name, URL: "pool:" + p.strategy, UDP: no, IPv6: no, RemoteDNS: no, Bind: no}
	for _, m := range p.Members() {
		s.Active, s.Total, s.Errors, s.Dropped = s.Active+m.Active, s.Total+m.Total, s.Errors+m.Errors, s.Dropped+m.Dropped
		if m.Up && m.Latency > 0 && (s.Latency == 0 || m.Latency < s.Latency) {
			s.Latency = m.Latency
		}
		s.Up = s.Up || m.Up
		for sum, one := range map[*string]string{&s.UDP: m.UDP, &s.IPv6: m.IPv6, &s.RemoteDNS: m.RemoteDNS, &s.Bind: m.Bind} {
			if one == yes || one == unknown && *sum == no {
				*sum = one
			}
		}
	}
	return s
}

// Dial tries members until one has a connection. A refusal by the destination is the truth, and ends it.
func (p *Pool) Dial(ctx context.Context, dst flow.Addr) (flow.Conn, error) {
	n := min(len(p.members), 1+max(0, p.cfg.Retry))
	var tried tries
	c, errs := race(ctx, n, p.stagger(ctx, n), func(ctx context.Context, _ int) (flow.Conn, error) {
		i := tried.pick(p)
		c, err := p.via[i].Dial(ctx, dst)
		p.note(ctx, i, err)
		return c, err
	}, func(err error) bool { return !errors.Is(err, flow.ErrRefused) }, flow.Conn.Abort)
	if c == nil {
		return nil, p.failed(errs)
	}
	return c, nil
}

// stagger returns when an attempt that still runs gets company.
func (p *poolState) stagger(ctx context.Context, n int) time.Duration {
	if p.cfg.Hedge > 0 {
		return p.cfg.Hedge
	}
	deadline, ok := ctx.Deadline()
	if !ok {
		return maxStagger
	}
	return min(max(time.Until(deadline)/time.Duration(n), minStagger), maxStagger)
}

// ListenPacket opens an association with the first member that carries UDP.
func (p *Pool) ListenPacket(ctx context.Context, f *flow.Flow) (flow.PacketConn, error) {
	var tried tries
	var errs []error
	for failures := 0; len(tried.done) < len(p.members) && failures <= max(0, p.cfg.Retry) && ctx.Err() == nil; {
		i := tried.pick(p)
		pc, err := p.via[i].ListenPacket(ctx, f)
		p.note(ctx, i, err)
		if err == nil {
			return pc, nil
		}
		if errs = append(errs, err); !errors.Is(err, errors.ErrUnsupported) {
			failures++
		}
	}
	return nil, p.failed(errs)
}

// tries are the members that one flow has tried.
type tries struct {
	mu   sync.Mutex
	done []int
}

// pick returns the member to try next. There must be one that has not been tried.
func (t *tries) pick(p *Pool) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	i := p.choose(t.done)
	t.done = append(t.done, i)
	return i
}

// choose returns the first member in the strategy's order that is neither tried nor ejected, or else the one whose ejection ends first.
func (p *poolState) choose(tried []int) int {
	now := p.cfg.Now().UnixNano()
	first := p.first(now, tried)
	last, lastUntil := -1, int64(0)
	for k := range p.order {
		i := p.order[(first+k)%len(p.order)]
		if slices.Contains(tried, i) {
			continue
		}
		m := p.members[i]
		until := m.ejectedUntil.Load()
		// The time is over: one flow finds out whether the member is back, the others keep away from it until then.
		if until == 0 || until <= now && m.ejectedUntil.CompareAndSwap(until, now+int64(probeTime)) {
			return i
		}
		if last < 0 || until < lastUntil {
			last, lastUntil = i, until
		}
	}
	return last
}

// note records how an attempt ended. Whatever a member has answered shows that it lives, also a no.
func (p *poolState) note(ctx context.Context, i int, err error) {
	m := p.members[i]
	var faults int32
	switch {
	case err != nil && errors.Is(ctx.Err(), context.Canceled):
		return // the application gave up, or another member was faster
	case errors.Is(err, flow.ErrUpstream):
		faults = m.faults.Add(2)
	case errors.Is(err, flow.ErrTimeout) || err != nil && timedOut(err):
		faults = m.faults.Add(1)
	case errors.Is(err, flow.ErrNoServers), errors.Is(err, errors.ErrUnsupported):
		return // the member has not been asked
	default:
		if m.faults.Load() == 0 { // nothing to forgive: no write to a line that all flows share
			return
		}
		m.faults.Store(0)
		m.ejections.Store(0)
		if m.ejectedUntil.Swap(0) != 0 {
			p.cfg.Log.Info("upstream is back", zap.String("pool", p.name), zap.String("upstream", m.Name()))
		}
		return
	}
	now := p.cfg.Now()
	until := m.ejectedUntil.Load()
	out := until != 0
	if faults < int32(2*p.cfg.Failures) && !out || until > now.Add(probeTime).UnixNano() {
		return // not enough, or out already and tried for want of a better one
	}
	wait := min(p.cfg.Eject<<min(m.ejections.Add(1)-1, 10), maxEject)
	m.ejectedUntil.Store(now.Add(wait).UnixNano())
	if !out {
		p.cfg.Log.Warn("upstream ejected", zap.String("pool", p.name), zap.String("upstream", m.Name()), zap.Duration("for", wait), zap.Error(err))
	}
}

// failed is the error of a flow that no member would take.
func (p *poolState) failed(errs []error) error {
	e := &poolError{name: p.name, members: len(p.members), errs: errs}
	if e.best = bestError(errs); e.best == nil {
		e.best = context.Canceled
	}
	return e
}

// poolError says what each member said, and is what the best of them is.
type poolError struct {
	name    string
	members int
	errs    []error
	best    error
}

// Error lists the failures.
func (e *poolError) Error() string {
	return fmt.Sprintf("pool %s: %d of %d members failed: %s", e.name, len(e.errs), e.members, joined(e.errs).Error())
}

// Unwrap returns the error that decides what the application is told.
func (e *poolError) Unwrap() error { return e.best }

// bestError returns the error that says most about the destination: the last of an upstream that works, if there is one, and of these
// rather one that is not "I carry no UDP".
func bestError(errs []error) error {
	var best error
	rank := -1
	for _, err := range errs {
		r := 2
		switch {
		case errors.Is(err, flow.ErrUpstream):
			r = 0
		case errors.Is(err, errors.ErrUnsupported):
			r = 1
		}
		if r >= rank {
			best, rank = err, r
		}
	}
	return best
}
