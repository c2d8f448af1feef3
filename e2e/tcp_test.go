// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mutex-proxy/mutex/e2e/lab"
)

// bulk is how much the matrix moves each way, over each server and family.
const bulk = 100_000_000

// servers are the proxy servers of the matrix.
func servers() []string {
	return []string{"dante", "dante-auth", "microsocks", "ssh", "squid", "tinyproxy"}
}

// startServer starts a server of the matrix.
func startServer(t *testing.T, l *lab.Lab, name string) *lab.Server {
	t.Helper()
	switch name {
	case "dante":
		return l.Dante(t, 1080, false)
	case "dante-auth":
		return l.Dante(t, 1081, true)
	case "microsocks":
		return l.Microsocks(t, 1082)
	case "ssh":
		return l.SSHDynamic(t, 1090)
	case "squid":
		return l.Squid(t, 3128)
	default:
		return l.Tinyproxy(t, 8888)
	}
}

// TestTCPMatrix runs the same cases over every server.
func TestTCPMatrix(t *testing.T) {
	for _, name := range servers() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := lab.New(t, lab.Options{})
			l.Unbound(t)
			s := startServer(t, l, name)
			m := l.Mprox(t)
			m.Up("--proxy", s.URL(), "--dns", "fakeip")
			for _, a := range []netip.Addr{lab.OriginV4, lab.OriginV6} {
				fam := map[bool]string{true: "v4", false: "v6"}[a.Is4()]
				t.Run("bulk "+fam, func(t *testing.T) { tcpBulk(t, l, a) })
				t.Run("half-close "+fam, func(t *testing.T) { tcpHalfClose(t, l, a, s.HalfClose) })
				t.Run("banner "+fam, func(t *testing.T) { tcpBanner(t, l, a) })
				t.Run("reset "+fam, func(t *testing.T) { tcpReset(t, l, a) })
			}
			t.Run("refused", func(t *testing.T) { tcpRefused(t, l, s) })
			t.Run("unreachable", func(t *testing.T) { tcpUnreachable(t, l, s) })
			t.Run("names", func(t *testing.T) { tcpNames(t, l) })
			t.Run("killed", func(t *testing.T) { tcpUpstreamKilled(t, l, s) })
			if t.Failed() {
				t.Logf("server:\n%s", s.Log)
			}
		})
	}
}

func dialOrigin(t *testing.T, l *lab.Lab, a netip.Addr, port uint16) *net.TCPConn {
	t.Helper()
	c, err := l.Client.Dial("tcp", netip.AddrPortFrom(a, port).String(), 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(2 * time.Minute))
	return c.(*net.TCPConn)
}

func tcpBulk(t *testing.T, l *lab.Lab, a netip.Addr) {
	t.Helper()
	started := time.Now()
	if err := lab.Exchange(dialOrigin(t, l, a, lab.PortSum), bulk); err != nil {
		t.Error(err)
	}
	d := time.Since(started)
	t.Logf("%d MB each way in %v: %.2f Gbit/s", bulk/1_000_000, d.Round(time.Millisecond), 2*bulk*8/d.Seconds()/1e9)
}

// tcpHalfClose ends each direction while the other goes on. Over a server that ends both at once nothing may hang.
func tcpHalfClose(t *testing.T, l *lab.Lab, a netip.Addr, carried bool) {
	t.Helper()
	if !carried {
		for _, port := range []uint16{lab.PortCount, lab.PortEarlyEnd} {
			c := dialOrigin(t, l, a, port)
			_, _ = c.Write(lab.Block(1000))
			_ = c.CloseWrite()
			_ = c.SetDeadline(time.Now().Add(10 * time.Second))
			if _, err := io.ReadAll(c); isTimeout(err) {
				t.Errorf("port %d: hangs after CloseWrite", port)
			}
		}
		return
	}
	// The application ends first and still gets the answer.
	c := dialOrigin(t, l, a, lab.PortCount)
	const n = 3_000_000
	if _, err := io.Copy(c, lab.DataReader(n)); err != nil {
		t.Error(err)
	}
	_ = c.CloseWrite()
	if b, err := io.ReadAll(c); string(b) != fmt.Sprintf("%d\n", n) || err != nil {
		t.Errorf("after CloseWrite: %q %v", b, err)
	}
	// The origin ends first and still gets what the application sends.
	had := len(l.Origin.AfterEnd())
	c = dialOrigin(t, l, a, lab.PortEarlyEnd)
	if b, err := io.ReadAll(c); string(b) != "bye\n" || err != nil {
		t.Errorf("until the origin's end: %q %v", b, err)
	}
	if _, err := io.Copy(c, lab.DataReader(n)); err != nil {
		t.Errorf("after the origin's end: %v", err)
	}
	_ = c.CloseWrite()
	lab.Eventually(t, 10*time.Second, "the origin has read to the end", func() bool { return len(l.Origin.AfterEnd()) > had })
	got := l.Origin.AfterEnd()
	for _, k := range got {
		if k != n {
			t.Errorf("the origin got %v bytes after its end, want %d", got, n)
		}
	}
}

// tcpBanner shows that a server that speaks first loses no byte and no time.
func tcpBanner(t *testing.T, l *lab.Lab, a netip.Addr) {
	t.Helper()
	within(t, 2*time.Second, "a server-first exchange", func() {
		c := dialOrigin(t, l, a, lab.PortBanner)
		r := bufio.NewReader(c)
		if line, err := r.ReadString('\n'); line != lab.Banner {
			t.Errorf("banner: %q %v", line, err)
		}
		_, _ = io.WriteString(c, "hello\n")
		if line, err := r.ReadString('\n'); line != "you said hello\n" {
			t.Errorf("answer: %q %v", line, err)
		}
	})
}

// tcpReset shows that a reset by the origin ends the application's connection with an error or, over servers that turn it into an end,
// with an end; it never hangs.
func tcpReset(t *testing.T, l *lab.Lab, a netip.Addr) {
	t.Helper()
	c := dialOrigin(t, l, a, lab.PortReset)
	_, _ = c.Write([]byte("x"))
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil || isTimeout(err) {
		t.Errorf("after the reset: %d bytes, %v", n, err)
	}
}

func isTimeout(err error) bool {
	var ne net.Error
	return errors.As(err, &ne) && ne.Timeout()
}

// refusals are what a failed connect may say when the server does not tell why.
var refusals = []syscall.Errno{syscall.ECONNREFUSED, syscall.EHOSTUNREACH, syscall.ENETUNREACH}

// saysWhy reports whether a server tells refused from unreachable: HTTP proxies and ssh do not.
func saysWhy(s *lab.Server) bool { return s.Scheme == "socks5h" && !strings.HasPrefix(s.Name, "ssh") }

func tcpRefused(t *testing.T, l *lab.Lab, s *lab.Server) {
	t.Helper()
	for _, a := range []netip.Addr{lab.OriginV4, lab.OriginV6} {
		within(t, 5*time.Second, "a refused connection", func() {
			c, err := l.Client.Dial("tcp", netip.AddrPortFrom(a, lab.PortClosed).String(), 15*time.Second)
			switch {
			case err == nil:
				c.Close()
				t.Errorf("%v: connected to a closed port", a)
			case saysWhy(s) && !isRefused(err), !isErrno(err, refusals...):
				t.Errorf("%v: %v", a, err)
			}
		})
	}
	if r := curl(t, l, originURL(false, ":9099/")); r.Code != 7 {
		t.Errorf("curl to a closed port: %v", r)
	}
}

func tcpUnreachable(t *testing.T, l *lab.Lab, s *lab.Server) {
	t.Helper()
	for _, a := range []netip.Addr{lab.UnreachableV4, lab.UnreachableV6, lab.NoNetV4, lab.NoNetV6} {
		c, err := l.Client.Dial("tcp", netip.AddrPortFrom(a, 80).String(), 20*time.Second)
		switch {
		case err == nil:
			c.Close()
			t.Errorf("%v: connected", a)
		case saysWhy(s) && !isErrno(err, syscall.EHOSTUNREACH, syscall.ENETUNREACH), !isErrno(err, refusals...):
			t.Errorf("%v: %v", a, err)
		}
	}
}

// tcpNames fetches by name: the proxy is asked for the name, not for an address.
func tcpNames(t *testing.T, l *lab.Lab) {
	t.Helper()
	l.Origin.Forget()
	for _, flag := range []string{"-4", "-6"} {
		if out := mustCurl(t, l, flag, "http://www.example.test/"); !strings.Contains(out, "this is www.example.test") {
			t.Errorf("by name %s: %q", flag, out)
		}
	}
	if bad := l.Origin.AllFrom(lab.ExitV4, lab.ExitV6); len(bad) > 0 {
		t.Errorf("reached the origin without the proxy: %v", bad)
	}
}

// tcpUpstreamKilled kills the proxy server in the middle of a transfer: the application learns of it, new connections fail at once and
// work again when the server is back.
func tcpUpstreamKilled(t *testing.T, l *lab.Lab, s *lab.Server) {
	t.Helper()
	c := dialOrigin(t, l, lab.OriginV4, lab.PortHold)
	r := bufio.NewReader(c)
	for i := range 3 {
		fmt.Fprintf(c, "line %d\n", i)
		if line, err := r.ReadString('\n'); line != fmt.Sprintf("line %d\n", i) {
			t.Fatalf("%q %v", line, err)
		}
	}
	// And one with bytes in flight.
	busy := dialOrigin(t, l, lab.OriginV6, lab.PortHTTP)
	fmt.Fprint(busy, "GET /bytes/4000000000 HTTP/1.0\r\n\r\n")
	if _, err := io.CopyN(io.Discard, busy, 10_000_000); err != nil {
		t.Fatal(err)
	}
	_ = syscall.Kill(-s.PID(), syscall.SIGKILL)
	s.Kill()
	_ = busy.SetDeadline(time.Now().Add(10 * time.Second))
	if n, err := io.Copy(io.Discard, busy); n >= 3_900_000_000 || isTimeout(err) {
		t.Errorf("a transfer whose server was killed: %d bytes more, %v", n, err)
	}
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	if n, err := r.Read(make([]byte, 1)); n != 0 || err == nil || isTimeout(err) {
		t.Errorf("after the server was killed: %d bytes, %v", n, err)
	}
	within(t, 5*time.Second, "a failing connection", func() {
		if c, err := l.Client.Dial("tcp", netip.AddrPortFrom(lab.OriginV4, 80).String(), 10*time.Second); err == nil {
			c.Close()
			t.Error("connected without a proxy server")
		} else if !isErrno(err, refusals...) {
			t.Error(err)
		}
	})
	if s.Addr.Addr().IsLoopback() {
		return // a new ssh would itself be captured before it can be an upstream again
	}
	s.Restart()
	if !lab.Poll(10*time.Second, func() bool { return curl(t, l, originURL(false, "/bytes/10")).Code == 0 }) {
		t.Error("no connection after the server is back")
	}
}

// TestDeadUpstream shows that a flow is never "connected" to something dead, and how long the application waits.
func TestDeadUpstream(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	for name, c := range map[string]struct {
		addr string
		max  time.Duration
	}{
		"silent":  {netip.AddrPortFrom(lab.BlackholeV4, 1080).String(), 4 * time.Second},
		"refused": {netip.AddrPortFrom(lab.ProxyV4, 1).String(), time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			m := l.Mprox(t)
			m.UpConfig(fmt.Sprintf(`{ "upstreams": { "p": { "url": "socks5h://%s" } },
  "contexts": { "default": { "mode": "global", "default": "p", "dial_timeout": "2s" } } }`, c.addr))
			for _, a := range []netip.Addr{lab.OriginV4, lab.OriginV6} {
				within(t, c.max, "the failure", func() {
					conn, err := l.Client.Dial("tcp", netip.AddrPortFrom(a, 80).String(), 15*time.Second)
					if err == nil {
						conn.Close()
						t.Errorf("%v: connected to something dead", a)
					} else if !isErrno(err, syscall.EHOSTUNREACH, syscall.ENETUNREACH) {
						t.Errorf("%v: %v", a, err)
					}
				})
			}
			m.Stop()
		})
	}
}

// TestActions shows what an application sees of reject and of drop.
func TestActions(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, false)
	m := l.Mprox(t)
	m.UpConfig(globalConfig(s, `"rules": [ { "port": 7, "upstream": "drop" }, { "port": 2222, "upstream": "reject" }, { "port": 80, "upstream": "direct" } ],`))
	if _, err := l.Client.Dial("tcp", "198.51.100.80:7", time.Second); !isTimeout(err) {
		t.Errorf("drop: %v", err)
	}
	if _, err := l.Client.Dial("tcp", "[2001:db8:3::80]:2222", 5*time.Second); !isRefused(err) {
		t.Errorf("reject: %v", err)
	}
	if out := mustCurl(t, l, originURL(true, "/")); !strings.Contains(out, lab.ClientV6.String()) {
		t.Errorf("direct: %q", out)
	}
}

// TestSYNIsHeld shows that the handshake ends only after the upstream's answer: it takes at least the round trips to the origin.
func TestSYNIsHeld(t *testing.T) {
	t.Parallel()
	const rtt = 200 * time.Millisecond
	l := lab.New(t, lab.Options{RTT: rtt})
	s := l.Dante(t, 1080, false)
	m := l.Mprox(t)
	m.Up("--proxy", s.URL())
	started := time.Now()
	c := dialOrigin(t, l, lab.OriginV4, lab.PortEcho)
	if d := time.Since(started); d < rtt {
		t.Errorf("connected after %v over a link of %v", d, rtt)
	}
	for _, f := range m.Flows() {
		if f.Handshake != "honest" {
			t.Errorf("flow %+v", f)
		}
	}
	_, _ = c.Write([]byte("x"))
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Error(err)
	}
}

// TestLossyLink moves data over a link with delay and loss.
func TestLossyLink(t *testing.T) {
	t.Parallel()
	for _, o := range []lab.Options{{RTT: 50 * time.Millisecond, Loss: 0.01}, {RTT: 200 * time.Millisecond}} {
		t.Run(fmt.Sprintf("%v, %v%%", o.RTT, o.Loss*100), func(t *testing.T) {
			l := lab.New(t, o)
			s := l.Dante(t, 1080, false)
			m := l.Mprox(t)
			m.Up("--proxy", s.URL())
			if err := lab.Exchange(dialOrigin(t, l, lab.OriginV4, lab.PortSum), 1_000_000); err != nil {
				t.Error(err)
			}
			if err := lab.Exchange(dialOrigin(t, l, lab.OriginV6, lab.PortSum), 1_000_000); err != nil {
				t.Error(err)
			}
		})
	}
}
