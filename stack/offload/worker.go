// SPDX-License-Identifier: GPL-3.0-or-later

package offload

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// worker waits for the sockets of its pairs, by an epoll of its own, and moves their bytes. That epoll itself is what the runtime's poller
// waits for, so no thread is blocked, and no goroutine belongs to a flow.
type worker struct {
	epoll   int
	file    *os.File
	stopped atomic.Bool
	pipes   pipes
	ready   []*pair // pairs that have more to do than one turn allows; the worker's own
	piece   int     // bytes of the largest piece since it last waited; the worker's own

	mu    sync.Mutex
	slots []slot
	free  []uint32
}

// slot is where an event finds its pair. The generation tells an event of a pair that has gone from one of its successor.
type slot struct {
	pair       *pair
	generation uint32
}

const (
	maxEvents = 256
	// muchAtOnce is the bytes of a piece from which on more is expected, and waited for: what answers a request is not to wait. At less than
	// some 2 Gbit/s the pieces stay smaller.
	muchAtOnce = 32 << 10
	// gather is how long it waits then (the kernel adds the thread's timer slack, 50 µs): pieces get larger, and it is woken up for fewer. Buffers
	// of TCP take many times of what can come meanwhile. Yielding the processor instead depends on who else is running.
	gather = 50 * time.Microsecond
	// events are edges: a socket is looked at until it has nothing more. PRI is for urgent data, before which splice stops.
	events = unix.EPOLLIN | unix.EPOLLOUT | unix.EPOLLRDHUP | unix.EPOLLPRI | unix.EPOLLET
)

func newWorker(maxFD int) (*worker, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil { // what os.NewFile goes by
		_ = unix.Close(fd)
		return nil, os.NewSyscallError("fcntl", err)
	}
	return &worker{epoll: fd, file: os.NewFile(uintptr(fd), "epoll"), pipes: pipes{maxFD: maxFD}}, nil
}

// add begins to watch both sockets of p, which must be locked.
func (w *worker) add(p *pair) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.stopped.Load() {
		return os.ErrClosed
	}
	var at uint32
	if n := len(w.free); n > 0 {
		at, w.free = w.free[n-1], w.free[:n-1]
	} else {
		at = uint32(len(w.slots))
		w.slots = append(w.slots, slot{})
	}
	s := &w.slots[at]
	s.pair, p.slot, p.generation = p, at, s.generation
	for i, fd := range p.fd {
		ev := unix.EpollEvent{Events: uint32(events & 0xffffffff), Fd: int32(at<<1 | uint32(i)), Pad: int32(s.generation)}
		if err := unix.EpollCtl(w.epoll, unix.EPOLL_CTL_ADD, fd, &ev); err != nil {
			if i == 1 {
				_ = unix.EpollCtl(w.epoll, unix.EPOLL_CTL_DEL, p.fd[0], nil)
			}
			w.freeLocked(at)
			return fmt.Errorf("epoll_ctl: %w", err)
		}
	}
	return nil
}

// remove forgets p. Its sockets are closed by the caller, which ends their being watched.
func (w *worker) remove(p *pair) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if s := &w.slots[p.slot]; s.pair == p {
		w.freeLocked(p.slot)
	}
}

func (w *worker) freeLocked(at uint32) {
	w.slots[at].pair = nil
	w.slots[at].generation++
	w.free = append(w.free, at)
}

// find returns the pair of an event, and which of its sockets it is about.
func (w *worker) find(ev *unix.EpollEvent) (*pair, int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	at := uint32(ev.Fd) >> 1
	if int(at) >= len(w.slots) || w.slots[at].generation != uint32(ev.Pad) {
		return nil, 0
	}
	return w.slots[at].pair, int(ev.Fd & 1)
}

// run is the worker's goroutine, until stop.
func (w *worker) run() {
	defer w.pipes.close()
	defer w.file.Close()
	raw, err := w.file.SyscallConn()
	if err != nil {
		return // cannot be: the file is open
	}
	var got [maxEvents]unix.EpollEvent
	n, woken := 0, false
	poll := func(fd uintptr) bool {
		if woken && w.piece >= muchAtOnce {
			wait := unix.NsecToTimespec(int64(gather))
			_ = unix.Nanosleep(&wait, nil) // one that is cut short is short
		}
		woken = true
		var err error
		n, err = unix.EpollWait(int(fd), got[:], 0)
		return n > 0 || err != nil && !errors.Is(err, unix.EINTR) || w.stopped.Load() || len(w.ready) > 0
	}
	for !w.stopped.Load() {
		woken = false
		if err := raw.Read(poll); err != nil {
			return
		}
		w.piece = 0
		for i := range max(n, 0) {
			if p, side := w.find(&got[i]); p != nil {
				w.turn(p, side, got[i].Events)
			}
		}
		more := w.ready
		w.ready = nil
		for _, p := range more {
			p.queued = false
			w.turn(p, 0, 0)
		}
	}
}

// turn lets p move what it can, within a budget.
func (w *worker) turn(p *pair, side int, events uint32) {
	if p.pump(w, side, events) && !p.queued {
		p.queued = true
		w.ready = append(w.ready, p)
	}
}

func (w *worker) stop() {
	w.mu.Lock()
	w.stopped.Store(true)
	w.mu.Unlock()
	_ = w.file.SetReadDeadline(time.Unix(1, 0)) // wakes run
}

// pipes is a worker's pipes: taken while bytes are on their way only, so that an idle flow has none.
type pipes struct {
	idle  []pipe
	maxFD int // no pipe has a descriptor from here on
}

// maxIdlePipes bounds the pipes kept for the next flow that needs one.
const maxIdlePipes = 16

// pipeSize is what a pipe can hold, in bytes of full pages: several trains of segments at a time.
const pipeSize = 1 << 20

type pipe struct{ r, w int }

func (ps *pipes) get() (pipe, error) {
	if n := len(ps.idle); n > 0 {
		p := ps.idle[n-1]
		ps.idle = ps.idle[:n-1]
		return p, nil
	}
	var fd [2]int
	if err := unix.Pipe2(fd[:], unix.O_NONBLOCK|unix.O_CLOEXEC); err != nil {
		return pipe{}, os.NewSyscallError("pipe2", err)
	}
	if max(fd[0], fd[1]) >= ps.maxFD {
		pipe{fd[0], fd[1]}.close()
		return pipe{}, errDescriptors
	}
	_, _ = unix.FcntlInt(uintptr(fd[0]), unix.F_SETPIPE_SZ, pipeSize) // a smaller one serves too
	return pipe{fd[0], fd[1]}, nil
}

// put gives an empty pipe back.
func (ps *pipes) put(p pipe) {
	if len(ps.idle) < maxIdlePipes {
		ps.idle = append(ps.idle, p)
		return
	}
	p.close()
}

func (p pipe) close() {
	_ = unix.Close(p.r)
	_ = unix.Close(p.w)
}

func (ps *pipes) close() {
	for _, p := range ps.idle {
		p.close()
	}
	ps.idle = nil
}
