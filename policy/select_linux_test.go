// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"fmt"
	"net"
	"os"
	"path"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// selected goes all the way for a context of selected processes.
func (l *lab) selected(change func(*ContextSpec)) (before string, spec Spec) {
	l.t.Helper()
	before = l.start()
	spec = l.spec(ModeProcess)
	change(&spec.Contexts[0])
	l.enforce(&spec)
	return before, spec
}

// cgroup makes a cgroup of the machine that has nothing to do with us.
func (l *lab) cgroup(p string) int {
	l.t.Helper()
	if _, err := l.host.MakeCgroup(p); err != nil {
		l.t.Fatal(err)
	}
	fd, err := l.host.OpenCgroup(p)
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() {
		unix.Close(fd)
		l.await("cgroup is empty", func() bool { return l.host.RemoveCgroup(p) == nil })
	})
	return fd
}

// eachMarking runs a test with BPF, and with nftables alone.
func eachMarking(t *testing.T, f func(*testing.T, *lab)) {
	t.Helper()
	for _, m := range []Marking{MarkingBPF, MarkingNFT} {
		t.Run(string(m), func(t *testing.T) {
			l := newLab(t)
			l.marking = m
			f(t, l)
		})
	}
}

// as is a helper that has become somebody else.
func (l *lab) as(cgroup, uid, gid int) *helper {
	l.t.Helper()
	h := l.spawn(cgroup)
	if s := h.do("user %d %d", uid, gid); s != "ok" {
		l.t.Fatal(s)
	}
	return h
}

// plainWays are what a process without any capability can do.
func plainWays(h *helper) (captured, escapes, direct []way) {
	captured = []way{
		h.way("udp4", "> 198.51.100.1:6001", "udp %s 6001", remote4), h.way("udp6", "> 2001:db8:ff::1:6002", "udp %s 6002", remote6),
		h.way("tcp4", "> 198.51.100.1:6003", "tcp %s 6003", remote4), h.way("tcp6", "> 2001:db8:ff::1:6004", "tcp %s 6004", remote6),
		h.way("fake", "> 198.18.0.9:6005", "tcp 198.18.0.9 6005"),
	}
	escapes = []way{
		h.way("bound udp4", "> 198.51.100.1:6101", "udp %s 6101 0 c0", remote4), h.way("bound udp6", "> 2001:db8:ff::1:6102", "udp %s 6102 0 c0", remote6),
		h.way("bound tcp6", "> 2001:db8:ff::1:6103", "tcp %s 6103 0 c0", remote6), h.way("dns", "> 10.9.0.53:53", "udp 10.9.0.53 53"),
		h.way("dns 6", "> fd09::53:53", "tcp fd09::53 53"), h.way("bound dns", "> 10.9.0.53:53", "udp 10.9.0.53 53 0 c0"),
	}
	direct = []way{h.way("LAN", "> 10.9.0.1:6200", "udp %s 6200", lan4), h.way("LAN 6", "> fd09::1:6201", "tcp %s 6201", lan6)}
	return captured, escapes, direct
}

func (l *lab) mustBeCaptured(h *helper) {
	l.t.Helper()
	captured, escapes, direct := plainWays(h)
	l.mustCapture(captured)
	l.noLeaks(escapes)
	l.mustPass(direct)
}

func (l *lab) mustBeFree(h *helper) {
	l.t.Helper()
	captured, escapes, direct := plainWays(h)
	l.mustPass(captured)
	l.mustPass(escapes)
	l.mustPass(direct)
}

func (l *lab) mustBeBlocked(h *helper) {
	l.t.Helper()
	captured, escapes, direct := plainWays(h)
	l.noLeaks(captured)
	l.noLeaks(escapes)
	l.mustPass(direct)
}

// TestSelectUser: by user, by group, by both; nobody else; and nothing gets out once the daemon is dead.
func TestSelectUser(t *testing.T) {
	eachMarking(t, selectUser)
}

func selectUser(t *testing.T, l *lab) {
	t.Helper()
	before, _ := l.selected(func(c *ContextSpec) {
		c.Select = []Selector{{UIDs: []uint32{4001, 4002}}, {GIDs: []uint32{5001}}, {UIDs: []uint32{4003}, GIDs: []uint32{5003}}}
		c.Exclude = []Selector{{UIDs: []uint32{4002}, GIDs: []uint32{5009}}}
	})
	out := l.outside()
	in := []*helper{l.as(out, 4001, 100), l.as(out, 4002, 100), l.as(out, 4009, 5001), l.as(out, 4003, 5003)}
	free := []*helper{l.as(out, 4009, 100), l.as(out, 4003, 100), l.as(out, 4009, 5003), l.as(out, 4002, 5009), l.spawn(out)}
	for _, h := range in {
		l.mustBeCaptured(h)
	}
	for _, h := range free {
		l.mustBeFree(h)
	}
	// Who comes in is answered the way they came.
	if s := in[0].do("listen 6300"); s != "ok" {
		t.Fatal(s)
	}
	l.inFar(func() {
		for _, addr := range []string{"10.9.0.2:6300", "[2001:db8:9::2]:6300"} {
			c, err := net.DialTimeout("tcp", addr, 3*time.Second)
			if err != nil {
				t.Error(err)
				continue
			}
			c.Close()
		}
	})
	l.die()
	for _, h := range in {
		l.mustBeBlocked(h)
	}
	for _, h := range free {
		l.mustBeFree(h)
	}
	l.cleanup()
	if after := l.state(); after != before {
		t.Errorf("not as before:\n%s\n\nwas:\n%s", after, before)
	}
	l.mustBeFree(in[0])
}

// TestSelectRoot: the daemon's own sockets get out even when its own user is selected; another process with the same mark does not.
func TestSelectRoot(t *testing.T) {
	l := newLab(t)
	l.selected(func(c *ContextSpec) { c.Select = []Selector{{UIDs: []uint32{0}}} })
	bypass := BypassMark(DefaultMask)
	l.mustPass([]way{
		{"own udp4", "> 198.51.100.1:6401", udp(remote4, 6401, mark(bypass))}, {"own tcp6", "> 2001:db8:ff::1:6402", tcp(remote6, 6402, mark(bypass))},
	})
	out := l.outside()
	captured, escapes, direct := helperWays(l.spawn(out))
	// A socket that its process has marked is marked again, at the price of its first datagram.
	marked := func(w way) bool { return w.name == "mark 0x123" || w.name == "inbound 6" }
	l.noLeaks(slices.DeleteFunc(slices.Clone(captured), func(w way) bool { return !marked(w) }))
	captured = slices.DeleteFunc(captured, marked)
	l.mustCapture(captured)
	l.noLeaks(escapes)
	l.mustPass(direct)
	l.mustBeFree(l.as(out, 4001, 100))
}

// TestSelectCgroup: with all below, none beside, found again when it was made again, and by the name of a unit.
func TestSelectCgroup(t *testing.T) {
	for _, by := range []string{"cgroup", "unit", "slice"} {
		t.Run(by, func(t *testing.T) {
			l := newLab(t)
			slice := fmt.Sprintf("/mproxtest%d.slice", os.Getpid())
			service := slice + "/web-1.service"
			l.selected(func(c *ContextSpec) {
				c.Select = []Selector{map[string]Selector{
					"cgroup": {Cgroups: []string{service}}, "unit": {Units: []string{"web-?.service"}}, "slice": {Units: []string{path.Base(slice)}},
				}[by]}
				c.Exclude = []Selector{{Cgroups: []string{service + "/not"}}}
			})
			l.cgroup(slice)
			fd := l.cgroup(service)
			inner, not := l.cgroup(service+"/inner"), l.cgroup(service+"/not")
			l.awaitSelected(service)
			l.mustBeCaptured(l.spawn(fd))
			l.mustBeCaptured(l.spawn(inner))
			l.mustBeFree(l.spawn(not))
			if by != "slice" {
				l.mustBeFree(l.spawn(l.cgroup(slice + "/other.service")))
			}
			if by == "unit" {
				second := slice + "/web-2.service"
				fd := l.cgroup(second)
				l.awaitSelected(second)
				l.mustBeCaptured(l.spawn(fd))
			}
		})
	}
}

// TestSelectCgroupAgain: a cgroup that was removed and made again has another id, which is found within a second.
func TestSelectCgroupAgain(t *testing.T) {
	eachMarking(t, selectCgroupAgain)
}

func selectCgroupAgain(t *testing.T, l *lab) {
	t.Helper()
	p := fmt.Sprintf("/mproxtest%d-again", os.Getpid())
	l.selected(func(c *ContextSpec) { c.Select = []Selector{{Cgroups: []string{p}}} })
	for range 2 {
		fd := l.cgroup(p)
		from := time.Now()
		l.awaitSelected(p)
		if d := time.Since(from); d > time.Second {
			t.Errorf("found after %s", d)
		}
		h := l.spawn(fd)
		l.mustBeCaptured(h)
		h.in.Close()
		_ = h.cmd.Wait()
		l.await("cgroup is empty", func() bool { return l.host.RemoveCgroup(p) == nil })
	}
}

// awaitSelected waits until the rules know the cgroup by its present id.
func (l *lab) awaitSelected(p string) {
	l.t.Helper()
	ref, err := cgroupRef(p)
	if err != nil {
		l.t.Fatal(err)
	}
	l.await("selected: "+p, func() bool {
		l.m.mu.Lock() // held for as long as a plan is being applied
		defer l.m.mu.Unlock()
		for _, refs := range l.m.found {
			if slices.ContainsFunc(refs, func(r CgroupRef) bool { return r.ID == ref.ID || strings.HasPrefix(p, r.Path+"/") }) {
				return true
			}
		}
		return false
	})
}

// TestExcludeSelected: a global context leaves out users and cgroups, all others are captured.
func TestExcludeSelected(t *testing.T) {
	eachMarking(t, excludeSelected)
}

func excludeSelected(t *testing.T, l *lab) {
	t.Helper()
	p := fmt.Sprintf("/mproxtest%d-exclude", os.Getpid())
	before, _ := l.up(func(c *ContextSpec) {
		c.Exclude = []Selector{{UIDs: []uint32{4001}}, {Cgroups: []string{p}}, {UIDs: []uint32{4002}, GIDs: []uint32{5002}}}
	})
	fd, out := l.cgroup(p), l.outside()
	l.awaitSelected(p)
	free := []*helper{l.as(out, 4001, 100), l.as(out, 4002, 5002), l.spawn(fd)}
	in := []*helper{l.as(out, 4002, 100), l.as(out, 4009, 5002), l.spawn(out)}
	for _, h := range free {
		l.mustBeFree(h)
	}
	for _, h := range in {
		l.mustBeCaptured(h)
	}
	l.mustCapture(captured())
	l.die()
	for _, h := range in {
		l.mustBeBlocked(h)
	}
	l.noLeaks(captured())
	l.cleanup()
	if after := l.state(); after != before {
		t.Errorf("not as before:\n%s\n\nwas:\n%s", after, before)
	}
}

// TestSelectProcess: a process that runs already, with all it starts, and nobody beside it; blocked when the daemon is dead, and put back.
func TestSelectProcess(t *testing.T) {
	eachMarking(t, selectProcess)
}

func selectProcess(t *testing.T, l *lab) {
	t.Helper()
	before := l.start()
	p := fmt.Sprintf("/mproxtest%d-home", os.Getpid())
	fd := l.cgroup(p)
	h, other := l.spawn(fd), l.spawn(fd)
	spec := l.spec(ModeProcess)
	spec.Contexts[0].Select = []Selector{{PIDs: []int{h.cmd.Process.Pid}}}
	l.enforce(&spec)
	l.mustBeCaptured(h)
	l.mustBeFree(other)
	l.die()
	l.mustBeBlocked(h)
	l.mustBeFree(other)
	l.cleanup()
	if after := l.state(); after != before {
		t.Errorf("not as before:\n%s\n\nwas:\n%s", after, before)
	}
	if at, err := l.host.Cgroup(h.cmd.Process.Pid); err != nil || at != p {
		t.Errorf("is in %s (%v), was in %s", at, err, p)
	}
	l.mustBeFree(h)
}
