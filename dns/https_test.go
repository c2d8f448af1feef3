// SPDX-License-Identifier: GPL-3.0-or-later

package dns

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/mutex-proxy/mutex/flow"
)

// certificate returns a certificate for dns.example and 192.0.2.53, and the pool that trusts it.
func certificate(t *testing.T) (tls.Certificate, *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		DNSNames: []string{"dns.example"}, IPAddresses: []net.IP{netip.MustParseAddr("192.0.2.53").AsSlice()},
		IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	if c, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(c)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, roots
}

func TestTLS(t *testing.T) {
	cert, roots := certificate(t)
	var mu sync.Mutex
	var sizes []int
	v := &fakeVia{sockets: true, serve: func(_ flow.Addr, c net.Conn) {
		tc := tls.Server(c, &tls.Config{Certificates: []tls.Certificate{cert}, NextProtos: []string{"dot"}})
		streamed(func(q *dns.Msg) *dns.Msg {
			mu.Lock()
			sizes = append(sizes, q.Len())
			mu.Unlock()
			return testZone()(q)
		})(flow.Addr{}, tc)
	}}
	for _, server := range []string{"tls://dns.example", "tls://192.0.2.53"} {
		s := start(t, Config{Servers: []string{server}, Via: v, RootCAs: roots})
		for range 2 {
			if got := askTXT(t, s); got != helloTXT {
				t.Error(server, got)
			}
			s.Flush()
		}
		ask(t, s, strings.Repeat("long.", 20)+"example", "TXT")
	}
	if v.dialed() != 2 || v.dials[0].Host != "dns.example" || v.dials[1].IP != addr("192.0.2.53") || v.dials[0].Port != 853 {
		t.Errorf("dialed %v", v.dials)
	}
	for _, n := range sizes { // what is asked must not show by its length
		if n%128 != 0 {
			t.Errorf("a query of %d bytes", n)
		}
	}
	for name, cfg := range map[string]Config{
		"unknown authority": {Servers: []string{"tls://dns.example"}},
		"another name":      {Servers: []string{"tls://other.example"}, RootCAs: roots},
		"another address":   {Servers: []string{"tls://192.0.2.54"}, RootCAs: roots},
	} {
		cfg.Via = v
		if cfg.RootCAs == nil {
			cfg.RootCAs = x509.NewCertPool()
		}
		if got := askTXT(t, start(t, cfg)); got != "SERVFAIL" {
			t.Error(name, got)
		}
	}
}

// oneListener hands the connections of a fakeVia to an http.Server.
type oneListener struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func (l *oneListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}
func (l *oneListener) Close() error   { l.once.Do(func() { close(l.done) }); return nil }
func (l *oneListener) Addr() net.Addr { return &net.TCPAddr{} }

// served is a connection that tells when the http.Server is done with it.
type served struct {
	net.Conn
	done chan struct{}
	once sync.Once
}

func (c *served) Close() error {
	c.once.Do(func() { close(c.done) })
	return c.Conn.Close()
}

// overHTTPS returns an upstream with a web server behind it.
func overHTTPS(t *testing.T, cert tls.Certificate, protocol string, h http.HandlerFunc) *fakeVia {
	t.Helper()
	l := &oneListener{conns: make(chan net.Conn), done: make(chan struct{})}
	srv := &http.Server{Handler: h, TLSConfig: &tls.Config{Certificates: []tls.Certificate{cert}, NextProtos: []string{protocol}}}
	if protocol != "h2" {
		srv.Protocols = new(http.Protocols)
		srv.Protocols.SetHTTP1(true)
	}
	var wg sync.WaitGroup
	wg.Go(func() { _ = srv.ServeTLS(l, "", "") })
	t.Cleanup(func() { srv.Close(); wg.Wait() })
	return &fakeVia{sockets: true, serve: func(_ flow.Addr, c net.Conn) {
		sc := &served{Conn: c, done: make(chan struct{})}
		select {
		case l.conns <- sc:
			<-sc.done
		case <-l.done:
		}
	}}
}

func TestHTTPS(t *testing.T) {
	cert, roots := certificate(t)
	for _, protocol := range []string{"h2", "http/1.1"} {
		t.Run(protocol, func(t *testing.T) {
			v := overHTTPS(t, cert, protocol, func(w http.ResponseWriter, r *http.Request) {
				body, err := io.ReadAll(r.Body)
				if err != nil || r.Method != http.MethodPost || r.URL.Path != "/customer" || r.Host != "dns.example" || r.Header.Get("Content-Type") != mediaType ||
					body[0] != 0 || body[1] != 0 || len(body)%128 != 0 || r.Header.Get("User-Agent") != "" || r.Header.Get("Idempotency-Key") != "" {
					t.Errorf("request %s %s %s %v, body %x, %v", r.Method, r.Host, r.URL, r.Header, body, err)
				}
				w.Header().Set("Content-Type", mediaType+"; charset=x")
				w.Header().Set("Age", "100")
				_, _ = w.Write(answered(testZone(), body))
			})
			s := start(t, Config{Servers: []string{"https://dns.example/customer"}, Via: v, RootCAs: roots})
			for range 3 {
				if got := askTXT(t, s); got != strings.Replace(helloTXT, "300", "200", 1) {
					t.Error(got)
				}
				s.Flush()
			}
			if v.dialed() != 1 || v.dials[0].String() != "dns.example:443" {
				t.Errorf("dialed %v", v.dials)
			}
			if err := s.Close(); err != nil {
				t.Error(err)
			}
			v.wg.Wait() // Close has closed the connection
		})
	}
}

func TestHTTPSBadAnswers(t *testing.T) {
	cert, roots := certificate(t)
	for name, h := range map[string]http.HandlerFunc{
		"status": func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusForbidden) },
		"redirect": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://evil.example/", http.StatusFound)
		},
		"content type": func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("Content-Type", "text/html") },
		"garbage": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", mediaType)
			_, _ = w.Write([]byte("hello"))
		},
		"endless": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", mediaType)
			for {
				if _, err := w.Write(make([]byte, 4096)); err != nil {
					return
				}
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			v := overHTTPS(t, cert, "h2", h)
			s := start(t, Config{Servers: []string{"https://dns.example/secret-path"}, Via: v, RootCAs: roots})
			if got := askTXT(t, s); got != "SERVFAIL" {
				t.Error(got)
			}
			if _, err := s.Resolve(t.Context(), "a.example"); err == nil || strings.Contains(err.Error(), "secret-path") {
				t.Error(err)
			}
			for _, to := range v.dials {
				if to.Host != "dns.example" {
					t.Error("dialed", to)
				}
			}
		})
	}
}
