// SPDX-License-Identifier: GPL-3.0-or-later

package server

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/dialers"
	"github.com/mutex-proxy/mutex/dialers/dialertest"
	"github.com/mutex-proxy/mutex/flow"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const secret = "hunter2-tOp+s3cret"

// start serves on loopback until the test ends, and greps the log for the password then.
func start(t *testing.T, cfg Config) (*Server, netip.AddrPort) {
	t.Helper()
	core, logs := observer.New(zapcore.DebugLevel)
	if cfg.Log == nil {
		cfg.Log = zap.New(core)
	}
	if cfg.Net == nil {
		cfg.Net = dialers.NewNet(dialers.NetConfig{})
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	l, err := cfg.Net.ListenTCP(t.Context(), netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), 0))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.Serve(context.Background(), l) }()
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
		for _, e := range logs.All() {
			if text := fmt.Sprint(e.Message, e.ContextMap()); strings.Contains(text, secret) {
				t.Errorf("the log has the password: %s", text)
			}
		}
		if s.Active() != 0 {
			t.Error("connections are left")
		}
	})
	return s, l.Addr().(*net.TCPAddr).AddrPort()
}

func connect(t *testing.T, to netip.AddrPort) *net.TCPConn {
	t.Helper()
	var d net.Dialer
	c, err := d.DialContext(t.Context(), "tcp", to.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	return c.(*net.TCPConn)
}

// fakeOut answers every dial with an error.
type fakeOut struct{ err error }

func (f fakeOut) Name() string { return "fake" }

func (f fakeOut) Dial(context.Context, flow.Addr) (flow.Conn, error) {
	return nil, fmt.Errorf("fake: %w", f.err)
}

func (f fakeOut) ListenPacket(context.Context, *flow.Flow) (flow.PacketConn, error) {
	return nil, fmt.Errorf("fake: %w", f.err)
}

var digestLine = regexp.MustCompile(`Proxy-Authenticate: Digest [^\r]*\r\n`)

// talk is what a client says, and all that it gets back.
func TestConversations(t *testing.T) {
	const zero = "\x00\x01\x00\x00\x00\x00\x00\x00"
	basic := "Proxy-Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte("bob:"+secret)) + "\r\n"
	users := map[string]string{"bob": secret, "empty": ""}
	ask := "HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic realm=\"mprox\", charset=\"UTF-8\"\r\n"
	for _, tt := range []struct {
		name       string
		users      map[string]string
		out        error
		says, gets string
	}{
		{"socks5 refused", nil, flow.ErrRefused, "\x05\x01\x00\x05\x01\x00\x01\x01\x02\x03\x04\x00\x50", "\x05\x00\x05\x05" + zero},
		{"socks5 host", nil, flow.ErrHostUnreachable, "\x05\x01\x00\x05\x01\x00\x03\x01a\x00\x50", "\x05\x00\x05\x04" + zero},
		{"socks5 net", nil, unix.ENETUNREACH, "\x05\x01\x00\x05\x01\x00\x04" + strings.Repeat("a", 16) + "\x00\x50", "\x05\x00\x05\x03" + zero},
		{"socks5 timeout", nil, context.DeadlineExceeded, "\x05\x01\x00\x05\x01\x00\x03\x01a\x00\x50", "\x05\x00\x05\x06" + zero},
		{"socks5 prohibited", nil, flow.ErrProhibited, "\x05\x01\x00\x05\x01\x00\x03\x01a\x00\x50", "\x05\x00\x05\x02" + zero},
		{"socks5 upstream", nil, flow.ErrUpstream, "\x05\x01\x00\x05\x01\x00\x03\x01a\x00\x50", "\x05\x00\x05\x01" + zero},
		{"socks5 bind through a chain", nil, flow.ErrRefused, "\x05\x01\x00\x05\x02\x00\x03\x01a\x00\x50", "\x05\x00\x05\x07" + zero},
		{"socks5 address type", nil, nil, "\x05\x01\x00\x05\x01\x00\x09\x01a\x00\x50", "\x05\x00\x05\x08" + zero},
		{"socks5 name", nil, nil, "\x05\x01\x00\x05\x01\x00\x03\x03a\nb\x00\x50", "\x05\x00\x05\x04" + zero},
		{"socks5 no udp", nil, errors.ErrUnsupported, "\x05\x01\x00\x05\x03\x00\x01\x00\x00\x00\x00\x00\x00", "\x05\x00\x05\x07" + zero},
		{"socks5 version in request", nil, nil, "\x05\x01\x00\x04\x01\x00\x03\x01a\x00\x50", "\x05\x00"},
		{"socks5 password not wanted", nil, flow.ErrRefused, "\x05\x01\x02\x01\x01a\x01b\x05\x01\x00\x03\x01a\x00\x50", "\x05\x02\x01\x00\x05\x05" + zero},
		{"socks5 password", users, flow.ErrRefused, "\x05\x02\x00\x02\x01\x03bob\x12" + secret + "\x05\x01\x00\x03\x01a\x00\x50", "\x05\x02\x01\x00\x05\x05" + zero},
		{"socks5 empty password", users, flow.ErrRefused, "\x05\x02\x00\x02\x01\x05empty\x00\x05\x01\x00\x03\x01a\x00\x50", "\x05\x02\x01\x00\x05\x05" + zero},
		{"socks5 wrong password", users, nil, "\x05\x02\x00\x02\x01\x03bob\x01x\x05\x01\x00\x03\x01a\x00\x50", "\x05\x02\x01\x01"},
		{"socks5 wrong user", users, nil, "\x05\x02\x00\x02\x01\x03eve\x00", "\x05\x02\x01\x01"},
		{"socks5 moved border", users, nil, "\x05\x02\x00\x02\x01\x04bobh\x11" + secret[1:], "\x05\x02\x01\x01"},
		{"socks5 no password", users, nil, "\x05\x01\x00", "\x05\xff"},
		{"socks5 no users at all", map[string]string{}, nil, "\x05\x01\x02\x01\x00\x00", "\x05\x02\x01\x01"},
		{"socks5 password version", users, nil, "\x05\x01\x02\x05\x00\x00", "\x05\x02"},
		{"socks5 no methods", nil, nil, "\x05\x00", "\x05\xff"},
		{"socks4", nil, flow.ErrRefused, "\x04\x01\x00\x50\x01\x02\x03\x04bob\x00", "\x00\x5b\x00\x00\x00\x00\x00\x00"},
		{"socks4a", nil, flow.ErrRefused, "\x04\x01\x00\x50\x00\x00\x00\x01\x00localhost\x00", "\x00\x5b\x00\x00\x00\x00\x00\x00"},
		{"socks4a name", nil, nil, "\x04\x01\x00\x50\x00\x00\x00\x01\x00a b\x00", "\x00\x5b\x00\x00\x00\x00\x00\x00"},
		{"socks4 bind", nil, nil, "\x04\x02\x00\x50\x01\x02\x03\x04\x00", "\x00\x5b\x00\x00\x00\x00\x00\x00"},
		{"socks4 has no password", users, nil, "\x04\x01\x00\x50\x01\x02\x03\x04bob\x00", "\x00\x5d\x00\x00\x00\x00\x00\x00"},
		{"socks4 endless user", nil, nil, "\x04\x01\x00\x50\x01\x02\x03\x04" + strings.Repeat("a", 300), ""},
		{"garbage", nil, nil, "\x00garbage", ""},
		{"nothing", nil, nil, "", ""},
		{
			"http refused", nil, flow.ErrRefused, "CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n",
			"HTTP/1.1 502 Bad Gateway\r\nConnection: close\r\nProxy-Status: mprox; error=connection_refused\r\nContent-Length: 0\r\n\r\n",
		},
		{
			"http timeout", nil, flow.ErrTimeout, "CONNECT a:80 HTTP/1.0\n\n",
			"HTTP/1.1 504 Gateway Timeout\r\nConnection: close\r\nProxy-Status: mprox; error=connection_timeout\r\nContent-Length: 0\r\n\r\n",
		},
		{
			"http prohibited", nil, flow.ErrProhibited, "CONNECT [::1]:80 HTTP/1.1\r\n\r\n",
			"HTTP/1.1 403 Forbidden\r\nConnection: close\r\nProxy-Status: mprox; error=destination_ip_prohibited\r\nContent-Length: 0\r\n\r\n",
		},
		{
			"http net", nil, flow.ErrNetUnreachable, "CONNECT [::1]:80 HTTP/1.1\r\n\r\n",
			"HTTP/1.1 502 Bad Gateway\r\nConnection: close\r\nProxy-Status: mprox; error=destination_ip_unroutable\r\nContent-Length: 0\r\n\r\n",
		},
		{
			"http upstream", nil, flow.ErrUpstream, "CONNECT a:80 HTTP/1.1\r\n\r\n",
			"HTTP/1.1 502 Bad Gateway\r\nConnection: close\r\nProxy-Status: mprox; error=destination_unavailable\r\nContent-Length: 0\r\n\r\n",
		},
		{"http get", nil, nil, "GET / HTTP/1.1\r\n\r\n", "HTTP/1.1 405 Method Not Allowed\r\nAllow: CONNECT\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"},
		{"http target", nil, nil, "CONNECT a HTTP/1.1\r\n\r\n", "HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"},
		{"http port 0", nil, nil, "CONNECT a:0 HTTP/1.1\r\n\r\n", "HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"},
		{"http name", nil, nil, "CONNECT a@b:80 HTTP/1.1\r\n\r\n", "HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"},
		{"http version", nil, nil, "CONNECT a:80 HTTP/2\r\n\r\n", "HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"},
		{"http folding", nil, nil, "CONNECT a:80 HTTP/1.1\r\nA: b\r\n c: d\r\n\r\n", "HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"},
		{"http fields", nil, nil, "CONNECT a:80 HTTP/1.1\r\n" + strings.Repeat("A: b\r\n", maxFields+1) + "\r\n", "HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"},
		{"http line", nil, nil, "CONNECT " + strings.Repeat("a", readBuffer) + ":80 HTTP/1.1\r\n\r\n", "HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"},
		{
			"http credentials on the second try", users, flow.ErrRefused, "CONNECT a:80 HTTP/1.1\r\n\r\nCONNECT a:80 HTTP/1.1\r\n" + basic + "\r\n",
			ask + "Content-Length: 0\r\n\r\nHTTP/1.1 502 Bad Gateway\r\nConnection: close\r\nProxy-Status: mprox; error=connection_refused\r\nContent-Length: 0\r\n\r\n",
		},
		{"http never any credentials", users, nil, strings.Repeat("CONNECT a:80 HTTP/1.1\r\n\r\n", 5), strings.Repeat(ask+"Content-Length: 0\r\n\r\n", maxTries)},
		{"http wrong scheme", users, nil, "CONNECT a:80 HTTP/1.1\r\nProxy-Authorization: Bearer x\r\nContent-Length: 3\r\n\r\nabc", ask + "Connection: close\r\nContent-Length: 0\r\n\r\n"},
		{"http get without credentials", users, nil, "GET / HTTP/1.1\r\n" + basic + "\r\n", "HTTP/1.1 405 Method Not Allowed\r\nAllow: CONNECT\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, at := start(t, Config{Users: tt.users, Dialer: fakeOut{tt.out}})
			for _, piece := range []int{len(tt.says), 1} { // in one segment, and byte by byte
				c := connect(t, at)
				for i := 0; i < len(tt.says); i += piece {
					if _, err := io.WriteString(c, tt.says[i:min(len(tt.says), i+piece)]); err != nil {
						break // it has heard enough
					}
				}
				_ = c.CloseWrite()
				got, err := io.ReadAll(c)
				got = digestLine.ReplaceAll(got, nil) // its nonce is another each time
				if err != nil && !errors.Is(err, unix.ECONNRESET) || string(got) != tt.gets {
					t.Errorf("in pieces of %d: %q, want %q (%v)", piece, got, tt.gets, err)
				}
			}
		})
	}
}

// upstreams are our own dialers at work with our own server.
func upstreams(at netip.AddrPort, auth string) []string {
	if auth == "" {
		return []string{"socks5://" + at.String(), "socks5h://" + at.String() + "?pipeline=1", "http://" + at.String(), "socks4://" + at.String(), "auto://" + at.String()}
	}
	return []string{"socks5://" + auth + at.String(), "socks5h://" + auth + at.String(), "socks5h://" + auth + at.String() + "?pipeline=1", "http://" + auth + at.String(), "auto://" + auth + at.String()}
}

func dialer(t *testing.T, raw string) flow.Dialer {
	t.Helper()
	s, err := dialers.ParseURL(raw)
	if err != nil {
		t.Fatal(err)
	}
	d, err := dialers.New("up", s, dialers.NewNet(dialers.NetConfig{}))
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestTransfer(t *testing.T) {
	_, at := start(t, Config{Users: map[string]string{"bob": secret}})
	origin := dialertest.Start(t, dialertest.Send("banner"), dialertest.Echo())
	for _, raw := range upstreams(at, "bob:"+strings.ReplaceAll(secret, "+", "%2B")+"@") {
		c, err := dialer(t, raw).Dial(t.Context(), flow.AddrFrom(origin.Addr))
		if err != nil {
			t.Fatal(err)
		}
		_ = c.SetDeadline(time.Now().Add(10 * time.Second))
		payload := strings.Repeat("0123456789abcdef", 1<<16) // 1 MiB
		go func() {
			_, _ = io.WriteString(c, payload)
			_ = c.CloseWrite()
		}()
		got, err := io.ReadAll(c)
		if err != nil || string(got) != "banner"+payload {
			t.Errorf("%s: %d bytes back, %v", raw, len(got), err)
		}
		c.Close()
	}
	for _, raw := range upstreams(at, "bob:x@") {
		_, err := dialer(t, raw).Dial(t.Context(), flow.AddrFrom(origin.Addr))
		if !errors.Is(err, flow.ErrUpstream) {
			t.Errorf("%s: %v", raw, err)
		}
	}
}

func TestTruth(t *testing.T) {
	_, at := start(t, Config{Allow: func(ap netip.AddrPort) bool { return ap.Port() != 9 }})
	closed := dialertest.Start(t)
	closed.Close()
	for _, raw := range upstreams(at, "") {
		d := dialer(t, raw)
		for dst, want := range map[flow.Addr]flow.Reason{
			flow.AddrFrom(closed.Addr):                       flow.ReasonRefused,
			{IP: netip.MustParseAddr("127.0.0.1"), Port: 9}:  flow.ReasonProhibited,
			{IP: netip.MustParseAddr("224.0.0.1"), Port: 80}: flow.ReasonNetUnreachable, // the kernel refuses TCP to a group, no packet leaves
		} {
			if _, err := d.Dial(t.Context(), dst); flow.ReasonOf(err) != want || errors.Is(err, flow.ErrUpstream) {
				if strings.HasPrefix(raw, "socks4") && flow.ReasonOf(err) == flow.ReasonHostUnreachable {
					continue // SOCKS4 has one code for all of them
				}
				t.Errorf("%s to %v: %v, want %v", raw, dst, err, want)
			}
		}
	}
}

func TestIdle(t *testing.T) {
	s, at := start(t, Config{IdleTimeout: 150 * time.Millisecond, HandshakeTimeout: 100 * time.Millisecond})
	origin := dialertest.Start(t, dialertest.Echo())
	c, err := dialer(t, "socks5://"+at.String()).Dial(t.Context(), flow.AddrFrom(origin.Addr))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	buf := make([]byte, 1)
	tick := time.NewTicker(30 * time.Millisecond)
	defer tick.Stop()
	for range 10 { // twice the limit, but never quiet
		<-tick.C
		if _, err := io.WriteString(c, "x"); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, buf); err != nil {
			t.Fatal(err)
		}
	}
	begin := time.Now()
	if _, err := c.Read(buf); !errors.Is(err, unix.ECONNRESET) || time.Since(begin) < 100*time.Millisecond {
		t.Errorf("%v after %v", err, time.Since(begin))
	}
	for _, says := range []string{"", "\x05", "\x05\x01", "\x05\x01\x00\x05", "CONNECT a:1 HTTP/1.1\r\n"} { // stuck in the handshake
		c := connect(t, at)
		if _, err := io.WriteString(c, says); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadAll(c); err != nil && !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("%q: %v", says, err)
		}
	}
	if err := s.Close(); err != nil || s.Active() != 0 {
		t.Error(err)
	}
}

// TestLimit fills a server with connections that are in use: what comes on top is reset, and the log says so once.
func TestLimit(t *testing.T) {
	core, logs := observer.New(zapcore.InfoLevel)
	s, at := start(t, Config{MaxConns: 2, Log: zap.New(core)})
	origin := dialertest.Start(t, dialertest.Silent())
	for range 2 {
		c, err := dialer(t, "socks5://"+at.String()).Dial(t.Context(), flow.AddrFrom(origin.Addr))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	for range 20 {
		var d net.Dialer
		third, err := d.DialContext(t.Context(), "tcp", at.String())
		if err == nil { // else the reset was faster than connect(2)
			_, err = third.Read(make([]byte, 1))
			third.Close()
		}
		if !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("a third connection: %v", err)
		}
	}
	if s.Active() != 2 {
		t.Error(s.Active())
	}
	if n := logs.FilterMessage("too many connections").Len(); n != 1 {
		t.Errorf("%d lines about too many connections", n)
	}
}

// TestSlowLoris fills a server with clients that never finish their request: those who do are served all the same.
func TestSlowLoris(t *testing.T) {
	const limit = 8
	s, at := start(t, Config{MaxConns: limit})
	origin := dialertest.Start(t, dialertest.Echo())
	for i := range 5 * limit {
		c := connect(t, at)
		if _, err := io.WriteString(c, []string{"\x05\x02", "CONNECT a:1 HT", "\x04\x01", ""}[i%4]); err != nil && !errors.Is(err, unix.ECONNRESET) {
			t.Error(err)
		}
	}
	for _, raw := range upstreams(at, "") {
		c, err := dialer(t, raw).Dial(t.Context(), flow.AddrFrom(origin.Addr))
		if err != nil {
			t.Errorf("%s: %v", raw, err)
			continue
		}
		defer c.Close()
	}
	if n := s.Active(); n > limit {
		t.Errorf("%d connections, more than %d", n, limit)
	}
}

// stuckOut never connects, and says when it stops trying.
type stuckOut struct {
	fakeOut
	begun chan struct{}
	ended chan error
}

func (s stuckOut) Dial(ctx context.Context, _ flow.Addr) (flow.Conn, error) {
	s.begun <- struct{}{}
	<-ctx.Done()
	s.ended <- ctx.Err()
	return nil, context.Cause(ctx)
}

// TestClientGoes: a client that goes while its destination does not answer frees its place, whether it ends or resets the connection. One that
// has sent something and ended its direction is still waiting for the answer.
func TestClientGoes(t *testing.T) {
	out := stuckOut{begun: make(chan struct{}, 1), ended: make(chan error, 1)}
	dialTime := map[bool]time.Duration{false: time.Hour, true: 2 * lingerTime}
	const request = "\x05\x01\x00\x05\x01\x00\x01\xc0\x00\x02\x01\x00\x50"
	for _, tt := range []struct {
		name, says string
		leave      func(*net.TCPConn)
		waits      bool // until the destination has had its time
	}{
		{"end", request, func(c *net.TCPConn) { c.Close() }, false},
		{"reset", request, func(c *net.TCPConn) { _ = c.SetLinger(0); c.Close() }, false},
		{"reset with early data", request + "GET", func(c *net.TCPConn) { _ = c.SetLinger(0); c.Close() }, false},
		{"end of what it has sent early", request + "GET", func(c *net.TCPConn) { _ = c.CloseWrite() }, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, at := start(t, Config{Dialer: out, DialTimeout: dialTime[tt.waits]})
			c := connect(t, at)
			if _, err := io.WriteString(c, tt.says); err != nil {
				t.Fatal(err)
			}
			<-out.begun
			tt.leave(c)
			if err := <-out.ended; errors.Is(err, context.DeadlineExceeded) != tt.waits {
				t.Errorf("given up: %v", err)
			}
		})
	}
}

func TestClose(t *testing.T) {
	s, at := start(t, Config{})
	origin := dialertest.Start(t, dialertest.Silent())
	var conns []flow.Conn
	for _, raw := range upstreams(at, "") {
		c, err := dialer(t, raw).Dial(t.Context(), flow.AddrFrom(origin.Addr))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		conns = append(conns, c)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := s.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	for _, c := range conns {
		if _, err := c.Read(make([]byte, 1)); err == nil {
			t.Error("a connection survived")
		}
	}
	if err := s.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
	l, err := dialers.NewNet(dialers.NetConfig{}).ListenTCP(t.Context(), netip.AddrPortFrom(at.Addr(), 0))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Serve(t.Context(), l); err != nil {
		t.Errorf("serve after close: %v", err)
	}
}

func TestServeEndsWithContext(t *testing.T) {
	n := dialers.NewNet(dialers.NetConfig{})
	s, err := New(Config{Net: n})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	l, err := n.ListenTCP(t.Context(), netip.MustParseAddrPort("127.0.0.1:0"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Serve(ctx, l); err != nil {
		t.Error(err)
	}
	if _, err := New(Config{}); err == nil {
		t.Error("no net")
	}
	if _, err := New(Config{Net: n, Dialer: fakeOut{}, Allow: func(netip.AddrPort) bool { return true }}); err == nil {
		t.Error("allow with a dialer")
	}
}

func TestAuthFunc(t *testing.T) {
	var asked atomic.Int32
	_, at := start(t, Config{Dialer: fakeOut{flow.ErrRefused}, Auth: func(u, p string) bool {
		asked.Add(1)
		return u == "a" && p == "b"
	}})
	for user, upstream := range map[string]bool{"a:b@": false, "a:c@": true} {
		for _, raw := range upstreams(at, user) {
			if _, err := dialer(t, raw).Dial(t.Context(), flow.Addr{Host: "a", IP: netip.MustParseAddr("192.0.2.1"), Port: 1}); errors.Is(err, flow.ErrUpstream) != upstream {
				t.Errorf("%s: %v", raw, err)
			}
		}
	}
	if asked.Load() == 0 {
		t.Error("nobody asked")
	}
}
