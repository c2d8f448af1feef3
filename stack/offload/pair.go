// SPDX-License-Identifier: GPL-3.0-or-later

package offload

import (
	"errors"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/flow"
)

// The two sockets of a pair, and the direction that reads from each.
const (
	appSide = 0
	upSide  = 1
)

const (
	// pieceMax bounds the bytes of one splice.
	pieceMax = 1 << 20
	// turnMax bounds the bytes that one pair moves while others wait.
	turnMax = 4 << 20
	// copyMax is the bytes of one step where splice cannot be used.
	copyMax = 16 << 10
)

// pair is an adopted flow whose bytes move: the application's socket and the upstream's.
//
//	direction 0:  fd[0] ──splice──▶ pipe ──splice──▶ fd[1]
//	direction 1:  fd[0] ◀──splice── pipe ◀──splice── fd[1]
type pair struct {
	worker     *worker
	slot       uint32
	generation uint32
	queued     bool // in the worker's ready list; the worker's own
	ended      func(upload bool, err error)

	mu    sync.Mutex
	fd    [2]int // -1 once closed, or not known yet
	spare int    // what becomes the upstream's: after the answer, none may be missing; -1 = used
	cut   bool   // the upstream's was to be reset before it was known
	dir   [2]direction
}

// direction is one direction, named by the side it reads from.
type direction struct {
	counter  *flow.Counter
	pipe     pipe
	held     int  // bytes in pipe
	piped    bool // pipe is ours
	over     bool // ended was called, or is about to be
	readable bool // the source may have something
	writable bool // the destination may have room
	urgent   bool // the source has urgent data, before which splice stops
	stalled  bool // copying, and waiting for room in the destination
}

// outcome is the end of a direction, to be told when the lock is released.
type outcome struct {
	over bool
	err  error
}

// begin hands the pair to its worker. Of a pair that was closed meanwhile the directions end here, if they have not before.
func (p *pair) begin() error {
	p.mu.Lock()
	if p.fd[appSide] < 0 || p.fd[upSide] < 0 {
		p.endAllLocked(opError("read", net.ErrClosed))
		return nil
	}
	defer p.mu.Unlock()
	return p.worker.add(p)
}

// close closes one socket, which ends both directions. It is idempotent.
func (p *pair) close(side int, reset bool) {
	p.mu.Lock()
	fd := p.fd[side]
	if fd < 0 {
		p.cut = p.cut || side == upSide
		p.mu.Unlock()
		return
	}
	if reset {
		_ = unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	} else {
		// Without a bound, a peer that stopped reading would keep a closed connection's data for as long as it lives.
		_ = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, orphanTimeout)
	}
	_ = unix.Close(fd)
	p.fd[side] = -1
	if p.worker != nil {
		p.worker.remove(p)
	}
	p.endAllLocked(opError("read", net.ErrClosed))
}

// drop closes the spare descriptor of a pair that has never been spliced.
func (p *pair) drop() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.spare >= 0 {
		_ = unix.Close(p.spare)
		p.spare = -1
	}
}

// fail ends both directions with an error of the application's side. Both sockets stay as they are.
func (p *pair) fail(err error) {
	p.mu.Lock()
	p.endAllLocked(opError("read", err))
}

// endAllLocked ends the directions that have not ended, and unlocks. Before Splice there is nobody to tell: begin does.
func (p *pair) endAllLocked(err error) {
	if p.ended == nil {
		p.mu.Unlock()
		return
	}
	var tell [2]bool
	for i := range p.dir {
		if d := &p.dir[i]; !d.over {
			p.finish(d)
			tell[i] = true
		}
	}
	ended := p.ended
	p.mu.Unlock()
	for i, t := range tell {
		if t && ended != nil {
			ended(i == appSide, err)
		}
	}
}

// pump notes what an event says and moves what can be moved. It reports whether there is more to move than fits into a turn.
func (p *pair) pump(w *worker, side int, events uint32) (more bool) {
	var done [2]outcome
	p.mu.Lock()
	p.note(side, events)
	for i := range p.dir {
		var left bool
		done[i], left = p.move(w, i)
		more = more || left
	}
	if events&(unix.EPOLLERR|unix.EPOLLHUP) != 0 {
		p.broken(side, &done)
	}
	p.mu.Unlock()
	for i, o := range done {
		if o.over {
			p.ended(i == appSide, o.err)
		}
	}
	return more
}

// note keeps what an event says about a socket.
func (p *pair) note(side int, events uint32) {
	if events&(unix.EPOLLIN|unix.EPOLLRDHUP|unix.EPOLLPRI|unix.EPOLLERR|unix.EPOLLHUP) != 0 {
		p.dir[side].readable = true
	}
	if events&unix.EPOLLPRI != 0 {
		p.dir[side].urgent = true
	}
	if events&(unix.EPOLLOUT|unix.EPOLLERR|unix.EPOLLHUP) != 0 {
		to := &p.dir[1-side]
		to.writable = true
		to.readable = to.readable || to.stalled
		to.stalled = false
	}
}

// broken ends the directions that would not notice by themselves that a socket was reset: one that waits for the other side, and one that
// has nothing to send to it.
func (p *pair) broken(side int, done *[2]outcome) {
	if p.fd[side] < 0 {
		return
	}
	from, to := &p.dir[side], &p.dir[1-side]
	switch {
	case !from.over && from.held > 0:
		if n, err := unix.GetsockoptInt(p.fd[side], unix.SOL_SOCKET, unix.SO_ERROR); err == nil && n != 0 {
			p.finish(from)
			done[side] = outcome{true, opError("read", unix.Errno(n))}
		}
	case from.over && !to.over:
		n, err := unix.GetsockoptInt(p.fd[side], unix.SOL_SOCKET, unix.SO_ERROR)
		if err != nil || n == 0 {
			n = int(unix.EPIPE)
		}
		p.finish(to)
		done[1-side] = outcome{true, opError("write", unix.Errno(n))}
	}
}

// move moves what one direction can move.
func (p *pair) move(w *worker, side int) (o outcome, more bool) {
	d := &p.dir[side]
	src, dst := p.fd[side], p.fd[1-side]
	if d.over || src < 0 || dst < 0 {
		return outcome{}, false
	}
	for moved := 0; ; {
		switch {
		case moved >= turnMax:
			return outcome{}, true
		case d.held > 0 && !d.writable, d.held == 0 && !d.readable:
			p.release(&w.pipes, d)
			return outcome{}, false
		case d.held > 0:
			n, err := p.drain(d, dst)
			if err != nil {
				p.finish(d)
				return outcome{true, err}, false
			}
			moved += n
			w.piece = max(w.piece, n)
		default:
			end, err := p.fill(&w.pipes, d, src, dst)
			if end || err != nil {
				p.release(&w.pipes, d)
				p.finish(d)
				return outcome{true, err}, false
			}
		}
	}
}

// drain moves bytes of the pipe to the destination.
func (p *pair) drain(d *direction, dst int) (int, error) {
	n, err := unix.Splice(d.pipe.r, nil, dst, nil, d.held, unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK)
	switch {
	case err == nil:
		d.held -= int(n)
		count(d.counter, int(n))
		return int(n), nil
	case errors.Is(err, unix.EINTR):
	case errors.Is(err, unix.EAGAIN):
		d.writable = false
	default:
		return 0, opError("write", err)
	}
	return 0, nil
}

// fill moves bytes of the source into the pipe, or straight to the destination where splice cannot be used. end is the source's end of file.
func (p *pair) fill(ps *pipes, d *direction, src, dst int) (end bool, err error) {
	if !d.piped {
		if d.pipe, err = ps.get(); err != nil {
			return p.copy(d, src, dst) // no descriptors left
		}
		d.piped = true
	}
	n, err := unix.Splice(src, nil, d.pipe.w, nil, pieceMax, unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK)
	switch {
	case err == nil && n == 0:
		if d.urgent {
			return p.copy(d, src, dst)
		}
		return true, nil
	case err == nil:
		d.held = int(n)
	case errors.Is(err, unix.EINTR):
	case errors.Is(err, unix.EAGAIN) && d.urgent:
		return p.copy(d, src, dst)
	case errors.Is(err, unix.EAGAIN):
		d.readable = false
	default:
		return false, opError("read", err)
	}
	return false, nil
}

// copy moves bytes without a pipe. What the destination does not take stays in the source.
func (p *pair) copy(d *direction, src, dst int) (end bool, err error) {
	if !d.writable {
		d.stall()
		return false, nil
	}
	var buf [copyMax]byte
	n, _, err := unix.Recvfrom(src, buf[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
	switch {
	case errors.Is(err, unix.EINTR):
		return false, nil
	case errors.Is(err, unix.EAGAIN):
		d.readable, d.urgent = false, false
		return false, nil
	case err != nil:
		return false, opError("read", err)
	case n == 0:
		return true, nil
	}
	m, err := unix.SendmsgN(dst, buf[:n], nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
	switch {
	case errors.Is(err, unix.EINTR):
		return false, nil
	case errors.Is(err, unix.EAGAIN):
		d.writable = false
		d.stall()
		return false, nil
	case err != nil:
		return false, opError("write", err)
	}
	count(d.counter, m)
	if _, _, err := unix.Recvfrom(src, buf[:m], unix.MSG_DONTWAIT); err != nil {
		return false, opError("read", err)
	}
	return false, nil
}

// stall stops a copying direction until its destination has room.
func (d *direction) stall() { d.readable, d.stalled = false, true }

// release gives an empty pipe back.
func (p *pair) release(ps *pipes, d *direction) {
	if d.piped && d.held == 0 {
		ps.put(d.pipe)
		d.piped = false
	}
}

// finish ends a direction. What is still in its pipe is lost: its destination is broken, or is about to be reset.
func (p *pair) finish(d *direction) {
	d.over = true
	if d.piped {
		d.pipe.close()
		d.piped, d.held = false, 0
	}
}

func count(c *flow.Counter, n int) {
	if c != nil && n > 0 {
		c.Add(uint64(n))
	}
}

func opError(op string, err error) error {
	return &net.OpError{Op: op, Net: "tcp", Err: os.NewSyscallError("splice", err)}
}
