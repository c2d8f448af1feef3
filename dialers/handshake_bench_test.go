// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"testing"

	"github.com/mutex-proxy/mutex/dialers/dialertest"
	"github.com/mutex-proxy/mutex/flow"
)

// BenchmarkHandshake is a connection through a proxy on loopback, from connect to close: what allocs/op says is allocated for it. The proxy's own
// are counted too; it allocates next to nothing.
func BenchmarkHandshake(b *testing.B) {
	for _, bb := range []struct {
		name, url string
		script    []dialertest.Step
	}{
		{"socks4", "socks4://", []dialertest.Step{dialertest.Read(9), dialertest.Send(first4), dialertest.Silent()}},
		{"socks5", "socks5://", []dialertest.Step{dialertest.Read(3), dialertest.Send(greet5), dialertest.Read(10), dialertest.Send(first5), dialertest.Silent()}},
		{"socks5-password", "socks5://bob:secret@", []dialertest.Step{
			dialertest.Read(4), dialertest.Send("\x05\x02"), dialertest.Read(12), dialertest.Send("\x01\x00"), dialertest.Read(10), dialertest.Send(first5), dialertest.Silent(),
		}},
		{"http", "http://", []dialertest.Step{dialertest.ReadHead(), dialertest.Send("HTTP/1.1 200 OK\r\n\r\n"), dialertest.Silent()}},
		{"http-basic", "http://bob:secret@", []dialertest.Step{dialertest.ReadHead(), dialertest.Send("HTTP/1.1 200 OK\r\n\r\n"), dialertest.Silent()}},
	} {
		b.Run(bb.name, func(b *testing.B) {
			s := dialertest.Start(b, bb.script...)
			spec, err := ParseURL(bb.url + s.Addr.String())
			if err != nil {
				b.Fatal(err)
			}
			d, err := New("up", spec, NewNet(NetConfig{}))
			if err != nil {
				b.Fatal(err)
			}
			dst, err := ParseAddr("192.0.2.7:21")
			if err != nil {
				b.Fatal(err)
			}
			b.ReportAllocs()
			for b.Loop() {
				var c flow.Conn
				if c, err = d.Dial(b.Context(), dst); err != nil {
					b.Fatal(err)
				}
				c.Abort()
			}
		})
	}
}
