// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/mutex-proxy/mutex/e2e/lab"
)

// TestNoAllocations counts what the daemon allocates while packets pass: through the device, netstack or the UDP sessions, the relays and the upstream's
// association. It is none a packet; what is left is of the scrapes, which differ by some thousands, and of what collections take from the pools.
func TestNoAllocations(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, false)
	m := l.Mprox(t)
	m.UpConfig(fmt.Sprintf(`{ "http": { "listen": "127.0.0.1:9464" }, "upstreams": { "p": { "url": %q } },
  "contexts": { "default": { "mode": "global", "default": "p", "offload": "off", "dns": { "mode": "off" }, "tun": { "name": "mprox0" } } } }`,
		strings.Replace(s.URL(), "socks5:", "socks5h:", 1)))
	const mallocs = "go_memstats_mallocs_total"
	up := dialOrigin(t, l, lab.OriginV4, lab.PortCount)
	down := dialOrigin(t, l, lab.OriginV4, lab.PortHTTP)
	fmt.Fprintf(down, "GET /bytes/900000000 HTTP/1.0\r\n\r\n")
	echo := udpSocket(t, l, lab.OriginV4)
	const bytes = 300_000_000
	const segment = 1448 // bytes of a packet; a train counts as the packets it is made of
	for name, load := range map[string]func() int{
		"tcp up": func() int {
			if _, err := io.Copy(up, lab.DataReader(bytes)); err != nil {
				t.Error(err)
			}
			return bytes / segment
		},
		"tcp down": func() int {
			if _, err := io.CopyN(io.Discard, down, bytes); err != nil {
				t.Error(err)
			}
			return bytes / segment
		},
		"udp": func() int { return 2 * echoMany(t, echo, 40_000) },
	} {
		load() // what is pooled is made
		before := metric(t, l, mallocs)
		scrape := metric(t, l, mallocs) - before
		before += scrape
		packets := load()
		got := metric(t, l, mallocs) - before - scrape
		t.Logf("%s: %.0f allocations, %d packets; %.0f by a scrape alone", name, got, packets, scrape)
		if packets == 0 || got > float64(packets)/10 {
			t.Errorf("%s: %.0f allocations for %d packets", name, got, packets)
		}
	}
}

// echoMany has datagrams echoed, 16 on the way at a time, and returns how many came back. Lost ones are not sent again.
func echoMany(t *testing.T, c *net.UDPConn, n int) int {
	t.Helper()
	back := 0
	b, dst := lab.Block(1200), netip.AddrPortFrom(lab.OriginV4, lab.PortEcho)
	buf := make([]byte, 1<<16)
	for range n / 16 {
		for range 16 {
			if _, err := c.WriteToUDPAddrPort(b, dst); err != nil {
				t.Fatal(err)
			}
		}
		for range 16 {
			_ = c.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
			if _, _, err := c.ReadFromUDPAddrPort(buf); err != nil {
				break
			}
			back++
		}
	}
	return back
}
