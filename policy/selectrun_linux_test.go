// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"context"
	"fmt"
	"testing"
)

// foreignWays are ways with the mark of a context that this instance does not have. TCP is marked again, UDP at the price of its first datagram.
func foreignWays(h *helper, m uint32) (captured, escapes []way) {
	name := func(s string) string { return fmt.Sprintf("%s with mark %#x", s, m) }
	captured = []way{
		h.way(name("tcp4"), "> 198.51.100.1:6501", "tcp %s 6501 %d", remote4, m), h.way(name("tcp6"), "> 2001:db8:ff::1:6502", "tcp %s 6502 %d", remote6, m),
	}
	escapes = []way{
		h.way(name("udp4"), "> 198.51.100.1:6503", "udp %s 6503 %d", remote4, m), h.way(name("udp6"), "> 2001:db8:ff::1:6504", "udp %s 6504 %d", remote6, m),
		h.way(name("bound tcp4"), "> 198.51.100.1:6505", "tcp %s 6505 %d c0", remote4, m), h.way(name("bound tcp6"), "> 2001:db8:ff::1:6506", "tcp %s 6506 %d c0", remote6, m),
		h.way(name("bound udp4"), "> 198.51.100.1:6507", "udp %s 6507 %d c0", remote4, m), h.way(name("bound udp6"), "> 2001:db8:ff::1:6508", "udp %s 6508 %d c0", remote6, m),
	}
	return captured, escapes
}

// TestSelectForeignMark: a process does not get out by a mark among those of contexts that nobody has a rule for.
func TestSelectForeignMark(t *testing.T) {
	l := newLab(t)
	l.marking = MarkingBPF
	l.selected(func(c *ContextSpec) { c.Select = []Selector{{UIDs: []uint32{0}}} })
	h := l.spawn(l.outside())
	for _, slot := range []int{1, 2, 31, MaxContexts - 1} {
		captured, escapes := foreignWays(h, ContextMark(DefaultMask, slot))
		l.mustCapture(captured)
		l.noLeaks(escapes)
	}
}

// TestSelectBesideRun: what an `mprox run` with an engine of its own has started is that one's, also for a daemon that selects it, and through its changes;
// the same mark is of no use to others, before and after.
func TestSelectBesideRun(t *testing.T) {
	l := newLab(t)
	l.marking = MarkingBPF
	_, spec := l.selected(func(c *ContextSpec) { c.Select = []Selector{{UIDs: []uint32{0}}} })
	daemon, seen, tun := l.m, l.tunSeen, l.tun
	l.m, l.tunSeen = NewManager(Config{Host: l.host, LockDir: l.dir}), newSeen()
	run, cg := l.run("run-1", "mprox-r1")
	mr, seenRun := l.m, l.tunSeen
	t.Cleanup(func() { _ = mr.Close(context.Background(), StopOpen) })
	l.m, l.tunSeen, l.tun = daemon, seen, tun

	other, in := l.spawn(l.outside()), l.spawn(cg.FD())
	mark := ContextMark(DefaultMask, run.Contexts[0].Slot)
	mustBeApart := func() {
		t.Helper()
		l.tunSeen = seenRun
		in.wantMark(fmt.Sprintf("%#x", mark))
		captured, _, _ := plainWays(in)
		l.mustCapture(captured)
		if seen.has(":600") {
			t.Errorf("the daemon has got what is the run's: %v", seen.list())
		}
		l.tunSeen = seen
		captured, escapes := foreignWays(other, mark)
		l.mustCapture(captured)
		l.noLeaks(escapes)
		if seenRun.has(":650") {
			t.Errorf("the run has got what is the daemon's: %v", seenRun.list())
		}
	}
	mustBeApart()
	in.must("open")
	spec.Contexts[0].Select = append(spec.Contexts[0].Select, Selector{GIDs: []uint32{4001}})
	if err := l.m.Apply(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	in.must("again %s 6009", remote4) // a socket that is older than the set of programs
	seenRun.await(t, "> 198.51.100.1:6009")
	mustBeApart()
	in.stop()
}
