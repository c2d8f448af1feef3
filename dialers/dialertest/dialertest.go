// SPDX-License-Identifier: GPL-3.0-or-later

// Package dialertest has upstreams that misbehave: that hang, lie, talk garbage, never stop talking, or fall over half way. Tests of
// dialers and of whatever is built on them use it; nothing else does.
//
// A Server plays one script on each connection. Conn is a connection in memory whose replies come in the pieces that a test wants.
package dialertest

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"
)

// Step is one thing that a Server does on a connection. A step that returns an error ends the connection.
type Step func(*Conv) error

// Conv is one connection of a Server. It is closed when the script has ended.
type Conv struct {
	*net.TCPConn
	tb testing.TB
}

// Server is a scripted upstream on loopback.
type Server struct {
	Addr netip.AddrPort

	l     *net.TCPListener
	wg    sync.WaitGroup
	mu    sync.Mutex
	conns []*net.TCPConn
	over  bool
}

// Start serves steps on each connection until the test ends.
func Start(tb testing.TB, steps ...Step) *Server {
	tb.Helper()
	var lc net.ListenConfig
	l, err := lc.Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	s := &Server{l: l.(*net.TCPListener), Addr: l.Addr().(*net.TCPAddr).AddrPort()}
	s.wg.Go(func() { s.accept(tb, steps) })
	tb.Cleanup(s.Close)
	return s
}

func (s *Server) accept(tb testing.TB, steps []Step) {
	tb.Helper()
	for {
		c, err := s.l.AcceptTCP()
		if err != nil {
			return
		}
		s.mu.Lock()
		if s.over {
			s.mu.Unlock()
			_ = c.Close()
			return
		}
		s.conns = append(s.conns, c)
		s.wg.Go(func() {
			defer func() { _ = c.Close() }()
			for _, step := range steps {
				if step(&Conv{TCPConn: c, tb: tb}) != nil {
					return
				}
			}
		})
		s.mu.Unlock()
	}
}

// Accepted returns how many connections there have been.
func (s *Server) Accepted() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.conns)
}

// Drop ends the connections there are with RST.
func (s *Server) Drop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.conns {
		_ = c.SetLinger(0)
		_ = c.Close()
	}
}

// Close ends the server and waits for its scripts.
func (s *Server) Close() {
	s.mu.Lock()
	s.over = true
	_ = s.l.Close()
	for _, c := range s.conns {
		_ = c.Close()
	}
	s.mu.Unlock()
	s.wg.Wait()
}

// Expect reads exactly want. Anything else fails the test.
func Expect(want string) Step {
	return func(c *Conv) error {
		got := make([]byte, len(want))
		n, err := io.ReadFull(c, got)
		if err == nil && string(got) != want {
			err = fmt.Errorf("client sent %q, want %q", got[:n], want)
			c.tb.Error(err)
		}
		return err
	}
}

// Read reads n bytes, whatever they are.
func Read(n int64) Step {
	return func(c *Conv) error {
		_, err := io.CopyN(io.Discard, c, n)
		return err
	}
}

// ReadHead reads up to an empty line.
func ReadHead() Step {
	return func(c *Conv) error {
		var head []byte
		for b := make([]byte, 1); !bytes.HasSuffix(head, []byte("\r\n\r\n")); head = append(head, b[0]) {
			if _, err := io.ReadFull(c, b); err != nil {
				return err
			}
		}
		return nil
	}
}

// Send sends p in one piece.
func Send(p string) Step {
	return func(c *Conv) error {
		_, err := io.WriteString(c, p)
		return err
	}
}

// SendSlowly sends p one byte a segment.
func SendSlowly(p string) Step {
	return func(c *Conv) error {
		for i := range len(p) {
			if _, err := io.WriteString(c, p[i:i+1]); err != nil {
				return err
			}
		}
		return nil
	}
}

// Endless sends p again and again until the client has had enough.
func Endless(p string) Step {
	return func(c *Conv) error {
		chunk := bytes.Repeat([]byte(p), 1+4096/len(p))
		for {
			if _, err := c.Write(chunk); err != nil {
				return err
			}
		}
	}
}

// Silent takes what comes and says nothing until the client closes.
func Silent() Step {
	return func(c *Conv) error {
		_, err := io.Copy(io.Discard, c)
		return err
	}
}

// Echo sends back what comes, and an end of file after an end of file.
func Echo() Step {
	return func(c *Conv) error {
		_, err := io.Copy(c, struct{ io.Reader }{c})
		return err
	}
}

// Reset ends the connection with RST.
func Reset() Step {
	return func(c *Conv) error {
		if err := c.SetLinger(0); err != nil {
			return err
		}
		return c.Close()
	}
}

// Conn is a connection in memory: Read returns one piece of Pieces after the other, then io.EOF; what is written is kept.
type Conn struct {
	Pieces  [][]byte
	Written bytes.Buffer
}

// Split returns a Conn whose reply comes in two pieces.
func Split(reply string, at int) *Conn {
	return &Conn{Pieces: [][]byte{[]byte(reply[:at]), []byte(reply[at:])}}
}

// Bytewise returns a Conn whose reply comes in pieces of one byte.
func Bytewise(reply string) *Conn {
	c := new(Conn)
	for i := range len(reply) {
		c.Pieces = append(c.Pieces, []byte{reply[i]})
	}
	return c
}

// Read returns at most one piece.
func (c *Conn) Read(p []byte) (int, error) {
	for len(c.Pieces) > 0 && len(c.Pieces[0]) == 0 {
		c.Pieces = c.Pieces[1:]
	}
	if len(c.Pieces) == 0 {
		return 0, io.EOF
	}
	n := copy(p, c.Pieces[0])
	c.Pieces[0] = c.Pieces[0][n:]
	return n, nil
}

// Rest returns what has not been read.
func (c *Conn) Rest() string { return string(bytes.Join(c.Pieces, nil)) }

// Write keeps p.
func (c *Conn) Write(p []byte) (int, error) { return c.Written.Write(p) }

// Close does nothing.
func (c *Conn) Close() error { return nil }

// LocalAddr returns nil.
func (c *Conn) LocalAddr() net.Addr { return nil }

// RemoteAddr returns nil.
func (c *Conn) RemoteAddr() net.Addr { return nil }

// SetDeadline does nothing.
func (c *Conn) SetDeadline(time.Time) error { return nil }

// SetReadDeadline does nothing.
func (c *Conn) SetReadDeadline(time.Time) error { return nil }

// SetWriteDeadline does nothing.
func (c *Conn) SetWriteDeadline(time.Time) error { return nil }

var _ net.Conn = (*Conn)(nil)
