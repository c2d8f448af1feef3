// SPDX-License-Identifier: GPL-3.0-or-later

package daemon

import (
	"slices"
	"testing"
)

func TestMemoryKeeper(t *testing.T) {
	const mb = 1 << 20
	type look struct {
		allocated, alive uint64 // MB
		want             bool
	}
	quiet := func(n int) []look { return slices.Repeat([]look{{102, 20, false}}, n) }
	for name, looks := range map[string][]look{
		"nothing happens":              {{5, 4, false}, {5, 4, false}, {6, 4, false}},
		"a burst that goes on":         {{100, 50, false}, {200, 50, false}, {300, 50, false}},
		"after a burst, twice":         slices.Concat([]look{{100, 50, false}, {101, 50, true}}, quiet(memoryAgain-1), []look{{102, 20, true}}, quiet(2*memoryAgain)),
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

func TestProgramMaps(t *testing.T) {
	maps := "00400000-00cdb000 r-xp 00000000 fd:00 1234                       /usr/bin/my prox\n" +
		"00cdb000-016cd000 r--p 008db000 fd:00 1234                       /usr/bin/my prox\n" +
		"016cd000-01746000 rw-p 012cd000 fd:00 1234                       /usr/bin/my prox\n" +
		"01800000-01900000 r--s 00000000 fd:00 1234                       /usr/bin/my prox\n" +
		"7fd226300000-7fd226301000 r--p 00000000 fd:00 9                  /usr/lib/prox\n" +
		"c000000000-c000400000 rw-p 00000000 00:00 0\n" +
		"garbage r--p 0 0 0 /usr/bin/my prox\n\nr--p\n"
	got := programMaps(maps, "/usr/bin/my prox")
	want := []mapping{{0x400000, 0xcdb000}, {0xcdb000, 0x16cd000}}
	if !slices.Equal(got, want) {
		t.Errorf("%x, want %x", got, want)
	}
}
