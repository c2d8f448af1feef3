// SPDX-License-Identifier: GPL-3.0-or-later

package server

import (
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/dialers"
	"github.com/mutex-proxy/mutex/flow"
)

var errIdle = errors.New("idle for too long")

// relay answers the client and moves bytes both ways until both directions have ended. An end of file travels as FIN, anything else as
// RST. Between two plain sockets the kernel moves the bytes (splice).
func (c *session) relay(out flow.Conn, reply []byte) error {
	defer out.Close()
	var once sync.Once
	var cause error
	abort := func(err error) {
		once.Do(func() {
			cause = err
			out.Abort()
			c.conn.Abort()
		})
	}
	idle := watchIdle(c.conn, c.s.cfg.IdleTimeout, func() { abort(errIdle) })
	defer idle.stop()
	var down, watch sync.WaitGroup
	sides := [2]*half{{conn: c.conn}, {conn: out}}
	for _, h := range sides {
		h.takeUrgent()
	}
	// ended looks after a side that has come to its end of file: nobody reads from it any more, who would notice that it was reset.
	ended := func(side flow.Conn) {
		watch.Go(func() {
			if err := awaitReset(side); err != nil {
				abort(err)
			}
		})
	}
	down.Go(func() {
		if _, err := c.conn.Write(reply); err != nil {
			abort(err)
			return
		}
		if err := sides[0].copyFrom(sides[1]); err != nil {
			abort(err)
			return
		}
		ended(out)
	})
	err := c.early(out)
	if err == nil {
		err = sides[1].copyFrom(sides[0])
	}
	if err != nil {
		abort(err)
	} else {
		ended(c.conn)
	}
	down.Wait()
	for _, side := range []flow.Conn{c.conn, out} {
		_ = side.SetReadDeadline(time.Unix(1, 0)) // ends awaitReset
	}
	watch.Wait()
	once.Do(func() {}) // cause is not written after this
	return cause
}

// early sends what the client sent behind its request.
func (c *session) early(out flow.Conn) error {
	n := c.in.Buffered()
	if n == 0 {
		return nil
	}
	p, err := c.in.Peek(n)
	if err == nil {
		_, err = out.Write(p)
	}
	c.in = nil
	return err
}

// awaitReset waits until a socket that has been read to its end of file is reset, and returns the error it has then: nil if it never
// was, because both directions have ended or the read deadline has passed.
func awaitReset(c flow.Conn) error {
	t, ok := c.(*dialers.TCPConn)
	if !ok {
		return nil
	}
	raw, err := t.SyscallConn()
	if err != nil {
		return nil
	}
	var reset error
	_ = raw.Read(func(fd uintptr) bool { // woken by every change of the socket's state
		p := [1]unix.PollFd{{Fd: int32(fd)}}
		if n, err := unix.Poll(p[:], 0); err != nil || n == 0 {
			return false
		}
		if e, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR); err == nil && e != 0 {
			reset = unix.Errno(e)
		}
		return true
	})
	return reset
}

// half is one side of a relay.
type half struct {
	conn     flow.Conn
	finished atomic.Bool // it is sent FIN
}

// takeUrgent has urgent data read like any other, in its place.
func (h *half) takeUrgent() {
	if t, ok := h.conn.(*dialers.TCPConn); ok {
		if raw, err := t.SyscallConn(); err == nil {
			_ = raw.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_OOBINLINE, 1) })
		}
	}
}

// copyFrom moves one direction until the end of file of src, and passes that on.
func (h *half) copyFrom(src *half) error {
	r := io.Reader(src.conn)
	if t, ok := r.(*dialers.TCPConn); ok {
		r = t.TCPConn // the type that net's splice looks for
	}
	for {
		if _, err := io.Copy(h.conn, r); err != nil {
			return err
		}
		// Before urgent data, splice stops as it does at the end; read(2) does not.
		var b [512]byte
		n, err := r.Read(b[:])
		if n > 0 {
			if _, err := h.conn.Write(b[:n]); err != nil {
				return err
			}
			continue
		}
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		break
	}
	if !src.finished.Load() {
		if err := flow.Lost(src.conn); err != nil {
			return err
		}
	}
	h.finished.Store(true)
	if err := h.conn.CloseWrite(); err != nil && !errors.Is(err, unix.ENOTCONN) && !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

// idleWatch ends a connection that has moved no byte for a while. It asks the kernel (TCP_INFO) when it wakes up, so that nothing has to
// be noted for each byte and splice stays possible.
type idleWatch struct {
	raw   syscall.RawConn
	limit time.Duration
	end   func()

	mu    sync.Mutex
	timer *time.Timer // nil after stop
}

func watchIdle(c *dialers.TCPConn, limit time.Duration, end func()) *idleWatch {
	raw, err := c.SyscallConn()
	w := &idleWatch{raw: raw, limit: limit, end: end}
	if err == nil {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.timer = time.AfterFunc(limit, w.check)
	}
	return w
}

func (w *idleWatch) check() {
	quiet := w.limit
	_ = w.raw.Control(func(fd uintptr) {
		if info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
			quiet = time.Duration(min(info.Last_data_sent, info.Last_data_recv)) * time.Millisecond
		}
	})
	w.mu.Lock()
	stopped := w.timer == nil
	if !stopped && quiet < w.limit {
		w.timer.Reset(w.limit - quiet)
	}
	w.mu.Unlock()
	if !stopped && quiet >= w.limit {
		w.end()
	}
}

func (w *idleWatch) stop() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.timer != nil {
		w.timer.Stop()
		w.timer = nil
	}
}
