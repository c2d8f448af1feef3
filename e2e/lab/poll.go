// SPDX-License-Identifier: GPL-3.0-or-later

package lab

import (
	"testing"
	"time"
)

// pollInterval is how often a condition is looked at: far below any deadline used here, far above the cost of a look.
const pollInterval = 5 * time.Millisecond

// Patience is how long a test waits for what the program does by itself, without being asked.
const Patience = 5 * time.Second

// Poll looks at cond until it holds or the deadline has passed, and reports which. It is the one place of the tests where time passes
// without an event: what other programs do (a server that starts, a device that vanishes) often announces itself in no other way.
func Poll(d time.Duration, cond func() bool) bool {
	deadline := time.NewTimer(d)
	defer deadline.Stop()
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for {
		if cond() {
			return true
		}
		select {
		case <-deadline.C:
			return cond()
		case <-tick.C:
		}
	}
}

// Eventually fails the test at once when cond does not come to hold within d.
func Eventually(t *testing.T, d time.Duration, what string, cond func() bool) {
	t.Helper()
	if !Poll(d, cond) {
		t.Fatalf("not within %v: %s", d, what)
	}
}

// Never fails the test when cond holds at any look during d.
func Never(t *testing.T, d time.Duration, what string, cond func() bool) {
	t.Helper()
	if Poll(d, cond) {
		t.Errorf("happened within %v: %s", d, what)
	}
}
