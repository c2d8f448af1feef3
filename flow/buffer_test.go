// SPDX-License-Identifier: GPL-3.0-or-later

package flow

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// idleSession is a session with one flow that is up, for measuring.
func idleSession(t *testing.T) (*session, *assoc, *Handler) {
	t.Helper()
	r := newRig(t, nil)
	silent := &silentAssoc{closed: make(chan struct{})}
	r.SetDecider(always(Forward, &dialer{name: "up", listen: func(context.Context, *Flow) (PacketConn, error) { return silent, nil }}))
	s := newSession(r.Handler, appAddr, newPacketQueue(), nullSink{})
	t.Cleanup(func() { s.close(ErrClosed) })
	s.dispatch(t.Context(), []Datagram{{AddrFrom(webAddr), []byte("first")}}, time.Now())
	var a *assoc
	for a == nil {
		s.mu.Lock()
		if p := s.peers[webAddr]; p != nil {
			a = p.a
		}
		s.mu.Unlock()
	}
	return s, a, r.Handler
}

type silentAssoc struct {
	once   sync.Once
	closed chan struct{}
}

func (a *silentAssoc) ReadBatch([]Datagram) (int, error)     { <-a.closed; return 0, net.ErrClosed }
func (a *silentAssoc) WriteBatch(ds []Datagram) (int, error) { return len(ds), nil }
func (a *silentAssoc) SetReadDeadline(time.Time) error       { return nil }
func (a *silentAssoc) Close() error                          { a.once.Do(func() { close(a.closed) }); return nil }

type nullSink struct{}

func (nullSink) Deliver([]Datagram)                         {}
func (nullSink) Flush()                                     {}
func (nullSink) Unreachable(netip.AddrPort, []byte, Reason) {}

// full is a source that always has datagrams.
type full struct{ from Addr }

func (f full) ReadBatch(ds []Datagram) (int, error) {
	for i := range ds {
		ds[i].Addr, ds[i].Buf = f.from, ds[i].Buf[:1200]
	}
	return len(ds), nil
}

func TestUDPDoesNotAllocate(t *testing.T) {
	s, a, h := idleSession(t)
	up, down := newBatchReader(full{AddrFrom(webAddr)}, h.buffers), newBatchReader(full{AddrFrom(webAddr)}, h.buffers)
	defer up.close()
	defer down.close()
	for range 10 {
		_, _ = up.read()
		_, _ = down.read()
	}
	now := time.Now()
	sent := 0
	n := testing.AllocsPerRun(100, func() {
		ds, err := up.read()
		if err != nil {
			t.Error(err)
		}
		s.dispatch(t.Context(), ds, now)
		sent += len(ds)
		if ds, err = down.read(); err != nil {
			t.Error(err)
		}
		s.deliver(s.address(a, ds))
	})
	if n != 0 || sent < 100*maxBatch {
		t.Errorf("%v allocations a batch, %d datagrams", n, sent)
	}
}

func BenchmarkUDP(b *testing.B) {
	h := NewHandler(HandlerConfig{})
	silent := &silentAssoc{closed: make(chan struct{})}
	h.SetDecider(always(Forward, &dialer{name: "up", listen: func(context.Context, *Flow) (PacketConn, error) { return silent, nil }}))
	s := newSession(h, appAddr, newPacketQueue(), nullSink{})
	defer s.close(ErrClosed)
	s.dispatch(b.Context(), []Datagram{{AddrFrom(webAddr), []byte("first")}}, time.Now())
	var a *assoc
	for a == nil {
		s.mu.Lock()
		a = s.peers[webAddr].a
		s.mu.Unlock()
	}
	up := newBatchReader(full{AddrFrom(webAddr)}, h.buffers)
	defer up.close()
	b.ReportAllocs()
	n := 0
	for b.Loop() {
		ds, _ := up.read()
		s.dispatch(b.Context(), ds, time.Now())
		s.deliver(s.address(a, ds))
		n += len(ds)
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(n), "ns/echo")
}

func TestBatchReader(t *testing.T) {
	pool := newBufferPool()
	q := newPacketQueue()
	r := newBatchReader(q, pool)
	read := func(n int) {
		t.Helper()
		for range n {
			q.push(AddrFrom(webAddr), "x")
		}
		for got := 0; got < n; {
			ds, err := r.read()
			if err != nil {
				t.Fatal(err)
			}
			got += len(ds)
		}
	}
	read(1)
	if q.biggest != 1 {
		t.Errorf("began with %d buffers", q.biggest)
	}
	read(200)
	if q.biggest != maxBatch || r.n != maxBatch {
		t.Errorf("grew to %d", q.biggest)
	}
	for range 10 {
		read(1)
	}
	if r.n > 2 || int(pool.spare.Load()) != r.n-1 {
		t.Errorf("%d buffers held after the burst, %d spare", r.n, pool.spare.Load())
	}
	pool.spare.Store(maxSpare)
	read(200)
	if r.n > 2 {
		t.Errorf("%d buffers held when none are spare", r.n)
	}
	pool.spare.Store(int64(r.n - 1))
	r.close()
	if pool.spare.Load() != 0 {
		t.Errorf("%d spare buffers lost", pool.spare.Load())
	}
}

// A source that can wait costs no buffer while it does.
func TestBatchReaderWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pool := newBufferPool()
		q := newPacketQueue()
		r := newBatchReader(waitingQueue{q}, pool)
		got := make(chan int)
		go func() {
			defer r.close()
			for {
				ds, err := r.read()
				if err != nil {
					close(got)
					return
				}
				got <- len(ds)
			}
		}()
		for range 3 {
			synctest.Wait()
			if r.n != 0 || pool.spare.Load() != 0 {
				t.Errorf("%d buffers held", r.n)
			}
			q.mu.Lock()
			for range maxBatch + 2 {
				q.ds = append(q.ds, Datagram{AddrFrom(webAddr), []byte("x")})
			}
			q.cond.Broadcast()
			q.mu.Unlock()
			if a, b := <-got, <-got; a != maxBatch || b != 2 {
				t.Errorf("read %d and %d", a, b)
			}
		}
		q.fail(net.ErrClosed)
		<-got
	})
}
