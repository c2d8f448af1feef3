// SPDX-License-Identifier: GPL-3.0-or-later

package stack

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"

	"github.com/mutex-proxy/mutex/flow"
)

// conn is an accepted connection of an application.
//
// Errors are those of a socket: io.EOF after the application's FIN, ECONNRESET after its RST (also when data was still unread on our way to
// it), ETIMEDOUT when it stopped answering, EPIPE after CloseWrite, net.ErrClosed after Close or Abort, os.ErrDeadlineExceeded.
type conn struct {
	t             *tcpFront
	local, remote *net.TCPAddr // remote is the application
	opened        bool         // by the application, with
	seq           uint32       // of its SYN

	ep    tcpip.Endpoint
	queue waiter.Queue
	entry waiter.Entry

	read, write side
	up, down    *flow.Counter // of WriteTo and ReadFrom; may be nil
	out         *upload       // what WriteTo writes to; made by its first call, used by one at a time
	closed      atomic.Bool
}

var (
	_ flow.Conn     = (*conn)(nil)
	_ io.WriterTo   = (*conn)(nil)
	_ io.ReaderFrom = (*conn)(nil)
	_ flow.Counted  = (*conn)(nil)
	_ flow.Parker   = (*conn)(nil)
)

// side is one direction: who waits for it, and until when.
type side struct {
	busy sync.Mutex           // held by the one caller at a time
	wake chan struct{}        // capacity 1: the endpoint may be ready, the deadline changed or passed, or the connection was closed
	peer atomic.Pointer[peer] // what WriteTo or ReadFrom may be blocked on instead

	resume func()      // called instead of waking; nil = nobody parks. Set before the first use
	parked atomic.Bool // resume is due with the next wake-up

	mu       sync.Mutex
	deadline time.Time
	timer    *time.Timer // wakes at the deadline; nil until there is one
}

func newConn(t *tcpFront, id stack.TransportEndpointID) *conn {
	c := &conn{
		t:      t,
		local:  net.TCPAddrFromAddrPort(netip.AddrPortFrom(addrOf(id.LocalAddress), id.LocalPort)),
		remote: net.TCPAddrFromAddrPort(netip.AddrPortFrom(addrOf(id.RemoteAddress), id.RemotePort)),
	}
	c.read.wake = make(chan struct{}, 1)
	c.write.wake = make(chan struct{}, 1)
	return c
}

// start takes the endpoint, which has completed its handshake.
func (c *conn) start(ep tcpip.Endpoint) {
	c.ep = ep
	c.entry.Init(c, waiter.ReadableEvents|waiter.WritableEvents|waiter.EventHUp|waiter.EventErr)
	c.queue.EventRegister(&c.entry)

	size := bufferSize(c.t.open.Add(1))
	o := ep.SocketOptions()
	o.SetReceiveBufferSize(size, true)
	o.SetSendBufferSize(size, true)
	o.SetKeepAlive(true)
	idle, interval := tcpip.KeepaliveIdleOption(keepAliveIdle), tcpip.KeepaliveIntervalOption(keepAliveInterval)
	// They fail for bad values only.
	_ = ep.SetSockOpt(&idle)
	_ = ep.SetSockOpt(&interval)
	_ = ep.SetSockOptInt(tcpip.KeepaliveCountOption, keepAliveCount)
}

// NotifyEvent is netstack's call when the endpoint changes. It may be made with the endpoint locked: it must not call into it but for its state, which
// is atomic.
func (c *conn) NotifyEvent(mask waiter.EventMask) {
	const end = waiter.EventHUp | waiter.EventErr
	if mask&(waiter.ReadableEvents|end) != 0 {
		c.read.poke()
	}
	if mask&(waiter.WritableEvents|end) != 0 {
		c.write.poke()
	}
	if mask&end != 0 {
		c.t.reuse.poke()
		for _, s := range []*side{&c.read, &c.write} {
			if c.broken(s) {
				s.peer.Load().interrupt()
			}
		}
	}
}

// broken says whether the connection has ended under the side. StateClose is where a reset after the application's FIN leads; for the reader it may
// as well be the orderly end of both directions, with bytes before it still to be read.
func (c *conn) broken(s *side) bool {
	switch tcp.EndpointState(c.ep.State()) {
	case tcp.StateError:
		return true
	case tcp.StateClose:
		return s == &c.write
	}
	return false
}

func (s *side) poke() {
	if s.parked.CompareAndSwap(true, false) {
		s.resume()
		return
	}
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

func (s *side) setDeadline(t time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.deadline = t
	if s.timer != nil {
		s.timer.Stop()
	}
	if !t.IsZero() {
		if d := time.Until(t); s.timer == nil {
			s.timer = time.AfterFunc(d, s.poke)
		} else {
			s.timer.Reset(d)
		}
	}
	s.poke() // the waiter looks at the new deadline
}

func (s *side) expired() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.deadline.IsZero() && !time.Now().Before(s.deadline)
}

// check says whether an operation on the side may go on.
func (c *conn) check(s *side) error {
	switch {
	case c.closed.Load():
		return net.ErrClosed
	case s.expired():
		return os.ErrDeadlineExceeded
	}
	return nil
}

// await blocks until the endpoint may be ready.
func (c *conn) await(s *side) error {
	if err := c.check(s); err != nil {
		return err
	}
	<-s.wake
	return c.check(s)
}

// Read reads at least one byte, or returns io.EOF after the application's FIN.
func (c *conn) Read(b []byte) (int, error) {
	c.read.busy.Lock()
	defer c.read.busy.Unlock()
	if err := c.check(&c.read); err != nil {
		return 0, c.opError("read", err)
	}
	if len(b) == 0 {
		return 0, nil
	}
	for {
		n, err := c.tryRead(b)
		if errors.Is(err, errWouldBlock) {
			err = c.await(&c.read)
		}
		switch {
		case n > 0:
			return n, nil
		case errors.Is(err, io.EOF):
			return 0, err
		case err != nil:
			return 0, c.opError("read", err)
		}
	}
}

var errWouldBlock = errors.New("would block")

// tryRead reads what there is: io.EOF after FIN, errWouldBlock if there is nothing yet.
func (c *conn) tryRead(b []byte) (int, error) {
	w := tcpip.SliceWriter(b)
	res, err := c.ep.Read(&w, tcpip.ReadOptions{})
	return res.Count, c.readError(err)
}

func (c *conn) readError(err tcpip.Error) error {
	switch err.(type) {
	case nil:
		return nil
	case *tcpip.ErrWouldBlock:
		return errWouldBlock
	case *tcpip.ErrClosedForReceive:
		if !c.closed.Load() {
			return io.EOF
		}
	}
	return c.errorOf(err)
}

// Write writes all of b, or returns an error.
func (c *conn) Write(b []byte) (int, error) {
	c.write.busy.Lock()
	defer c.write.busy.Unlock()
	n, err := c.writeLocked(b)
	if err != nil {
		return n, c.opError("write", err)
	}
	return n, nil
}

func (c *conn) writeLocked(b []byte) (int, error) {
	if err := c.check(&c.write); err != nil {
		return 0, err
	}
	done := 0
	for done < len(b) {
		n, err := c.ep.Write(bytes.NewReader(b[done:]), tcpip.WriteOptions{})
		done += int(n)
		switch err.(type) {
		case nil:
			if done == len(b) {
				return done, nil
			}
		case *tcpip.ErrWouldBlock:
		default:
			return done, c.errorOf(err)
		}
		// netstack says that there is room again when half of the buffer is free: filling it up to the brim in between is not worth it.
		if err := c.await(&c.write); err != nil {
			return done, err
		}
	}
	return done, nil
}

// CloseWrite sends FIN after what was written.
func (c *conn) CloseWrite() error {
	if c.closed.Load() {
		return c.opError("close", net.ErrClosed)
	}
	if err := c.ep.Shutdown(tcpip.ShutdownWrite); err != nil {
		return c.opError("close", c.errorOf(err))
	}
	return nil
}

// orphanTimeout is how long netstack may go on delivering, after Close, what was written before.
const orphanTimeout = time.Minute

// Close closes both directions: what was written is still delivered, and what the application sends from now on, or has sent unread, is answered with RST.
func (c *conn) Close() error {
	if !c.closed.CompareAndSwap(false, true) {
		return nil
	}
	c.over()
	// Without a bound, an application that stopped reading would keep a closed connection's data for as long as it lives.
	limit := tcpip.TCPUserTimeoutOption(orphanTimeout)
	_ = c.ep.SetSockOpt(&limit)
	c.ep.Close()
	c.wakeAll()
	return nil
}

// over counts the connection as ended.
func (c *conn) over() {
	c.t.open.Add(-1)
	if c.opened {
		c.t.late.note(endpointID(c.local.AddrPort(), c.remote.AddrPort()), c.seq)
	}
}

// Abort sends RST and discards what is queued. It is safe after Close, and then cuts short what Close left to do.
func (c *conn) Abort() {
	first := c.closed.CompareAndSwap(false, true)
	if first {
		c.over()
	}
	// An endpoint that is closed and has reached its end was cleaned up: nothing may touch it again.
	if s := tcp.EndpointState(c.ep.State()); first || s != tcp.StateClose && s != tcp.StateError {
		c.ep.Abort()
	}
	if first {
		c.ep.Close() // marks an endpoint that was reset as closed by its user, so that its queues are freed
	}
	c.wakeAll()
}

func (c *conn) wakeAll() {
	for _, s := range []*side{&c.read, &c.write} {
		s.mu.Lock()
		if s.timer != nil {
			s.timer.Stop()
		}
		s.mu.Unlock()
		s.poke()
		s.peer.Load().interrupt()
	}
}

// LocalAddr returns the address the application connected to.
func (c *conn) LocalAddr() net.Addr { return c.local }

// RemoteAddr returns the application's own address.
func (c *conn) RemoteAddr() net.Addr { return c.remote }

// SetDeadline sets both deadlines.
func (c *conn) SetDeadline(t time.Time) error {
	c.read.setDeadline(t)
	c.write.setDeadline(t)
	return nil
}

// SetReadDeadline bounds Read and WriteTo, also ones under way.
func (c *conn) SetReadDeadline(t time.Time) error {
	c.read.setDeadline(t)
	return nil
}

// SetWriteDeadline bounds Write and ReadFrom, also ones under way.
func (c *conn) SetWriteDeadline(t time.Time) error {
	c.write.setDeadline(t)
	return nil
}

func (c *conn) opError(op string, err error) error {
	return &net.OpError{Op: op, Net: "tcp", Source: c.local, Addr: c.remote, Err: err}
}

// errorOf translates what the endpoint says; after Close it can only be about that.
func (c *conn) errorOf(err tcpip.Error) error {
	if c.closed.Load() {
		return net.ErrClosed
	}
	return errorOf(err)
}

// errorOf returns what a kernel's socket would say.
func errorOf(err tcpip.Error) error {
	switch err.(type) {
	case *tcpip.ErrConnectionReset:
		return unix.ECONNRESET
	case *tcpip.ErrConnectionRefused:
		return unix.ECONNREFUSED
	case *tcpip.ErrTimeout:
		return unix.ETIMEDOUT
	case *tcpip.ErrConnectionAborted, *tcpip.ErrAborted:
		return unix.ECONNABORTED
	case *tcpip.ErrClosedForSend:
		return unix.EPIPE
	case *tcpip.ErrNotConnected, *tcpip.ErrInvalidEndpointState:
		return unix.ENOTCONN
	case *tcpip.ErrHostUnreachable, *tcpip.ErrNetworkUnreachable:
		return unix.EHOSTUNREACH
	}
	return errors.New(err.String())
}
