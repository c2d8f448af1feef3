// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"context"
	"fmt"
	"net/netip"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/mutex-proxy/mutex/flow"
)

// weighty is a member with a weight, a priority and a load.
type weighty struct {
	fakeDialer
	stats
	spec Spec
}

func (w *weighty) Spec() Spec { return w.spec }

func weighties(n int, set func(i int, w *weighty)) ([]flow.Dialer, []*weighty) {
	var ds []flow.Dialer
	var ws []*weighty
	for i := range n {
		w := &weighty{fakeDialer: fakeDialer{name: fmt.Sprint("m", i)}}
		set(i, w)
		ds, ws = append(ds, w), append(ws, w)
	}
	return ds, ws
}

func strategyPool(t *testing.T, strategy string, ds []flow.Dialer) *Pool {
	t.Helper()
	p, err := NewPool("eu", strategy, ds, PoolConfig{})
	if err != nil {
		t.Fatal(err)
	}
	return p.(*Pool)
}

func TestWeighted(t *testing.T) {
	for _, tt := range []struct {
		weights []int
		want    string
	}{
		{[]int{5, 1, 1}, "0010200"}, // nginx's example: a a b a c a a
		{[]int{1, 1}, "01"},
		{[]int{0, 0, 0}, "012"},
		{[]int{300, 100}, "0010"},
	} {
		ds, _ := weighties(len(tt.weights), func(i int, w *weighty) { w.spec.Weight = tt.weights[i] })
		var got strings.Builder
		for _, i := range strategyPool(t, Weighted, ds).turns {
			fmt.Fprint(&got, i)
		}
		if got.String() != tt.want {
			t.Errorf("%v: %s, want %s", tt.weights, got.String(), tt.want)
		}
	}
	ds, _ := weighties(3, func(i int, w *weighty) { w.spec.Weight = []int{1_000_000, 999_999, 1}[i] })
	if n := len(strategyPool(t, Weighted, ds).turns); n > maxSchedule+3 || n < maxSchedule/2 {
		t.Errorf("%d turns", n)
	}
	// A member that is out leaves its turns to the next.
	ds, ws := weighties(2, func(i int, w *weighty) { w.spec.Weight = 1 + i })
	ws[1].dial = fails(flow.ErrUpstream)
	if got := dials(t, strategyPool(t, Weighted, ds), 5); got != "m0 m0 m0 m0 m0" {
		t.Error(got)
	}
}

func TestPriority(t *testing.T) {
	ds, ws := weighties(4, func(i int, w *weighty) { w.spec.Priority = []int{2, 1, 0, 1}[i] })
	p := strategyPool(t, Failover, ds)
	if got := dials(t, p, 2); got != "m2 m2" {
		t.Error(got)
	}
	ws[2].dial = fails(flow.ErrUpstream)
	ws[1].dial = fails(flow.ErrUpstream)
	if got := dials(t, p, 2); got != "m3 m3" {
		t.Error(got)
	}
}

func TestLeastConnections(t *testing.T) {
	ds, ws := weighties(3, func(i int, w *weighty) {
		w.spec.Weight = []int{1, 4, 1}[i]
		w.active.Store([]int64{2, 7, 3}[i]) // 2, 1.75, 3 a unit of weight
	})
	p := strategyPool(t, LeastConnections, ds)
	if got := dials(t, p, 3); got != "m1 m1 m1" {
		t.Error(got)
	}
	ws[1].active.Store(9)
	if got := dials(t, p, 3); got != "m0 m0 m0" {
		t.Error(got)
	}
	ws[0].dial = fails(flow.ErrUpstream)
	if got := dials(t, p, 1); got != "m1" {
		t.Error(got)
	}
}

func TestLeastLatency(t *testing.T) {
	ds, ws := weighties(3, func(i int, w *weighty) { w.latency.Store([]int64{30, 10, 20}[i] * int64(time.Millisecond)) })
	p := strategyPool(t, LeastLatency, ds)
	if got := dials(t, p, 2); got != "m1 m1" {
		t.Error(got)
	}
	ws[1].active.Store(2) // 30 ms by its load
	if got := dials(t, p, 1); got != "m2" {
		t.Error(got)
	}
	ws[0].latency.Store(0) // not known: find out
	if got := dials(t, p, 1); got != "m0" {
		t.Error(got)
	}
}

// Of two at random the less loaded: the most loaded member of all is chosen only when both picks are it.
func TestRandom(t *testing.T) {
	const members, flows = 4, 4000
	ds, ws := weighties(members, func(int, *weighty) {})
	ws[0].active.Store(1000)
	p := strategyPool(t, Random, ds)
	for range flows {
		if _, err := p.Dial(t.Context(), flow.Addr{}); err != nil {
			t.Fatal(err)
		}
	}
	// Both picks are it in 1 of 16: 250 of 4000, standard deviation 15.
	if got := len(ws[0].log()); got < 150 || got > 350 {
		t.Errorf("the loaded member got %d of %d flows", got, flows)
	}
	for _, w := range ws[1:] {
		if got := len(w.log()); got < 1000 || got > 1500 {
			t.Errorf("%s got %d of %d flows", w.name, got, flows)
		}
	}
}

// A flow finds the one member that works, whatever the strategy.
func TestStrategiesFindTheLiving(t *testing.T) {
	for _, s := range strategies() {
		ds, ws := weighties(5, func(_ int, w *weighty) { w.dial = fails(flow.ErrUpstream) })
		ws[3].dial = nil
		d, err := NewPool("eu", s, ds, PoolConfig{Retry: 4})
		if err != nil {
			t.Fatal(err)
		}
		for range 50 {
			if _, err := d.Dial(t.Context(), flow.Addr{Host: "a"}); err != nil {
				t.Fatalf("%s: %v", s, err)
			}
		}
		for i, w := range ws {
			if got := len(w.log()); i != 3 && got > defaultFailures {
				t.Errorf("%s: dead member %d was asked %d times", s, i, got)
			}
		}
	}
	if _, err := NewPool("eu", "", make([]flow.Dialer, maxMembers+1), PoolConfig{}); err == nil {
		t.Error("too many members")
	}
}

// TestPickAllocs: choosing a member and noting how it went costs no memory, whatever the strategy.
func TestPickAllocs(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	for _, s := range strategies() {
		ds, _ := weighties(1000, func(i int, w *weighty) { w.spec.Weight = 1 + i%3 })
		d, err := NewPool("eu", s, ds, PoolConfig{})
		if err != nil {
			t.Fatal(err)
		}
		p := d.(*Pool)
		dst := flow.Addr{Host: "www.example.com", Port: 443}
		if n := testing.AllocsPerRun(1000, func() {
			p.note(context.Background(), byTCP, p.choose(byTCP, p.key(netip.Addr{}, &dst), nil), nil)
		}); n != 0 {
			t.Errorf("%s: %v allocations", s, n)
		}
	}
}

func BenchmarkPick(b *testing.B) {
	for _, s := range strategies() {
		for _, n := range []int{1, 8, 1000} {
			b.Run(fmt.Sprintf("%s/%d", s, n), func(b *testing.B) {
				ds, _ := weighties(n, func(i int, w *weighty) { w.spec.Weight = 1 + i%3 })
				d, err := NewPool("eu", s, ds, PoolConfig{})
				if err != nil {
					b.Fatal(err)
				}
				p := d.(*Pool)
				dst := flow.Addr{Host: "www.example.com", Port: 443}
				b.ReportAllocs()
				b.SetParallelism(max(1, 64/runtime.GOMAXPROCS(0)))
				b.RunParallel(func(pb *testing.PB) {
					for pb.Next() {
						p.note(context.Background(), byTCP, p.choose(byTCP, p.key(netip.Addr{}, &dst), nil), nil)
					}
				})
			})
		}
	}
}
