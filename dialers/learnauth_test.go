// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"strings"
	"testing"

	"github.com/mutex-proxy/mutex/dialers/dialertest"
)

// TestLearnAuth: how a server authenticates is what it last asked for or took.
func TestLearnAuth(t *testing.T) {
	socks := func(steps ...dialertest.Step) []dialertest.Step { return steps }
	demand := func(fields ...string) []dialertest.Step {
		return []dialertest.Step{dialertest.ReadHead(), dialertest.Send("HTTP/1.1 407 No\r\nProxy-Authenticate: " + strings.Join(fields, "\r\nProxy-Authenticate: ") + "\r\n\r\n")}
	}
	ok := []dialertest.Step{dialertest.ReadHead(), dialertest.Send(ok200), dialertest.Silent()}
	digest := `Digest realm="x", nonce="n", qop="auth", algorithm=SHA-256`
	for _, tt := range []struct {
		name, url string
		script    []dialertest.Step
		want      []string
	}{
		{"socks5 none", "socks5://bob:secret@", socks(dialertest.Read(4), dialertest.Send("\x05\x00"), dialertest.Read(10), dialertest.Send(first5), dialertest.Silent()), []string{"none"}},
		{"socks5 password", "socks5://bob:secret@", socks(dialertest.Read(4), dialertest.Send("\x05\x02"), dialertest.Read(12), dialertest.Send("\x01\x01")), []string{"password"}},
		{"socks5 not said", "socks5://", socks(dialertest.Read(3), dialertest.Send("\x05\xff")), nil},
		{"http none", "http://", ok, []string{"none"}},
		{"http basic", "http://bob:secret@", ok, []string{"basic"}},
		{"http bearer", "http://:secret@", ok, []string{"bearer"}},
		{"http demands", "http://", demand("Basic realm=x, Negotiate", digest, "Hush secret"), []string{"basic", "digest", "negotiate"}},
		{"http digest", "http://bob:secret@", append(demand(digest)[:1], dialertest.Send("HTTP/1.1 407 No\r\nContent-Length: 0\r\nProxy-Authenticate: "+digest+"\r\n\r\n"), dialertest.ReadHead(), dialertest.Send(ok200), dialertest.Silent()), []string{"digest"}},
		{"http garbage", "http://", demand("=,=,\"", strings.Repeat("x", 100)), nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := dialertest.Start(t, tt.script...)
			options := ""
			if tt.want != nil && tt.want[0] == "bearer" {
				options = "?auth=bearer"
			}
			d := dialer(t, tt.url+s.Addr.String()+options)
			if got := StatusOf(d).Auth; got != "" {
				t.Errorf("%q before anything was said", got)
			}
			if c, err := d.Dial(testContext(t), addr(t, "192.0.2.7:21")); err == nil {
				c.Abort()
			}
			if got := StatusOf(d).Auth; got != strings.Join(tt.want, " ") {
				t.Errorf("learned %q, want %q", got, tt.want)
			}
		})
	}
	t.Run("learned anew", func(t *testing.T) {
		var a authSchemes
		for _, step := range []struct {
			say  func()
			want string
		}{
			{func() { a.asked([]string{"Basic realm=x", digest}) }, "basic digest"},
			{func() { a.took("digest") }, "basic digest"}, // one of them
			{func() { a.asked([]string{digest}) }, "digest"},
			{func() { a.took("none") }, "none"},
			{func() { a.asked([]string{"Hush"}) }, "none"},
			{func() { a.are("password") }, "password"},
		} {
			if step.say(); a.String() != step.want {
				t.Errorf("%q, want %q", a.String(), step.want)
			}
		}
		if n := testing.AllocsPerRun(100, func() { a.are("password"); a.took("password") }); n != 0 {
			t.Errorf("%v allocations for what is known", n)
		}
	})
}
