// SPDX-License-Identifier: GPL-3.0-or-later

package daemon

import (
	"bytes"
	"context"
	"os"
	"runtime"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// How many threads run the engine's code. One is the cheapest for a few flows: what one goroutine passes on to the next never has to wake up another
// thread for it, a system call and an interrupt of another processor each, a quarter of what such a flow costs. It is too few for connections that
// are set up by the hundreds, whose system calls are to overlap, and for more work than one processor can do, if the machine has another to spare:
// where it has not, more threads only make the same work dearer.
const (
	// procsBusyLook is how often that is looked at while the engine works, procsIdleLook while it does not.
	procsBusyLook = 100 * time.Millisecond
	procsIdleLook = 500 * time.Millisecond
	// procsIdle is the share of a processor below which it does not work.
	procsIdle = 0.02
	// procsFull is the share of one processor that counts as all of it.
	procsFull = 0.85
	// procsSpare is how many processors of the machine must be idle for one more thread to be of use.
	procsSpare = 0.2
	// procsMany is how many flows that begin in a second are many.
	procsMany = 300
	// procsCalm is how many looks in a row must see no reason for more than one thread.
	procsCalm = 10
)

// procsLook is what was seen since the last look, in processors and per second.
type procsLook struct {
	used  float64 // by the engine
	spare float64 // by nobody on this machine
	flows float64 // begun
}

// procsKeeper decides between one thread and as many as the runtime would have.
type procsKeeper struct {
	all  bool
	calm int
}

// look takes what was seen and returns whether to have all threads.
func (k *procsKeeper) look(l procsLook) bool {
	full := l.used >= procsFull && (k.all || l.spare >= procsSpare)
	switch {
	case full, l.flows >= procsMany:
		k.all, k.calm = true, 0
	case k.all:
		if k.calm++; k.calm >= procsCalm {
			k.all, k.calm = false, 0
		}
	}
	return k.all
}

// procsSeen is what a look subtracts.
type procsSeen struct {
	at    time.Time
	used  time.Duration
	idle  float64 // processor seconds
	flows uint64
}

func seeProcs(flows uint64) procsSeen {
	var u unix.Rusage
	_ = unix.Getrusage(unix.RUSAGE_SELF, &u)
	return procsSeen{at: time.Now(), used: time.Duration(u.Utime.Nano() + u.Stime.Nano()), idle: idleProcs("/proc/stat"), flows: flows}
}

func (s procsSeen) since(before procsSeen) procsLook {
	d := s.at.Sub(before.at).Seconds()
	if d <= 0 {
		return procsLook{}
	}
	begun := s.flows - min(s.flows, before.flows) // a context may be gone, with its flows
	return procsLook{used: (s.used - before.used).Seconds() / d, spare: (s.idle - before.idle) / d, flows: float64(begun) / d}
}

// idleProcs returns how many seconds the machine's processors have been idle, 0 if that is not known: no reason for more threads then.
func idleProcs(path string) float64 {
	const hertz = 100 // USER_HZ, the same on all machines Linux runs on today
	b, err := os.ReadFile(path)
	if err != nil {
		return 0
	}
	line, _, _ := bytes.Cut(b, []byte("\n"))
	f := bytes.Fields(line) // cpu user nice system idle iowait …
	if len(f) < 6 {
		return 0
	}
	idle, err := strconv.ParseUint(string(f[4]), 10, 64)
	if err != nil {
		return 0
	}
	return float64(idle) / hertz
}

// keepProcs sets the number of threads, until ctx is done. It leaves it alone where $GOMAXPROCS says it, or there is one processor. flows returns how
// many have begun since the start.
func keepProcs(ctx context.Context, flows func() uint64) {
	if os.Getenv("GOMAXPROCS") != "" || runtime.GOMAXPROCS(0) == 1 {
		return
	}
	defer runtime.SetDefaultGOMAXPROCS()
	k := procsKeeper{all: true}
	before := seeProcs(flows())
	next := time.NewTimer(procsBusyLook)
	defer next.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-next.C:
		}
		seen := seeProcs(flows())
		l := seen.since(before)
		before = seen
		had := k.all
		switch all := k.look(l); {
		case all && !had:
			runtime.SetDefaultGOMAXPROCS()
		case had && !all:
			runtime.GOMAXPROCS(1)
		}
		if l.used < procsIdle && !k.all {
			next.Reset(procsIdleLook)
		} else {
			next.Reset(procsBusyLook)
		}
	}
}
