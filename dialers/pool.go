// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
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
	// minHedge bounds a second attempt by what is usual: below, the jitter of a fast network would double the load of the members.
	minHedge = 10 * time.Millisecond
)

// PoolConfig is how a pool behaves. The zero value of a field means its default.
type PoolConfig struct {
	Retry    int           // how many other members are tried for one flow; 2, negative = none
	Hedge    time.Duration // when the next attempt starts beside one that still runs; 0 = an even share of the dial time, 0.5 to 3 s
	Failures int           // consecutive failures that eject a member; 3
	Eject    time.Duration // for how long, doubled each time up to 5 min; 30 s
	Log      *zap.Logger
	Now      func() time.Time

	// HedgePercentile is Hedge by what is usual: the next attempt starts when the first has taken longer than this percentage of the
	// member's connections did. 1 to 99; 0 = Hedge counts.
	HedgePercentile int
	HashBy          HashBy        // what counts for Hash; by destination
	Settle          time.Duration // how long a member must have been well before Failover returns to it; as Eject
	Health          HealthConfig  // active checks
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
	ring           ring          // of a pool by hash
	next           atomic.Uint64 // the turn
	switchedTo     atomic.Uint32 // a State

	checks checks
}

// member is one upstream and its passive health.
type member struct {
	flow.Dialer
	gauged           gauged   // nil if the upstream does not say
	switched         switched // nil if it cannot be switched
	weight, priority int
	times            quantile // of its connections, for HedgePercentile
	limited          limited  // nil if it has no maximum

	conditions [2]condition // by carriage: a member whose UDP is dead may well carry TCP
}

// carriage is what is asked of a member.
type carriage uint8

// The carriages.
const (
	byTCP carriage = iota
	byUDP
)

// String returns tcp or udp.
func (c carriage) String() string { return [...]string{"tcp", "udp"}[min(c, byUDP)] }

// condition is how a member is, in one carriage.
type condition struct {
	faults       atomic.Int32 // consecutive: 2 for a failure of the upstream, 1 for a silence that may be the destination's
	ejections    atomic.Int32 // in a row, for the back-off
	ejectedUntil atomic.Int64 // Unix ns; 0 = in
	settledAt    atomic.Int64 // Unix ns; until then Failover prefers others; 0 = it is
	probeAt      atomic.Int64 // Unix ns; when the next flow tries a member that is not settled
}

// off reports whether the member takes nothing now: it is switched off, or has as many flows as it may.
func (m *member) off() bool { return m.switchedOff() || m.limited != nil && m.limited.full() }

func (m *member) switchedOff() bool { return m.switched != nil && m.switched.State() != Enabled }

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
	if cfg.Settle <= 0 {
		cfg.Settle = cfg.Eject
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
	if strategy == Hash {
		p.ring = newRing(p.members)
	}
	if err := p.prepareChecks(); err != nil {
		return nil, fmt.Errorf("pool %s: %w", name, err)
	}
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

// State returns what the operator has decided about the pool. Its members have states of their own.
func (p *poolState) State() State { return State(p.switchedTo.Load()) }

// SetState switches the pool. What is open through it belongs to the members, and is not ended.
func (p *poolState) SetState(s State) { p.switchedTo.Store(uint32(s)) }

// takesNames reports whether every member does.
func (p *poolState) takesNames() bool {
	for _, m := range p.members {
		if n, ok := m.Dialer.(named); !ok || !n.takesNames() {
			return false
		}
	}
	return true
}

// Members returns the status of each member; Up is false for an ejected one.
func (p *Pool) Members() []Status {
	out := make([]Status, len(p.members))
	for i, m := range p.members {
		out[i] = StatusOf(m.Dialer)
		if m.conditions[byUDP].ejectedUntil.Load() != 0 {
			out[i].UDP = no
		}
		out[i].Up = out[i].Up && m.conditions[byTCP].ejectedUntil.Load() == 0 && !m.switchedOff()
	}
	return out
}

// Status sums the members up: up if one is, the latency of the fastest that is up, and capable of what one of them is capable of.
func (p *Pool) Status() Status {
	s := Status{Name: p.name, URL: "pool:" + p.strategy, UDP: no, IPv6: no, RemoteDNS: no, Bind: no, State: p.State()}
	var auth []string
	for _, m := range p.Members() {
		auth = append(auth, strings.Fields(m.Auth)...)
		s.Active, s.Total, s.Errors, s.Dropped = s.Active+m.Active, s.Total+m.Total, s.Errors+m.Errors, s.Dropped+m.Dropped
		s.Warm += m.Warm
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
	s.Auth = strings.Join(slices.Compact(slices.Sorted(slices.Values(auth))), " ")
	return s
}

// Dial tries members until one has a connection. A refusal by the destination is the truth, and ends it.
func (p *Pool) Dial(ctx context.Context, dst flow.Addr) (flow.Conn, error) {
	return p.dial(ctx, p.key(netip.Addr{}, &dst), func(ctx context.Context, d flow.Dialer) (flow.Conn, error) { return d.Dial(ctx, dst) })
}

// DialFlow is Dial to f.Dst for a flow whose source is known: a pool by hash may choose by it.
func (p *Pool) DialFlow(ctx context.Context, f *flow.Flow) (flow.Conn, error) {
	return p.dial(ctx, p.key(f.Src.Addr(), &f.Dst), func(ctx context.Context, d flow.Dialer) (flow.Conn, error) {
		if fd, ok := d.(flow.SourceDialer); ok {
			return fd.DialFlow(ctx, f)
		}
		return d.Dial(ctx, f.Dst)
	})
}

func (p *Pool) dial(ctx context.Context, key uint64, open func(context.Context, flow.Dialer) (flow.Conn, error)) (flow.Conn, error) {
	if p.State() != Enabled {
		return nil, fmt.Errorf("pool %s: %w", p.name, errOff)
	}
	n := min(len(p.members), 1+max(0, p.cfg.Retry))
	tried := tries{by: byTCP, key: key}
	first := tried.pick(p) // before the race: how long to wait for it depends on who it is
	c, errs := race(ctx, n, p.stagger(ctx, n, first), func(ctx context.Context, k int) (flow.Conn, error) {
		i := first
		if k > 0 {
			i = tried.pick(p)
		}
		begin := p.cfg.Now()
		c, err := open(ctx, p.via[i])
		p.note(ctx, byTCP, i, err)
		if err != nil && errors.Is(context.Cause(ctx), errLost) && p.cfg.Now().Sub(begin) >= minStagger {
			// Another member that began later has answered: without this, one that hangs would be asked, and waited for, for ever.
			c := &p.members[i].conditions[byTCP]
			p.punish(p.members[i], byTCP, c.faults.Add(1), fmt.Errorf("%w: silent while another member answered", flow.ErrTimeout))
		}
		if err == nil && p.cfg.HedgePercentile > 0 {
			p.members[i].times.add(p.cfg.Now().Sub(begin))
		}
		return c, err
	}, func(err error) bool { return !errors.Is(err, flow.ErrRefused) }, flow.Conn.Abort)
	if c == nil {
		return nil, p.failed(errs)
	}
	return c, nil
}

// stagger returns when an attempt that still runs gets company.
func (p *poolState) stagger(ctx context.Context, n, first int) time.Duration {
	if p.cfg.HedgePercentile > 0 {
		if usual, ok := p.members[first].times.at(p.cfg.HedgePercentile); ok {
			return min(max(usual, minHedge), maxStagger)
		}
	} else if p.cfg.Hedge > 0 {
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
	if p.State() != Enabled {
		return nil, fmt.Errorf("pool %s: %w", p.name, errOff)
	}
	tried := tries{by: byUDP}
	if f != nil {
		tried.key = p.key(f.Src.Addr(), &f.Dst)
	}
	var errs []error
	for failures := 0; len(tried.done) < len(p.members) && failures <= max(0, p.cfg.Retry) && ctx.Err() == nil; {
		i := tried.pick(p)
		pc, err := p.via[i].ListenPacket(ctx, f)
		p.note(ctx, byUDP, i, err)
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
	by   carriage
	key  uint64 // of the flow, for Hash
	mu   sync.Mutex
	done []int
}

// pick returns the member to try next. There must be one that has not been tried.
func (t *tries) pick(p *Pool) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	i := p.choose(t.by, t.key, t.done)
	t.done = append(t.done, i)
	return i
}

// choose returns the first member in the strategy's order that is well and not tried yet. Failing that it is one that is well but not settled,
// or else the one whose ejection ends first. Members that are switched off come last of all, and fail without being asked.
func (p *poolState) choose(by carriage, key uint64, tried []int) int {
	now := p.cfg.Now().UnixNano()
	first := p.first(by, now, key, tried)
	if p.strategy == Hash {
		for k := range min(len(p.ring.owners), ringWalk) {
			if i := p.ring.owner(first + k); p.fit(by, i, now, tried) && p.turnOf(by, i, now) == turnNow {
				return i
			}
		}
		first = p.ring.owner(first)
	}
	last, lastRank, lastUntil := -1, turnNever, int64(0)
	for k := range p.order {
		i := p.order[(first+k)%len(p.order)]
		if slices.Contains(tried, i) {
			continue
		}
		rank := p.turnOf(by, i, now)
		if rank == turnNow {
			return i
		}
		if until := p.members[i].conditions[by].ejectedUntil.Load(); last < 0 || rank < lastRank || rank == lastRank && rank == turnOut && until < lastUntil {
			last, lastRank, lastUntil = i, rank, until
		}
	}
	return last
}

// The order in which members are resorted to.
const (
	turnNow      = iota
	turnUnproven // well again, but not for long
	turnOut      // ejected
	turnNever    // switched off, or full
)

// turnOf says whether it is a member's turn. Of a member that has been out, one flow a while finds out how it is; the others keep away.
func (p *poolState) turnOf(by carriage, i int, now int64) int {
	if p.members[i].off() {
		return turnNever
	}
	m := &p.members[i].conditions[by]
	if until := m.ejectedUntil.Load(); until != 0 {
		if until <= now && m.ejectedUntil.CompareAndSwap(until, now+int64(probeTime)) {
			return turnNow
		}
		return turnOut
	}
	settled := m.settledAt.Load()
	if settled == 0 || now >= settled && m.settledAt.CompareAndSwap(settled, 0) {
		return turnNow
	}
	if at := m.probeAt.Load(); now >= at && m.probeAt.CompareAndSwap(at, now+int64(probeTime)) {
		return turnNow
	}
	return turnUnproven
}

// note records how an attempt ended. Whatever a member has answered shows that it lives, also a no.
func (p *poolState) note(ctx context.Context, by carriage, i int, err error) {
	m := p.members[i]
	c := &m.conditions[by]
	var faults int32
	switch {
	case errors.Is(err, errOff), errors.Is(err, errFull), flow.OutOfDescriptors(err):
		return // not its fault
	case err != nil && errors.Is(ctx.Err(), context.Canceled):
		return // the application gave up, or another member was faster: see dial
	case errors.Is(err, flow.ErrUpstream):
		faults = c.faults.Add(2)
	case errors.Is(err, flow.ErrTimeout) || err != nil && timedOut(err):
		faults = c.faults.Add(1)
	case errors.Is(err, flow.ErrNoServers), errors.Is(err, errors.ErrUnsupported):
		return // the member has not been asked
	default:
		if c.faults.Load() == 0 { // nothing to forgive: no write to a line that all flows share
			return
		}
		c.faults.Store(0)
		c.ejections.Store(0)
		if c.ejectedUntil.Load() != 0 {
			p.settle(c)
			c.ejectedUntil.Store(0)
			p.cfg.Log.Info("upstream is back", zap.String("pool", p.name), zap.String("upstream", m.Name()), zap.Stringer("for", by))
		}
		return
	}
	p.punish(m, by, faults, err)
}

// settle lets a member that is back prove itself before Failover returns to it. Other strategies have no better members to return to.
func (p *poolState) settle(c *condition) {
	if p.strategy == Failover && len(p.members) > 1 {
		now := p.cfg.Now()
		c.probeAt.Store(now.Add(probeTime).UnixNano())
		c.settledAt.Store(now.Add(p.cfg.Settle).UnixNano())
	}
}

// punish ejects a member that has failed often enough.
func (p *poolState) punish(m *member, by carriage, faults int32, err error) {
	c := &m.conditions[by]
	if c.settledAt.Load() != 0 && errors.Is(err, flow.ErrUpstream) {
		p.settle(c) // from the beginning
	}
	now := p.cfg.Now()
	until := c.ejectedUntil.Load()
	out := until != 0
	if faults < int32(2*p.cfg.Failures) && !out || until > now.Add(probeTime).UnixNano() {
		return // not enough, or out already and tried for want of a better one
	}
	wait := min(p.cfg.Eject<<min(c.ejections.Add(1)-1, 10), maxEject)
	c.ejectedUntil.Store(now.Add(wait).UnixNano())
	if !out {
		p.cfg.Log.Warn("upstream ejected", zap.String("pool", p.name), zap.String("upstream", m.Name()), zap.Stringer("for", by), zap.Duration("time", wait), zap.Error(err))
		if !slices.ContainsFunc(p.members, func(m *member) bool { return m.conditions[by].ejectedUntil.Load() == 0 }) {
			p.cfg.Log.Error("no member of the pool is left: flows through it fail until one is back", zap.String("pool", p.name), zap.Stringer("for", by))
		}
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
