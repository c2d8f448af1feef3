// SPDX-License-Identifier: GPL-3.0-or-later

package flow

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// packetQueue is a queue of datagrams with a deadline: a PacketSource, and the reading half of a PacketConn.
type packetQueue struct {
	mu       sync.Mutex
	cond     *sync.Cond
	ds       []Datagram
	deadline time.Time
	timer    *time.Timer
	err      error
	biggest  int // batch asked for
}

func newPacketQueue() *packetQueue {
	q := &packetQueue{}
	q.cond = sync.NewCond(&q.mu)
	return q
}

func (q *packetQueue) push(to Addr, payload string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.ds = append(q.ds, Datagram{to, []byte(payload)})
	q.cond.Broadcast()
}

func (q *packetQueue) fail(err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.err == nil {
		q.err = err
	}
	if q.timer != nil {
		q.timer.Stop()
	}
	q.cond.Broadcast()
}

func (q *packetQueue) waitLocked() error {
	for {
		switch {
		case q.err != nil:
			return q.err
		case !q.deadline.IsZero() && !time.Now().Before(q.deadline):
			return os.ErrDeadlineExceeded
		case len(q.ds) > 0:
			return nil
		}
		q.cond.Wait()
	}
}

func (q *packetQueue) ReadBatch(ds []Datagram) (int, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.biggest = max(q.biggest, len(ds))
	if err := q.waitLocked(); err != nil {
		return 0, err
	}
	n := 0
	for n < len(ds) && len(q.ds) > 0 {
		ds[n].Addr, ds[n].Buf = q.ds[0].Addr, ds[n].Buf[:copy(ds[n].Buf, q.ds[0].Buf)]
		q.ds = q.ds[1:]
		n++
	}
	return n, nil
}

func (q *packetQueue) SetReadDeadline(t time.Time) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.deadline = t
	if q.timer != nil {
		q.timer.Stop()
		q.timer = nil
	}
	if !t.IsZero() && q.err == nil {
		q.timer = time.AfterFunc(time.Until(t), func() {
			q.mu.Lock()
			defer q.mu.Unlock()
			q.cond.Broadcast()
		})
	}
	q.cond.Broadcast()
	return nil
}

// waitingQueue is a packetQueue whose reader need not hold a buffer.
type waitingQueue struct{ *packetQueue }

func (q waitingQueue) WaitRead() error {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.waitLocked()
}

// fakeAssoc is an association.
type fakeAssoc struct {
	*packetQueue
	wmu      sync.Mutex
	wrote    []string
	batches  int
	writeErr func(d Datagram) error
	closed   bool
}

func newFakeAssoc() *fakeAssoc { return &fakeAssoc{packetQueue: newPacketQueue()} }

func (a *fakeAssoc) WriteBatch(ds []Datagram) (int, error) {
	a.wmu.Lock()
	defer a.wmu.Unlock()
	a.batches++
	for i, d := range ds {
		if a.writeErr != nil {
			if err := a.writeErr(d); err != nil {
				return i, err
			}
		}
		a.wrote = append(a.wrote, d.Addr.String()+" "+string(d.Buf))
	}
	return len(ds), nil
}

func (a *fakeAssoc) Close() error {
	a.wmu.Lock()
	defer a.wmu.Unlock()
	a.closed = true
	a.fail(net.ErrClosed)
	return nil
}

func (a *fakeAssoc) sent() []string {
	a.wmu.Lock()
	defer a.wmu.Unlock()
	return slices.Clone(a.wrote)
}

func (a *fakeAssoc) isClosed() bool {
	a.wmu.Lock()
	defer a.wmu.Unlock()
	return a.closed
}

// fakeSink is the application's side.
type fakeSink struct {
	mu        sync.Mutex
	got       []string
	refused   []string
	unflushed int
}

func (s *fakeSink) Deliver(ds []Datagram) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, d := range ds {
		s.got = append(s.got, d.Addr.String()+" "+string(d.Buf))
	}
	s.unflushed += len(ds)
}

func (s *fakeSink) Flush() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.unflushed = 0
}

func (s *fakeSink) Unreachable(dst netip.AddrPort, payload []byte, r Reason) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.refused = append(s.refused, fmt.Sprintf("%s %s %s", dst, payload, r))
}

func (s *fakeSink) take() (got, refused []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	got, refused = s.got, s.refused
	s.got, s.refused = nil, nil
	if s.unflushed != 0 {
		got = append(got, "NOT FLUSHED")
	}
	return got, refused
}

// udpRig is an application socket. Its associations are made by via and kept in assocs, in order.
type udpRig struct {
	*rig
	t      *testing.T
	in     *packetQueue
	sink   *fakeSink
	via    *dialer
	mu     sync.Mutex
	assocs []*fakeAssoc
	done   chan struct{}
}

func startUDP(t *testing.T, n Names) *udpRig {
	t.Helper()
	u := &udpRig{t: t, in: newPacketQueue(), sink: &fakeSink{}, done: make(chan struct{})}
	u.rig = newRig(t, func(h *HandlerConfig, c *TableConfig) { h.Names, c.MaxFlows = n, 1000 })
	u.via = &dialer{name: "up", names: true}
	u.via.listen = func(context.Context, *Flow) (PacketConn, error) {
		a := newFakeAssoc()
		u.mu.Lock()
		defer u.mu.Unlock()
		u.assocs = append(u.assocs, a)
		return a, nil
	}
	u.SetDecider(always(Forward, u.via))
	return u
}

func (u *udpRig) run() *udpRig {
	done := u.done
	go func() {
		defer close(done)
		u.UDP(u.t.Context(), appAddr, u.in, u.sink)
	}()
	return u
}

func (u *udpRig) assoc(i int) *fakeAssoc {
	u.t.Helper()
	u.mu.Lock()
	defer u.mu.Unlock()
	if i >= len(u.assocs) {
		u.t.Fatalf("%d associations, want more than %d", len(u.assocs), i)
	}
	return u.assocs[i]
}

func (u *udpRig) made() int {
	u.mu.Lock()
	defer u.mu.Unlock()
	return len(u.assocs)
}

// send lets the application send, and everything that follows from it happen. Like the stack, it starts again with a socket that was idle.
func (u *udpRig) send(to string, payload string) {
	u.t.Helper()
	synctest.Wait()
	select {
	case <-u.done:
		u.done = make(chan struct{})
		u.run()
	default:
	}
	u.in.push(AddrFrom(netip.MustParseAddrPort(to)), payload)
	synctest.Wait()
}

func (u *udpRig) reply(i int, from string, payload string) {
	u.t.Helper()
	u.assoc(i).push(AddrFrom(netip.MustParseAddrPort(from)), payload)
	synctest.Wait()
}

func (u *udpRig) want(got, refused []string) {
	u.t.Helper()
	g, r := u.sink.take()
	if d := cmp.Diff(got, g); d != "" {
		u.t.Errorf("delivered (-want +got):\n%s", d)
	}
	if d := cmp.Diff(refused, r); d != "" {
		u.t.Errorf("refused (-want +got):\n%s", d)
	}
}

func (u *udpRig) wantSent(i int, want ...string) {
	u.t.Helper()
	if d := cmp.Diff(want, u.assoc(i).sent()); d != "" {
		u.t.Errorf("association %d sent (-want +got):\n%s", i, d)
	}
}
