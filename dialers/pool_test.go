// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/flow"
)

func fails(err error) func(context.Context, flow.Addr) error {
	return func(context.Context, flow.Addr) error { return fmt.Errorf("x: %w", err) }
}

// hangs is a destination, or an upstream, that does not answer.
func hangs(ctx context.Context, _ flow.Addr) error {
	<-ctx.Done()
	return context.Cause(ctx)
}

// after answers after a while.
func after(d time.Duration, err error) func(context.Context, flow.Addr) error {
	return func(ctx context.Context, _ flow.Addr) error {
		select {
		case <-time.After(d):
			return err
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

func pool(t *testing.T, strategy string, cfg PoolConfig, members ...*fakeDialer) *Pool {
	t.Helper()
	var ds []flow.Dialer
	for _, m := range members {
		ds = append(ds, m)
	}
	p, err := NewPool("eu", strategy, ds, cfg)
	if err != nil {
		t.Fatal(err)
	}
	return p.(*Pool)
}

func members(n int) []*fakeDialer {
	var out []*fakeDialer
	for i := range n {
		out = append(out, &fakeDialer{name: fmt.Sprint("m", i)})
	}
	return out
}

// dials makes flows through a pool and says who carried them.
func dials(t *testing.T, p flow.Dialer, n int) string {
	t.Helper()
	var who []string
	for range n {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		c, err := p.Dial(ctx, flow.Addr{Host: "a", Port: 1})
		cancel()
		if err != nil {
			who = append(who, flow.ReasonOf(err).String())
			continue
		}
		who = append(who, c.(*fakeConn).from)
	}
	return strings.Join(who, " ")
}

func TestPoolStrategies(t *testing.T) {
	m := members(3)
	if got := dials(t, pool(t, RoundRobin, PoolConfig{}, m...), 7); got != "m0 m1 m2 m0 m1 m2 m0" {
		t.Error(got)
	}
	if got := dials(t, pool(t, Failover, PoolConfig{}, m...), 3); got != "m0 m0 m0" {
		t.Error(got)
	}
	if got := dials(t, pool(t, "", PoolConfig{}, m...), 2); got != "m0 m1" {
		t.Error(got)
	}
	if _, err := NewPool("eu", "nonsense", []flow.Dialer{m[0]}, PoolConfig{}); err == nil {
		t.Error("a strategy that is not there")
	}
	if _, err := NewPool("eu", RoundRobin, nil, PoolConfig{}); err == nil {
		t.Error("no members")
	}
}

func TestPoolRetry(t *testing.T) {
	for _, tt := range []struct {
		name string
		errs []error // of m0, m1, ...; nil works
		cfg  PoolConfig
		want string
		asks string
	}{
		{"the second works", []error{flow.ErrUpstream, nil, nil}, PoolConfig{}, "m1", "1 1 0"},
		{"the third works", []error{flow.ErrUpstream, flow.ErrHostUnreachable, nil}, PoolConfig{}, "m2", "1 1 1"},
		{"bounded", []error{flow.ErrUpstream, flow.ErrUpstream, flow.ErrUpstream, nil}, PoolConfig{}, "host_unreachable", "1 1 1 0"},
		{"more", []error{flow.ErrUpstream, flow.ErrUpstream, flow.ErrUpstream, nil}, PoolConfig{Retry: 9}, "m3", "1 1 1 1"},
		{"off", []error{flow.ErrUpstream, nil}, PoolConfig{Retry: -1}, "host_unreachable", "1 0"},
		{"a refusal is the truth", []error{flow.ErrRefused, nil}, PoolConfig{}, "refused", "1 0"},
		{"no IPv6 here", []error{flow.ErrNetUnreachable, nil}, PoolConfig{}, "m1", "1 1"},
		{"not allowed here", []error{flow.ErrProhibited, nil}, PoolConfig{}, "m1", "1 1"},
		{"what one that works says counts", []error{flow.ErrUpstream, flow.ErrNetUnreachable, flow.ErrUpstream}, PoolConfig{}, "net_unreachable", "1 1 1"},
		{"a time-out", []error{flow.ErrTimeout, flow.ErrTimeout}, PoolConfig{}, "timeout", "1 1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := members(len(tt.errs))
			for i, err := range tt.errs {
				if err != nil {
					m[i].dial = fails(err)
				}
			}
			if got := dials(t, pool(t, Failover, tt.cfg, m...), 1); got != tt.want {
				t.Errorf("%s, want %s", got, tt.want)
			}
			var asks []string
			for _, d := range m {
				asks = append(asks, fmt.Sprint(len(d.log())))
			}
			if got := strings.Join(asks, " "); got != tt.asks {
				t.Errorf("asked %s, want %s", got, tt.asks)
			}
		})
	}
}

func TestPoolErrorNamesAll(t *testing.T) {
	m := members(2)
	m[0].dial, m[1].dial = fails(errors.New("first")), fails(flow.ErrUpstream)
	_, err := pool(t, Failover, PoolConfig{}, m...).Dial(testContext(t), flow.Addr{})
	if err == nil || err.Error() != "pool eu: 2 of 2 members failed: x: first; x: upstream failed" || errors.Is(err, flow.ErrUpstream) {
		t.Error(err)
	}
}

// A member that does not answer gets company after its share of the time, and may still win.
func TestPoolStagger(t *testing.T) {
	for _, tt := range []struct {
		name string
		dial []func(context.Context, flow.Addr) error
		cfg  PoolConfig
		want string
		took time.Duration
	}{
		{"hangs", []func(context.Context, flow.Addr) error{hangs, nil}, PoolConfig{}, "m1", 3 * time.Second},
		{"two hang", []func(context.Context, flow.Addr) error{hangs, hangs, nil}, PoolConfig{}, "m2", 6 * time.Second},
		{"slow but first", []func(context.Context, flow.Addr) error{after(4*time.Second, nil), hangs}, PoolConfig{}, "m0", 4 * time.Second},
		{"hedge", []func(context.Context, flow.Addr) error{after(4*time.Second, nil), after(time.Second, nil)}, PoolConfig{Hedge: 300 * time.Millisecond}, "m1", 1300 * time.Millisecond},
		{"all hang", []func(context.Context, flow.Addr) error{hangs, hangs, hangs}, PoolConfig{}, "timeout", 10 * time.Second},
		{"a failure starts the next at once", []func(context.Context, flow.Addr) error{after(time.Second, flow.ErrUpstream), nil}, PoolConfig{}, "m1", time.Second},
		{"a late refusal ends it", []func(context.Context, flow.Addr) error{after(4*time.Second, flow.ErrRefused), after(5*time.Second, flow.ErrRefused)}, PoolConfig{}, "refused", 8 * time.Second},
		{"both win", []func(context.Context, flow.Addr) error{after(4*time.Second, nil), after(time.Second, nil)}, PoolConfig{}, "", 4 * time.Second},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := members(len(tt.dial))
				for i, f := range tt.dial {
					m[i].dial = f
				}
				begin := time.Now()
				got := dials(t, pool(t, Failover, tt.cfg, m...), 1)
				if got != tt.want && tt.want != "" || time.Since(begin) != tt.took {
					t.Errorf("%s after %v, want %s after %v", got, time.Since(begin), tt.want, tt.took)
				}
			})
		})
	}
}

func TestPoolCancel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := members(3)
		for _, d := range m {
			d.dial = hangs
		}
		p := pool(t, Failover, PoolConfig{}, m...)
		ctx, cancel := context.WithCancelCause(t.Context())
		gone := errors.New("gone")
		time.AfterFunc(time.Second, func() { cancel(gone) })
		if _, err := p.Dial(ctx, flow.Addr{}); !errors.Is(err, gone) {
			t.Error(err)
		}
		if p.members[0].conditions[byTCP].faults.Load() != 0 {
			t.Error("a caller that gave up was held against the member")
		}
	})
}

func TestPoolEjects(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		core, logs := observer.New(zap.InfoLevel)
		m := members(2)
		m[0].dial = fails(flow.ErrUpstream)
		p := pool(t, Failover, PoolConfig{Log: zap.New(core)}, m...)
		for i, want := range []int{1, 2, 3, 3, 3} {
			if got := dials(t, p, 1); got != "m1" {
				t.Error(got)
			}
			if got := len(m[0].log()); got != want {
				t.Errorf("flow %d: the dead member was asked %d times, want %d", i, got, want)
			}
		}
		if st := p.Members(); st[0].Up || !st[1].Up || !p.Status().Up {
			t.Errorf("%+v", st)
		}
		<-time.After(30 * time.Second)
		dials(t, p, 3)
		if got := len(m[0].log()); got != 4 {
			t.Errorf("after its time it was asked %d times, want once more", got-3)
		}
		<-time.After(30 * time.Second)
		dials(t, p, 1)
		if got := len(m[0].log()); got != 4 {
			t.Error("the back-off has not grown")
		}
		m[0].dial = nil
		<-time.After(30 * time.Second)
		if got := dials(t, p, 3); got != "m0 m1 m1" { // it has answered once; that is not enough to rely on it
			t.Errorf("back: %s", got)
		}
		<-time.After(probeTime)
		if got := dials(t, p, 2); got != "m0 m1" {
			t.Errorf("looked after: %s", got)
		}
		m[0].dial = fails(flow.ErrUpstream)
		<-time.After(probeTime)
		dials(t, p, 1)
		m[0].dial = nil
		<-time.After(defaultEject - time.Second)
		if got := dials(t, p, 3); got != "m0 m1 m1" {
			t.Errorf("a failure does not begin the while again: %s", got)
		}
		<-time.After(2 * time.Second)
		if got := dials(t, p, 2); got != "m0 m0" {
			t.Errorf("settled: %s", got)
		}
		var said []string
		for _, e := range logs.All() {
			said = append(said, e.Message)
		}
		if !slices.Equal(said, []string{"upstream ejected", "upstream is back"}) {
			t.Error(said)
		}
	})
}

// That this machine has too many files open is no member's fault.
func TestPoolOutOfDescriptors(t *testing.T) {
	m := members(2)
	m[0].dial = fails(fmt.Errorf("%w: %w", flow.ErrUpstream, unix.EMFILE))
	m[1].dial = m[0].dial
	p := pool(t, Failover, PoolConfig{}, m...)
	dials(t, p, 10)
	if st := p.Members(); !st[0].Up || !st[1].Up {
		t.Errorf("%+v", st)
	}
}

// Members that are all out are asked all the same: the first that is back carries the next flow.
func TestPoolAllEjected(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := members(3)
		for _, d := range m {
			d.dial = fails(flow.ErrUpstream)
		}
		p := pool(t, RoundRobin, PoolConfig{}, m...)
		dials(t, p, 50)
		if p.Status().Up {
			t.Error("up")
		}
		for _, mm := range p.members {
			if left := time.Until(time.Unix(0, mm.conditions[byTCP].ejectedUntil.Load())); left > defaultEject {
				t.Errorf("flows that had no choice prolonged the ejection to %v", left)
			}
		}
		m[1].dial = nil
		if got := dials(t, p, 3); got != "m1 m1 m1" {
			t.Error(got)
		}
	})
}

func TestPoolSuspectsSilence(t *testing.T) {
	m := members(2)
	m[0].dial = fails(flow.ErrTimeout)
	p := pool(t, Failover, PoolConfig{}, m...)
	dials(t, p, 10)
	if got := len(m[0].log()); got != 2*defaultFailures {
		t.Errorf("asked %d times, want %d", got, 2*defaultFailures)
	}
}

func TestPoolUDP(t *testing.T) {
	for _, tt := range []struct {
		name string
		errs []error
		want error
		asks []int
	}{
		{"first", []error{nil, nil}, nil, []int{1, 0}},
		{"the last of many that can", []error{errors.ErrUnsupported, errors.ErrUnsupported, errors.ErrUnsupported, errors.ErrUnsupported, nil}, nil, []int{1, 1, 1, 1, 1}},
		{"none can", []error{errors.ErrUnsupported, errors.ErrUnsupported}, errors.ErrUnsupported, []int{1, 1}},
		{"down or cannot", []error{flow.ErrUpstream, errors.ErrUnsupported}, errors.ErrUnsupported, []int{1, 1}},
		{"bounded", []error{flow.ErrUpstream, flow.ErrUpstream, flow.ErrUpstream, nil}, flow.ErrUpstream, []int{1, 1, 1, 0}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := members(len(tt.errs))
			for i, err := range tt.errs {
				if m[i].pcErr = err; err == nil {
					m[i].pc = newFakePackets()
				}
			}
			p := pool(t, Failover, PoolConfig{}, m...)
			pc, err := p.ListenPacket(testContext(t), nil)
			if !errors.Is(err, tt.want) || err == nil && pc == nil {
				t.Error(err)
			}
			for i, want := range tt.asks {
				if got := len(m[i].log()); got != want {
					t.Errorf("m%d asked %d times, want %d", i, got, want)
				}
			}
			if p.members[0].conditions[byTCP].faults.Load() > 0 && errors.Is(tt.errs[0], errors.ErrUnsupported) {
				t.Error("no UDP was held against a member")
			}
		})
	}
}

// The views of two contexts share health and turns, each with its own names; members that take names are sent them.
func TestPoolWithNames(t *testing.T) {
	m := &fakeDialer{name: "m0"}
	h := dialer(t, "http://127.0.0.1:1")
	p, err := NewPool("eu", Failover, []flow.Dialer{m, h}, PoolConfig{})
	if err != nil {
		t.Fatal(err)
	}
	one := WithNames(p, &fakeNames{hosts: map[string][]netip.Addr{"a": addrs("192.0.2.1")}})
	two := WithNames(p, &fakeNames{hosts: map[string][]netip.Addr{"a": addrs("192.0.2.2")}})
	dials(t, one, 1)
	dials(t, two, 1)
	if got := m.log(); !slices.Equal(got, []string{"192.0.2.1:1 a", "192.0.2.2:1 a"}) {
		t.Errorf("%q", got)
	}
	if one.(*Pool).poolState != p.(*Pool).poolState || one.(*Pool).via[1] != h {
		t.Error("not shared")
	}
}

func TestPoolStatus(t *testing.T) {
	a, b := dialer(t, "socks5://127.0.0.1:1?udp=off").(*SOCKS5), dialer(t, "socks5h://127.0.0.1:1").(*SOCKS5)
	a.total.Store(3)
	b.total.Store(4)
	a.latency.Store(int64(time.Second))
	b.latency.Store(int64(time.Millisecond))
	a.auth.are("password")
	b.auth.are("none")
	inner, err := NewPool("inner", "", []flow.Dialer{b}, PoolConfig{})
	if err != nil {
		t.Fatal(err)
	}
	p, err := NewPool("eu", "", []flow.Dialer{a, inner}, PoolConfig{})
	if err != nil {
		t.Fatal(err)
	}
	want := Status{Name: "eu", URL: "pool:round-robin", Up: true, Latency: time.Millisecond, Total: 7, UDP: unknown, IPv6: unknown, RemoteDNS: yes, Bind: unknown, Auth: "none password"}
	if got := StatusOf(p); got != want {
		t.Errorf("%+v", got)
	}
}

func TestCapability(t *testing.T) {
	now := time.Unix(1000, 0)
	c := capability{now: func() time.Time { return now }}
	check := func(allowed bool, s string) {
		t.Helper()
		if c.allowed() != allowed || c.String() != s {
			t.Errorf("allowed %v, %s; want %v, %s", !allowed, c.String(), allowed, s)
		}
	}
	check(true, unknown)
	c.doubt()
	c.doubt()
	check(true, unknown)
	c.can()
	c.doubt()
	c.doubt()
	check(true, yes)
	c.doubt()
	check(false, no)
	if !c.denied() {
		t.Error("not denied")
	}
	now = now.Add(relearn)
	check(true, no)
	check(false, no)
	c.can()
	check(true, yes)
	c.cannot()
	check(false, no)
}

// TestPoolNoticesHanging: a member that hangs is set aside without active checks too, though each flow is saved by another member. One that is
// merely slower than a hedge is not.
func TestPoolNoticesHanging(t *testing.T) {
	for _, tt := range []struct {
		name  string
		first func(context.Context, flow.Addr) error
		cfg   PoolConfig
		asked int // of 20 flows
	}{
		{"hangs", hangs, PoolConfig{}, 2 * defaultFailures},
		{"slower than the hedge", after(200*time.Millisecond, nil), PoolConfig{Hedge: 50 * time.Millisecond}, 20},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := members(2)
				m[0].dial = tt.first
				dials(t, pool(t, Failover, tt.cfg, m...), 20)
				synctest.Wait()
				if got := len(m[0].log()); got != tt.asked {
					t.Errorf("asked %d times, want %d", got, tt.asked)
				}
			})
		})
	}
}
