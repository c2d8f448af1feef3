// SPDX-License-Identifier: GPL-3.0-or-later

package flow

import (
	"time"

	"golang.org/x/sys/unix"
)

// Pause lets whoever is sending to a reader that was just woken up go on before it reads: the reader then finds a batch instead of a datagram or two,
// and much of a stream instead of a segment, and is woken up for one of three. It costs a fifth less CPU a byte where sender and reader share
// processors, and nothing where they do not.
//
// Others may be waiting for the processor too, and for longer: after a pause of more than pauseLong there is none for pauseRest, which bounds what
// they take from the reader to less than a hundredth.
//
// The zero value is ready. It belongs to one goroutine.
type Pause struct {
	rest time.Time // none before
}

const (
	pauseLong = 1500 * time.Microsecond // a slice of the scheduler is 3 ms, what a sender does at a time some 100 µs
	pauseRest = 500 * time.Millisecond
)

// Take pauses, unless it rests: it yields the processor once (sched_yield(2)).
func (p *Pause) Take() {
	begin := time.Now()
	if p.resting(begin) {
		return
	}
	_, _, _ = unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
	end := time.Now()
	p.after(end, end.Sub(begin))
}

func (p *Pause) resting(now time.Time) bool { return now.Before(p.rest) }

// after is told how long a pause has been.
func (p *Pause) after(now time.Time, d time.Duration) {
	if d > pauseLong {
		p.rest = now.Add(pauseRest)
	}
}
