// SPDX-License-Identifier: GPL-3.0-or-later

package flow

import (
	"context"
	"errors"
	"io"
	"math"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// limited is a table with limits and a clock that the returned function moves on.
func limited(l Limits) (*Table, func(time.Duration)) {
	now := time.Unix(1_700_000_000, 0)
	t := NewTable(TableConfig{Now: func() time.Time { return now }})
	t.SetLimits(l)
	return t, func(d time.Duration) { now = now.Add(d) }
}

func TestNewFlowsLimited(t *testing.T) {
	table, pass := limited(Limits{NewFlows: 3})
	begun := func() (n int) {
		for range 10 {
			e, err := table.add(&Flow{}, func(error) {})
			if err == nil {
				n++
				e.finish()
			} else if !errors.Is(err, ErrRate) {
				t.Fatal(err)
			}
		}
		return n
	}
	if n := begun(); n != 3 {
		t.Errorf("%d flows at once, want 3", n)
	}
	pass(time.Second / 3)
	table.SetLimits(Limits{NewFlows: 3}) // the same again gives nothing away
	if n := begun(); n != 1 {
		t.Errorf("%d flows after a third of a second, want 1", n)
	}
	if n := table.Stats().Dropped["rate"]; n != 16 {
		t.Errorf("%d counted, want 16", n)
	}
	table.SetLimits(Limits{})
	if n := begun(); n != 10 {
		t.Errorf("%d flows without a limit", n)
	}
}

func TestDatagramsLimited(t *testing.T) {
	const size, bandwidth = 1000, 100_000
	table, pass := limited(Limits{Bandwidth: bandwidth})
	passed := map[bool]int{}
	send := func() {
		for range 100 {
			for _, upload := range []bool{true, false} {
				if table.passes(upload, size) {
					passed[upload] += size
				}
			}
		}
	}
	send()
	const most = bandwidth/limitBurst + bandwidth/4 // limitDebt
	for upload, n := range passed {
		if n > most || n < most-size {
			t.Errorf("upload %t: %d bytes at once, want %d", upload, n, most)
		}
	}
	clear(passed)
	pass(time.Second / 10)
	send()
	for upload, n := range passed {
		if n != bandwidth/10 {
			t.Errorf("upload %t: %d bytes in a tenth of a second", upload, n)
		}
	}
	pass(time.Hour)
	if !table.passes(true, 65_507) {
		t.Error("a datagram larger than a burst never passes")
	}
}

// TestBandwidthShared: connections share each direction evenly, and the directions nothing.
func TestBandwidthShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const bandwidth, size = 1 << 20, 2 << 20
		table := NewTable(TableConfig{})
		table.SetLimits(Limits{Bandwidth: bandwidth})
		took := map[bool][]time.Duration{}
		var mu sync.Mutex
		var running sync.WaitGroup
		begin := time.Now()
		for _, upload := range []bool{true, true, false} {
			e := mustAdd(t, table, func(error) {})
			r := &relaying{e: e, buffers: newBufferPool(), pacing: t.Context()}
			running.Go(func() {
				defer e.finish()
				if err := r.copy(io.Discard, io.LimitReader(&repeater{left: math.MaxInt}, size), upload); err != nil {
					t.Error(err)
				}
				mu.Lock()
				defer mu.Unlock()
				took[upload] = append(took[upload], time.Since(begin))
			})
		}
		running.Wait()
		for upload, want := range map[bool]time.Duration{true: 4 * time.Second, false: 2 * time.Second} {
			for _, d := range took[upload] {
				if d < want*9/10 || d > want*11/10 {
					t.Errorf("upload %t: took %v, want about %v", upload, d, want)
				}
			}
		}
	})
}

// TestBandwidthAbort: a flow that ends does not wait for its turn, and one whose limit has gone goes on.
func TestBandwidthAbort(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		table := NewTable(TableConfig{})
		table.SetLimits(Limits{Bandwidth: 1})
		e := mustAdd(t, table, func(error) {})
		defer e.finish()
		ctx, end := context.WithCancelCause(t.Context())
		ended := make(chan error, 1)
		r := &relaying{e: e, buffers: newBufferPool(), pacing: ctx}
		begin := time.Now()
		go func() { ended <- r.copy(io.Discard, &repeater{left: math.MaxInt}, true) }()
		synctest.Wait()
		end(ErrKilled)
		if err := <-ended; !errors.Is(err, ErrKilled) || time.Since(begin) > 0 {
			t.Errorf("%v after %v", err, time.Since(begin))
		}
		table.SetLimits(Limits{})
		r.pacing = t.Context()
		if err := r.copy(io.Discard, io.LimitReader(&repeater{left: math.MaxInt}, 1<<30), true); err != nil || time.Since(begin) > 0 {
			t.Errorf("without a limit: %v after %v", err, time.Since(begin))
		}
	})
}
