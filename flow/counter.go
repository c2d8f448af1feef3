// SPDX-License-Identifier: GPL-3.0-or-later

package flow

import (
	"errors"
	"sync/atomic"
)

// Counter counts the bytes of one direction of one flow and remembers when it last moved, which is what makes "the longest idle flow" an
// exact notion. One goroutine adds, any may read. The zero value counts, and remembers no time.
type Counter struct {
	n     atomic.Uint64
	at    atomic.Int64
	clock func() int64 // nanoseconds since the table's epoch
}

// Add counts n bytes that have just moved. It costs one reading of the clock and does not allocate: call it once an operation, not once
// a segment.
func (c *Counter) Add(n uint64) {
	var now int64
	if c.clock != nil {
		now = c.clock()
	}
	c.addAt(n, now)
}

// Load returns the bytes counted so far.
func (c *Counter) Load() uint64 { return c.n.Load() }

// addAt is Add for callers that have read the clock for a whole batch.
func (c *Counter) addAt(n uint64, now int64) {
	c.n.Add(n)
	c.at.Store(now)
}

// Counted is implemented by an application-side Conn that moves bytes by itself, in WriteTo and ReadFrom, and so has to count them
// itself for the figures to be right while the flow runs. Relay uses a Conn's WriteTo and ReadFrom only if it is Counted too.
//
// SetCounters is called once, after Accept and before the first WriteTo or ReadFrom. From then on the Conn adds to read every byte taken
// from the application and handed to WriteTo's writer, and to written every byte of ReadFrom's reader that was handed to the application;
// each as soon as the operation that moved it returns, not at the end of the flow. Bytes moved by plain Read and Write are counted by
// the caller, and not by the Conn.
type Counted interface {
	SetCounters(read, written *Counter)
}

// Parker is implemented by an application-side Conn whose WriteTo need not be waited in: most connections are idle most of the time, and a
// goroutine that waits costs more memory than all else of them.
type Parker interface {
	// Park is called once, before the first WriteTo. From then on WriteTo returns ErrParked instead of waiting for the application, and
	// resume is called, once for each time and once for the start, when WriteTo has something to do: bytes, an end, an error, a deadline.
	// It is called from any goroutine, with locks held, and must not block.
	Park(resume func())
}

// ErrParked is what a parked WriteTo returns: not an end.
var ErrParked = errors.New("parked")

// WriteError is how WriteTo and ReadFrom say that it was the destination that failed: WriteTo's writer, ReadFrom's own Conn. Any other
// error is taken as the source's. It matters because bytes still on their way in the other direction are delivered in the first case.
// A *net.OpError whose Op is "write" says the same.
type WriteError struct{ Err error }

// Error returns the cause's text.
func (e *WriteError) Error() string { return e.Err.Error() }

// Unwrap returns the cause.
func (e *WriteError) Unwrap() error { return e.Err }
