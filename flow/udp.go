// SPDX-License-Identifier: GPL-3.0-or-later

package flow

import (
	"bytes"
	"context"
	"errors"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// How long a UDP flow lives after its last datagram: a DNS answer that takes longer is asked for again, QUIC probes a path more often
	// than every 30 s while it needs it, and a minute is half of what RFC 4787 section 4.3 wants of a NAT, whose mappings cost it less.
	idleDNS  = 10 * time.Second
	idleQUIC = 30 * time.Second
	idleUDP  = 60 * time.Second
	// sweepEvery bounds how often a socket's flows are looked through for idle ones.
	sweepEvery = time.Second
	// maxPeers bounds the destinations of one application socket; the longest idle makes room. A busy BitTorrent node has some 2,000.
	maxPeers = 4096
	// maxPreparing bounds the destinations of one socket that wait for an association or a name.
	maxPreparing = 64
	// maxHeld, maxHeldBytes and maxAllHeldBytes bound the datagrams that wait with one destination, one socket, and all sockets of a context.
	maxHeld         = 16
	maxHeldBytes    = 256 << 10
	maxAllHeldBytes = 32 << 20
	// refusedFor is how long an upstream that could not open an association is not asked again by this socket, refusedLong the same for
	// one that carries no UDP at all. Datagrams are answered with an ICMP error meanwhile.
	refusedFor  = time.Second
	refusedLong = 10 * time.Second
)

// session is one application socket. UDP's goroutine owns what is not guarded.
//
//	application ──PacketSource──▶ dispatch ─▶ peer (decision) ─▶ association ──▶ upstream
//	            ◀──PacketSink── deliver ◀──────── replies ◀──────────┘
type session struct {
	h   *Handler
	src netip.AddrPort
	in  PacketSource

	wg      sync.WaitGroup // preparing, replies, queries
	queries turns
	routed  [maxBatch]*peer // of the batch being dispatched
	idlest  idlest[*peer]

	outMu sync.Mutex // the sink takes one batch at a time
	out   PacketSink

	mu        sync.Mutex
	peers     map[netip.AddrPort]*peer
	assocs    map[assocKey]*assoc
	preparing int
	held      int // bytes
	over      bool
	wake      time.Time // the deadline of in
}

// peer is one destination of the socket, as the application wrote it: a flow.
type peer struct {
	s       *session
	e       *entry
	f       *Flow
	dst     netip.AddrPort
	idle    time.Duration
	rules   *ruleSet // which decided; only dispatch uses it
	release func()   // of the name

	// decided once, before it is shared
	action Action
	via    Dialer

	// guarded by s.mu
	a         *assoc         // nil = not ready
	to        Addr           // what the upstream is sent
	from      netip.AddrPort // where its replies come from
	preparing bool
	held      [][]byte
	refused   bool // answered with reason until retry
	reason    Reason
	retry     time.Time
	over      bool
	cause     error // why, if it was over before it was inserted
}

// UDP is the life of one application socket: its datagrams are decided by destination, sent through an association by upstream, and
// whatever the upstream brings back is delivered. It returns when no flow is left, in has ended, or ctx is done. What in still holds then
// is the caller's, which starts again with it.
func (h *Handler) UDP(ctx context.Context, src netip.AddrPort, in PacketSource, out PacketSink) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	leave, ok := h.enter(cancel)
	if !ok {
		return
	}
	defer leave()
	s := newSession(h, src, in, out)
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		s.stop()
	})
	s.run(ctx)
	if !stop() {
		<-stopped
	}
	cause := context.Cause(ctx) // nil: the socket is idle
	cancel(ErrClosed)           // what is still being prepared or asked
	s.close(cause)
}

func newSession(h *Handler, src netip.AddrPort, in PacketSource, out PacketSink) *session {
	return &session{
		h: h, src: src, in: in, out: out,
		queries: make(turns, maxPipelined),
		peers:   make(map[netip.AddrPort]*peer),
		assocs:  make(map[assocKey]*assoc),
	}
}

// run moves what the application sends until there is nothing more to expect of it.
func (s *session) run(ctx context.Context) {
	r := newBatchReader(s.in, s.h.buffers)
	defer r.close()
	s.mu.Lock()
	s.wakeLocked(s.h.cfg.Now().Add(idleDNS)) // nothing at all is a socket not worth keeping
	s.mu.Unlock()
	for ctx.Err() == nil {
		ds, err := r.read()
		now := s.h.cfg.Now()
		switch {
		case err == nil:
			s.dispatch(ctx, ds, now)
		case !isTimeout(err):
			return
		}
		if !now.Before(s.wakeAt()) && !s.sweep(now) {
			return
		}
	}
}

func (s *session) wakeAt() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.wake
}

// dispatch sends a batch on its way. Datagrams in a row that go through the same association are written together.
func (s *session) dispatch(ctx context.Context, ds []Datagram, now time.Time) {
	rules := s.h.rules.Load()
	var run *assoc
	first := 0
	for i := range ds {
		p := s.peer(ctx, ds[i].Addr.AddrPort(), rules, now)
		s.routed[i] = p
		a := s.route(ctx, p, &ds[i], now)
		if a != run {
			s.send(run, ds[first:i], s.routed[first:i])
			run, first = a, i
		}
	}
	s.send(run, ds[first:], s.routed[first:len(ds)])
	clear(s.routed[:len(ds)])
}

// peer returns the flow towards dst under the rules in force: the one there is, or a new one. nil if there is no room for it.
func (s *session) peer(ctx context.Context, dst netip.AddrPort, rules *ruleSet, now time.Time) *peer {
	s.mu.Lock()
	p := s.peers[dst]
	stale := p != nil && p.refused && !now.Before(p.retry)
	s.mu.Unlock()
	if p != nil && !stale && p.rules == rules {
		return p
	}
	if p != nil {
		result := ResultOK
		if !stale {
			if s.stillHolds(p, rules) {
				p.rules = rules
				return p
			}
			result = ResultReloaded
		}
		s.end(p, result, nil)
	}
	return s.open(ctx, dst, now)
}

// stillHolds reports whether new rules do the same with a running flow. A flow that is forwarded stays with its association even if they
// would choose another upstream now, as a TCP connection does.
func (s *session) stillHolds(p *peer, rules *ruleSet) bool {
	s.mu.Lock()
	refused := p.refused
	s.mu.Unlock()
	f := *p.f
	return !refused && s.h.ask(rules, &f).Action == p.action
}

// open makes a flow: a slot, a name, a decision, as for TCP.
func (s *session) open(ctx context.Context, dst netip.AddrPort, now time.Time) *peer {
	s.makeRoom()
	f := s.h.newFlow(UDP, s.src, dst)
	p := &peer{s: s, f: f, dst: dst, idle: idleOf(dst.Port())}
	e, err := s.h.table.add(f, func(cause error) { s.end(p, ResultOK, cause) })
	if errors.Is(err, ErrTableFull) {
		s.h.table.drop(dropTableFull, 1)
	}
	if err != nil {
		return nil
	}
	p.rules = s.h.rules.Load() // if they are swapped from here on, the next datagram looks again
	release, err := s.h.name(f)
	if err != nil {
		e.decide(f, Decision{Rule: ruleUnmapped})
		e.outcome(ResultFailed, err)
		p.idle, p.refused, p.reason, p.retry = refusedFor, true, ReasonRefused, now.Add(refusedFor) // see refuse
		return s.insert(ctx, p, e, func() {}, now)
	}
	d := s.h.decide(f, e)
	p.action, p.via, p.reason = d.Action, d.Via, ReasonRefused
	switch d.Action {
	case Forward:
	case Resolve:
		p.idle = idleDNS
		e.early()
		e.established(0)
	case Drop:
		p.idle = min(p.idle, refusedLong)
		e.outcome(ResultDropped, nil)
	default: // Sniff too: there is nobody to listen to datagrams
		p.idle = min(p.idle, refusedLong)
		e.outcome(ResultBlocked, nil)
	}
	return s.insert(ctx, p, e, release, now)
}

// insert shows the flow to the socket's other goroutines, unless it has been ended already.
func (s *session) insert(ctx context.Context, p *peer, e *entry, release func(), now time.Time) *peer {
	s.mu.Lock()
	p.e, p.release = e, release
	if p.over || s.over || ctx.Err() != nil {
		p.over = true
		cause := p.cause
		s.mu.Unlock()
		release()
		e.outcome(ResultOK, cause)
		e.finish()
		return nil
	}
	s.peers[p.dst] = p
	if wake := now.Add(p.idle); wake.Before(s.wake) {
		s.wakeLocked(wake)
	}
	s.mu.Unlock()
	return p
}

func idleOf(port uint16) time.Duration {
	switch port {
	case 53:
		return idleDNS
	case 443:
		return idleQUIC
	}
	return idleUDP
}

// route does with one datagram what was decided, and returns the association to write it to, if there is one.
func (s *session) route(ctx context.Context, p *peer, d *Datagram, now time.Time) *assoc {
	if p == nil || p.action == Forward && !s.h.table.passes(true, len(d.Buf)) {
		return nil
	}
	p.e.up.addAt(uint64(len(d.Buf)), p.e.t.clockAt(now))
	p.e.packetsUp.Add(1)
	if p.action == Resolve {
		s.resolve(ctx, p, d.Buf)
		return nil
	}
	if p.action == Drop {
		return nil
	}
	s.mu.Lock()
	switch {
	case p.over: // killed since it was looked up
		s.mu.Unlock()
		s.h.table.drop(dropLost, 1)
		return nil
	case p.action != Forward || p.refused:
		r := p.reason
		s.mu.Unlock()
		s.unreachable(p.dst, d.Buf, r)
		return nil
	case p.a == nil && !s.attachReadyLocked(p):
		s.holdLocked(ctx, p, d.Buf)
		s.mu.Unlock()
		return nil
	}
	a := p.a
	a.last = p
	d.Addr = p.to
	s.mu.Unlock()
	return a
}

// holdLocked keeps a datagram until its flow can send, and sees to it that somebody makes that happen.
func (s *session) holdLocked(ctx context.Context, p *peer, buf []byte) {
	size := len(buf)
	if !p.preparing && s.preparing >= maxPreparing || len(p.held) >= maxHeld || s.held+size > maxHeldBytes {
		s.h.table.drop(dropQueueFull, 1)
		return
	}
	if s.h.held.Add(int64(size)) > maxAllHeldBytes {
		s.h.held.Add(-int64(size))
		s.h.table.drop(dropQueueFull, 1)
		return
	}
	s.held += size
	p.held = append(p.held, bytes.Clone(buf))
	if !p.preparing {
		p.preparing = true
		s.preparing++
		s.wg.Go(func() { s.prepare(ctx, p) })
	}
}

// send writes datagrams to an association. One that the upstream cannot carry is answered and skipped; any other error is the end of the
// association, and the application's next datagram makes a new one.
func (s *session) send(a *assoc, ds []Datagram, ps []*peer) {
	if a == nil {
		return
	}
	for len(ds) > 0 {
		a.writeMu.Lock()
		n, err := a.conn.WriteBatch(ds)
		a.writeMu.Unlock()
		n = max(0, min(n, len(ds)))
		ds, ps = ds[n:], ps[n:]
		switch {
		case len(ds) == 0:
		case err == nil && n > 0:
		case err != nil && isDatagramError(err):
			if errors.Is(err, unix.EMSGSIZE) {
				s.h.table.drop(dropTooLarge, 1)
			}
			s.unreachable(ps[0].dst, ds[0].Buf, reasonOfDatagram(err))
			ds, ps = ds[1:], ps[1:]
		default:
			s.h.table.drop(dropLost, len(ds))
			s.lost(a, err)
			return
		}
	}
}

// isDatagramError reports whether an error of WriteBatch is about the next datagram alone: too large, or towards where the upstream
// cannot or will not send. The association is as good as before.
func isDatagramError(err error) bool {
	if errors.Is(err, ErrUpstream) {
		return false
	}
	for _, e := range [...]error{
		unix.EMSGSIZE, unix.ENETUNREACH, unix.EHOSTUNREACH, unix.EACCES, unix.EPERM, unix.ECONNREFUSED,
		ErrNetUnreachable, ErrHostUnreachable, ErrProhibited, ErrRefused, ErrNoServers, errors.ErrUnsupported,
	} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// reasonOfDatagram is what the application is told of a datagram that was not sent. There is no ICMP error for "the proxy cannot carry so
// much", and "fragmentation needed" would make it try sizes that are not the point.
func reasonOfDatagram(err error) Reason {
	switch {
	case errors.Is(err, unix.EMSGSIZE), errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return ReasonProhibited
	case errors.Is(err, errors.ErrUnsupported):
		return ReasonRefused
	}
	return ReasonOf(err)
}

// resolve answers a DNS query.
func (s *session) resolve(ctx context.Context, p *peer, query []byte) {
	if !s.queries.tryTake() {
		s.h.table.drop(dropDNSBusy, 1)
		return
	}
	if !s.h.queries.tryTake() {
		s.queries.give()
		s.h.table.drop(dropDNSBusy, 1)
		return
	}
	query = bytes.Clone(query)
	s.wg.Go(func() {
		defer func() { s.h.queries.give(); s.queries.give() }()
		ctx, cancel := context.WithTimeout(ctx, queryTimeout)
		defer cancel()
		reply, err := s.h.names.Exchange(ctx, p.f, query)
		if err != nil || len(reply) > bufferSize {
			s.h.table.drop(dropNotDNS, 1)
			return
		}
		p.received(len(reply), p.e.t.clock())
		s.deliver([]Datagram{{Addr: Addr{IP: p.dst.Addr(), Port: p.dst.Port()}, Buf: reply}})
	})
}

// received counts a datagram towards the application.
func (p *peer) received(n int, now int64) {
	p.e.down.addAt(uint64(n), now)
	p.e.packetsDown.Add(1)
}

func (s *session) deliver(ds []Datagram) {
	if len(ds) == 0 {
		return
	}
	s.outMu.Lock()
	defer s.outMu.Unlock()
	s.out.Deliver(ds)
	s.out.Flush()
}

func (s *session) unreachable(dst netip.AddrPort, payload []byte, r Reason) {
	s.outMu.Lock()
	defer s.outMu.Unlock()
	s.out.Unreachable(dst, payload, r)
}
