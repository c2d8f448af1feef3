// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"math/rand/v2"
	"syscall"
	"testing"
	"time"

	"github.com/mutex-proxy/mutex/e2e/lab"
)

// crashes is how often TestCrashAnywhere kills the program.
const crashes = 50

// TestCrashAnywhere kills the program with SIGKILL at random instants of its start, its work and its stop, and compares the kernel's
// state after cleanup with the state before. The seed is logged.
func TestCrashAnywhere(t *testing.T) {
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, false)
	m := l.Mprox(t)
	m.WriteConfig(globalConfig(s, ""))
	before := l.Snapshot(t)

	// One whole life first: how long does a start, a stop, a run take here?
	started := time.Now()
	m.Up("-c", m.ConfigPath())
	startTime := time.Since(started)
	stopping := time.Now()
	m.Signal(syscall.SIGTERM)
	m.Wait(10 * time.Second)
	stopTime := time.Since(stopping)
	if d := before.Diff(l.Snapshot(t)); d != "" {
		t.Fatalf("an orderly stop left:\n%s", d)
	}
	seed := uint64(started.UnixNano())
	t.Logf("start %v, stop %v, seed %d", startTime, stopTime, seed)
	rnd := rand.New(rand.NewPCG(seed, 0))

	debris := 0 // crashes that left something: without any, nothing was tested
	for i := range crashes {
		var where string
		var delay time.Duration
		switch i % 4 {
		case 0, 1:
			where, delay = "start", time.Duration(rnd.Int64N(int64(startTime)*3/2))
			m.Start("-c", m.ConfigPath())
		case 2:
			where, delay = "stop", time.Duration(rnd.Int64N(int64(stopTime)))
			m.Up("-c", m.ConfigPath())
			m.Signal(syscall.SIGTERM)
		case 3:
			where, delay = "run", time.Duration(rnd.Int64N(int64(startTime)*3/2))
			m.StartCommand(m.Command("run", "--proxy", s.URL(), "--", "curl", "-s", "-m", "5", originURL(i%8 == 3, "/bytes/100000")))
		}
		lab.Poll(delay, m.Exited)
		m.Kill()
		// The next start over the debris must work too; every fifth time, it is killed again before cleanup.
		if i%5 == 4 {
			m.Up("-c", m.ConfigPath())
			m.Kill()
		}
		if before.Diff(l.Snapshot(t)) != "" {
			debris++
		}
		if r := m.CLI("cleanup"); r.Code != 0 {
			t.Errorf("crash %d, %s after %v: cleanup: %v", i, where, delay, r)
		}
		var diff string
		if !lab.Poll(2*time.Second, func() bool { diff = before.Diff(l.Snapshot(t)); return diff == "" }) {
			t.Fatalf("crash %d, %s after %v: cleanup left:\n%s", i, where, delay, diff)
		}
		if i%10 == 9 {
			lab.Progress("%s: %d of %d", t.Name(), i+1, crashes)
		}
	}
	t.Logf("%d of %d crashes left something for cleanup", debris, crashes)
	if debris < crashes/4 {
		t.Errorf("only %d of %d crashes left something: the instants are badly chosen", debris, crashes)
	}
	if out := mustCurl(t, l, originURL(false, "/bytes/10")); len(out) != 10 {
		t.Errorf("the network after all that: %q", out)
	}
}

// TestCrashRace kills the daemon while cleanup of a dead one runs, and cleanup itself: what is left must still be removable.
func TestCrashRace(t *testing.T) {
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, false)
	m := l.Mprox(t)
	before := l.Snapshot(t)
	rnd := rand.New(rand.NewPCG(1, 2))
	for i := range 10 {
		m.Up("--proxy", s.URL())
		m.Kill()
		p := lab.Start(t, "cleanup", m.Command("cleanup"))
		lab.Poll(time.Duration(rnd.Int64N(int64(30*time.Millisecond))), p.Exited)
		p.Kill()
		if r := m.CLI("cleanup"); r.Code != 0 {
			t.Errorf("%d: %v", i, r)
		}
		if d := before.Diff(l.Snapshot(t)); d != "" {
			t.Fatalf("%d: left:\n%s", i, d)
		}
	}
	// With a living daemon, cleanup must not touch anything.
	m.Up("--proxy", s.URL())
	during := l.Snapshot(t)
	m.CLI("cleanup")
	if d := during.Diff(l.Snapshot(t)); d != "" {
		t.Errorf("cleanup changed what belongs to a living daemon:\n%s", d)
	}
	checkProxied(t, l)
}
