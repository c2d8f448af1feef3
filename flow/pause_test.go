// SPDX-License-Identifier: GPL-3.0-or-later

package flow

import (
	"testing"
	"time"
)

// TestPause: after a pause in which others had the processor for long there is none for a while.
func TestPause(t *testing.T) {
	var p Pause
	now := time.Now()
	if p.after(now, pauseLong); p.resting(now) {
		t.Error("a short pause is followed by a rest")
	}
	if p.after(now, pauseLong+1); !p.resting(now) || p.resting(now.Add(pauseRest)) {
		t.Errorf("after a long pause, at %v, it rests until %v", now, p.rest)
	}
	rest := p.rest
	if p.Take(); p.rest != rest {
		t.Error("it did not rest")
	}
}
