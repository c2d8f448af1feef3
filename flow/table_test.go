// SPDX-License-Identifier: GPL-3.0-or-later

package flow

import (
	"errors"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// tableClock is a clock that a test moves.
type tableClock struct{ now atomic.Int64 }

func (c *tableClock) Now() time.Time { return time.Unix(0, c.now.Load()) }
func (c *tableClock) tick()          { c.now.Add(1) }

func mustAdd(t *testing.T, tb *Table, kill func(error)) *entry {
	t.Helper()
	f := &Flow{Network: TCP, Src: appAddr, Orig: webAddr, Start: tb.cfg.Now()}
	e, err := tb.add(f, kill)
	if err != nil {
		t.Fatal(err)
	}
	e.decide(f, Decision{Action: Forward, Via: failing(nil), Rule: "default"})
	return e
}

// The flow that a full table ends is compared with what an obvious search says, under random traffic.
func TestTableEvictsExactlyTheLongestIdle(t *testing.T) {
	for seed := range uint64(20) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		clock := &tableClock{}
		const size = 300
		tb := NewTable(TableConfig{MaxFlows: size, Now: clock.Now})
		last := make(map[uint64]int64) // the model
		entries := make(map[uint64]*entry)
		evicted := 0
		for range 5000 {
			clock.tick()
			switch k := rnd.IntN(10); {
			case k < 4:
				e := mustAdd(t, tb, func(err error) {
					if !errors.Is(err, ErrEvicted) {
						t.Errorf("killed for %v", err)
					}
				})
				var want uint64
				if len(last) == size {
					for id, l := range last {
						if want == 0 || l < last[want] {
							want = id
						}
					}
				}
				last[e.id], entries[e.id] = clock.now.Load(), e
				if want != 0 {
					evicted++
					if !entries[want].killed.Load() {
						t.Fatalf("seed %d: flow %d, longest idle since %d, was not ended", seed, want, last[want])
					}
					entries[want].finish()
					delete(last, want)
					delete(entries, want)
				}
			case k < 9:
				for id := range last {
					if rnd.IntN(2) == 0 {
						entries[id].up.Add(1)
					} else {
						entries[id].down.Add(1)
					}
					last[id] = clock.now.Load()
					break
				}
			default:
				for id, e := range entries {
					e.finish()
					delete(last, id)
					delete(entries, id)
					break
				}
			}
			if tb.Len() != len(last) {
				t.Fatalf("seed %d: Len %d, want %d", seed, tb.Len(), len(last))
			}
		}
		if evicted == 0 || tb.Stats().Evicted != uint64(evicted) {
			t.Fatalf("seed %d: %d evicted, counted %d", seed, evicted, tb.Stats().Evicted)
		}
	}
}

func TestTableFullOfEndingFlows(t *testing.T) {
	tb := NewTable(TableConfig{MaxFlows: 2})
	a := mustAdd(t, tb, func(error) {})
	mustAdd(t, tb, func(error) {})
	mustAdd(t, tb, func(error) {}) // takes a's slot; a has not ended yet
	if !a.killed.Load() || tb.Len() != 2 || len(tb.Snapshot()) != 3 {
		t.Fatalf("killed %v, Len %d, Snapshot %d", a.killed.Load(), tb.Len(), len(tb.Snapshot()))
	}
	a.finish()
	a.finish()
	if tb.Len() != 2 {
		t.Fatalf("Len %d after finish, want 2: a slot was given back twice", tb.Len())
	}
}

func TestTableKill(t *testing.T) {
	tb := NewTable(TableConfig{})
	var cause error
	e := mustAdd(t, tb, func(err error) { cause = err })
	if tb.Kill(e.id+1) || !tb.Kill(e.id) || !errors.Is(cause, ErrKilled) {
		t.Fatalf("cause %v", cause)
	}
	cause = nil
	if tb.Kill(e.id); cause != nil {
		t.Fatal("killed twice")
	}
	if s := tb.Snapshot(); len(s) != 1 || s[0].State != StateClosing {
		t.Fatalf("%+v", s)
	}
	e.outcome(ResultReset, ErrKilled)
	e.finish()
	if tb.Kill(e.id) {
		t.Fatal("killed after its end")
	}
	want := map[ResultKey]uint64{{TCP, "up", ResultKilled}: 1}
	if d := cmp.Diff(want, tb.Stats().Results); d != "" {
		t.Error(d)
	}
}

func TestTableKillIf(t *testing.T) {
	tb := NewTable(TableConfig{})
	var killed []uint64
	for range 5 {
		var e *entry
		e = mustAdd(t, tb, func(err error) {
			if !errors.Is(err, ErrRules) {
				t.Error(err)
			}
			killed = append(killed, e.id)
		})
	}
	undecided, err := tb.add(&Flow{Network: TCP}, func(error) { t.Error("an undecided flow was killed") })
	if err != nil {
		t.Fatal(err)
	}
	if n := tb.KillIf(ErrRules, func(i *Info) bool { return i.ID%2 == 1 }); n != 3 {
		t.Errorf("killed %d, want 3", n)
	}
	slices.Sort(killed)
	if d := cmp.Diff([]uint64{1, 3, 5}, killed); d != "" {
		t.Error(d)
	}
	undecided.finish()
}

// Totals include what runs, and do not go back when it ends.
func TestTableStatsSurviveFlows(t *testing.T) {
	tb := NewTable(TableConfig{})
	e := mustAdd(t, tb, func(error) {})
	e.up.Add(10)
	e.down.Add(20)
	st := tb.Stats()
	want := UpstreamStats{Active: 1, Flows: 1, BytesUp: 10, BytesDown: 20}
	if d := cmp.Diff(want, st.Upstreams["up"]); d != "" || st.Active[TCP] != 1 || st.BytesUp != 10 {
		t.Errorf("while it runs: %s %+v", d, st)
	}
	e.finish()
	st = tb.Stats()
	want.Active = 0
	if d := cmp.Diff(want, st.Upstreams["up"]); d != "" || st.Active[TCP] != 0 || st.BytesDown != 20 || st.Flows != 1 {
		t.Errorf("after its end: %s %+v", d, st)
	}
}

func TestTableIDsAreShared(t *testing.T) {
	var ids atomic.Uint64
	a, b := NewTable(TableConfig{IDs: &ids}), NewTable(TableConfig{IDs: &ids})
	x, y := mustAdd(t, a, func(error) {}), mustAdd(t, b, func(error) {})
	if x.id == 0 || y.id != x.id+1 {
		t.Errorf("IDs %d and %d", x.id, y.id)
	}
}

func TestWatch(t *testing.T) {
	tb := NewTable(TableConfig{})
	w, slow := tb.Watch(8), tb.Watch(1)
	e := mustAdd(t, tb, func(error) {})
	e.up.Add(7)
	e.outcome(ResultReset, errors.New("broken"))
	e.finish()
	if ev := <-w.C; ev.Type != FlowStarted || ev.Info.ID != e.id || ev.Info.State != StateEstablishing {
		t.Errorf("first event %+v", ev)
	}
	if ev := <-w.C; ev.Type != FlowEnded || ev.Result != ResultReset || ev.Info.BytesUp != 7 || ev.Info.Err != "broken" || ev.Info.End.IsZero() {
		t.Errorf("second event %+v", ev)
	}
	if slow.Dropped() != 1 || tb.Stats().Missed != 1 || tb.Stats().Watchers != 2 {
		t.Errorf("dropped %d, %+v", slow.Dropped(), tb.Stats())
	}
	w.Close()
	w.Close()
	if _, ok := <-w.C; ok {
		t.Error("C not closed")
	}
	slow.Close()
	mustAdd(t, tb, func(error) {}).finish()
	if n := tb.Stats().Watchers; n != 0 {
		t.Errorf("%d watchers left", n)
	}
}

func TestErrorTextIsBounded(t *testing.T) {
	tb := NewTable(TableConfig{})
	w := tb.Watch(2)
	defer w.Close()
	e := mustAdd(t, tb, func(error) {})
	e.outcome(ResultFailed, errors.New(string(make([]byte, 10*maxErr))))
	e.finish()
	<-w.C
	if ev := <-w.C; len(ev.Info.Err) != maxErr {
		t.Errorf("%d bytes kept", len(ev.Info.Err))
	}
}

func TestCounterWithoutTable(t *testing.T) {
	var c Counter
	c.Add(3)
	c.Add(4)
	if c.Load() != 7 {
		t.Error(c.Load())
	}
}

// Adding to a counter is on the path of every byte.
func TestCounterDoesNotAllocate(t *testing.T) {
	tb := NewTable(TableConfig{})
	e := mustAdd(t, tb, func(error) {})
	if n := testing.AllocsPerRun(100, func() { e.up.Add(1) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func TestTableConcurrent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tb := NewTable(TableConfig{MaxFlows: 50})
		w := tb.Watch(1)
		defer w.Close()
		for range 8 {
			go func() {
				for range 500 {
					done := make(chan struct{}, 1)
					f := &Flow{Network: TCP}
					e, err := tb.add(f, func(error) { done <- struct{}{} })
					if err != nil {
						continue
					}
					e.decide(f, Decision{})
					e.up.Add(1)
					if e.id%3 == 0 {
						tb.Kill(e.id)
						<-done
					}
					e.finish()
				}
			}()
		}
		for range 100 {
			if tb.Len() > 50 {
				t.Error("more flows than slots")
			}
			tb.Snapshot()
			tb.Stats()
		}
		synctest.Wait()
		if tb.Len() != 0 || len(tb.entries()) != 0 {
			t.Errorf("%d slots, %d entries left", tb.Len(), len(tb.entries()))
		}
	})
}

// Every flow that a full table takes ends another.
func BenchmarkTableFull(b *testing.B) {
	tb := NewTable(TableConfig{})
	add := func() {
		f := &Flow{Network: TCP}
		var e *entry
		e, err := tb.add(f, func(error) { e.finish() })
		if err != nil {
			b.Fatal(err)
		}
		e.decide(f, Decision{})
	}
	for range DefaultMaxFlows {
		add()
	}
	b.ReportAllocs()
	for b.Loop() {
		add()
	}
}
