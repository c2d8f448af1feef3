// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"bytes"
	"net/netip"
	"testing"

	"github.com/mutex-proxy/mutex/e2e/lab"
)

// TestUDPOverTCP carries an application's datagrams in a stream, in both versions, also through an HTTP proxy that knows nothing of it: the
// exit behind it does.
func TestUDPOverTCP(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	serveOwn(t, l, 1081)
	for _, url := range []string{
		"socks5h://203.0.113.10:1081?udp=over-tcp", "socks5h://203.0.113.10:1081?udp=over-tcp-v1", "http://203.0.113.10:1081?udp=over-tcp",
	} {
		t.Run(url, func(t *testing.T) {
			m := l.Mprox(t)
			cp := l.Capture(t)
			m.Up("--proxy", url)
			defer m.Stop()
			for _, dst := range []netip.Addr{lab.OriginV4, lab.OriginV6} {
				sock := udpSocket(t, l, dst)
				to := netip.AddrPortFrom(dst, lab.PortEcho)
				for _, n := range []int{1, 1200, 1473, 9000, 65000} {
					got, from, err := exchangeUDP(sock, to, lab.Block(n))
					if err != nil || !bytes.Equal(got, lab.Block(n)) || from != to {
						t.Errorf("%v: %d bytes: got %d from %v, %v", dst, n, len(got), from, err)
					}
				}
			}
			for _, p := range cp.Packets() {
				if p.Proto == 17 && p.Dst == lab.ProxyV4 {
					t.Errorf("a datagram left as one: %v", p)
				}
			}
		})
	}
}
