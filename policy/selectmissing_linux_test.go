// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"regexp"
	"testing"
	"time"
)

// TestSelectAnyOneMissing: with processes selected by BPF no single one of nft, rules, routes is what their capture hangs on. What a stranger removes is
// put back within a second and counted, and what they send all the while never leaves; nor does it when nobody is there to put it back.
func TestSelectAnyOneMissing(t *testing.T) {
	counts := regexp.MustCompile(`packets \d+ bytes \d+`)
	for name, tt := range map[string]struct {
		remove string
		object string
		guard  bool // the guard is still there, which holds in who binds a socket to the uplink
	}{
		"nft":    {"nft flush ruleset", "nft", false},
		"rules":  {"ip rule flush proto 77; ip -6 rule flush proto 77", "rule", true},
		"routes": {"for t in 19760 19920; do ip route flush table $t; ip -6 route flush table $t; done", "route", true},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t)
			l.marking = MarkingBPF
			l.selected(func(c *ContextSpec) { c.Strict, c.Select = true, []Selector{{UIDs: []uint32{4001}}} })
			h := l.as(l.outside(), 4001, 100)
			state := func(s string) string { return counts.ReplaceAllString(s, "") }
			whole := state(l.state())
			l.farSeen.reset()
			stop, sent := make(chan struct{}), make(chan int)
			go func() {
				n := 0
				for ; ; n++ {
					select {
					case <-stop:
						sent <- n
						return
					default:
						h.do("udp %s 6001", remote4)
						h.do("tcp %s 6002", remote6)
						h.do("udp 10.9.0.53 53")
					}
				}
			}()
			for range 3 {
				was, start := l.m.Stats().Restored[tt.object], time.Now()
				l.sh(tt.remove)
				l.awaitState(func(s string) bool { return state(s) == whole })
				if d := time.Since(start); d > time.Second {
					t.Errorf("put back after %s", d)
				}
				if l.m.Stats().Restored[tt.object] == was {
					t.Error("not counted")
				}
			}
			close(stop)
			if n := <-sent; n < 10 {
				t.Errorf("sent %d times only", n)
			}
			l.marker()
			for _, p := range []string{"> 198.51.100.1:6001", "> 2001:db8:ff::1:6002", "> 10.9.0.53:53"} {
				if l.farSeen.has(p) {
					t.Errorf("leaked: %s", p)
				}
			}
			l.mustBeCaptured(h)
			l.die()
			l.sh(tt.remove)
			captured, escapes, _ := plainWays(h)
			l.noLeaks(captured)
			if tt.guard {
				l.noLeaks(escapes)
			}
		})
	}
}
