// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/flow"
)

// HTTP/2 CONNECT (RFC 9113 section 8.5): many connections are streams of few. Whether a proxy speaks it is settled by ALPN on each new
// connection to it; https with http=1.1 does not offer it.
//
//	Dial ──▶ a connection with room for a stream? ──no──▶ connect, TLS, ALPN ──"http/1.1"──▶ converse, see http.go
//	              │yes                                          │"h2"
//	              └─────────────▶ CONNECT on a stream ◀─────────┘

const (
	protoH2 = "h2"
	protoH1 = "http/1.1"

	// h2Conns bounds the connections to one proxy; each has as many streams as the proxy allows, mostly 100 to 256.
	h2Conns = 64
	// h2Quiet and h2Pong find a connection that is dead: a ping after so long a silence, and the wait for its answer.
	h2Quiet = 30 * time.Second
	h2Pong  = 15 * time.Second
	// h2Idle is how long a connection without streams is kept.
	h2Idle = 2 * time.Minute
	// h2Window is what a stream may have on its way to us unread: as much as the netstack's send buffer.
	h2Window = 1 << 20
)

// errStale is a stream that was refused by a connection which had been there before: another one may take it.
var errStale = errors.New("the connection to the proxy has ended")

// h2Pool is the connections to one proxy that speaks HTTP/2.
type h2Pool struct {
	mu    sync.Mutex
	conns []*h2Conn
}

// h2Conn is one connection.
type h2Conn struct {
	*http.ClientConn
	tcp   *TCPConn
	timer *time.Timer // closes it when it has been idle; guarded by the pool's mu
}

// reserve returns a connection with room for a stream, whose place is taken; nil if there is none.
func (p *h2Pool) reserve() *h2Conn {
	p.mu.Lock()
	defer p.mu.Unlock()
	alive := p.conns[:0]
	var found *h2Conn
	for _, c := range p.conns {
		if c.Err() != nil {
			c.tcp.Abort()
			continue
		}
		alive = append(alive, c)
		if found == nil && c.Reserve() == nil {
			found = c
		}
	}
	clear(p.conns[len(alive):])
	p.conns = alive
	return found
}

// chosenH2 returns the TLS of a connection on which the proxy has chosen HTTP/2; nil of others.
func chosenH2(c flow.Conn) *tls.Conn {
	if tc, ok := c.(*tlsConn); ok && tc.ConnectionState().NegotiatedProtocol == protoH2 {
		return tc.Conn
	}
	return nil
}

// newH2Conn makes a connection of one whose TLS handshake has chosen HTTP/2, and reserves a stream on it.
func newH2Conn(ctx context.Context, tc *tls.Conn, tcp *TCPConn) (*h2Conn, error) {
	var protocols http.Protocols
	protocols.SetHTTP2(true)
	t := &http.Transport{
		Protocols: &protocols, DisableCompression: true,
		DialTLSContext: func(context.Context, string, string) (net.Conn, error) { return tc, nil },
		HTTP2:          &http.HTTP2Config{SendPingTimeout: h2Quiet, PingTimeout: h2Pong, MaxReceiveBufferPerStream: h2Window},
	}
	cc, err := t.NewClientConn(ctx, "https", "proxy:443") // the address is not used
	if err != nil {
		return nil, fmt.Errorf("%w: %w", flow.ErrUpstream, err)
	}
	if err := cc.Reserve(); err != nil {
		_ = cc.Close()
		return nil, fmt.Errorf("%w: %w", flow.ErrUpstream, err)
	}
	return &h2Conn{ClientConn: cc, tcp: tcp}, nil
}

// add takes a connection that others are to use too.
func (p *h2Pool) add(c *h2Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.conns) < h2Conns { // one more serves this stream alone
		p.conns = append(p.conns, c)
	}
}

// rest closes a connection that has been without streams for a while. It is called when a stream ends.
func (p *h2Pool) rest(c *h2Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if c.InFlight() > 0 {
		return
	}
	if c.timer == nil {
		c.timer = time.AfterFunc(h2Idle, func() { p.close(c) })
	} else {
		c.timer.Reset(h2Idle)
	}
}

func (p *h2Pool) close(c *h2Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if c.InFlight() > 0 {
		return
	}
	_ = c.Close()
	c.tcp.Abort()
	for i := range p.conns {
		if p.conns[i] == c {
			p.conns = append(p.conns[:i], p.conns[i+1:]...)
			return
		}
	}
}

// overStream asks for dst on a connection that is reserved, and counts the result as a flow whose place is taken already. An error gives
// the place back and leaves the connection as good as before.
func (h *HTTP) overStream(ctx context.Context, c *h2Conn, dst flow.Addr, l *login) (flow.Conn, error) {
	a := &h2Asker{h: h, c: c, dst: dst, ctx: ctx, first: true}
	if err := h.logIn(a, l); err != nil {
		a.give()
		h.leave()
		h.h2.rest(c)
		if c.Err() != nil && ctx.Err() == nil {
			return nil, fmt.Errorf("%w: %w", errStale, err)
		}
		return nil, err
	}
	s := newH2Stream(a)
	s.onClose = func() {
		h.closed(s)
		h.leave()
		h.h2.rest(c)
	}
	h.opened(s)
	return s, nil
}

// h2Asker asks on streams of one connection (see asker).
type h2Asker struct {
	h     *HTTP
	c     *h2Conn
	dst   flow.Addr
	ctx   context.Context //nolint:containedctx // of one Dial, as the asker is
	first bool            // the reserved place has not been used

	resp  *http.Response
	up    net.Conn // what the application sends is written to it
	reset func()   // ends the stream with RST_STREAM
}

// h2Body is what the application sends, as net/http reads it. An end of it is END_STREAM, an error RST_STREAM; a cancelled context alone is
// not noticed by who waits for the next byte.
type h2Body struct {
	net.Conn
	aborted atomic.Bool
}

var errAborted = errors.New("aborted")

// Read returns an error instead of the end if there is to be no end.
func (b *h2Body) Read(p []byte) (int, error) {
	n, err := b.Conn.Read(p)
	if err != nil && b.aborted.Load() {
		err = errAborted
	}
	return n, err
}

// ask sends CONNECT on a new stream and waits for the header of the reply.
func (a *h2Asker) ask(l *login) (*response, []string, error) {
	if !a.first {
		if err := a.c.Reserve(); err != nil {
			return nil, nil, fmt.Errorf("%w: %w", flow.ErrUpstream, err)
		}
	}
	a.first = false
	target := requestTarget(a.dst)
	fields := http.Header{"User-Agent": nil}
	secrets := a.h.fields(target, l, fields.Add)
	near, far := net.Pipe() // has deadlines, which io.Pipe has not
	life, cancel := context.WithCancel(context.Background())
	body := &h2Body{Conn: far}
	reset := func() {
		body.aborted.Store(true)
		_ = near.Close()
		cancel()
	}
	req := &http.Request{Method: http.MethodConnect, URL: &url.URL{Host: target}, Host: target, Header: fields, Body: body, ContentLength: -1}
	stop := context.AfterFunc(a.ctx, reset)
	resp, err := a.c.RoundTrip(req.WithContext(life))
	if !stop() && err == nil {
		_ = resp.Body.Close()
		err = context.Cause(a.ctx)
	}
	if err != nil {
		reset()
		return nil, nil, a.failed(err)
	}
	a.resp, a.up, a.reset = resp, near, reset
	return responseOf(resp), secrets, nil
}

// failed says what it means that there is no reply.
func (a *h2Asker) failed(err error) error {
	switch {
	case errors.Is(a.ctx.Err(), context.DeadlineExceeded):
		return fmt.Errorf("%w: no reply", flow.ErrTimeout)
	case a.ctx.Err() != nil:
		return context.Cause(a.ctx)
	case a.c.Err() == nil && strings.Contains(err.Error(), "CONNECT_ERROR"), strings.Contains(err.Error(), "REFUSED_STREAM"):
		return fmt.Errorf("%w: stream reset", flow.ErrHostUnreachable)
	}
	return fmt.Errorf("reply: %w: %w", flow.ErrUpstream, err)
}

// again gives the stream up; the next request has one of its own.
func (a *h2Asker) again(*response) error {
	a.give()
	return nil
}

// give gives up the stream, if there is one.
func (a *h2Asker) give() {
	if a.resp != nil {
		a.reset()
		_ = a.resp.Body.Close()
		a.resp = nil
	}
}

// body returns the first bytes of an error page.
func (a *h2Asker) body() []byte {
	stop := time.AfterFunc(bodyWait, a.reset)
	defer stop.Stop()
	buf := make([]byte, maxErrorBody)
	n, _ := io.ReadFull(a.resp.Body, buf)
	return buf[:n]
}

// responseOf is the part of a reply that matters.
func responseOf(resp *http.Response) *response {
	f := resp.Header
	r := &response{
		status: resp.StatusCode, reason: http.StatusText(resp.StatusCode), squid: f.Get("X-Squid-Error"), proxy: f.Get("Proxy-Status"),
		length: resp.ContentLength,
	}
	r.challenges = f.Values("Proxy-Authenticate")
	r.challenges = r.challenges[:min(len(r.challenges), maxChallenges)]
	r.nextnonce = nextNonce(f.Get("Proxy-Authentication-Info"))
	return r
}

// h2Stream is a stream as a connection. Two pipes stand between it and net/http, which knows no deadlines on the parts of a request.
type h2Stream struct {
	up, down net.Conn
	reset    func()    // RST_STREAM
	body     io.Closer // of the reply
	tcp      *TCPConn
	pump     sync.WaitGroup

	once    sync.Once
	onClose func()

	mu  sync.Mutex
	err error // how the downward direction ended, if not by its end of file
}

var _ flow.Conn = (*h2Stream)(nil)

func newH2Stream(a *h2Asker) *h2Stream {
	near, far := net.Pipe()
	s := &h2Stream{up: a.up, down: near, reset: a.reset, body: a.resp.Body, tcp: a.c.tcp}
	body := a.resp.Body
	s.pump.Go(func() {
		_, err := io.Copy(far, body)
		s.mu.Lock()
		if s.err == nil && err != nil {
			s.err = fmt.Errorf("%w: %w", unix.ECONNRESET, err)
		}
		s.mu.Unlock()
		_ = far.Close()
	})
	return s
}

// Read returns io.EOF after END_STREAM, and ECONNRESET after RST_STREAM or the end of the connection.
func (s *h2Stream) Read(b []byte) (int, error) {
	n, err := s.down.Read(b)
	if err != nil && errors.Is(err, io.EOF) {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.err != nil {
			err = s.err
		}
	}
	return n, s.op("read", err)
}

func (s *h2Stream) Write(b []byte) (int, error) {
	n, err := s.up.Write(b)
	if errors.Is(err, io.ErrClosedPipe) {
		err = unix.EPIPE // the stream was reset, or closed by us
	}
	return n, s.op("write", err)
}

func (s *h2Stream) op(op string, err error) error {
	if err == nil || errors.Is(err, io.EOF) || timedOut(err) {
		return err
	}
	return &net.OpError{Op: op, Net: "tcp", Addr: s.tcp.RemoteAddr(), Err: err}
}

// CloseWrite sends END_STREAM.
func (s *h2Stream) CloseWrite() error { return s.up.Close() }

// Close ends both directions; what was written is still sent, what comes is not read any more.
func (s *h2Stream) Close() error {
	s.end(func() { _ = s.up.Close() })
	return nil
}

// Abort sends RST_STREAM.
func (s *h2Stream) Abort() { s.end(s.reset) }

func (s *h2Stream) end(how func()) {
	s.once.Do(func() {
		how()
		_ = s.down.Close()
		_ = s.body.Close() // a pump that reads returns, as does one that writes
		s.pump.Wait()
		s.reset()
		s.onClose()
	})
}

// LocalAddr is that of the connection the stream is on.
func (s *h2Stream) LocalAddr() net.Addr { return s.tcp.LocalAddr() }

// RemoteAddr is the proxy's.
func (s *h2Stream) RemoteAddr() net.Addr { return s.tcp.RemoteAddr() }

// SetDeadline sets both deadlines.
func (s *h2Stream) SetDeadline(t time.Time) error {
	return errors.Join(s.SetReadDeadline(t), s.SetWriteDeadline(t))
}

// SetReadDeadline bounds Read.
func (s *h2Stream) SetReadDeadline(t time.Time) error { return s.down.SetReadDeadline(t) }

// SetWriteDeadline bounds Write.
func (s *h2Stream) SetWriteDeadline(t time.Time) error { return s.up.SetWriteDeadline(t) }
