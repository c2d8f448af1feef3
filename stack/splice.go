// SPDX-License-Identifier: GPL-3.0-or-later

package stack

import (
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/waiter"

	"github.com/mutex-proxy/mutex/flow"
)

// The copy-free relay. Towards the upstream, netstack's Endpoint.Read calls us with each view it holds, and we write(2) that to the
// socket; from the upstream, Endpoint.Write asks us for bytes, and we read(2) straight into the view it will send. No buffer of ours is in
// between, and none belongs to an idle flow. The socket belongs to the runtime's poller all the while: the system calls are made
// inside RawConn's callbacks, which also wait.

const (
	// pieceMax bounds the bytes of one Endpoint.Write, in views of 64 KiB, and those that are moved before they are counted.
	pieceMax = 256 << 10
	// copySize is the buffer for upstreams that are no sockets: a TLS record holds no more.
	copySize = 16 << 10
)

// peer is the far side of a relay that runs in WriteTo or ReadFrom. When the application resets the connection, the relay must not wait
// for a socket that stands still.
type peer struct {
	setDeadline func(time.Time) error
}

func (p *peer) interrupt() {
	if p != nil {
		_ = p.setDeadline(time.Unix(1, 0))
	}
}

// attach makes resets and Close interrupt the far side, until nil is stored again.
func (c *conn) attach(s *side, p *peer) {
	s.peer.Store(p)
	if c.closed.Load() || c.broken(s) {
		p.interrupt() // it happened before Store
	}
}

// farError says whose fault it is that op on the far side failed: an interruption is the application's.
func (c *conn) farError(op string, err error) error {
	near, side := "read", &c.read
	if op == "read" {
		near, side = "write", &c.write
	}
	if c.closed.Load() {
		return c.opError(near, net.ErrClosed)
	}
	if errors.Is(err, os.ErrDeadlineExceeded) && c.broken(side) {
		if _, e := c.ep.Write(&empty{}, tcpip.WriteOptions{}); e != nil {
			return c.opError(near, c.errorOf(e))
		}
	}
	return c.opError(op, err)
}

// SetCounters makes WriteTo count to read and ReadFrom to written (flow.Counted).
func (c *conn) SetCounters(read, written *flow.Counter) { c.up, c.down = read, written }

func count(c *flow.Counter, n int) {
	if c != nil {
		c.Add(uint64(n))
	}
}

// empty is a Payloader of nothing: writing it asks an endpoint for its error.
type empty struct{}

func (*empty) Read([]byte) (int, error) { return 0, io.EOF }
func (*empty) Len() int                 { return 0 }

// Park makes WriteTo return flow.ErrParked instead of waiting for the application (flow.Parker).
func (c *conn) Park(resume func()) {
	c.read.resume = resume
	if !c.park() {
		resume()
	}
}

// park has resume called when there is something for WriteTo to do; false if there is already.
func (c *conn) park() bool {
	c.read.parked.Store(true)
	// What happened before the Store has woken nobody.
	const any = waiter.ReadableEvents | waiter.EventHUp | waiter.EventErr
	if c.check(&c.read) == nil && c.ep.Readiness(any) == 0 {
		return true
	}
	return !c.read.parked.CompareAndSwap(true, false) // else resume has been called
}

// pause waits until there may be something to read; flow.ErrParked if the caller is to come back for it.
func (c *conn) pause() error {
	if c.read.resume == nil {
		return c.await(&c.read)
	}
	if err := c.check(&c.read); err != nil {
		return err
	}
	if c.park() {
		return flow.ErrParked
	}
	return nil
}

// upload is the far side of WriteTo, kept from one call to the next: a parked connection is resumed without allocating.
type upload struct {
	w    io.Writer
	peer *peer
	raw  syscall.RawConn // nil if w is no socket
	sock socketWriter
	step func(uintptr) bool
}

func (c *conn) uploadTo(w io.Writer) *upload {
	u := &upload{w: w, sock: socketWriter{c: c}}
	if d, ok := w.(interface{ SetWriteDeadline(time.Time) error }); ok {
		u.peer = &peer{setDeadline: d.SetWriteDeadline}
	}
	if sc, ok := w.(syscall.Conn); ok {
		if raw, err := sc.SyscallConn(); err == nil {
			u.raw = raw
		}
	}
	u.step = u.sock.step
	return u
}

// WriteTo sends what the application sends to w until its FIN, and then returns nil; w is left open. Errors are *net.OpError: "write" if w
// failed, "read" if the application's side did. If w is a syscall.Conn (a socket), it must not be written to by others meanwhile.
func (c *conn) WriteTo(w io.Writer) (int64, error) {
	c.read.busy.Lock()
	defer c.read.busy.Unlock()
	if c.out == nil || c.out.w != w {
		c.out = c.uploadTo(w)
	}
	if c.out.peer != nil {
		c.attach(&c.read, c.out.peer)
		defer c.read.peer.Store(nil)
	}
	if c.out.raw != nil {
		return c.writeToSocket(c.out)
	}
	return c.copyTo(w)
}

func (c *conn) writeToSocket(u *upload) (int64, error) {
	s := &u.sock
	var total int64
	for {
		if err := c.check(&c.read); err != nil {
			return total, c.opError("read", err)
		}
		s.moved, s.err = 0, nil
		err := u.raw.Write(u.step)
		if s.moved > 0 {
			total += int64(s.moved)
			count(c.up, s.moved)
		}
		if err != nil {
			return total, c.farError("write", err)
		}
		switch {
		case s.err == nil:
		case errors.Is(s.err, errWouldBlock):
			// Only now: a FIN behind the data may have used up its wake-up long ago.
			if err := c.pause(); err != nil {
				return total, c.readOpError(err)
			}
		case errors.Is(s.err, io.EOF):
			return total, nil
		default:
			return total, s.err
		}
	}
}

// readOpError is opError for a wait, which may have been left.
func (c *conn) readOpError(err error) error {
	if errors.Is(err, flow.ErrParked) {
		return err
	}
	return c.opError("read", err)
}

// socketWriter moves bytes from the endpoint to a socket.
type socketWriter struct {
	c     *conn
	fd    int
	moved int
	full  bool  // the socket takes no more now
	err   error // the endpoint's or the socket's
}

// step is RawConn.Write's callback: false makes it wait until the socket is writable and call again.
func (s *socketWriter) step(fd uintptr) bool {
	s.fd, s.full = int(fd), false
	for s.err == nil && s.moved < pieceMax {
		res, err := s.c.ep.Read(s, tcpip.ReadOptions{})
		s.moved += res.Count
		if s.full {
			return false
		}
		if s.err == nil {
			s.err = s.c.readError(err)
		}
	}
	return true
}

// Write is called by the endpoint, with its lock held, for each view it has: it must not block, and a short write must come with an
// error. It goes on until EAGAIN, because only that arms the poller's edge.
func (s *socketWriter) Write(b []byte) (int, error) {
	done := 0
	for done < len(b) {
		n, err := unix.Write(s.fd, b[done:])
		switch {
		case err == nil:
			done += n
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EAGAIN):
			s.full = true
			return done, io.ErrShortWrite
		default:
			s.err = s.c.opError("write", os.NewSyscallError("write", err))
			return done, s.err
		}
	}
	return done, nil
}

// copyTo is WriteTo for what is not a socket. It holds a buffer only while there is something to copy.
func (c *conn) copyTo(w io.Writer) (int64, error) {
	var total int64
	for {
		if err := c.check(&c.read); err != nil {
			return total, c.opError("read", err)
		}
		buf := c.t.s.copies.get()
		n, err := c.tryRead(*buf)
		if n > 0 {
			var werr error
			n, werr = w.Write((*buf)[:n])
			total += int64(n)
			count(c.up, n)
			if werr != nil {
				c.t.s.copies.put(buf)
				return total, c.farError("write", werr)
			}
		}
		c.t.s.copies.put(buf)
		switch {
		case err == nil:
		case errors.Is(err, errWouldBlock):
			if err := c.pause(); err != nil {
				return total, c.readOpError(err)
			}
		case errors.Is(err, io.EOF):
			return total, nil
		default:
			return total, c.opError("read", err)
		}
	}
}

// ReadFrom sends what r yields to the application until its end, and then returns nil without sending FIN. Errors are *net.OpError: "read" if
// r failed, "write" if the application's side did. If r is a syscall.Conn (a socket), it must not be read from by others meanwhile.
func (c *conn) ReadFrom(r io.Reader) (int64, error) {
	c.write.busy.Lock()
	defer c.write.busy.Unlock()
	if d, ok := r.(interface{ SetReadDeadline(time.Time) error }); ok {
		c.attach(&c.write, &peer{setDeadline: d.SetReadDeadline})
		defer c.write.peer.Store(nil)
	}
	if sc, ok := r.(syscall.Conn); ok {
		if raw, err := sc.SyscallConn(); err == nil {
			return c.readFromSocket(raw)
		}
	}
	return c.copyFrom(r)
}

func (c *conn) readFromSocket(raw syscall.RawConn) (int64, error) {
	s := &socketReader{c: c}
	step := s.step
	var total int64
	for {
		if err := c.check(&c.write); err != nil {
			return total, c.opError("write", err)
		}
		s.moved, s.few, s.full, s.err = 0, 0, false, nil
		err := raw.Read(step)
		if err == nil && s.few > 0 {
			s.moved, s.err = c.writeLocked(s.small[:s.few])
		}
		if s.moved > 0 {
			total += int64(s.moved)
			count(c.down, s.moved)
		}
		switch {
		case err != nil:
			return total, c.farError("read", err)
		case errors.Is(s.err, io.EOF):
			return total, nil
		case s.err != nil:
			return total, s.err
		case s.full:
			// Woken when half of the send buffer is free; to fill it up to the brim in between would mean ever smaller pieces.
			if err := c.await(&c.write); err != nil {
				return total, c.opError("write", err)
			}
		}
	}
}

// socketReader moves bytes from a socket to the endpoint. It is the Payloader of Endpoint.Write, and has to deliver exactly Len() bytes:
// an early end makes the endpoint ask for ever, an error makes it lose what it was given.
type socketReader struct {
	c     *conn
	fd    int
	want  int // bytes still promised by Len
	moved int
	full  bool  // the endpoint takes no more now
	err   error // io.EOF, the endpoint's or the socket's
	few   int   // bytes in small
	small [64]byte
}

// step is RawConn.Read's callback: false makes it wait until the socket is readable and call again.
func (s *socketReader) step(fd uintptr) bool {
	s.fd = int(fd)
	queued, err := unix.IoctlGetInt(s.fd, unix.TIOCINQ)
	if err != nil || queued <= 0 {
		return s.end()
	}
	s.want = min(queued, pieceMax)
	want := s.want
	n, terr := s.c.ep.Write(s, tcpip.WriteOptions{})
	s.moved = int(n)
	switch terr.(type) {
	case nil:
		s.full = s.moved < want
	case *tcpip.ErrWouldBlock:
		s.full = true
	default:
		if s.err == nil {
			s.err = s.c.opError("write", s.c.errorOf(terr))
		}
	}
	return true
}

// end looks closer at a socket with nothing queued: nothing yet, its end, an error, or (after urgent data, which TIOCINQ stops before)
// some bytes all the same.
func (s *socketReader) end() bool {
	for {
		n, err := unix.Read(s.fd, s.small[:])
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			return false
		case err != nil:
			s.err = s.c.opError("read", os.NewSyscallError("read", err))
		case n == 0:
			s.err = io.EOF
		default:
			s.few = n
		}
		return true
	}
}

// Len returns the bytes that Read will deliver.
func (s *socketReader) Len() int { return s.want }

// Read is called by the endpoint, without its lock, with the room of a fresh view; and with none, to ask for the end.
func (s *socketReader) Read(b []byte) (int, error) {
	b = b[:min(len(b), s.want)]
	if len(b) == 0 {
		return 0, nil
	}
	for {
		n, err := unix.Read(s.fd, b)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			s.err = s.c.opError("read", os.NewSyscallError("read", err))
			return 0, s.err
		case n == 0: // cannot be: that many bytes were queued, and nobody else reads
			s.err = io.ErrUnexpectedEOF
			return 0, s.err
		}
		s.want -= n
		return n, nil
	}
}

// copyFrom is ReadFrom for what is not a socket.
func (c *conn) copyFrom(r io.Reader) (int64, error) {
	buf := c.t.s.copies.get()
	defer c.t.s.copies.put(buf)
	var total int64
	for {
		n, err := r.Read(*buf)
		if n > 0 {
			n, werr := c.writeLocked((*buf)[:n])
			total += int64(n)
			count(c.down, n)
			if werr != nil {
				return total, c.opError("write", werr)
			}
		}
		if err == io.EOF {
			return total, nil
		}
		if err != nil {
			return total, c.farError("read", err)
		}
	}
}
