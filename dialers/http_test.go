// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"bufio"
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"io"
	"math/big"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/dialers/dialertest"
	"github.com/mutex-proxy/mutex/flow"
)

const ok200 = "HTTP/1.1 200 Connection established\r\n\r\n"

// replies are what a proxy may answer, tried split at every byte.
var replies = []struct {
	name, reply string
	ok          bool
	reason      flow.Reason
	upstream    bool
	says        string // part of the error
}{
	{name: "plain", reply: ok200, ok: true},
	{name: "1.0", reply: "HTTP/1.0 200 OK\r\nProxy-agent: x\r\n\r\n", ok: true},
	{name: "no reason phrase", reply: "HTTP/1.1 200\r\n\r\n", ok: true},
	{name: "empty reason phrase", reply: "HTTP/1.1 200 \r\n\r\n", ok: true},
	{name: "line feeds alone", reply: "HTTP/1.1 200 OK\nA: b\n\n", ok: true},
	{name: "other success", reply: "HTTP/1.1 204 No Content\r\n\r\n", ok: true},
	{name: "length and coding are ignored", reply: "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", ok: true},
	{name: "malformed field", reply: "HTTP/1.1 200 OK\r\nno colon\r\n: no name\r\n\r\n", ok: true},
	{name: "interim replies", reply: "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + ok200, ok: true},
	{name: "forbidden", reply: "HTTP/1.1 403 Forbidden\r\n\r\n", reason: flow.ReasonProhibited},
	{name: "method", reply: "HTTP/1.1 405 Method Not Allowed\r\n\r\n", reason: flow.ReasonProhibited},
	{name: "bad gateway", reply: "HTTP/1.1 502 Bad Gateway\r\n\r\n", reason: flow.ReasonHostUnreachable},
	{name: "gateway timeout", reply: "HTTP/1.1 504 Gateway Timeout\r\n\r\n", reason: flow.ReasonTimeout},
	{name: "tinyproxy", reply: "HTTP/1.1 500 Unable to connect\r\nServer: tinyproxy/1.11.1\r\n\r\n", reason: flow.ReasonHostUnreachable},
	{name: "squid refused", reply: "HTTP/1.1 503 Service Unavailable\r\nX-Squid-Error: ERR_CONNECT_FAIL 111\r\n\r\n", reason: flow.ReasonRefused, says: "ERR_CONNECT_FAIL 111"},
	{name: "squid timeout", reply: "HTTP/1.1 503 Service Unavailable\r\nx-squid-error: ERR_CONNECT_FAIL 110\r\n\r\n", reason: flow.ReasonTimeout},
	{name: "squid network", reply: "HTTP/1.1 503 Service Unavailable\r\nX-Squid-Error: ERR_CONNECT_FAIL 101\r\n\r\n", reason: flow.ReasonNetUnreachable},
	{name: "squid host", reply: "HTTP/1.1 503 Service Unavailable\r\nX-Squid-Error: ERR_CONNECT_FAIL 113\r\n\r\n", reason: flow.ReasonHostUnreachable},
	{name: "squid name", reply: "HTTP/1.1 503 Service Unavailable\r\nX-Squid-Error: ERR_DNS_FAIL 0\r\n\r\n", reason: flow.ReasonHostUnreachable},
	{name: "squid denied", reply: "HTTP/1.1 403 Forbidden\r\nX-Squid-Error: ERR_ACCESS_DENIED 0\r\n\r\n", reason: flow.ReasonProhibited},
	{name: "squid 407", reply: "HTTP/1.1 407 Proxy Authentication Required\r\nX-Squid-Error: ERR_CACHE_ACCESS_DENIED 0\r\n\r\n", upstream: true, says: "407"},
	{name: "407", reply: "HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic\r\n\r\n", upstream: true},
	{name: "tinyproxy 401", reply: "HTTP/1.1 401 Unauthorized\r\n\r\n", upstream: true},
	{name: "proxy-status refused", reply: "HTTP/1.1 502 Bad Gateway\r\nProxy-Status: mprox; error=connection_refused; details=x\r\n\r\n", reason: flow.ReasonRefused},
	{name: "proxy-status timeout", reply: "HTTP/1.1 504 X\r\nProxy-Status: a; error=connection_timeout, b\r\n\r\n", reason: flow.ReasonTimeout},
	{name: "proxy-status route", reply: "HTTP/1.1 502 X\r\nProxy-Status: a; error=destination_ip_unroutable\r\n\r\n", reason: flow.ReasonNetUnreachable},
	{name: "proxy-status limit", reply: "HTTP/1.1 503 X\r\nProxy-Status: a; error=connection_limit_reached\r\n\r\n", upstream: true},
	{name: "proxy-status unknown", reply: "HTTP/1.1 403 X\r\nProxy-Status: a; error=new_thing\r\n\r\n", reason: flow.ReasonProhibited},
	{name: "switching protocols", reply: "HTTP/1.1 101 Switching Protocols\r\n\r\n", upstream: true},
	{name: "redirect", reply: "HTTP/1.1 302 Found\r\nLocation: x\r\n\r\n", upstream: true},
	{name: "closed", reply: "", reason: flow.ReasonHostUnreachable, says: "closed without a reply"},
	{name: "closed in the header", reply: "HTTP/1.1 200 OK\r\nA: b\r\n", upstream: true},
	{name: "socks server", reply: "\x05\x00\x00\n\n", upstream: true, says: "not an HTTP/1 server"},
	{name: "http/2", reply: "HTTP/2 200\r\n\r\n", upstream: true},
	{name: "status", reply: "HTTP/1.1 2x0 OK\r\n\r\n", upstream: true},
	{name: "long status", reply: "HTTP/1.1 2000 OK\r\n\r\n", upstream: true},
	{name: "too large", reply: "HTTP/1.1 200 OK\r\nA: " + strings.Repeat("a", maxHead) + "\r\n\r\n", upstream: true, says: "too large"},
}

func TestHTTPReplies(t *testing.T) {
	h := dialer(t, "http://h").(*HTTP)
	for _, tt := range replies {
		t.Run(tt.name, func(t *testing.T) {
			rest := "220 mail\r\n\r\n"
			if !tt.ok {
				rest = ""
			}
			stream := tt.reply + rest
			conns := []*dialertest.Conn{dialertest.Bytewise(stream)}
			for i := range min(len(stream), 1000) + 1 {
				conns = append(conns, dialertest.Split(stream, i))
			}
			for i, c := range conns {
				head := &streamHead{r: c}
				err := h.request(c, head, addr(t, "example.com:443"))
				if got, want := c.Written.String(), "CONNECT example.com:443 HTTP/1.1\r\nHost: example.com:443\r\n\r\n"; got != want {
					t.Fatalf("sent %q", got)
				}
				if tt.ok {
					if left := string(head.left) + c.Rest(); err != nil || left != rest {
						t.Fatalf("split %d: left %q, %v", i, left, err)
					}
					continue
				}
				wantError(t, err, tt.reason, tt.upstream)
				if t.Failed() || !strings.Contains(err.Error(), tt.says) {
					t.Fatalf("split %d: %v", i, err)
				}
			}
		})
	}
}

// The header is read from a plain socket without taking a byte of what follows, wherever it is split.
func TestHTTPPeek(t *testing.T) {
	const payload = "220 mail\r\n\r\nmore"
	reply := "HTTP/1.1 100 Continue\r\n\r\n" + ok200
	whole := reply + payload
	for i := 1; i <= len(whole); i++ {
		sent := make(chan struct{})
		cut := i
		s := dialertest.Start(t, dialertest.ReadHead(), dialertest.Send(whole[:cut]), func(*dialertest.Conv) error { <-sent; return nil }, dialertest.Send(whole[cut:]))
		tcp, err := NewNet(NetConfig{}).dialTCP(testContext(t), s.Addr)
		if err != nil {
			t.Fatal(err)
		}
		_ = tcp.SetDeadline(time.Now().Add(5 * time.Second))
		h := dialer(t, "http://h").(*HTTP)
		done := make(chan error, 1)
		go func() { done <- h.request(tcp, &socketHead{c: tcp}, addr(t, "a:1")) }()
		if cut < len(reply) {
			waitFor(t, "the first piece to be taken", func() bool { return s.Accepted() == 1 && queued(t, tcp) == 0 })
		} else if err := <-done; err != nil {
			t.Fatal(err)
		}
		close(sent)
		if cut < len(reply) {
			if err := <-done; err != nil {
				t.Fatal(err)
			}
		}
		got, err := io.ReadAll(tcp)
		if err != nil || string(got) != payload {
			t.Fatalf("split %d: left %q, %v", cut, got, err)
		}
		tcp.Close()
		s.Close()
	}
}

// queued returns how many bytes wait in a socket.
func queued(t *testing.T, c syscall.Conn) int {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	if err := raw.Control(func(fd uintptr) { n, _ = unix.IoctlGetInt(int(fd), unix.SIOCINQ) }); err != nil {
		t.Fatal(err)
	}
	return n
}

func TestHTTPDial(t *testing.T) {
	code := base64.StdEncoding.EncodeToString([]byte("bob:" + testSecret))
	s := dialertest.Start(t,
		dialertest.Expect("CONNECT [2001:db8::1]:443 HTTP/1.1\r\nHost: [2001:db8::1]:443\r\nProxy-Authorization: Basic "+code+"\r\n\r\n"),
		dialertest.Send(ok200+"220 mail\r\n"), dialertest.Echo())
	p := spec(t, "http://bob:pw@"+s.Addr.String())
	p.Password = NewSecret(testSecret)
	d, err := New("up", p, NewNet(NetConfig{}))
	if err != nil {
		t.Fatal(err)
	}
	c, err := d.Dial(testContext(t), addr(t, "[2001:db8::1]:443"))
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := c.(syscall.Conn); !ok {
		t.Error("not a plain socket")
	}
	if _, err := io.WriteString(c, "hello"); err != nil || c.CloseWrite() != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(c); err != nil || string(got) != "220 mail\r\nhello" {
		t.Errorf("%q, %v", got, err)
	}
	if st := StatusOf(d); st.Active != 1 || st.IPv6 != yes || st.UDP != no {
		t.Errorf("%+v", st)
	}
	c.Close()
	if st := StatusOf(d); st.Active != 0 {
		t.Errorf("%+v", st)
	}
	if _, err := d.ListenPacket(t.Context(), nil); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("udp: %v", err)
	}
}

func TestHTTPBearer(t *testing.T) {
	for _, p := range []Spec{
		{Auth: "bearer", HasUser: true, Password: NewSecret("tok")}, {Token: NewSecret("tok")}, {Auth: "bearer", Token: NewSecret("tok"), Password: NewSecret("x")},
	} {
		p.Scheme, p.Host = SchemeHTTP, "h"
		req, secrets := newHTTP("up", p, NewNet(NetConfig{})).head(addr(t, "a:1"), new(login))
		if !bytes.Contains(req, []byte("\r\nProxy-Authorization: Bearer tok\r\n")) || len(secrets) != 1 {
			t.Errorf("%q %q", req, secrets)
		}
	}
}

func TestHTTPHostile(t *testing.T) {
	for _, tt := range []struct {
		name     string
		steps    []dialertest.Step
		reason   flow.Reason
		upstream bool
	}{
		{"never replies", []dialertest.Step{dialertest.Silent()}, flow.ReasonTimeout, false},
		{"half a header", []dialertest.Step{dialertest.ReadHead(), dialertest.Send("HTTP/1.1 200"), dialertest.Silent()}, flow.ReasonTimeout, false},
		{"resets", []dialertest.Step{dialertest.ReadHead(), dialertest.Reset()}, flow.ReasonHostUnreachable, true},
		{"closes", []dialertest.Step{dialertest.ReadHead()}, flow.ReasonHostUnreachable, false},
		{"endless line", []dialertest.Step{dialertest.Endless("A")}, flow.ReasonHostUnreachable, true},
		{"endless fields", []dialertest.Step{dialertest.Send("HTTP/1.1 200 OK\r\n"), dialertest.Endless("A: b\r\n")}, flow.ReasonHostUnreachable, true},
		{"endless interim replies", []dialertest.Step{dialertest.Endless("HTTP/1.1 100 Continue\r\n\r\n")}, flow.ReasonHostUnreachable, true},
		{"endless error page", []dialertest.Step{dialertest.ReadHead(), dialertest.Send("HTTP/1.1 502 X\r\n\r\n"), dialertest.Endless("<p>A</p>\n")}, flow.ReasonHostUnreachable, false},
		{"silent error page", []dialertest.Step{dialertest.ReadHead(), dialertest.Send("HTTP/1.1 502 X\r\nContent-Length: 9\r\n\r\n"), dialertest.Silent()}, flow.ReasonHostUnreachable, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := dialertest.Start(t, tt.steps...)
			d := dialer(t, "http://bob:hunter2@"+s.Addr.String())
			_, err := d.Dial(hostileContext(t, tt.reason), addr(t, "example.com:80"))
			wantError(t, err, tt.reason, tt.upstream)
			if st := StatusOf(d); st.Active != 0 {
				t.Errorf("%+v", st)
			}
		})
	}
	for _, a := range []flow.Addr{{}, {Host: "a\r\nX: y", Port: 1}, {Host: "a b"}, {Host: strings.Repeat("a", 300)}} {
		_, err := dialer(t, "http://127.0.0.1:1").Dial(testContext(t), a)
		wantError(t, err, flow.ReasonHostUnreachable, false)
	}
}

// An error page that is said to be empty is not waited for: the application waits as long.
func TestHTTPNoErrorPage(t *testing.T) {
	s := dialertest.Start(t, dialertest.ReadHead(), dialertest.Send("HTTP/1.1 502 X\r\nContent-Length: 0\r\n\r\n"), dialertest.Silent())
	begin := time.Now()
	_, err := dialer(t, "http://"+s.Addr.String()).Dial(testContext(t), addr(t, "example.com:80"))
	wantError(t, err, flow.ReasonHostUnreachable, false)
	if took := time.Since(begin); took >= bodyWait {
		t.Errorf("took %v", took)
	}
}

// A proxy may repeat what it was sent. The error shows its first line of text, without our credentials.
func TestHTTPErrorPage(t *testing.T) {
	code := base64.StdEncoding.EncodeToString([]byte("bob:" + testSecret))
	for name, tt := range map[string]struct{ page, says string }{
		"text":        {"no route to host\nmore", "no route to host"},
		"html":        {"<!DOCTYPE html>\n<html><head>\n<title>Proxy is sad</title>", "Proxy is sad"},
		"echo":        {"you sent Proxy-Authorization: Basic " + code + " and " + testSecret, "you sent Proxy-Authorization: Basic *** and ***"},
		"unprintable": {"a\x1b[31mb\x00c\xff", "a.[31mb.c."},
		"long":        {strings.Repeat("y", 5000), "yyy..."},
	} {
		t.Run(name, func(t *testing.T) {
			s := dialertest.Start(t, dialertest.ReadHead(), dialertest.Send("HTTP/1.1 502 Bad Gateway\r\n\r\n"+tt.page))
			p := spec(t, "http://bob:pw@"+s.Addr.String())
			p.Password = NewSecret(testSecret)
			d, _ := New("up", p, NewNet(NetConfig{}))
			_, err := d.Dial(testContext(t), addr(t, "example.com:80"))
			wantError(t, err, flow.ReasonHostUnreachable, false)
			if s := err.Error(); !strings.Contains(s, tt.says) || strings.Contains(s, testSecret) || strings.Contains(s, code) || len(s) > 400 {
				t.Errorf("%s", s)
			}
		})
	}
}

// certificate makes a self-signed certificate for a name.
func certificate(t *testing.T, name string) (tls.Certificate, *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: []string{name}, NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(cert)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, pool
}

// tlsServer is a Step that speaks TLS, answers one request with reply, and echoes.
func tlsServer(cert tls.Certificate, reply string) dialertest.Step {
	return func(c *dialertest.Conv) error {
		tc := tls.Server(c.TCPConn, &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12})
		in := bufio.NewReader(tc)
		for line := "x"; line != "\r\n"; {
			var err error
			if line, err = in.ReadString('\n'); err != nil {
				return err
			}
		}
		if _, err := io.WriteString(tc, reply); err != nil {
			return err
		}
		if _, err := io.Copy(tc, in); err != nil {
			return err
		}
		return tc.Close()
	}
}

func TestHTTPS(t *testing.T) {
	cert, pool := certificate(t, "proxy.example")
	s := dialertest.Start(t, tlsServer(cert, ok200+"220 mail\r\n"))
	for raw, want := range map[string]string{
		"https://" + s.Addr.String() + "?sni=proxy.example":      "",
		"https://" + s.Addr.String() + "?insecure=1":             "",
		"https://" + s.Addr.String() + "?sni=other.example":      "other.example",
		"https://" + s.Addr.String():                             "127.0.0.1",
		"https://" + s.Addr.String() + "?sni=unknown-ca.invalid": "unknown-ca.invalid",
	} {
		d := dialer(t, raw).(*HTTP)
		d.tls.RootCAs = pool
		c, err := d.Dial(testContext(t), addr(t, "example.com:25"))
		if want != "" {
			wantError(t, err, flow.ReasonHostUnreachable, true)
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", raw, err)
			continue
		}
		if _, ok := c.(syscall.Conn); ok {
			t.Error("a TLS connection says that it is a plain socket")
		}
		if _, err := io.WriteString(c, "hello"); err != nil || c.CloseWrite() != nil {
			t.Error(err)
		}
		if got, err := io.ReadAll(c); err != nil || string(got) != "220 mail\r\nhello" {
			t.Errorf("%q, %v", got, err)
		}
		c.Close()
		c.Abort()
		if st := d.Status(); st.Active != 0 {
			t.Errorf("%+v", st)
		}
	}
}

// socksTLS is a Step that speaks SOCKS5 inside TLS: it expects want, and answers with reply as soon as there is something to read.
func socksTLS(cert tls.Certificate, want, reply string) dialertest.Step {
	return func(c *dialertest.Conv) error {
		tc := tls.Server(c.TCPConn, &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12})
		if _, err := io.WriteString(tc, reply); err != nil {
			return err
		}
		got := make([]byte, len(want))
		if _, err := io.ReadFull(tc, got); err != nil || string(got) != want {
			return errors.Join(err, errors.New("unexpected request"))
		}
		if _, err := io.Copy(tc, struct{ io.Reader }{tc}); err != nil {
			return err
		}
		return tc.Close()
	}
}

// Everything the server says comes in one record, and what follows the reply is not lost.
func TestSOCKS5s(t *testing.T) {
	cert, pool := certificate(t, "proxy.example")
	s := dialertest.Start(t, socksTLS(cert, "\x05\x01\x00\x05\x01\x00\x03\x0bexample.com\x00\x19", "\x05\x00"+okReply+"220 mail\r\n"))
	d := dialer(t, "socks5s://"+s.Addr.String()+"?sni=proxy.example").(*SOCKS5)
	_, err := d.Dial(testContext(t), addr(t, "example.com:25"))
	wantError(t, err, flow.ReasonHostUnreachable, true) // nobody knows this certificate
	d.tls.RootCAs = pool
	c, err := d.Dial(testContext(t), addr(t, "example.com:25"))
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := c.(syscall.Conn); ok {
		t.Error("a TLS connection says that it is a plain socket")
	}
	if _, err := io.WriteString(c, "hello"); err != nil || c.CloseWrite() != nil {
		t.Error(err)
	}
	if got, err := io.ReadAll(c); err != nil || string(got) != "220 mail\r\nhello" {
		t.Errorf("%q, %v", got, err)
	}
	c.Close()
	if _, err := d.ListenPacket(testContext(t), nil); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("udp goes in the clear without being asked for: %v", err)
	}
	if st := d.Status(); st.Active != 0 || st.UDP != no {
		t.Errorf("%+v", st)
	}
}

func TestSOCKS5sUDP(t *testing.T) {
	cert, pool := certificate(t, "proxy.example")
	_, at := relaySocket(t)
	s := dialertest.Start(t, socksTLS(cert, "\x05\x01\x00\x05\x03\x00\x01\x00\x00\x00\x00\x00\x00",
		"\x05\x00"+string(appendSOCKSAddr([]byte{5, 0, 0}, flow.AddrFrom(at)))))
	d := dialer(t, "socks5s://"+s.Addr.String()+"?sni=proxy.example&udp=on").(*SOCKS5)
	d.tls.RootCAs = pool
	pc, err := d.ListenPacket(testContext(t), nil)
	if err != nil {
		t.Fatal(err)
	}
	if st := d.Status(); st.Active != 1 || st.UDP != yes {
		t.Errorf("%+v", st)
	}
	pc.Close()
	if st := d.Status(); st.Active != 0 {
		t.Errorf("%+v", st)
	}
}

func TestHTTPSHostile(t *testing.T) {
	for name, tt := range map[string]struct {
		step   dialertest.Step
		reason flow.Reason
	}{
		"silent":     {dialertest.Silent(), flow.ReasonTimeout},
		"plain http": {dialertest.Send("HTTP/1.1 400 Bad Request\r\n\r\n"), flow.ReasonHostUnreachable},
		"closes":     {dialertest.Read(1), flow.ReasonHostUnreachable},
	} {
		t.Run(name, func(t *testing.T) {
			s := dialertest.Start(t, tt.step)
			_, err := dialer(t, "https://"+s.Addr.String()+"?insecure=1").Dial(hostileContext(t, tt.reason), addr(t, "a:1"))
			wantError(t, err, tt.reason, true)
		})
	}
}

func TestHTTPDown(t *testing.T) {
	s := dialertest.Start(t)
	s.Close()
	_, err := dialer(t, "http://"+s.Addr.String()).Dial(testContext(t), addr(t, "a:1"))
	wantError(t, err, flow.ReasonHostUnreachable, true)
}

func FuzzHTTPHead(f *testing.F) {
	for _, tt := range replies {
		if len(tt.reply) < 1000 {
			f.Add([]byte(tt.reply+"rest"), uint(7))
		}
	}
	f.Fuzz(func(t *testing.T, in []byte, at uint) {
		c := dialertest.Split(string(in), int(at%uint(len(in)+1)))
		h := &streamHead{r: c}
		raw, err := readHead(h)
		if err != nil {
			return
		}
		if !bytes.HasSuffix(raw, []byte("\n")) || !bytes.HasSuffix(in, []byte(string(raw)+string(h.left)+c.Rest())) {
			t.Errorf("%q: head %q, left %q %q", in, raw, h.left, c.Rest())
		}
		r, err := parseHead(raw)
		if err == nil && r.status/100 != 2 && r.meaning() == nil {
			t.Errorf("%q: no meaning", raw)
		}
		if text := quote(r.describe(h.left)); len(text) > maxQuote+3 || strings.ContainsAny(text, "\r\n\x00\x1b") {
			t.Errorf("%q", text)
		}
	})
}
