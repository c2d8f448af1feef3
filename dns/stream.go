// SPDX-License-Identifier: GPL-3.0-or-later

package dns

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/miekg/dns"

	"github.com/mutex-proxy/mutex/flow"
)

const (
	// maxStreams bounds the shared connections to one server, and, apart from those, the connections that carry one question each.
	maxStreams = 4
	maxSingle  = 16
	// serialStrikes: a server that twice closed a connection after its first answer while more questions were waiting does one question
	// a connection (common before RFC 7766).
	serialStrikes = 2
	// maxStray bounds the messages in a row that answer no question: a few are late, more are a server that is none.
	maxStray = maxInFlight
	// writeTimeout: a server that does not read for this long is dead; others wait behind the write.
	writeTimeout = 5 * time.Second
)

// errGone is what a question gets whose connection ended before the answer: it is asked again.
var errGone = errors.New("connection closed before the answer")

// streams asks one server over TCP or TLS (RFC 7766, RFC 7858): many questions at a time on few connections, answers in any order.
type streams struct {
	p    *profile
	via  flow.Dialer
	addr flow.Addr
	tls  *tls.Config   // nil: plain TCP
	one  chan struct{} // one element a connection that carries a single question

	mu      sync.Mutex
	conns   []*stream // at most maxStreams
	strikes int
}

// stream is one shared connection, from before it is dialed until it is closed.
type stream struct {
	s     *streams
	mux   mux
	ready chan struct{} // closed when conn is set
	conn  net.Conn
	wmu   sync.Mutex // one write at a time
}

func newStreams(p *profile, via flow.Dialer, addr flow.Addr, conf *tls.Config) *streams {
	return &streams{p: p, via: via, addr: addr, tls: conf, one: make(chan struct{}, maxSingle)}
}

func tlsConfig(addr flow.Addr, roots *x509.CertPool, protocol string) *tls.Config {
	name := addr.Host
	if name == "" {
		name = addr.IP.String()
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS12, ServerName: name, RootCAs: roots, NextProtos: []string{protocol},
		ClientSessionCache: tls.NewLRUClientSessionCache(maxStreams),
	}
}

func (s *streams) close() {} // connections end with the profile's life

// ask tries a shared connection, once more on another if that one ended first (servers close idle ones at any time), and at last a
// connection of its own.
func (s *streams) ask(ctx context.Context, q question) (*dns.Msg, error) {
	for range 2 {
		c := s.shared()
		if c == nil {
			break
		}
		m, err := c.ask(ctx, q)
		if !errors.Is(err, errGone) && !errors.Is(err, errFull) {
			return m, err
		}
	}
	return s.single(ctx, q)
}

// shared returns the least busy connection, or a new one; nil if the server takes one question a connection.
func (s *streams) shared() *stream {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.strikes >= serialStrikes {
		return nil
	}
	var best *stream
	least := maxInFlight / 2
	for _, c := range s.conns {
		if n, _ := c.mux.load(); n < least || len(s.conns) == maxStreams && best == nil {
			best, least = c, n
		}
	}
	if best == nil {
		best = &stream{s: s, ready: make(chan struct{})}
		s.conns = append(s.conns, best)
		s.p.wg.Go(best.run)
	}
	return best
}

// remove forgets a connection that has ended with so many questions unanswered and answered.
func (s *streams) remove(c *stream, waiting int, answered uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, o := range s.conns {
		if o == c {
			s.conns = append(s.conns[:i], s.conns[i+1:]...)
			break
		}
	}
	switch {
	case answered > 1:
		s.strikes = 0
	case answered == 1 && waiting > 0:
		s.strikes++
	}
}

// dial opens a connection. It lives no longer than the profile.
func (s *streams) dial(ctx context.Context) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	conn, err := s.via.Dial(ctx, s.addr)
	if err != nil {
		return nil, err
	}
	if s.tls == nil {
		return conn, nil
	}
	tc := tls.Client(conn, s.tls)
	if err := tc.HandshakeContext(ctx); err != nil {
		conn.Close()
		return nil, fmt.Errorf("tls: %w", err)
	}
	return tc, nil
}

// run dials and reads until the connection ends.
func (c *stream) run() {
	conn, err := c.s.dial(c.s.p.life)
	if err != nil {
		c.s.remove(c, 0, 0)
		c.mux.fail(err)
		return
	}
	defer conn.Close()
	defer context.AfterFunc(c.s.p.life, func() { conn.Close() })()
	c.conn = conn
	close(c.ready)
	r := bufio.NewReader(conn)
	for stray := 0; err == nil; {
		var wire []byte
		if err = conn.SetReadDeadline(time.Now().Add(idleTimeout)); err != nil {
			break
		}
		if wire, err = readMessage(r); err != nil {
			break
		}
		if stray++; c.mux.deliver(wire) {
			stray = 0
		}
		if stray > maxStray {
			err = errMalformed
		}
	}
	waiting, answered := c.mux.fail(fmt.Errorf("%w: %w", errGone, err))
	c.s.remove(c, waiting, answered)
}

// ask sends one question and waits for its answer.
func (c *stream) ask(ctx context.Context, q question) (*dns.Msg, error) {
	id, w, err := c.mux.add(q)
	if err != nil {
		return nil, err
	}
	defer c.mux.remove(id)
	select {
	case <-c.ready:
	case r := <-w.ch: // not connected
		return r.msg, r.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	_, before := c.mux.load()
	asked := time.Now()
	if err := c.write(id, q); err != nil {
		return nil, err
	}
	select {
	case r := <-w.ch:
		return r.msg, r.err
	case <-ctx.Done():
		// A connection on which nothing has come back for as long as it takes to turn to another server is dead: the next question
		// opens a new one.
		if _, now := c.mux.load(); now == before && time.Since(asked) >= stagger {
			c.conn.Close()
		}
		return nil, context.Cause(ctx)
	}
}

func (c *stream) write(id uint16, q question) error {
	wire, err := q.pack(id, c.s.tls != nil)
	if err != nil {
		return err
	}
	c.wmu.Lock()
	defer c.wmu.Unlock()
	now := time.Now()
	err = errors.Join(c.conn.SetReadDeadline(now.Add(idleTimeout)), c.conn.SetWriteDeadline(now.Add(writeTimeout)))
	if err == nil {
		_, err = c.conn.Write(framed(wire))
	}
	if err != nil {
		c.conn.Close()
		return fmt.Errorf("%w: %w", errGone, err)
	}
	return nil
}

// single asks on a connection of its own.
func (s *streams) single(ctx context.Context, q question) (*dns.Msg, error) {
	select {
	case s.one <- struct{}{}:
		defer func() { <-s.one }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	conn, err := s.dial(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	var m mux
	id, w, err := m.add(q)
	if err != nil {
		return nil, err
	}
	wire, err := q.pack(id, s.tls != nil)
	if err != nil {
		return nil, err
	}
	if _, err := conn.Write(framed(wire)); err != nil {
		return nil, err
	}
	r := bufio.NewReader(conn)
	for range maxStray {
		wire, err := readMessage(r)
		if err != nil {
			return nil, errors.Join(context.Cause(ctx), err)
		}
		if m.deliver(wire) {
			r := <-w.ch
			return r.msg, r.err
		}
	}
	return nil, errMalformed
}

// framed puts the length before a message (RFC 1035 section 4.2.2), so that both go in one write (RFC 7766 section 8).
func framed(wire []byte) []byte {
	b := make([]byte, 2, 2+len(wire))
	binary.BigEndian.PutUint16(b, uint16(len(wire)))
	return append(b, wire...)
}

// readMessage reads one message of at most 65535 bytes; memory is only spent on what has arrived.
func readMessage(r *bufio.Reader) ([]byte, error) {
	var head [2]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	n := int(binary.BigEndian.Uint16(head[:]))
	b := make([]byte, 0, min(n, 2048))
	for len(b) < n {
		have := len(b)
		b = append(b, make([]byte, min(n-have, 2048))...)
		if _, err := io.ReadFull(r, b[have:]); err != nil {
			return nil, err
		}
	}
	return b, nil
}
