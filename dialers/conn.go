// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/flow"
)

var (
	_ flow.Socket  = (*TCPConn)(nil)
	_ syscall.Conn = (*TCPConn)(nil)
	_ flow.Conn    = (*tlsConn)(nil)
	_ flow.Bound   = (*TCPConn)(nil)
	_ flow.Bound   = (*tlsConn)(nil)
)

// TCPConn is a plain TCP socket with an abort. Nothing is buffered above its descriptor.
type TCPConn struct {
	*net.TCPConn
	mu      sync.Mutex
	taken   func() // resets the socket after Detach; nil before
	ended   bool   // Close or Abort was called
	once    sync.Once
	onClose func()                                      // runs once, at the first Close or Abort; nil = nothing
	leave   func()                                      // gives the place at the upstream back, with onClose; nil = nothing
	bind    func(context.Context) (flow.Binding, error) // nil = the upstream has no such thing
	lazy    bool                                        // acknowledges with data: ack.go
	direct  bool                                        // there is no upstream
}

// Direct reports whether the connection is that of a Direct (flow.Bound).
func (c *TCPConn) Direct() bool { return c.direct }

// Bind asks the upstream of the connection to accept one from the same destination (flow.Bound).
func (c *TCPConn) Bind(ctx context.Context) (flow.Binding, error) {
	if c.bind == nil {
		return nil, fmt.Errorf("bind: %w", errors.ErrUnsupported)
	}
	return c.bind(ctx)
}

// Detach gives the socket away (flow.Socket).
func (c *TCPConn) Detach(fd int, abort func()) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended || c.taken != nil {
		return net.ErrClosed
	}
	cerr := raw.Control(func(s uintptr) { err = unix.Dup3(int(s), fd, unix.O_CLOEXEC) })
	if err := errors.Join(cerr, err); err != nil {
		return err
	}
	c.taken = abort
	return c.TCPConn.Close()
}

// Close closes the socket; what is queued is still sent.
func (c *TCPConn) Close() error {
	c.mu.Lock()
	c.ended = true
	c.mu.Unlock()
	err := c.TCPConn.Close()
	c.closed()
	return err
}

// Abort sends RST and discards what is queued. After Close it does nothing.
func (c *TCPConn) Abort() {
	c.mu.Lock()
	taken := c.taken
	c.mu.Unlock()
	if taken != nil {
		taken()
		return
	}
	_ = c.SetLinger(0)
	_ = c.Close()
}

// userTimeout bounds how long the peer may take to acknowledge what is sent; 0 = the system's default.
func (c *TCPConn) userTimeout(d time.Duration) error {
	return c.setTCP(unix.TCP_USER_TIMEOUT, int(d.Milliseconds()))
}

// setTCP sets an option of tcp(7).
func (c *TCPConn) setTCP(option, value int) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	cerr := raw.Control(func(s uintptr) { err = unix.SetsockoptInt(int(s), unix.IPPROTO_TCP, option, value) })
	return errors.Join(cerr, err)
}

func (c *TCPConn) closed() {
	c.once.Do(func() {
		if c.onClose != nil {
			c.onClose()
		}
		if c.leave != nil {
			c.leave()
		}
	})
}

// secure starts TLS on a connection to a proxy; with a nil cfg it is the connection itself.
func secure(ctx context.Context, c *TCPConn, cfg *tls.Config) (flow.Conn, error) {
	if cfg == nil {
		return c, nil
	}
	tc := tls.Client(c.TCPConn, cfg)
	if err := tc.HandshakeContext(ctx); err != nil {
		return nil, fmt.Errorf("tls: %w: %w", flow.ErrUpstream, err)
	}
	return &tlsConn{Conn: tc, tcp: c}, nil
}

// tlsConn is a stream inside TLS. head is what arrived together with the proxy's reply and is read first.
type tlsConn struct {
	*tls.Conn
	tcp  *TCPConn
	head []byte
}

// Read returns the bytes that came with the proxy's reply before those that followed it. Only one goroutine may read.
func (c *tlsConn) Read(p []byte) (int, error) {
	if len(c.head) > 0 {
		n := copy(p, c.head)
		if c.head = c.head[n:]; len(c.head) == 0 {
			c.head = nil
		}
		return n, nil
	}
	return c.Conn.Read(p)
}

// Bind is that of the socket.
func (c *tlsConn) Bind(ctx context.Context) (flow.Binding, error) { return c.tcp.Bind(ctx) }

// Direct is that of the socket.
func (c *tlsConn) Direct() bool { return c.tcp.Direct() }

// CloseWrite sends close_notify: the proxy reads it as end of file.
func (c *tlsConn) CloseWrite() error { return c.Conn.CloseWrite() }

// Close sends close_notify and closes the socket.
func (c *tlsConn) Close() error {
	err := c.Conn.Close()
	c.tcp.closed()
	return err
}

// Abort sends RST, without close_notify.
func (c *tlsConn) Abort() { c.tcp.Abort() }
