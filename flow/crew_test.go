// SPDX-License-Identifier: GPL-3.0-or-later

package flow

import (
	"sync"
	"sync/atomic"
	"testing"
)

// TestCrew: every job is run, goroutines are used again, and close waits for jobs and ends them.
func TestCrew(t *testing.T) {
	var c crew
	var done atomic.Int64
	var wg sync.WaitGroup
	for range 50 {
		wg.Add(200)
		for range 200 {
			go c.run(func() {
				defer wg.Done()
				done.Add(1)
			})
		}
		wg.Wait()
	}
	if done.Load() != 10_000 {
		t.Errorf("%d jobs were run", done.Load())
	}
	c.mu.Lock()
	idle := len(c.idle)
	c.mu.Unlock()
	if idle > maxIdleCrew {
		t.Errorf("%d goroutines wait for more", idle)
	}
	hold := make(chan struct{})
	c.run(func() { <-hold; done.Add(1) })
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		c.close()
	}()
	select {
	case <-closed:
		t.Error("close did not wait for a job")
	default:
	}
	close(hold)
	<-closed
	if done.Load() != 10_001 {
		t.Error("a job was lost")
	}
}

func BenchmarkCrew(b *testing.B) {
	var c crew
	defer c.close()
	done := make(chan struct{})
	job := func() { done <- struct{}{} }
	b.ReportAllocs()
	for b.Loop() {
		c.run(job)
		<-done
	}
}
