// SPDX-License-Identifier: GPL-3.0-or-later

package flow

import (
	"time"
)

// sweep ends the flows that have been idle for too long and sets when to look again. It reports whether any flow is left.
func (s *session) sweep(now time.Time) bool {
	clock := s.h.table.clockAt(now)
	next := now.Add(idleUDP)
	var idle []*peer
	s.mu.Lock()
	for _, p := range s.peers {
		left := p.idle - time.Duration(clock-p.last())
		if p.refused {
			left = min(left, p.retry.Sub(now))
		}
		if left <= 0 {
			idle = append(idle, p)
		} else if at := now.Add(left); at.Before(next) {
			next = at
		}
	}
	if soon := now.Add(sweepEvery); next.Before(soon) {
		next = soon
	}
	s.wakeLocked(next)
	alive := len(s.peers) > len(idle)
	s.mu.Unlock()
	for _, p := range idle {
		s.end(p, ResultOK, nil)
	}
	return alive
}

// makeRoom ends the longest idle flow of a socket that has as many as it may. Only dispatch's goroutine calls it.
func (s *session) makeRoom() {
	s.mu.Lock()
	full := len(s.peers) >= maxPeers
	s.mu.Unlock()
	if !full {
		return
	}
	p, ok := s.idlest.take(s.alive)
	if !ok {
		s.idlest.scanned(s.scan())
		p, ok = s.idlest.take(s.alive)
	}
	if ok {
		s.end(p, ResultEvicted, nil)
	}
}

func (s *session) alive(p *peer) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !p.over
}

func (s *session) scan() []aged[*peer] {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]aged[*peer], 0, len(s.peers))
	for _, p := range s.peers {
		all = append(all, aged[*peer]{p, p.last()})
	}
	return all
}

// last returns when the flow last moved.
func (p *peer) last() int64 { return p.e.last() }

// end ends one flow, and its association with the last of them. It may be called from anywhere, with no lock held, at any time after the
// flow has been added to the table.
func (s *session) end(p *peer, result string, cause error) {
	s.mu.Lock()
	if p.over {
		s.mu.Unlock()
		return
	}
	p.over, p.cause = true, cause
	e := p.e
	if e == nil { // not inserted yet: insert finishes it
		s.mu.Unlock()
		return
	}
	if s.peers[p.dst] == p {
		delete(s.peers, p.dst)
	}
	s.takeHeldLocked(p)
	unused := s.detachLocked(p)
	s.mu.Unlock()
	closeConn(unused)
	p.release()
	e.outcome(result, cause)
	e.finish()
}

// takeHeldLocked returns the datagrams that have waited with the flow, and counts them as waiting no longer.
func (s *session) takeHeldLocked(p *peer) [][]byte {
	held := p.held
	for _, b := range held {
		s.held -= len(b)
		s.h.held.Add(-int64(len(b)))
	}
	p.held = nil
	return held
}

// wakeLocked sets when to look for idle flows. All deadlines of in are set here and in stop, so that the last one is the one that is meant.
func (s *session) wakeLocked(at time.Time) {
	if !s.over {
		s.wake = at
		_ = s.in.SetReadDeadline(at)
	}
}

// stop ends the reading of in and closes all associations, which ends their readers and whatever is being written.
func (s *session) stop() {
	s.mu.Lock()
	s.over = true
	_ = s.in.SetReadDeadline(time.Unix(1, 0))
	var conns []PacketConn
	for _, a := range s.assocs {
		if a.conn != nil {
			conns = append(conns, a.conn)
		}
	}
	s.mu.Unlock()
	for _, c := range conns {
		_ = c.Close()
	}
}

// close ends all flows and waits for all goroutines.
func (s *session) close(cause error) {
	s.stop()
	s.mu.Lock()
	all := make([]*peer, 0, len(s.peers))
	for _, p := range s.peers {
		all = append(all, p)
	}
	s.mu.Unlock()
	for _, p := range all {
		s.end(p, ResultOK, cause)
	}
	s.wg.Wait()
}
