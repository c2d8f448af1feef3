// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/mutex-proxy/mutex/e2e/lab"
)

// TestRateLimits: a context's bandwidth, each way, and its new flows are bounded from a reload on, and no longer after another. What is paced
// passes netstack; flows that were adopted before live on.
func TestRateLimits(t *testing.T) {
	t.Parallel()
	w := newWire(t, "auto", lab.Options{})
	limit := func(limits string) {
		t.Helper()
		w.m.WriteConfig(fmt.Sprintf(`{ "upstreams": { "p": { "url": %q } }, "contexts": { "default": { "mode": "global", "default": "p",
  "dns": { "mode": "off" }, "limits": %s } } }`, w.s.URL(), limits))
		if err := w.m.Post("/v1/reload"); err != nil {
			t.Fatal(err)
		}
	}
	before, beforeFar := w.open(t, lab.OriginV4)
	w.check(t, before, beforeFar)

	limit(`{ "bandwidth": "1MB" }`)
	app, far := w.open(t, lab.OriginV6)
	if f := w.flow(t, app); f.Path != "netstack" || f.PathReason != "its bandwidth is limited" {
		t.Errorf("path %q, because %q", f.Path, f.PathReason)
	}
	const size = 1_500_000
	var moving sync.WaitGroup
	for what, ends := range map[string][2]*net.TCPConn{"up": {app, far}, "down": {far, app}} {
		begin := time.Now()
		moving.Go(func() {
			if _, err := ends[0].Write(make([]byte, size)); err != nil {
				t.Errorf("%s: %v", what, err)
			}
		})
		moving.Go(func() {
			if _, err := io.ReadFull(ends[1], make([]byte, size)); err != nil {
				t.Errorf("%s: %v", what, err)
			}
			if took := time.Since(begin); took < 1400*time.Millisecond { // less what may pass at once
				t.Errorf("%s: %d bytes in %v", what, size, took)
			}
		})
	}
	moving.Wait()
	w.check(t, before, beforeFar)
	datagramsLimited(t, w)

	limit(`{ "new_flows_per_second": 5 }`)
	begin, opened, refused := time.Now(), 0, 0
	for range 40 {
		c, err := w.Client.Dial("tcp", netip.AddrPortFrom(lab.OriginV4, lab.PortEcho).String(), 5*time.Second)
		switch {
		case err == nil:
			opened++
			c.Close()
		case isErrno(err, syscall.EHOSTUNREACH):
			refused++
		default:
			t.Error(err)
		}
	}
	if most := 5 + 5*time.Since(begin).Seconds(); opened < 5 || float64(opened) > most {
		t.Errorf("%d flows in %v, %d refused", opened, time.Since(begin), refused)
	}
	dropped := w.m.Status().Contexts[0].PacketsDropped
	if dropped < uint64(refused) {
		t.Errorf("%d refused, %d counted", refused, dropped)
	}

	limit(`{}`)
	app, far = w.open(t, lab.OriginV4)
	w.check(t, app, far)
}

// datagramsLimited sends more datagrams than may pass; those that are dropped are gone, and a second later others pass.
func datagramsLimited(t *testing.T, w *wire) {
	t.Helper()
	c, err := w.Client.Dial("udp", netip.AddrPortFrom(lab.OriginV4, lab.PortEcho).String(), 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	echoed := func(wait time.Duration) (n int) {
		buf := make([]byte, 2048)
		for {
			_ = c.SetReadDeadline(time.Now().Add(wait))
			m, err := c.Read(buf)
			if err != nil {
				return n
			}
			n += m
		}
	}
	begin := time.Now()
	for range 2000 {
		_, _ = c.Write(make([]byte, 1000))
	}
	n := echoed(time.Second)
	if most := 300_000 + 1e6*time.Since(begin).Seconds(); n == 0 || float64(n) > most || n >= 2_000_000 {
		t.Errorf("%d bytes of datagrams in %v", n, time.Since(begin))
	}
	if _, err := c.Write(make([]byte, 1000)); err != nil || echoed(time.Second) != 1000 {
		t.Errorf("a datagram after a second without any is lost: %v", err)
	}
}
