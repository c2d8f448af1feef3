// SPDX-License-Identifier: GPL-3.0-or-later

package flow

import "sync"

// maxIdleCrew bounds the goroutines that wait for work: more than run at a time on a machine that is busy, few enough not to matter on one
// that is not.
const maxIdleCrew = 64

// crew runs short jobs in goroutines that it keeps: a fresh one would begin with a small stack, and copy it several times on its way down
// through netstack. How many run at a time is bounded by those who give the jobs, one a flow.
type crew struct {
	wg     sync.WaitGroup
	mu     sync.Mutex
	idle   []chan func() // each a waiting goroutine's; the last one came last, and is warm
	closed bool
}

// run has f run by another goroutine. It does not block, and may be called with locks held.
func (c *crew) run(f func()) {
	c.mu.Lock()
	if n := len(c.idle); n > 0 {
		job := c.idle[n-1]
		c.idle = c.idle[:n-1]
		c.mu.Unlock()
		job <- f // there is room: it was idle
		return
	}
	c.mu.Unlock()
	c.wg.Go(func() { c.work(f) })
}

func (c *crew) work(f func()) {
	job := make(chan func(), 1)
	for f != nil {
		f()
		c.mu.Lock()
		if c.closed || len(c.idle) >= maxIdleCrew {
			c.mu.Unlock()
			return
		}
		c.idle = append(c.idle, job)
		c.mu.Unlock()
		f = <-job
	}
}

// close ends the goroutines and waits for them. Jobs that are still given are run.
func (c *crew) close() {
	c.mu.Lock()
	c.closed = true
	for _, job := range c.idle {
		job <- nil
	}
	c.idle = nil
	c.mu.Unlock()
	c.wg.Wait()
}
