// SPDX-License-Identifier: GPL-3.0-or-later

// Package offload adopts TCP flows into the kernel: the connection with the application, which package stack has not answered yet, becomes an
// established socket of the kernel by TCP_REPAIR, and its bytes are spliced to and from the upstream's socket. They never pass through
// netstack or this process.
//
// adopt.go is the order of things for one flow, syn.go what is read and written for it, pair.go how bytes move, worker.go who moves them. It
// decides nothing and dials nothing; package stack calls it, and is what a flow falls back to. The kernel's part, how the application's
// packets find the socket, is in policy/accel.go.
package offload

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// Config is what an Engine is built from.
type Config struct {
	Mark uint32 // of the sockets towards applications: policy.AccelMark
	TTL  uint8  // of the SYN-ACK: policy.AccelTTL
	// Option is put into the SYN-ACK as it is: that of policy.Shortcut, or none. At most 16 bytes, a multiple of 4.
	Option []byte
	// Waits reports whether a socket of this machine, bound to no device, is connecting from src to dst: lo is no device that it could be bound
	// to. nil = not asked.
	Waits func(src, dst netip.AddrPort) bool
	Log   *zap.Logger // nil = none
}

// maxWorkers bounds the workers of an Engine: above, the memory bus is the limit.
const maxWorkers = 8

// Engine moves the bytes of all adopted flows of one context.
type Engine struct {
	cfg     Config
	hearing hearing
	maxFD   int // no flow is adopted with a descriptor from here on
	workers []*worker
	next    atomic.Uint32
	open    atomic.Int64 // adopted and not closed
	running sync.WaitGroup

	mu     sync.Mutex
	closed bool
	conns  map[*Conn]struct{} // what Close has to end
}

// New returns an Engine that does nothing until Start.
func New(cfg Config) (*Engine, error) {
	if cfg.Mark == 0 || cfg.TTL == 0 {
		return nil, errors.New("offload: mark or TTL is missing")
	}
	if n := len(cfg.Option); n > maxMore || n%4 != 0 {
		return nil, fmt.Errorf("offload: an option of %d bytes", n)
	}
	if cfg.Log == nil {
		cfg.Log = zap.NewNop()
	}
	return &Engine{cfg: cfg, hearing: hearing{log: cfg.Log, now: time.Now}, conns: map[*Conn]struct{}{}}, nil
}

// spareDescriptors is the part of the limit of open files, 1/spareDescriptors, that is kept for what does not come in pairs: in netstack a flow needs
// one where an adopted one needs two.
const spareDescriptors = 16

var errDescriptors = errors.New("few file descriptors are left")

// Start starts the workers. It can be called once.
func (e *Engine) Start() error {
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
		return fmt.Errorf("offload: %w", os.NewSyscallError("getrlimit", err))
	}
	e.maxFD = int(min(files.Cur, math.MaxInt32) / spareDescriptors * (spareDescriptors - 1))
	for range min(runtime.GOMAXPROCS(0), maxWorkers) {
		w, err := newWorker(e.maxFD)
		if err != nil {
			return errors.Join(fmt.Errorf("offload: %w", err), e.Close())
		}
		e.workers = append(e.workers, w)
		e.running.Go(w.run)
	}
	return nil
}

// Open returns how many flows are adopted and not closed.
func (e *Engine) Open() int { return int(e.open.Load()) }

// Close resets what is left and ends the workers. It is idempotent. Adopt must not be called meanwhile.
func (e *Engine) Close() error {
	e.mu.Lock()
	e.closed = true
	left := make([]*Conn, 0, len(e.conns))
	for c := range e.conns {
		left = append(left, c)
	}
	e.mu.Unlock()
	for _, c := range left {
		c.abandon()
	}
	for _, w := range e.workers {
		w.stop()
	}
	e.running.Wait()
	return nil
}

// add registers a connection, unless the Engine is closed.
func (e *Engine) add(c *Conn) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return false
	}
	e.conns[c] = struct{}{}
	e.open.Add(1)
	return true
}

func (e *Engine) remove(c *Conn) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if _, ok := e.conns[c]; ok {
		delete(e.conns, c)
		e.open.Add(-1)
	}
}
