// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"bytes"
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

// serveOwn starts `mprox serve` on the proxy host.
func serveOwn(t *testing.T, l *lab.Lab, port uint16, args ...string) *lab.Proc {
	t.Helper()
	at := netip.AddrPortFrom(lab.ProxyV4, port).String()
	p := lab.Start(t, "mprox serve", l.Proxy.Command(append([]string{lab.Binary(t), "serve", "--listen", at}, args...)...))
	lab.Eventually(t, 10*time.Second, "mprox serve listens", func() bool {
		c, err := l.Proxy.Dial("tcp", at, time.Second)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	return p
}

// listening returns the addresses that `forward` has printed.
func listening(p *lab.Proc) []string {
	var out []string
	for line := range strings.Lines(p.Log.String()) {
		if a, ok := strings.CutPrefix(strings.TrimSpace(line), "listening "); ok {
			out = append(out, a)
		}
	}
	return out
}

// TestForward lets the origin connect to a service of the client through BIND at real servers: one connection after another, several at a
// time, after the server was restarted; and ends on SIGINT.
func TestForward(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	echo, err := l.Client.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer echo.Close()
	go func() {
		for {
			c, err := echo.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				_, _ = io.Copy(c, c)
			}()
		}
	}()
	l.Dante(t, 1080, false)
	serveOwn(t, l, 1081)
	origin := lab.OriginV4.String()
	for _, c := range []struct{ name, url, bind string }{
		{"dante socks5", "socks5://203.0.113.10:1080", origin + ":0"},
		{"dante socks4", "socks4://203.0.113.10:1080", origin + ":0"},
		{"serve socks5", "socks5://203.0.113.10:1081", origin + ":0"},
		{"serve socks4", "socks4://203.0.113.10:1081", origin + ":0"},
		{"serve auto", "auto://203.0.113.10:1081", origin + ":0"},
		{"serve port", "socks5h://203.0.113.10:1081", ":8022"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := lab.Start(t, "forward", l.Client.Command(lab.Binary(t), "forward", "--upstream", c.url, "--bind", c.bind, echo.Addr().String()))
			for i := range 3 {
				var conn net.Conn
				lab.Eventually(t, 10*time.Second, "a connection is accepted", func() bool {
					as := listening(p)
					if len(as) == 0 {
						return false
					}
					at := netip.MustParseAddrPort(as[len(as)-1])
					if c.name == "serve port" && at.Port() != 8022 {
						t.Fatalf("listens on %v", at)
					}
					// The proxy's two addresses are one machine; the origin has a way to the exit's.
					conn, err = l.OriginNS.Dial("tcp", net.JoinHostPort(lab.ExitV4.String(), fmt.Sprint(at.Port())), time.Second)
					if err != nil {
						conn, err = l.OriginNS.Dial("tcp", at.String(), time.Second)
					}
					return err == nil
				})
				want := bytes.Repeat([]byte(fmt.Sprint(i)), 200_000)
				_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
				go func() {
					_, _ = conn.Write(want)
					_ = conn.(*net.TCPConn).CloseWrite()
				}()
				got, err := io.ReadAll(conn)
				if err != nil || !bytes.Equal(got, want) {
					t.Errorf("%d bytes of %d came back: %v", len(got), len(want), err)
				}
				conn.Close()
			}
			_ = syscall.Kill(p.PID(), syscall.SIGINT)
			if code := p.Wait(10 * time.Second); code != 0 {
				t.Errorf("exit %d\n%s", code, p.Log)
			}
		})
	}
}

// TestForwardRefused: an upstream that cannot, or is not there, is an error that says so, with the exit code of a failure.
func TestForwardRefused(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	micro := l.Microsocks(t, 1080)
	for _, c := range []struct {
		name string
		args []string
		code int
		says string
	}{
		{"no BIND", []string{"--upstream", micro.URL()}, 1, "command not supported"},
		{"nobody there", []string{"--upstream", "socks5://203.0.113.10:1999"}, 1, "refused"},
		{"http", []string{"--upstream", "http://203.0.113.10:1080"}, 2, "cannot accept connections"},
		{"no such name", []string{"--upstream", "paris", "-c", l.File("other.json", `{"upstreams":{"berlin":{"url":"socks5://203.0.113.10:1"}},"contexts":{"default":{"mode":"global","default":"berlin"}}}`)}, 2, "no upstream"},
		{"no upstream", nil, 2, "upstream"},
		{"bad local", []string{"--upstream", "socks5://203.0.113.10:1080", "--bind", "nonsense"}, 2, "--bind"},
	} {
		r := lab.Exec(t, l.Client.Command(append([]string{lab.Binary(t), "forward", "127.0.0.1:9"}, c.args...)...))
		if r.Code != c.code || !strings.Contains(r.Stderr, c.says) || strings.Contains(r.Stderr, lab.Password) {
			t.Errorf("%s: %v", c.name, r)
		}
	}
}
