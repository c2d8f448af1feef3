// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/flow"
)

const (
	// maxHead bounds the header of a reply, 1xx replies included. The largest real ones (squid's errors) have 2 KB.
	maxHead = 32 << 10
	// peekSize is how much of a header is looked at in one system call.
	peekSize = 2048
	// maxErrorBody bounds what is read of an error page, and bodyWait for how long: it arrives with the header or is not worth waiting
	// for while an application's SYN is held.
	maxErrorBody = 2048
	bodyWait     = 200 * time.Millisecond
)

// HTTP is an HTTP proxy asked with CONNECT (RFC 9110 section 9.3.6), in the clear or inside TLS (https). It is sent names. Credentials
// are Basic (RFC 7617), Digest (RFC 7616) or Bearer (RFC 6750). It carries UDP in a stream only.
type HTTP struct {
	upstream
	tls    *tls.Config // nil for http
	digest digest
	h2     h2Pool
}

func newHTTP(name string, s Spec, n *Net) *HTTP {
	h := new(HTTP)
	h.init(name, s, n)
	if s.Scheme == SchemeHTTPS {
		protos := []string{protoH2, protoH1}
		switch s.HTTP {
		case "1.1":
			protos = protos[1:]
		case "2":
			protos = protos[:1]
		}
		h.tls = tlsConfig(&s, protos...)
	}
	h.keepWarm(func(ctx context.Context, c *TCPConn) (flow.Conn, error) { return secure(ctx, c, h.tls) })
	return h
}

// Status returns the counters and what has been learned.
func (h *HTTP) Status() Status {
	st := h.status()
	st.Bind, st.RemoteDNS = no, yes
	if !h.spec.overTCP() {
		st.UDP = no
	}
	return st
}

func (h *HTTP) takesNames() bool { return true }

// DialContext is Dial for golang.org/x/net/proxy.
func (h *HTTP) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	return dialContext(ctx, h, network, address)
}

// ListenPacket opens an association in a stream if that is asked for (udp=over-tcp), and else wraps errors.ErrUnsupported.
func (h *HTTP) ListenPacket(ctx context.Context, _ *flow.Flow) (flow.PacketConn, error) {
	if h.spec.overTCP() {
		return h.listenOverTCP(ctx, h.Dial)
	}
	return nil, h.wrap("udp", errors.ErrUnsupported)
}

// Dial asks the upstream for a connection to dst. Over http the result is a plain socket, over https it is not.
func (h *HTTP) Dial(ctx context.Context, dst flow.Addr) (flow.Conn, error) {
	c, err := h.dial(ctx, dst)
	h.done(err)
	return c, err
}

func (h *HTTP) dial(ctx context.Context, dst flow.Addr) (flow.Conn, error) {
	op := "connect " + dst.String()
	v6 := dst.Host == "" && dst.IP.Is6() && !dst.IP.Is4In6()
	switch {
	case dst.Host != "" && !sendable(dst.Host):
		return nil, h.wrap("connect", fmt.Errorf("%w: not a name that can be sent", flow.ErrHostUnreachable))
	case dst.Host == "" && !dst.IP.IsValid():
		return nil, h.wrap("connect", fmt.Errorf("%w: no destination", flow.ErrHostUnreachable))
	case v6 && !h.ipv6.allowed():
		return nil, h.wrap(op, fmt.Errorf("%w: the upstream has no IPv6", flow.ErrNetUnreachable))
	}
	conn, err := h.ask(ctx, op, dst)
	if v6 {
		h.learnIPv6(err)
	}
	return conn, err
}

// ask makes connections to the proxy until one of them is through to dst. A second one is needed where a proxy asks for credentials and
// closes, and where one that is shared has just ended.
func (h *HTTP) ask(ctx context.Context, op string, dst flow.Addr) (flow.Conn, error) {
	var l login
	if c := h.reserve(); c != nil {
		conn, err := h.shared(ctx, c, dst, &l)
		if err == nil {
			return conn, nil
		}
		if !errors.Is(err, errStale) {
			return nil, h.ended(ctx, op, err)
		}
	}
	w := h.warmed()
	if w == nil {
		return h.askFresh(ctx, op, dst, &l)
	}
	begun := make(chan login, 1) // what the proxy has asked for before it has ended the connection that was ready
	return overWarm(ctx, &h.upstream, op, w, func() (flow.Conn, error) {
		conn, err := h.speak(w.conn, dst, &l)
		switch {
		case err == nil:
			h.track(w.tcp)
		case errors.Is(err, errReconnect):
			begun <- l
		}
		return conn, err
	}, func(ctx context.Context) (flow.Conn, error) {
		var l login // that of the other counts as used
		select {
		case l = <-begun:
		default:
		}
		return h.askFresh(ctx, op, dst, &l)
	}, flow.Conn.Abort)
}

// askFresh is ask on connections that are new.
func (h *HTTP) askFresh(ctx context.Context, op string, dst flow.Addr, l *login) (flow.Conn, error) {
	for {
		tcp, err := h.connect(ctx)
		if err != nil {
			return nil, err
		}
		conn, err := h.through(ctx, tcp, dst, l)
		if err == nil {
			return conn, nil
		}
		if !errors.Is(err, errReconnect) {
			return nil, h.ended(ctx, op, err)
		}
	}
}

// reserve returns a connection that others use too, with a place for one stream more; nil if there is none.
func (h *HTTP) reserve() *h2Conn {
	if h.tls == nil {
		return nil // HTTP/2 is chosen in TLS
	}
	return h.h2.reserve()
}

// shared asks on a connection that others use too.
func (h *HTTP) shared(ctx context.Context, c *h2Conn, dst flow.Addr, l *login) (flow.Conn, error) {
	err := errOff
	if !h.off() {
		err = h.take()
	}
	if err != nil {
		c.Release()
		return nil, err
	}
	return h.overStream(ctx, c, dst, l)
}

// through asks on a new connection, by what the proxy chooses of the protocols. An error leaves it closed, or to the pool.
func (h *HTTP) through(ctx context.Context, tcp *TCPConn, dst flow.Addr, l *login) (flow.Conn, error) {
	var conn flow.Conn
	var h2 *tls.Conn
	err := handshake(ctx, tcp, func() error {
		sc, err := secure(ctx, tcp, h.tls)
		if err != nil {
			return err
		}
		if h2 = chosenH2(sc); h2 != nil {
			return nil
		}
		conn, err = h.speak(sc, dst, l)
		return err
	})
	if err != nil {
		tcp.Abort()
		return nil, err
	}
	if h2 == nil {
		h.track(tcp)
		return conn, nil
	}
	c, err := newH2Conn(ctx, h2, tcp)
	if err != nil {
		tcp.Abort()
		return nil, err
	}
	h.h2.add(c)
	tcp.leave = nil // the place is the stream's
	return h.overStream(ctx, c, dst, l)
}

// speak asks by HTTP/1.1 on a connection of one's own, and returns it with what has followed the reply.
func (h *HTTP) speak(c flow.Conn, dst flow.Addr, l *login) (flow.Conn, error) {
	tc, ok := c.(*tlsConn)
	if !ok {
		tcp := c.(*TCPConn) // secure returns nothing else
		return tcp, h.converse(tcp, &socketHead{c: tcp}, dst, l)
	}
	head := &streamHead{r: tc.Conn}
	err := h.converse(tc.Conn, head, dst, l)
	tc.head = head.left
	return tc, err
}

// headReader hands out the bytes of a reply's header, and keeps what follows it.
type headReader interface {
	// more returns the next bytes of the header, up to its end as found by scan, at least one. What scan does not take stays unread.
	more(scan func([]byte) int) ([]byte, error)
	// body returns the first bytes of an error page, if there are any now.
	body() []byte
	// drop reads the n bytes of a body and forgets them.
	drop(n int64) error
}

// readHead reads headers until one that is not 1xx, and returns that.
func readHead(h headReader) ([]byte, error) {
	var raw []byte
	for total := 0; ; {
		end := headEnd{}
		part, err := h.more(end.scan)
		raw = append(raw, part...)
		for err == nil && !end.done && total+len(raw) <= maxHead {
			part, err = h.more(end.scan)
			raw = append(raw, part...)
		}
		total += len(raw)
		switch {
		case err != nil:
			return raw, err
		case !end.done || total > maxHead:
			return raw, errors.New("header too large")
		case len(raw) > 9 && raw[9] == '1' && !hasStatus(raw, "101"): // RFC 9110 section 15.2: any number of interim replies
			raw = raw[:0]
			continue
		}
		return raw, nil
	}
}

// headEnd finds the empty line that ends a header, over several pieces. A line may end in LF alone (RFC 9112 section 2.2).
type headEnd struct {
	last [2]byte // the line so far: only whether it is empty, or a lone CR, matters
	n    int     // its length, at most 2
	seen bool    // a line has ended before
	done bool
}

// scan returns how many bytes of p belong to the header.
func (e *headEnd) scan(p []byte) int {
	for i, c := range p {
		if c == '\n' {
			if e.seen && (e.n == 0 || e.n == 1 && e.last[0] == '\r') {
				e.done = true
				return i + 1
			}
			e.seen, e.n = true, 0
			continue
		}
		if e.n < len(e.last) {
			e.last[e.n] = c
			e.n++
		}
	}
	return len(p)
}

// socketHead reads a header from a plain socket. It looks before it reads (MSG_PEEK), so that what follows the header is still in the
// socket when flow gets it, and bytes can go from socket to netstack without a buffer of ours between.
type socketHead struct{ c *TCPConn }

func (s *socketHead) more(scan func([]byte) int) ([]byte, error) {
	buf := make([]byte, peekSize)
	raw, err := s.c.SyscallConn()
	if err != nil {
		return nil, err
	}
	var n int
	var rerr error
	err = raw.Read(func(fd uintptr) bool {
		for {
			n, _, rerr = unix.Recvfrom(int(fd), buf, unix.MSG_PEEK|unix.MSG_DONTWAIT)
			if !errors.Is(rerr, unix.EINTR) {
				return !errors.Is(rerr, unix.EAGAIN)
			}
		}
	})
	if err == nil {
		err = rerr
	}
	if err != nil {
		return nil, err
	}
	if n == 0 {
		return nil, io.EOF
	}
	part := buf[:scan(buf[:n])]
	_, err = io.ReadFull(s.c, part) // the same bytes, now taken
	return part, err
}

func (s *socketHead) body() []byte { return errorPage(s.c) }

func (s *socketHead) drop(n int64) error {
	_, err := io.CopyN(io.Discard, struct{ io.Reader }{s.c}, n)
	return err
}

// streamHead reads a header from a stream that cannot be looked into (TLS). What it reads too much is in left.
type streamHead struct {
	r    net.Conn
	left []byte
}

func (s *streamHead) more(scan func([]byte) int) ([]byte, error) {
	p := s.left
	if len(p) == 0 {
		p = make([]byte, peekSize)
		n, err := s.r.Read(p)
		if n == 0 && err == nil {
			err = io.ErrNoProgress
		}
		if n == 0 {
			return nil, err
		}
		p = p[:n]
	}
	k := scan(p)
	s.left = p[k:]
	return p[:k], nil
}

func (s *streamHead) body() []byte {
	if len(s.left) > 0 {
		return s.left
	}
	return errorPage(s.r)
}

func (s *streamHead) drop(n int64) error {
	k := min(n, int64(len(s.left)))
	s.left = s.left[k:]
	_, err := io.CopyN(io.Discard, s.r, n-k)
	return err
}

// errorPage reads the first bytes of an error page. The connection is of no use afterwards.
func errorPage(c net.Conn) []byte {
	_ = c.SetReadDeadline(time.Now().Add(bodyWait))
	buf := make([]byte, maxErrorBody)
	n, _ := c.Read(buf)
	return buf[:n]
}
