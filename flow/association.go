// SPDX-License-Identifier: GPL-3.0-or-later

package flow

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// maxAliases bounds the associations of one socket with one upstream. The second is made when two names the application tells apart by
// their fake IPs turn out to have the same real address and port: replies over one association could not be told apart.
const maxAliases = 4

// UDPNamer is implemented by a Dialer that knows whether its associations take names (Datagram.Addr with a Host and no IP). If it says no,
// a datagram to a name that dns cannot resolve is answered with an ICMP error at once. One that does not say is given the name: if it
// cannot use it, that is an error or a loss, but not a leak.
type UDPNamer interface {
	UDPNames() bool
}

type assocKey struct {
	via   Dialer
	alias int
}

// assoc is one association of the socket with an upstream: one address and port there for all the socket's destinations, and whoever
// answers to it is heard (RFC 4787 sections 4.1 and 5: endpoint-independent mapping and filtering). It lives as long as a flow uses it.
// One that failed stays as a note of when it may be tried again.
type assoc struct {
	key     assocKey
	ready   chan struct{} // closed when conn and err are final
	writeMu sync.Mutex
	conn    PacketConn

	// guarded by session.mu
	err    error
	retry  time.Time // after err: not before
	born   time.Time
	closed bool
	refs   int                      // flows that use it or wait for it
	peers  map[netip.AddrPort]*peer // by where their replies come from
	named  []*peer                  // sent by name, replies not seen yet; oldest first
	last   *peer                    // sent the latest datagram: what strangers send is counted as its
}

// attachReadyLocked gives the flow an association that is there already, if it needs nothing else.
func (s *session) attachReadyLocked(p *peer) bool {
	ip := p.f.Dst.IP
	if p.preparing || !ip.IsValid() {
		return false
	}
	to := Addr{IP: ip, Port: p.f.Dst.Port}
	for alias := range maxAliases {
		a := s.assocs[assocKey{p.via, alias}]
		if a == nil || a.conn == nil || a.closed {
			return false
		}
		if other := a.peers[to.AddrPort()]; other == nil {
			a.refs++
			a.bindLocked(p, to)
			p.a, p.to = a, to
			p.e.established(0)
			return true
		}
	}
	return false
}

// prepare gets the flow what it needs to send (an address for its name, an association) and sends what has waited for it.
func (s *session) prepare(ctx context.Context, p *peer) {
	dctx, cancel := context.WithTimeoutCause(ctx, s.h.dialTimeout(), ErrTimeout)
	defer cancel()
	begin := s.h.cfg.Now()
	var a *assoc
	to, err := s.target(dctx, p)
	if err == nil {
		a, err = s.associate(dctx, p, to)
	}
	if err != nil {
		s.refuse(p, because(ctx, err))
		return
	}
	p.e.established(s.h.cfg.Now().Sub(begin))
	s.mu.Lock()
	for len(p.held) > 0 && !p.over { // more may come while some are written, and must not overtake
		held := s.takeHeldLocked(p)
		s.mu.Unlock()
		ds, ps := make([]Datagram, len(held)), make([]*peer, len(held))
		for i, b := range held {
			ds[i], ps[i] = Datagram{Addr: to, Buf: b}, p
		}
		s.send(a, ds, ps)
		s.mu.Lock()
	}
	p.preparing = false
	s.preparing--
	if !p.over {
		p.a, p.to = a, to
		s.mu.Unlock()
		return
	}
	a.unbindLocked(p)
	unused := s.unrefLocked(a)
	s.mu.Unlock()
	closeConn(unused)
}

// refuse answers what has waited, and for a while whatever else the application sends there.
func (s *session) refuse(p *peer, err error) {
	reason, pause := ReasonOf(err), refusedFor
	switch {
	case errors.Is(err, errors.ErrUnsupported):
		reason, pause = ReasonRefused, refusedLong // port unreachable: QUIC falls back to TCP at once
	case errors.Is(err, ErrNoServers):
		reason = ReasonRefused // "host unreachable" is a soft error, which no connected UDP socket is told of (RFC 1122 section 4.1.3.3)
	}
	s.mu.Lock()
	held := s.takeHeldLocked(p)
	p.preparing = false
	s.preparing--
	p.refused, p.reason, p.retry = true, reason, s.h.cfg.Now().Add(pause)
	over := p.over || s.over
	if p.retry.Before(s.wake) {
		s.wakeLocked(p.retry)
	}
	s.mu.Unlock()
	p.e.outcome(ResultFailed, err)
	if over {
		return
	}
	for _, b := range held {
		s.unreachable(p.dst, b, reason)
	}
}

// target returns what the upstream is to be sent for the flow's destination.
//
// A name is resolved first, through the proxy, since then replies tell by their source which destination they belong to. Without servers
// to ask, the name itself is sent if the upstream takes it; replies are then attributed by port alone (assoc.senderLocked).
func (s *session) target(ctx context.Context, p *peer) (Addr, error) {
	dst := p.f.Dst
	if dst.IP.IsValid() {
		return Addr{IP: dst.IP, Port: dst.Port}, nil
	}
	ips, err := s.h.names.Resolve(ctx, dst.Host)
	if err == nil && len(ips) > 0 {
		i := slices.IndexFunc(ips, func(ip netip.Addr) bool { return ip.Unmap().Is4() == p.dst.Addr().Unmap().Is4() })
		return Addr{IP: ips[max(0, i)].Unmap(), Port: dst.Port}, nil
	}
	if errors.Is(err, ErrNoServers) {
		if n, ok := p.via.(UDPNamer); !ok || n.UDPNames() {
			return Addr{Host: dst.Host, Port: dst.Port}, nil
		}
	}
	if err == nil {
		err = ErrHostUnreachable
	}
	return Addr{}, fmt.Errorf("resolve %s: %w", dst.Host, err)
}

// associate returns an association with the flow's upstream on which replies from to are the flow's, making it if need be. The flow is
// bound to it and counted as a user.
func (s *session) associate(ctx context.Context, p *peer, to Addr) (*assoc, error) {
	for alias := range maxAliases {
		a, created := s.reserve(assocKey{p.via, alias})
		if created {
			s.listen(ctx, a, p)
		}
		var err error
		select {
		case <-a.ready:
		case <-ctx.Done():
			err = context.Cause(ctx)
		}
		s.mu.Lock()
		if err == nil {
			err = a.err
		}
		if err == nil && (!to.IP.IsValid() || a.peers[to.AddrPort()] == nil || alias == maxAliases-1) {
			a.bindLocked(p, to)
			s.mu.Unlock()
			return a, nil
		}
		unused := s.unrefLocked(a)
		s.mu.Unlock()
		closeConn(unused)
		if err != nil {
			return nil, err
		}
	}
	return nil, ErrHostUnreachable // not reached: the last alias is shared
}

// reserve returns the association there is, with one more user, or a new one that the caller has to make.
func (s *session) reserve(key assocKey) (a *assoc, created bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	a = s.assocs[key]
	if a == nil || a.err != nil && !s.h.cfg.Now().Before(a.retry) {
		a = &assoc{key: key, ready: make(chan struct{}), peers: make(map[netip.AddrPort]*peer)}
		s.assocs[key] = a
		created = true
	}
	a.refs++
	return a, created
}

// listen opens a new association.
func (s *session) listen(ctx context.Context, a *assoc, p *peer) {
	defer close(a.ready)
	begin := s.h.cfg.Now()
	var conn PacketConn
	err := takeTurn(ctx, s.h.assocs)
	if err == nil {
		conn, err = makeRoom(ctx, s.h.table, func() (PacketConn, error) { return a.key.via.ListenPacket(ctx, p.f) })
		s.h.assocs.give()
	}
	now := s.h.cfg.Now()
	s.mu.Lock()
	if err == nil && s.over {
		_ = conn.Close()
		err = ErrClosed
	}
	a.born = now
	if err == nil {
		a.conn = conn
	} else {
		a.err, a.retry = err, now.Add(refusedFor)
		if errors.Is(err, errors.ErrUnsupported) {
			a.retry = now.Add(refusedLong)
		}
	}
	s.mu.Unlock()
	if err != nil {
		if ctx.Err() == nil || errors.Is(context.Cause(ctx), ErrTimeout) {
			s.h.table.cfg.Recorder.UpstreamError(a.key.via.Name(), ReasonOf(err))
		}
		return
	}
	s.h.table.cfg.Recorder.Connected(a.key.via.Name(), now.Sub(begin))
	s.wg.Go(func() { s.replies(a) })
}

// lost ends an association that broke, and its flows. The next datagram of the application makes a new one; at once if this one has
// worked for a while, else after refusedFor, so that a server that closes every association is not asked once a datagram.
func (s *session) lost(a *assoc, err error) {
	now := s.h.cfg.Now()
	s.mu.Lock()
	if a.closed {
		s.mu.Unlock()
		return
	}
	a.closed = true
	a.err = fmt.Errorf("association lost: %w", err)
	if a.retry = now; now.Sub(a.born) < refusedFor {
		a.retry = now.Add(refusedFor)
	}
	users := slices.Clone(a.named)
	for _, p := range a.peers {
		users = append(users, p)
	}
	over := s.over
	s.mu.Unlock()
	_ = a.conn.Close()
	if over {
		return // close ends the flows, with their own reason
	}
	for _, p := range users {
		s.end(p, ResultReset, a.err)
	}
}

// detachLocked takes the flow from its association. The caller closes what is returned.
func (s *session) detachLocked(p *peer) PacketConn {
	a := p.a
	if a == nil {
		return nil
	}
	p.a = nil
	a.unbindLocked(p)
	return s.unrefLocked(a)
}

// unrefLocked counts one user less, and returns what the caller has to close if it was the last.
func (s *session) unrefLocked(a *assoc) PacketConn {
	a.refs--
	if a.refs > 0 || a.closed || a.conn == nil {
		return nil
	}
	a.closed = true
	if s.assocs[a.key] == a {
		delete(s.assocs, a.key)
	}
	return a.conn
}

func closeConn(c PacketConn) {
	if c != nil {
		_ = c.Close()
	}
}

// bindLocked makes replies from to the flow's.
func (a *assoc) bindLocked(p *peer, to Addr) {
	if to.IP.IsValid() {
		a.peers[to.AddrPort()] = p
		p.from = to.AddrPort()
	} else {
		a.named = append(a.named, p)
	}
	p.to = to
}

func (a *assoc) unbindLocked(p *peer) {
	if a.peers[p.from] == p {
		delete(a.peers, p.from)
	}
	if i := slices.Index(a.named, p); i >= 0 {
		a.named = slices.Delete(a.named, i, i+1)
	}
	if a.last == p {
		a.last = nil
	}
}

// replies delivers what the upstream brings, until the association ends.
func (s *session) replies(a *assoc) {
	r := newBatchReader(a.conn, s.h.buffers)
	defer r.close()
	for {
		ds, err := r.read()
		if err != nil {
			s.lost(a, err)
			return
		}
		s.deliver(s.address(a, ds))
	}
}

// address replaces each datagram's source by the address that the application knows its sender by, and returns those that have one.
// It reorders ds.
func (s *session) address(a *assoc, ds []Datagram) []Datagram {
	now := s.h.table.clock()
	n, limited := 0, 0
	s.mu.Lock()
	for i := range ds {
		src := netip.AddrPortFrom(ds[i].Addr.IP.Unmap(), ds[i].Addr.Port)
		p := a.senderLocked(src, ds[i].Addr.Host)
		switch {
		case p != nil:
			src = p.dst
		case !src.IsValid() || src.Addr().Is4() != s.src.Addr().Unmap().Is4():
			continue // a stranger that the application's socket has no form of address for
		default:
			p = a.last
		}
		if !s.h.table.passes(false, len(ds[i].Buf)) {
			limited++
			continue
		}
		if p != nil {
			p.received(len(ds[i].Buf), now)
		}
		ds[i].Addr = Addr{IP: src.Addr(), Port: src.Port()}
		ds[n], ds[i] = ds[i], ds[n]
		n++
	}
	s.mu.Unlock()
	s.h.table.drop(dropBadSource, len(ds)-n-limited)
	return ds[:n]
}

// senderLocked returns the flow whose destination a datagram comes from; nil if it is nobody that the socket has written to.
//
// Where names were sent, an unknown address with the port of one is taken for the one that has waited longest. That is a guess: two
// names asked at the same time on one port, answered in the other order, are confused, and a stranger on that port may be taken for
// a name that never answers. Applications that check whom they talk to (QUIC, DTLS, SRTP) notice.
func (a *assoc) senderLocked(src netip.AddrPort, host string) *peer {
	if host != "" {
		for _, p := range a.named {
			if p.to.Host == host && p.to.Port == src.Port() {
				return p
			}
		}
	}
	if p := a.peers[src]; p != nil || !src.IsValid() {
		return p
	}
	for i, p := range a.named {
		if p.to.Port == src.Port() {
			a.named = slices.Delete(a.named, i, i+1)
			a.peers[src] = p
			p.from = src
			return p
		}
	}
	return nil
}
