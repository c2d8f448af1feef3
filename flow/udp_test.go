// SPDX-License-Identifier: GPL-3.0-or-later

package flow

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
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

func TestUDPLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := startUDP(t, nil).run()
		begin := time.Now()
		u.send("192.0.2.1:5000", "one")
		u.send("192.0.2.2:5000", "two")
		u.send("192.0.2.1:5000", "three")
		u.wantSent(0, "192.0.2.1:5000 one", "192.0.2.2:5000 two", "192.0.2.1:5000 three")
		u.reply(0, "192.0.2.1:5000", "yes")
		u.reply(0, "203.0.113.9:7777", "stranger") // endpoint-independent filtering
		u.want([]string{"192.0.2.1:5000 yes", "203.0.113.9:7777 stranger"}, nil)
		if s := u.table.Snapshot(); len(s) != 2 || s[0].State != StateEstablished || s[0].PacketsUp != 2 || s[0].BytesUp != 8 ||
			s[0].PacketsDown != 2 || s[0].Upstream != "up" {
			t.Errorf("%+v", s)
		}
		<-u.done
		if took := time.Since(begin); took != idleUDP {
			t.Errorf("ended after %v, want %v", took, idleUDP)
		}
		if u.made() != 1 || !u.assoc(0).isClosed() {
			t.Errorf("%d associations, closed %v", u.made(), u.assoc(0).isClosed())
		}
		if d := cmp.Diff([]string{"udp up ok", "udp up ok"}, u.rec.ended); d != "" {
			t.Error(d)
		}
		if n := len(u.logs.All()); n != 2 {
			t.Errorf("%d lines logged, want one a flow", n)
		}
	})
}

func TestUDPIdleByProtocol(t *testing.T) {
	for port, want := range map[int]time.Duration{53: idleDNS, 443: idleQUIC, 5000: idleUDP} {
		synctest.Test(t, func(t *testing.T) {
			u := startUDP(t, nil).run()
			begin := time.Now()
			u.send(fmt.Sprintf("192.0.2.1:%d", port), "x")
			<-time.After(want - time.Second)
			u.reply(0, fmt.Sprintf("192.0.2.1:%d", port), "y") // replies keep it alive
			<-u.done
			if took := time.Since(begin); took != 2*want-time.Second {
				t.Errorf("port %d: ended after %v", port, took)
			}
		})
	}
}

func TestUDPWithoutTraffic(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begin := time.Now()
		<-startUDP(t, nil).run().done
		if took := time.Since(begin); took != idleDNS {
			t.Errorf("ended after %v", took)
		}
	})
}

func TestUDPRefusals(t *testing.T) {
	for name, c := range map[string]struct {
		decider Decider
		dst     string
		want    []string
	}{
		"block":          {always(Block, nil), "192.0.2.1:443", []string{"192.0.2.1:443 x refused"}},
		"sniff":          {always(Sniff, nil), "192.0.2.1:443", []string{"192.0.2.1:443 x refused"}},
		"drop":           {always(Drop, nil), "192.0.2.1:443", nil},
		"no udp":         {always(Forward, &dialer{name: "up"}), "192.0.2.1:443", []string{"192.0.2.1:443 x refused"}},
		"upstream fails": {always(Forward, refusing(ErrUpstream)), "192.0.2.1:443", []string{"192.0.2.1:443 x host_unreachable"}},
		"no ipv6":        {always(Forward, refusing(ErrNetUnreachable)), "192.0.2.1:443", []string{"192.0.2.1:443 x net_unreachable"}},
		"unmapped":       {always(Forward, refusing(nil)), "198.18.0.9:443", []string{"198.18.0.9:443 x host_unreachable"}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				u := startUDP(t, &names{})
				u.SetDecider(c.decider)
				u.run()
				begin := time.Now()
				u.send(c.dst, "x")
				if time.Since(begin) != 0 {
					t.Error("not at once")
				}
				u.want(nil, c.want)
				u.send(c.dst, "x")
				u.want(nil, c.want)
				if len(u.logs.All()) != 0 || len(u.table.Snapshot()) != 1 {
					t.Errorf("%d lines, %d flows: want one flow, still there", len(u.logs.All()), len(u.table.Snapshot()))
				}
				<-u.done
				if n := len(u.logs.All()); n != 1 {
					t.Errorf("%d lines logged, want 1", n)
				}
			})
		})
	}
}

func refusing(err error) *dialer {
	return &dialer{name: "up", listen: func(context.Context, *Flow) (PacketConn, error) { return nil, err }}
}

// An upstream that fails is asked once a second at most, and heals.
func TestUDPUpstreamHeals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := startUDP(t, nil)
		good, tries, bad := u.via.listen, 0, true
		u.via.listen = func(ctx context.Context, f *Flow) (PacketConn, error) {
			if tries++; bad {
				return nil, fmt.Errorf("%w: down", ErrUpstream)
			}
			return good(ctx, f)
		}
		u.run()
		for range 10 {
			u.send("192.0.2.1:5000", "x")
			u.send("192.0.2.2:5000", "x")
		}
		if _, refused := u.sink.take(); len(refused) != 20 || tries != 1 {
			t.Errorf("%d refused, %d tries", len(refused), tries)
		}
		bad = false
		<-time.After(refusedFor)
		u.send("192.0.2.1:5000", "again")
		u.send("192.0.2.2:5000", "again")
		u.wantSent(0, "192.0.2.1:5000 again", "192.0.2.2:5000 again")
		u.want(nil, nil)
		if d := cmp.Diff([]string{"up host_unreachable"}, u.rec.errors); d != "" {
			t.Error(d)
		}
	})
}

// What is sent while the association is being made waits, in order, and other upstreams do not.
func TestUDPHeldWhileAssociating(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := startUDP(t, nil)
		fast := *u.via
		slow := &dialer{name: "slow", listen: func(ctx context.Context, f *Flow) (PacketConn, error) {
			<-time.After(3 * time.Second)
			return u.via.listen(ctx, f)
		}}
		u.SetDecider(decider{decide: func(f *Flow) Decision {
			if f.Orig.Port() == 1 {
				return Decision{Action: Forward, Via: slow}
			}
			return Decision{Action: Forward, Via: &fast}
		}})
		u.run()
		for i := range maxHeld + 5 {
			u.send("192.0.2.1:1", fmt.Sprint(i))
		}
		u.send("192.0.2.2:2", "at once")
		u.wantSent(0, "192.0.2.2:2 at once")
		<-time.After(3 * time.Second)
		synctest.Wait()
		u.send("192.0.2.1:1", "last")
		var want []string
		for i := range maxHeld {
			want = append(want, fmt.Sprint("192.0.2.1:1 ", i))
		}
		u.wantSent(1, append(want, "192.0.2.1:1 last")...)
		if n := u.table.Stats().Dropped["queue_full"]; n != 5 {
			t.Errorf("%d counted as dropped, want 5", n)
		}
	})
}

func TestUDPAssociationTimesOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := startUDP(t, nil)
		u.via.listen = func(ctx context.Context, _ *Flow) (PacketConn, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		u.run()
		u.send("192.0.2.1:5000", "x")
		<-time.After(DefaultDialTimeout)
		synctest.Wait()
		u.want(nil, []string{"192.0.2.1:5000 x timeout"})
	})
}

// The server closed the association: the next datagram makes another.
func TestUDPAssociationLost(t *testing.T) {
	for name, lose := range map[string]func(*fakeAssoc){
		"seen by the reader": func(a *fakeAssoc) { a.fail(fmt.Errorf("%w: gone", ErrUpstream)) },
		"seen by the writer": func(a *fakeAssoc) {
			a.wmu.Lock()
			defer a.wmu.Unlock()
			a.writeErr = func(Datagram) error { return fmt.Errorf("%w: gone", ErrUpstream) }
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				u := startUDP(t, nil).run()
				u.send("192.0.2.1:5000", "one")
				u.send("192.0.2.2:5000", "one")
				<-time.After(5 * time.Second)
				lose(u.assoc(0))
				synctest.Wait()
				if name == "seen by the writer" {
					u.send("192.0.2.1:5000", "lost")
				}
				if !u.assoc(0).isClosed() || len(u.table.Snapshot()) != 0 {
					t.Errorf("closed %v, %d flows", u.assoc(0).isClosed(), len(u.table.Snapshot()))
				}
				u.send("192.0.2.1:5000", "two")
				u.wantSent(1, "192.0.2.1:5000 two")
				u.reply(1, "192.0.2.1:5000", "yes")
				u.want([]string{"192.0.2.1:5000 yes"}, nil)
				// One that breaks as soon as it is made is not made again for every datagram.
				u.assoc(1).fail(fmt.Errorf("%w: gone", ErrUpstream))
				synctest.Wait()
				for range 5 {
					u.send("192.0.2.1:5000", "x")
				}
				if u.made() != 2 {
					t.Errorf("%d associations, want 2", u.made())
				}
				if _, refused := u.sink.take(); len(refused) != 5 {
					t.Errorf("%d refused, want 5", len(refused))
				}
				<-time.After(refusedFor)
				u.send("192.0.2.1:5000", "three")
				u.wantSent(2, "192.0.2.1:5000 three")
			})
		})
	}
}

// An error about one datagram is that one's alone.
func TestUDPDatagramErrors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := startUDP(t, nil).run()
		u.send("192.0.2.1:5000", "first")
		u.assoc(0).writeErr = func(d Datagram) error {
			switch {
			case len(d.Buf) > 65497:
				return fmt.Errorf("too large: %w", unix.EMSGSIZE)
			case d.Addr.Port == 6:
				return ErrNetUnreachable
			}
			return nil
		}
		big := strings.Repeat("b", 65507)
		u.in.mu.Lock() // one batch
		for _, d := range []struct{ to, payload string }{{"192.0.2.1:5000", "a"}, {"192.0.2.1:5000", big}, {"192.0.2.1:5000", "c"}, {"192.0.2.1:6", "d"}} {
			u.in.ds = append(u.in.ds, Datagram{AddrFrom(netip.MustParseAddrPort(d.to)), []byte(d.payload)})
		}
		u.in.cond.Broadcast()
		u.in.mu.Unlock()
		synctest.Wait()
		u.wantSent(0, "192.0.2.1:5000 first", "192.0.2.1:5000 a", "192.0.2.1:5000 c")
		u.want(nil, []string{"192.0.2.1:5000 " + big + " prohibited", "192.0.2.1:6 d net_unreachable"})
		if u.made() != 1 || u.table.Stats().Dropped["too_large"] != 1 {
			t.Errorf("%d associations, %v", u.made(), u.table.Stats().Dropped)
		}
	})
}

func TestUDPLargestDatagram(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := startUDP(t, nil).run()
		big := strings.Repeat("x", 65507)
		u.send("192.0.2.1:5000", "small")
		u.send("192.0.2.1:5000", big)
		u.wantSent(0, "192.0.2.1:5000 small", "192.0.2.1:5000 "+big)
		u.reply(0, "192.0.2.1:5000", big)
		u.want([]string{"192.0.2.1:5000 " + big}, nil)
	})
}

// A name behind a fake IP is resolved; replies come from the fake IP. Two names with one address are kept apart.
func TestUDPFakeIPResolved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		real4, real6 := netip.MustParseAddr("192.0.2.80"), netip.MustParseAddr("2001:db8::80")
		a, b := netip.MustParseAddr("198.18.0.1"), netip.MustParseAddr("198.18.0.2")
		n := &names{
			fake: map[netip.Addr]string{a: "a.example", b: "b.example"},
			real: map[string][]netip.Addr{"a.example": {real6, real4}, "b.example": {real4}},
		}
		u := startUDP(t, n).run()
		u.send("198.18.0.1:443", "to a")
		u.send("198.18.0.2:443", "to b")
		u.send("198.18.0.1:443", "to a again")
		u.wantSent(0, "192.0.2.80:443 to a", "192.0.2.80:443 to a again")
		u.wantSent(1, "192.0.2.80:443 to b")
		u.reply(0, "192.0.2.80:443", "from a")
		u.reply(1, "192.0.2.80:443", "from b")
		u.want([]string{"198.18.0.1:443 from a", "198.18.0.2:443 from b"}, nil)
		if s := u.table.Snapshot(); s[0].Dst.Host != "a.example" || n.holds(a) != 1 {
			t.Errorf("%+v, held %d times", s, n.holds(a))
		}
		<-u.done
		if n.holds(a) != 0 || n.holds(b) != 0 {
			t.Error("still held")
		}
	})
}

// Without servers the name is sent, and replies are given to the name that has waited longest on the port.
func TestUDPFakeIPNamesSent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &names{fake: map[netip.Addr]string{
			netip.MustParseAddr("198.18.0.1"): "a.example", netip.MustParseAddr("198.18.0.2"): "b.example", netip.MustParseAddr("198.18.0.3"): "c.example",
		}}
		u := startUDP(t, n).run()
		u.send("198.18.0.1:443", "to a")
		u.send("198.18.0.2:443", "to b")
		u.send("198.18.0.3:8443", "to c")
		u.send("192.0.2.7:443", "to an address")
		u.wantSent(0, "a.example:443 to a", "b.example:443 to b", "c.example:8443 to c", "192.0.2.7:443 to an address")
		u.reply(0, "192.0.2.7:443", "an address")
		u.reply(0, "192.0.2.50:443", "a")
		u.reply(0, "192.0.2.51:443", "b")
		u.reply(0, "192.0.2.50:443", "a again")
		u.reply(0, "192.0.2.52:443", "stranger")
		u.reply(0, "192.0.2.53:8443", "c")
		u.want([]string{
			"192.0.2.7:443 an address", "198.18.0.1:443 a", "198.18.0.2:443 b", "198.18.0.1:443 a again",
			"192.0.2.52:443 stranger", "198.18.0.3:8443 c",
		}, nil)
	})
}

func TestUDPFakeIPWithoutServersOrNames(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := startUDP(t, &names{fake: map[netip.Addr]string{fakeAddr.Addr(): "example.com"}})
		u.via.names = false
		u.run()
		u.send(fakeAddr.String(), "x")
		u.want(nil, []string{fakeAddr.String() + " x host_unreachable"})
	})
}

// A reply that names its sender is the name's; one from nowhere, or of another family, is nobody's.
func TestUDPRepliesOfAllKinds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := startUDP(t, &names{fake: map[netip.Addr]string{fakeAddr.Addr(): "example.com"}}).run()
		u.send(fakeAddr.String(), "x")
		a := u.assoc(0)
		a.push(Addr{Host: "example.com", Port: 443}, "by name")
		a.push(Addr{Host: "other.example", Port: 443}, "by other name")
		a.push(Addr{IP: netip.MustParseAddr("2001:db8::1"), Port: 9}, "v6 stranger")
		a.push(Addr{IP: netip.MustParseAddr("::ffff:192.0.2.9"), Port: 9}, "mapped stranger")
		synctest.Wait()
		u.want([]string{fakeAddr.String() + " by name", "192.0.2.9:9 mapped stranger"}, nil)
		if n := u.table.Stats().Dropped["bad_source"]; n != 2 {
			t.Errorf("%d counted, want 2", n)
		}
	})
}

func TestUDPDNS(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		block := make(chan struct{})
		n := &names{exchange: func(_ context.Context, f *Flow, q []byte) ([]byte, error) {
			switch string(q) {
			case "junk":
				return nil, errors.New("not dns")
			case "slow":
				<-block
			}
			return []byte(f.Network.String() + ":" + string(q)), nil
		}}
		u := startUDP(t, n)
		u.SetDecider(always(Resolve, nil))
		u.run()
		begin := time.Now()
		u.send("127.0.0.53:53", "query")
		u.send("127.0.0.53:53", "junk")
		u.want([]string{"127.0.0.53:53 udp:query"}, nil)
		for range maxPipelined + 3 {
			u.send("127.0.0.53:53", "slow")
		}
		u.want(nil, nil)
		close(block)
		synctest.Wait()
		if got, _ := u.sink.take(); len(got) != maxPipelined {
			t.Errorf("%d answers, want %d", len(got), maxPipelined)
		}
		if d := u.table.Stats().Dropped; d["dns_busy"] != 3 || d["not_dns"] != 1 {
			t.Error(d)
		}
		<-u.done
		if took := time.Since(begin); took != idleDNS {
			t.Errorf("ended after %v", took)
		}
		if line := u.line(t); line["upstream"] != "dns" || line["result"] != ResultOK {
			t.Error(line)
		}
	})
}

func TestUDPReload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := startUDP(t, nil).run()
		u.send("192.0.2.1:5000", "one")
		u.send("192.0.2.2:5000", "one")
		// Still allowed, even through another upstream: the flow lives on where it is.
		other := &dialer{name: "other", listen: u.via.listen}
		u.SetDecider(always(Forward, other))
		u.send("192.0.2.1:5000", "two")
		u.wantSent(0, "192.0.2.1:5000 one", "192.0.2.2:5000 one", "192.0.2.1:5000 two")
		u.send("192.0.2.3:5000", "new")
		u.wantSent(1, "192.0.2.3:5000 new")
		// Blocked: what the table does not find is found by the next datagram.
		u.SetDecider(always(Block, nil))
		u.send("192.0.2.1:5000", "three")
		u.want(nil, []string{"192.0.2.1:5000 three refused"})
		if n := u.table.KillIf(func(i *Info) bool { return i.Upstream != "reject" }); n != 2 {
			t.Errorf("killed %d, want 2", n)
		}
		if !u.assoc(0).isClosed() || !u.assoc(1).isClosed() {
			t.Error("associations without flows are open")
		}
		u.send("192.0.2.2:5000", "x")
		u.want(nil, []string{"192.0.2.2:5000 x refused"})
	})
}

func TestUDPKill(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := startUDP(t, nil).run()
		u.send("192.0.2.1:5000", "one")
		u.table.Kill(u.table.Snapshot()[0].ID)
		if line := u.line(t); line["result"] != ResultKilled || !u.assoc(0).isClosed() {
			t.Errorf("%v, closed %v", line, u.assoc(0).isClosed())
		}
		u.send("192.0.2.1:5000", "two")
		u.wantSent(1, "192.0.2.1:5000 two")
	})
}

func TestUDPShutdown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := startUDP(t, &names{exchange: func(ctx context.Context, _ *Flow, _ []byte) ([]byte, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}})
		never := &dialer{name: "never", listen: func(ctx context.Context, _ *Flow) (PacketConn, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}}
		u.SetDecider(decider{decide: func(f *Flow) Decision {
			switch f.Orig.Port() {
			case 53:
				return Decision{Action: Resolve}
			case 1:
				return Decision{Action: Forward, Via: never}
			}
			return Decision{Action: Forward, Via: u.via}
		}})
		u.run()
		u.send("192.0.2.1:5000", "x")
		u.send("192.0.2.1:53", "x")
		u.send("192.0.2.1:1", "x")
		u.Close()
		<-u.done
		for _, l := range u.logs.All() {
			if r := l.ContextMap()["result"]; r != ResultShutdown {
				t.Errorf("result %v: %v", r, l.ContextMap())
			}
		}
		if len(u.logs.All()) != 3 || len(u.rec.errors) != 0 {
			t.Errorf("%d lines, upstream blamed: %v", len(u.logs.All()), u.rec.errors)
		}
		u.UDP(t.Context(), appAddr, u.in, u.sink) // returns at once
	})
}

func TestUDPPeersAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := startUDP(t, nil)
		u.table.cfg.MaxFlows = 2 * maxPeers
		u.run()
		for i := range maxPeers + 10 {
			u.in.push(Addr{IP: netip.AddrFrom4([4]byte{192, 0, byte(i >> 8), byte(i)}), Port: 5000}, "x")
		}
		synctest.Wait()
		if n := u.table.Len(); n != maxPeers {
			t.Errorf("%d flows, want %d", n, maxPeers)
		}
		if st := u.table.Stats(); st.Results[ResultKey{UDP, "up", ResultEvicted}] != 10 {
			t.Errorf("%v", st.Results)
		}
	})
}

// The table's own bound ends flows of the socket that is asking for more.
func TestUDPTableFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := startUDP(t, nil)
		u.table.cfg.MaxFlows = 3
		u.run()
		for i := range 10 {
			u.send(fmt.Sprintf("192.0.2.%d:5000", i), "x")
			<-time.After(time.Second)
		}
		if u.table.Len() != 3 || u.table.Stats().Evicted != 7 || u.made() != 1 {
			t.Errorf("%d flows, %d evicted, %d associations", u.table.Len(), u.table.Stats().Evicted, u.made())
		}
	})
}

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
