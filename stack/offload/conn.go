// SPDX-License-Identifier: GPL-3.0-or-later

package offload

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/flow"
)

// end is one socket of a pair as a net.Conn. Read and Write are for what is not spliced: a flow whose upstream is no socket, and what is left of
// one when a side has failed.
type end struct {
	pair *pair
	side int

	mu   sync.Mutex
	conn net.Conn // a second descriptor of the socket, in the runtime's poller; nil until it is needed
}

// Conn is an adopted connection of an application. Its errors are those of a socket.
type Conn struct {
	end
	e             *Engine
	local, remote netip.AddrPort // remote is the application
	confirm, hear *time.Timer    // nil if the application's kernel had answered at once
}

var _ flow.Splicer = (*Conn)(nil)

func newConn(e *Engine, fd, spare int, s *SYN) *Conn {
	c := &Conn{e: e, local: s.Dst, remote: s.Src}
	c.pair = &pair{fd: [2]int{fd, -1}, spare: spare}
	c.side = appSide
	e.add(c)
	return c
}

// confirmed says whether the application's kernel has been heard of since the SYN-ACK; an error is its reset.
func (c *Conn) confirmed() (bool, error) {
	c.pair.mu.Lock()
	defer c.pair.mu.Unlock()
	fd := c.pair.fd[appSide]
	if fd < 0 {
		return true, nil // ended some other way
	}
	info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	if err != nil {
		return false, os.NewSyscallError("tcp_info", err)
	}
	if info.State == unix.BPF_TCP_CLOSE {
		return false, unix.ECONNRESET
	}
	return info.Segs_in > 0, nil
}

// Answered says whether the application's kernel has been heard of, if only by a reset.
func (c *Conn) Answered() bool {
	return c.confirm == nil || c.answered()
}

func (c *Conn) answered() bool {
	ok, err := c.confirmed()
	return ok || err != nil
}

// doubt has the connection looked at again after silence, and after confirmTime.
func (c *Conn) doubt() {
	c.confirm = time.AfterFunc(confirmTime, c.unconfirmed)
	c.hear = time.AfterFunc(silence, func() {
		if c.answered() {
			c.e.hearing.yes()
		} else {
			c.e.hearing.no()
		}
	})
}

// unconfirmed ends a connection that nobody has ever answered for.
func (c *Conn) unconfirmed() {
	if ok, err := c.confirmed(); !ok || err != nil {
		c.pair.fail(unix.ETIMEDOUT)
	}
}

// Splice implements flow.Splicer.
func (c *Conn) Splice(up flow.Socket, counted, countedDown *flow.Counter, ended func(upload bool, err error)) (flow.Conn, func() error, error) {
	p := c.pair
	p.mu.Lock()
	if p.spare < 0 {
		p.mu.Unlock()
		return nil, nil, fmt.Errorf("splice: %w", net.ErrClosed)
	}
	if err := up.Detach(p.spare, func() { p.close(upSide, true) }); err != nil {
		p.mu.Unlock()
		return nil, nil, fmt.Errorf("splice: %w", err)
	}
	p.fd[upSide], p.spare, p.ended = p.spare, -1, ended
	p.dir[appSide].counter, p.dir[upSide].counter = counted, countedDown
	p.worker = c.e.workers[int(c.e.next.Add(1))%len(c.e.workers)]
	cut := p.cut
	p.mu.Unlock()
	if cut {
		p.close(upSide, true)
	}
	return &far{end: end{pair: p, side: upSide}, origin: up}, p.begin, nil
}

// Close closes both directions: what was written is still delivered.
func (c *Conn) Close() error { return c.finish(false) }

// Abort sends RST.
func (c *Conn) Abort() { _ = c.finish(true) }

func (c *Conn) finish(reset bool) error {
	if c.confirm != nil {
		c.confirm.Stop()
		if c.hear.Stop() {
			c.e.hearing.unknown()
		}
	}
	c.e.remove(c)
	c.end.finish(reset)
	c.pair.drop()
	return nil
}

// abandon resets both sides.
func (c *Conn) abandon() {
	c.Abort()
	c.pair.close(upSide, true)
}

// LocalAddr returns the address that the application connected to.
func (c *Conn) LocalAddr() net.Addr { return net.TCPAddrFromAddrPort(c.local) }

// RemoteAddr returns the application's own address.
func (c *Conn) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(c.remote) }

// far is the upstream's side of an adopted flow.
type far struct {
	end
	origin flow.Conn // counts as open until it is closed
}

var _ flow.Conn = (*far)(nil)

// Close closes the socket; what was written is still sent.
func (f *far) Close() error {
	f.finish(false)
	return f.origin.Close()
}

// Abort sends RST.
func (f *far) Abort() {
	f.finish(true)
	_ = f.origin.Close()
}

// LocalAddr and RemoteAddr are those of the socket.
func (f *far) LocalAddr() net.Addr { return f.origin.LocalAddr() }

// RemoteAddr returns the upstream's address.
func (f *far) RemoteAddr() net.Addr { return f.origin.RemoteAddr() }

// finish closes the socket and whatever uses it.
func (x *end) finish(reset bool) {
	x.pair.close(x.side, reset)
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.conn != nil {
		_ = x.conn.Close()
	}
}

// CloseWrite sends FIN after what was written.
func (x *end) CloseWrite() error {
	x.pair.mu.Lock()
	defer x.pair.mu.Unlock()
	fd := x.pair.fd[x.side]
	if fd < 0 {
		return opError("close", net.ErrClosed)
	}
	return os.NewSyscallError("shutdown", unix.Shutdown(fd, unix.SHUT_WR))
}

// plain returns the socket as a net.Conn of the runtime's poller.
func (x *end) plain() (net.Conn, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.conn != nil {
		return x.conn, nil
	}
	x.pair.mu.Lock()
	defer x.pair.mu.Unlock()
	fd := x.pair.fd[x.side]
	if fd < 0 {
		return nil, net.ErrClosed
	}
	fd, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("dup", err)
	}
	f := os.NewFile(uintptr(fd), "tcp")
	defer f.Close()
	x.conn, err = net.FileConn(f)
	return x.conn, err
}

// Read reads from a socket that is not, or no more, spliced from.
func (x *end) Read(b []byte) (int, error) {
	c, err := x.plain()
	if err != nil {
		return 0, opError("read", err)
	}
	return c.Read(b)
}

// Write writes to a socket that is not, or no more, spliced to.
func (x *end) Write(b []byte) (int, error) {
	c, err := x.plain()
	if err != nil {
		return 0, opError("write", err)
	}
	return c.Write(b)
}

// SetDeadline sets the deadlines of Read and Write; splicing has none.
func (x *end) SetDeadline(t time.Time) error {
	c, err := x.plain()
	if err != nil {
		return err
	}
	return c.SetDeadline(t)
}

// SetReadDeadline bounds Read.
func (x *end) SetReadDeadline(t time.Time) error {
	c, err := x.plain()
	if err != nil {
		return err
	}
	return c.SetReadDeadline(t)
}

// SetWriteDeadline bounds Write.
func (x *end) SetWriteDeadline(t time.Time) error {
	c, err := x.plain()
	if err != nil {
		return err
	}
	return c.SetWriteDeadline(t)
}
