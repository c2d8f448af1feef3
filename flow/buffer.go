// SPDX-License-Identifier: GPL-3.0-or-later

package flow

import (
	"sync"
	"sync/atomic"
)

const (
	// bufferSize holds the largest UDP payload there is: 65,507 bytes over IPv4 (RFC 768: 65,535 less both headers), 65,527 over IPv6.
	bufferSize = 64 << 10
	// maxBatch is how many datagrams one read may bring. The gain of batching is in the first dozen.
	maxBatch = 16
	// maxSpare bounds the buffers that readers of datagrams hold beyond the one each needs: 64 MiB.
	maxSpare = 1024
)

// buffer is a pooled 64 KiB.
type buffer [bufferSize]byte

// bufferPool lends buffers. What is lent is bounded by the borrowers: one for a direction of a relay or a reader of datagrams, and
// maxSpare more for batches.
type bufferPool struct {
	pool  sync.Pool
	spare atomic.Int64
}

func newBufferPool() *bufferPool {
	return &bufferPool{pool: sync.Pool{New: func() any { return new(buffer) }}}
}

func (p *bufferPool) get() *buffer  { return p.pool.Get().(*buffer) }
func (p *bufferPool) put(b *buffer) { p.pool.Put(b) }

// takeSpare returns a buffer for a batch, or nil if enough are lent.
func (p *bufferPool) takeSpare() *buffer {
	if p.spare.Add(1) > maxSpare {
		p.spare.Add(-1)
		return nil
	}
	return p.get()
}

func (p *bufferPool) giveSpare(b *buffer) {
	p.spare.Add(-1)
	p.put(b)
}

// Waiter is implemented by a PacketSource or PacketConn whose reader need not hold a buffer while there is nothing to read.
type Waiter interface {
	// WaitRead returns nil when ReadBatch would not block, else the error that ReadBatch would return (deadline, closed).
	WaitRead() error
}

type batchSource interface {
	ReadBatch(ds []Datagram) (int, error)
}

// batchReader reads datagrams in batches that grow with the traffic: an idle reader holds one buffer, or none if its source can wait.
// One goroutine uses it.
type batchReader struct {
	src  batchSource
	wait Waiter // nil if src cannot
	pool *bufferPool
	n    int // buffers held
	full bool
	bufs [maxBatch]*buffer
	ds   [maxBatch]Datagram
}

func newBatchReader(src batchSource, pool *bufferPool) *batchReader {
	r := &batchReader{src: src, pool: pool}
	r.wait, _ = src.(Waiter)
	return r
}

// read returns the next datagrams. They are valid until the next call, which is free to do anything to them; so is the caller.
func (r *batchReader) read() ([]Datagram, error) {
	if r.wait != nil && !r.full {
		r.resize(0)
		if err := r.wait.WaitRead(); err != nil {
			return nil, err
		}
		r.resize(maxBatch)
	}
	if r.n == 0 {
		r.resize(1)
	}
	for i := range r.n {
		r.ds[i] = Datagram{Buf: r.bufs[i][:]}
	}
	n, err := r.src.ReadBatch(r.ds[:r.n])
	if err != nil {
		r.full = false
		return nil, err
	}
	n = max(0, min(n, r.n))
	held := r.n
	r.full = n == held
	if r.wait == nil {
		// The buffers of the batch just read stay where they are; only the number for the next read changes.
		switch {
		case r.full:
			r.grow(2 * held)
		case n <= held/4:
			r.resizeAfter(max(n, held/2))
		}
	}
	return r.ds[:n], nil
}

// resize makes the reader hold n buffers, or as many as it may: at least 1 if n is not 0.
func (r *batchReader) resize(n int) {
	r.grow(n)
	r.resizeAfter(n)
}

func (r *batchReader) grow(n int) {
	for r.n < min(n, maxBatch) {
		b := r.takeOne()
		if b == nil {
			return
		}
		r.bufs[r.n] = b
		r.n++
	}
}

func (r *batchReader) takeOne() *buffer {
	if r.n == 0 {
		return r.pool.get()
	}
	return r.pool.takeSpare()
}

// resizeAfter gives back all buffers but n.
func (r *batchReader) resizeAfter(n int) {
	for r.n > n {
		r.n--
		b := r.bufs[r.n]
		r.bufs[r.n] = nil
		r.ds[r.n] = Datagram{}
		if r.n == 0 {
			r.pool.put(b)
		} else {
			r.pool.giveSpare(b)
		}
	}
}

// close gives back all buffers.
func (r *batchReader) close() { r.resizeAfter(0) }
