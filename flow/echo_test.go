// SPDX-License-Identifier: GPL-3.0-or-later

package flow

import (
	"context"
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

var pinger, pinged = netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("192.0.2.1")

// knocker is a dialer that notes what it was asked for and answers by port.
type knocker struct {
	mu     sync.Mutex
	asked  []string
	answer map[uint16]func(context.Context) error // nil = open
}

func (k *knocker) dialer() *dialer {
	return &dialer{name: "up", dial: func(ctx context.Context, a Addr) (Conn, error) {
		k.mu.Lock()
		k.asked = append(k.asked, a.String())
		k.mu.Unlock()
		if f := k.answer[a.Port]; f != nil {
			if err := f(ctx); err != nil {
				return nil, err
			}
		}
		c, _ := memPipe()
		return c, nil
	}}
}

func (k *knocker) count() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.asked)
}

func giving(err error) func(context.Context) error { return func(context.Context) error { return err } }

func silence(ctx context.Context) error {
	<-ctx.Done()
	return ctx.Err()
}

func TestEcho(t *testing.T) {
	for name, c := range map[string]struct {
		answer map[uint16]func(context.Context) error
		alive  bool
		reason Reason
		asked  []string
		took   time.Duration
	}{
		"open":                  {nil, true, 0, []string{"192.0.2.1:443"}, 0},
		"refused":               {map[uint16]func(context.Context) error{443: giving(ErrRefused)}, true, 0, []string{"192.0.2.1:443"}, 0},
		"80 only":               {map[uint16]func(context.Context) error{443: silence}, true, 0, []string{"192.0.2.1:443", "192.0.2.1:80"}, 5 * time.Second},
		"silent":                {map[uint16]func(context.Context) error{443: silence, 80: silence}, false, ReasonTimeout, []string{"192.0.2.1:443", "192.0.2.1:80"}, 10 * time.Second},
		"no route":              {map[uint16]func(context.Context) error{443: giving(ErrNetUnreachable), 80: giving(ErrNetUnreachable)}, false, ReasonNetUnreachable, []string{"192.0.2.1:443", "192.0.2.1:80"}, 0},
		"proxy down":            {map[uint16]func(context.Context) error{443: giving(fmt.Errorf("%w: %w", ErrUpstream, ErrRefused))}, false, ReasonHostUnreachable, []string{"192.0.2.1:443"}, 0},
		"prohibited, 80 is not": {map[uint16]func(context.Context) error{443: giving(ErrProhibited)}, true, 0, []string{"192.0.2.1:443", "192.0.2.1:80"}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, nil)
				k := &knocker{answer: c.answer}
				r.SetDecider(always(Forward, k.dialer()))
				begin := time.Now()
				alive, reason := r.Echo(t.Context(), pinger, pinged)
				if alive != c.alive || reason != c.reason || time.Since(begin) != c.took {
					t.Errorf("%v, %v after %v", alive, reason, time.Since(begin))
				}
				if d := cmp.Diff(c.asked, k.asked); d != "" {
					t.Error(d)
				}
				line := r.line(t)
				if line["network"] != "icmp" || line["upstream"] != "up" || (line["result"] == ResultOK) != c.alive {
					t.Error(line)
				}
				// Again: the same answer, from memory, and no flow.
				if again, rr := r.Echo(t.Context(), pinger, pinged); again != alive || rr != reason || k.count() != len(c.asked) || len(r.logs.All()) != 1 {
					t.Errorf("again: %v, %v, %d dials", again, rr, k.count())
				}
				<-time.After(echoFresh)
				r.Echo(t.Context(), pinger, pinged)
				if k.count() != 2*len(c.asked) {
					t.Errorf("stale after %v: %d dials", echoFresh, k.count())
				}
			})
		})
	}
}

func TestEchoModesAndRules(t *testing.T) {
	for name, c := range map[string]struct {
		mode    ICMPMode
		decider Decider
		reason  Reason
	}{
		"drop mode":   {ICMPDrop, nil, ReasonDrop},
		"reject mode": {ICMPReject, nil, ReasonProhibited},
		"no rules":    {ICMPHonest, nil, ReasonProhibited},
		"block":       {ICMPHonest, always(Block, nil), ReasonProhibited},
		"drop":        {ICMPHonest, always(Drop, nil), ReasonDrop},
		"resolve":     {ICMPHonest, always(Resolve, nil), ReasonProhibited},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, func(h *HandlerConfig, _ *TableConfig) { h.Tuning.ICMP = c.mode })
			if c.decider != nil {
				r.SetDecider(c.decider)
			}
			if alive, reason := r.Echo(t.Context(), pinger, pinged); alive || reason != c.reason {
				t.Errorf("%v, %v, want %v", alive, reason, c.reason)
			}
		})
	}
}

func TestEchoFakeIP(t *testing.T) {
	n := &names{fake: map[netip.Addr]string{fakeAddr.Addr(): "example.com"}}
	r := newRig(t, func(h *HandlerConfig, _ *TableConfig) { h.Names = n })
	k := &knocker{}
	r.SetDecider(always(Forward, k.dialer()))
	if alive, _ := r.Echo(t.Context(), pinger, fakeAddr.Addr()); !alive || k.asked[0] != "example.com:443" || n.holds(fakeAddr.Addr()) != 0 {
		t.Errorf("%v, asked %v", alive, k.asked)
	}
	if alive, reason := r.Echo(t.Context(), pinger, netip.MustParseAddr("198.18.9.9")); alive || reason != ReasonHostUnreachable {
		t.Errorf("unmapped: %v, %v", alive, reason)
	}
}

// Requests for one destination share a probe; those for others are not held up.
func TestEchoMerged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, nil)
		k := &knocker{answer: map[uint16]func(context.Context) error{443: func(ctx context.Context) error {
			select {
			case <-time.After(time.Second):
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		}}}
		r.SetDecider(always(Forward, k.dialer()))
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() {
				if alive, _ := r.Echo(t.Context(), pinger, pinged); !alive {
					t.Error("not alive")
				}
			})
		}
		wg.Go(func() { r.Echo(t.Context(), pinger, netip.MustParseAddr("192.0.2.2")) })
		begin := time.Now()
		wg.Wait()
		if k.count() != 2 || time.Since(begin) != time.Second {
			t.Errorf("%d dials in %v, want 2 in 1s", k.count(), time.Since(begin))
		}
	})
}

func TestEchoRateIsLimited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, func(_ *HandlerConfig, c *TableConfig) { c.MaxFlows = 1000 })
		k := &knocker{}
		r.SetDecider(always(Forward, k.dialer()))
		begin := time.Now()
		var wg sync.WaitGroup
		for i := range probeBurst + 3*probesPerSecond {
			wg.Go(func() { r.Echo(t.Context(), pinger, netip.AddrFrom4([4]byte{192, 0, 2, byte(i)})) })
		}
		wg.Wait()
		if took := time.Since(begin).Round(time.Millisecond); took != 3*time.Second || k.count() != probeBurst+3*probesPerSecond {
			t.Errorf("%d probes in %v", k.count(), took)
		}
		if len(r.rec.errors) != 0 {
			t.Errorf("upstream blamed: %v", r.rec.errors)
		}
	})
}

func TestEchoCacheIsBounded(t *testing.T) {
	c := newEchoCache()
	now := time.Now()
	key := func(i int) echoKey { return echoKey{dst: netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)})} }
	for i := range maxEchoes {
		p, mine := c.get(key(i), now)
		if p == nil || !mine {
			t.Fatalf("%d: %v, %v", i, p, mine)
		}
		if i >= maxEchoes/2 {
			p.expiry = now.Add(time.Duration(i) * time.Millisecond)
			close(p.done)
		}
	}
	// The oldest answer makes room; probes under way do not.
	for i := range maxEchoes {
		p, _ := c.get(key(maxEchoes+i), now.Add(-time.Hour))
		if got := p != nil; got != (i < maxEchoes/2) {
			t.Fatalf("%d more: %v", i, got)
		}
	}
	if len(c.m) != maxEchoes {
		t.Errorf("%d remembered", len(c.m))
	}
}

func TestEchoShutdown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, nil)
		k := &knocker{answer: map[uint16]func(context.Context) error{443: silence}}
		r.SetDecider(always(Forward, k.dialer()))
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				if alive, _ := r.Echo(t.Context(), pinger, pinged); alive {
					t.Error("alive")
				}
			})
		}
		synctest.Wait()
		r.Close()
		wg.Wait()
		if line := r.line(t); line["result"] != ResultShutdown {
			t.Error(line)
		}
		if alive, _ := r.Echo(t.Context(), pinger, pinged); alive {
			t.Error("alive after Close")
		}
	})
}
