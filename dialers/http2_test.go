// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"bytes"
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/flow"
)

// h2Proxy is an HTTP/2 proxy that answers CONNECT as told.
type h2Proxy struct {
	*httptest.Server
	conns  atomic.Int32
	asked  atomic.Int32
	handle func(w http.ResponseWriter, r *http.Request)
}

func newH2Proxy(t *testing.T, handle func(http.ResponseWriter, *http.Request)) (*h2Proxy, string) {
	t.Helper()
	p := &h2Proxy{handle: handle}
	p.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p.asked.Add(1)
		if r.ProtoMajor != 2 || r.Method != http.MethodConnect {
			w.WriteHeader(http.StatusTeapot)
			return
		}
		p.handle(w, r)
	}))
	p.EnableHTTP2 = true
	p.Config.ConnState = func(_ net.Conn, s http.ConnState) {
		if s == http.StateNew {
			p.conns.Add(1)
		}
	}
	p.StartTLS()
	t.Cleanup(p.Close)
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: p.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	return p, "https://USER" + p.Listener.Addr().String() + "?ca=" + ca
}

func h2Dialer(t *testing.T, raw, user string) *HTTP {
	t.Helper()
	s := spec(t, strings.Replace(raw, "USER", user, 1))
	if err := s.ReadSecrets(); err != nil {
		t.Fatal(err)
	}
	d, err := New("up", s, NewNet(NetConfig{}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.(*HTTP).h2.closeAll() })
	return d.(*HTTP)
}

// echoStream sends back what comes, and its end.
func echoStream(w http.ResponseWriter, r *http.Request) {
	w.WriteHeader(http.StatusOK)
	f := w.(http.Flusher)
	f.Flush()
	buf := make([]byte, 32<<10)
	for {
		n, err := r.Body.Read(buf)
		if n > 0 {
			if _, err := w.Write(buf[:n]); err != nil {
				return
			}
			f.Flush()
		}
		if err != nil {
			return
		}
	}
}

// TestHTTP2 runs many connections as streams of few: bytes both ways, half-close, and the counts.
func TestHTTP2(t *testing.T) {
	p, raw := newH2Proxy(t, echoStream)
	d := h2Dialer(t, raw, "")
	big := bytes.Repeat([]byte("0123456789abcdef"), 64<<10)
	one := func() {
		c, err := d.Dial(testContext(t), addr(t, "www.example.com:443"))
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Close()
		go func() {
			_, _ = c.Write(big)
			_ = c.CloseWrite()
		}()
		if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, big) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
	}
	one()
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(one)
	}
	wg.Wait()
	if n := p.conns.Load(); n != 1 {
		t.Errorf("%d connections for 51 streams", n)
	}
	if st := StatusOf(d); st.Total != 51 || st.Active != 0 || st.Errors != 0 || !st.Up {
		t.Errorf("%+v", st)
	}
}

func TestHTTP2Errors(t *testing.T) {
	for _, tt := range []struct {
		name     string
		handle   func(http.ResponseWriter, *http.Request)
		reason   flow.Reason
		upstream bool
		says     string
	}{
		{"refused", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Proxy-Status", "x; error=connection_refused")
			w.WriteHeader(http.StatusBadGateway)
		}, flow.ReasonRefused, false, "502"},
		{"forbidden", func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusForbidden)
			fmt.Fprintln(w, "not for you")
		}, flow.ReasonProhibited, false, "not for you"},
		{"time-out", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusGatewayTimeout) }, flow.ReasonTimeout, false, "504"},
		{"reset", func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, flow.ReasonHostUnreachable, true, ""},
		{"silence", func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, flow.ReasonTimeout, false, "no reply"},
		{"wants a password", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Proxy-Authenticate", "Basic realm=x")
			w.WriteHeader(http.StatusProxyAuthRequired)
		}, flow.ReasonHostUnreachable, true, "407"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p, raw := newH2Proxy(t, tt.handle)
			d := h2Dialer(t, raw, "")
			for range 2 { // the second on the same connection
				limit := 10 * time.Second
				if tt.reason == flow.ReasonTimeout {
					limit = 10 * short
				}
				ctx, cancel := context.WithTimeout(t.Context(), limit)
				_, err := d.Dial(ctx, addr(t, "192.0.2.1:80"))
				cancel()
				wantError(t, err, tt.reason, tt.upstream)
				if !strings.Contains(err.Error(), tt.says) {
					t.Error(err)
				}
			}
			if p.conns.Load() != 1 {
				t.Errorf("%d connections", p.conns.Load())
			}
			if st := StatusOf(d); st.Active != 0 || d.taken.Load() != 0 {
				t.Errorf("%+v", st)
			}
		})
	}
}

// TestHTTP2Login answers challenges on streams of the same connection.
func TestHTTP2Login(t *testing.T) {
	for _, scheme := range []string{"basic", "digest", "bearer"} {
		p, raw := newH2Proxy(t, func(w http.ResponseWriter, r *http.Request) {
			cred := r.Header.Get("Proxy-Authorization")
			if ok := strings.HasPrefix(strings.ToLower(cred), scheme+" "); !ok {
				w.Header().Set("Proxy-Authenticate", `Digest realm="x", nonce="n", algorithm=SHA-256, qop="auth"`)
				w.WriteHeader(http.StatusProxyAuthRequired)
				return
			}
			echoStream(w, r)
		})
		d := h2Dialer(t, raw+"&auth="+scheme, "bob:secret@")
		for range 3 {
			c, err := d.Dial(testContext(t), addr(t, "www.example.com:443"))
			if err != nil {
				t.Fatalf("%s: %v", scheme, err)
			}
			c.Close()
		}
		if p.conns.Load() != 1 {
			t.Errorf("%s: %d connections", scheme, p.conns.Load())
		}
	}
}

// TestHTTP2Resets: a reset on either side arrives as one, and hurts no other stream.
func TestHTTP2Resets(t *testing.T) {
	server := make(chan error, 1)
	var victim atomic.Bool
	_, raw := newH2Proxy(t, func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.Host, "reset") && victim.Load() {
			w.WriteHeader(http.StatusOK)
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		}
		w.WriteHeader(http.StatusOK)
		w.(http.Flusher).Flush()
		_, err := io.Copy(w, r.Body)
		if strings.HasPrefix(r.Host, "abort") {
			server <- err
		}
	})
	d := h2Dialer(t, raw, "")
	other, err := d.Dial(testContext(t), addr(t, "other.example:1"))
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	victim.Store(true)
	c, err := d.Dial(testContext(t), addr(t, "reset.example:1"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadAll(c); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("reset by the proxy: %v", err)
	}
	c.Close()
	c, err = d.Dial(testContext(t), addr(t, "abort.example:1"))
	if err != nil {
		t.Fatal(err)
	}
	c.Abort()
	c.Abort()
	if err := <-server; err == nil {
		t.Error("an abort arrived as an end of file")
	}
	_ = other.SetReadDeadline(time.Now().Add(short))
	if _, err := other.Read(make([]byte, 1)); !timedOut(err) {
		t.Errorf("the other stream: %v", err)
	}
}

// TestHTTP2Ends: a connection that ends is replaced, and the flow that found out does not notice.
func TestHTTP2Ends(t *testing.T) {
	p, raw := newH2Proxy(t, echoStream)
	d := h2Dialer(t, raw, "")
	for i := range 3 {
		c, err := d.Dial(testContext(t), addr(t, "www.example.com:443"))
		if err != nil {
			t.Fatalf("round %d: %v", i, err)
		}
		c.Close()
		p.CloseClientConnections()
	}
	if n := p.conns.Load(); n != 3 {
		t.Errorf("%d connections", n)
	}
}

// TestHTTP2Backpressure: a reader who stands still stops the sender, not the other streams.
func TestHTTP2Backpressure(t *testing.T) {
	var sent atomic.Int64
	_, raw := newH2Proxy(t, func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusOK)
		if !strings.HasPrefix(r.Host, "flood") {
			echoStream(w, r)
			return
		}
		for buf := make([]byte, 64<<10); ; {
			n, err := w.Write(buf)
			if sent.Add(int64(n)); err != nil {
				return
			}
		}
	})
	d := h2Dialer(t, raw, "")
	flood, err := d.Dial(testContext(t), addr(t, "flood.example:1"))
	if err != nil {
		t.Fatal(err)
	}
	defer flood.Abort()
	last := int64(-1)
	tick := time.NewTicker(short)
	defer tick.Stop()
	for now := sent.Load(); now != last; now = sent.Load() { // until it has come to a stand
		last = now
		<-tick.C
	}
	if last > 4*h2Window {
		t.Errorf("%d bytes are on their way to nobody", last)
	}
	c, err := d.Dial(testContext(t), addr(t, "www.example.com:443"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := c.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(c, make([]byte, 5)); err != nil {
		t.Errorf("another stream: %v", err)
	}
}

// TestHTTP2NotSpoken: a proxy without HTTP/2, or a URL that does not want it, is asked by HTTP/1.1.
func TestHTTP2NotSpoken(t *testing.T) {
	p, raw := newH2Proxy(t, echoStream)
	if _, err := h2Dialer(t, raw+"&http=1.1", "").Dial(testContext(t), addr(t, "www.example.com:443")); err == nil || !strings.Contains(err.Error(), "418") {
		t.Errorf("http=1.1: %v", err)
	}
	if p.asked.Load() != 1 {
		t.Error("nobody was asked")
	}
}

// closeAll ends all connections, with the streams on them.
func (p *h2Pool) closeAll() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.conns {
		if c.timer != nil {
			c.timer.Stop()
		}
		_ = c.Close()
		c.tcp.Abort()
	}
	p.conns = nil
}

// TestHTTP2Trial: what is tried is what a flow would use, also where the proxy chooses HTTP/2, and asks for credentials on it.
func TestHTTP2Trial(t *testing.T) {
	_, raw := newH2Proxy(t, func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.Header.Get("Proxy-Authorization") == "":
			w.Header().Set("Proxy-Authenticate", `Digest realm="r", nonce="n", qop="auth"`)
			w.WriteHeader(http.StatusProxyAuthRequired)
		case r.Host == "closed.example.com:443":
			w.Header().Set("Proxy-Status", "p; error=connection_refused")
			w.WriteHeader(http.StatusBadGateway)
		default:
			w.WriteHeader(http.StatusOK)
		}
	})
	for to, want := range map[string]string{
		"www.example.com:443":    "request:HTTP/2 407 Proxy Authentication Required request:HTTP/2 200 OK",
		"closed.example.com:443": "request:HTTP/2 407 Proxy Authentication Required request:HTTP/2 502 Bad Gateway!",
	} {
		d := h2Dialer(t, raw, "u:pqz@")
		d.spec.Auth = "digest"
		steps := Trial(testContext(t), d, addr(t, to))
		if len(steps) < 3 || !strings.HasPrefix(steps[2].Says, "TLS 1.3, HTTP/2, certificate of ") {
			t.Errorf("%s: %+v", to, steps)
			continue
		}
		if got := trialText(steps[3:], ""); got != want {
			t.Errorf("got  %s\nwant %s", got, want)
		}
		if st := d.Status(); st.Total != 0 || st.Active != 0 || d.h2.conns != nil {
			t.Errorf("%+v, %d connections", st, len(d.h2.conns))
		}
	}
}
