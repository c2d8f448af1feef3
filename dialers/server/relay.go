// SPDX-License-Identifier: GPL-3.0-or-later

package server

import (
	"errors"
	"io"
	"net"
	"sync"
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
	var down sync.WaitGroup
	down.Go(func() {
		if _, err := c.conn.Write(reply); err != nil {
			abort(err)
			return
		}
		if err := copyHalf(c.conn, out); err != nil {
			abort(err)
		}
	})
	err := c.early(out)
	if err == nil {
		err = copyHalf(out, c.conn)
	}
	if err != nil {
		abort(err)
	}
	down.Wait()
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

// copyHalf moves one direction until its end of file, and passes that on.
func copyHalf(dst, src flow.Conn) error {
	var r io.Reader = src
	if t, ok := src.(*dialers.TCPConn); ok {
		r = t.TCPConn // the type that net's splice looks for
	}
	if _, err := io.Copy(dst, r); err != nil {
		return err
	}
	if err := dst.CloseWrite(); err != nil && !errors.Is(err, unix.ENOTCONN) && !errors.Is(err, net.ErrClosed) {
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
