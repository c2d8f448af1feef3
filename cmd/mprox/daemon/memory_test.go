// SPDX-License-Identifier: GPL-3.0-or-later

package daemon

import "testing"

func TestMemoryKeeper(t *testing.T) {
	const mb = 1 << 20
	type look struct {
		allocated, alive uint64 // MB
		want             bool
	}
	for name, looks := range map[string][]look{
		"nothing happens":              {{5, 4, false}, {5, 4, false}, {6, 4, false}},
		"a burst that goes on":         {{100, 50, false}, {200, 50, false}, {300, 50, false}},
		"after a burst, twice":         {{100, 50, false}, {101, 50, true}, {101, 20, false}, {102, 20, false}, {102, 20, true}, {102, 20, false}, {103, 20, false}},
		"a trickle, now and then":      {{10, 5, false}, {11, 5, false}, {15, 5, false}, {16, 5, true}, {17, 5, false}},
		"little beside much alive":     {{30, 400, false}, {31, 400, false}},
		"each burst":                   {{50, 9, false}, {50, 9, true}, {100, 9, false}, {100, 9, true}},
		"the start counts as a burst ": {{20, 8, false}, {20, 8, true}},
	} {
		t.Run(name, func(t *testing.T) {
			var k memoryKeeper
			for i, l := range looks {
				if got := k.due(l.allocated*mb, l.alive*mb); got != l.want {
					t.Errorf("look %d: %v", i, got)
				}
			}
		})
	}
}
