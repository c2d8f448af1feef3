// SPDX-License-Identifier: GPL-3.0-or-later

package stack

import (
	"context"
	"errors"
	"io"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"

	"github.com/mutex-proxy/mutex/flow"
)

// TestCall: connections to applications come from whom they shall come from, two from one port at a time, and end like others.
func TestCall(t *testing.T) {
	for _, v := range variants() {
		t.Run(v.name, func(t *testing.T) {
			_, a, _, c := accepted(t, v)
			from := netip.AddrPortFrom(v.dst(21).Addr(), 20)
			for port := uint16(5001); port <= 5002; port++ {
				l, err := gonet.ListenTCP(a.ns, fullAddress(netip.AddrPortFrom(v.app(), port)), v.proto())
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { _ = l.Close() })
				ctx, cancel := context.WithTimeout(t.Context(), wait)
				defer cancel()
				up, err := c.(flow.Caller).Call(ctx, from, netip.AddrPortFrom(v.app(), port))
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { _ = up.Close() })
				down, err := l.Accept()
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { _ = down.Close() })
				_ = down.SetDeadline(time.Now().Add(wait))
				if got := netip.MustParseAddrPort(down.RemoteAddr().String()); got != from {
					t.Errorf("comes from %v, not %v", got, from)
				}
				data := randomBytes(300_000)
				go func() {
					_, _ = up.Write(data)
					_ = up.CloseWrite()
				}()
				if got, err := io.ReadAll(down); err != nil || string(got) != string(data) {
					t.Errorf("%d bytes: %v", len(got), err)
				}
				if _, err := down.Write(data[:100]); err != nil {
					t.Error(err)
				}
				buf := make([]byte, 100)
				if _, err := io.ReadFull(up, buf); err != nil || string(buf) != string(data[:100]) {
					t.Error(err)
				}
			}
			ctx, cancel := context.WithTimeout(t.Context(), wait)
			defer cancel()
			if _, err := c.(flow.Caller).Call(ctx, from, netip.AddrPortFrom(v.app(), 5003)); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("nobody listens: %v", err)
			}
			cancel()
			if _, err := c.(flow.Caller).Call(ctx, from, netip.AddrPortFrom(v.app(), 5004)); !errors.Is(err, context.Canceled) {
				t.Errorf("given up: %v", err)
			}
		})
	}
}
