// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/mutex-proxy/mutex/dialers/dialertest"
	"github.com/mutex-proxy/mutex/flow"
)

// TestUDPNames: an upstream whose associations take no names says so, or a datagram to a name would wait for an answer that cannot come.
func TestUDPNames(t *testing.T) {
	pool := func(urls ...string) flow.Dialer {
		var members []flow.Dialer
		for _, u := range urls {
			members = append(members, dialer(t, u))
		}
		p, err := NewPool("pool", RoundRobin, members, PoolConfig{})
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	direct := flow.Dialer(NewDirect("direct", NewNet(NetConfig{})))
	for _, tc := range []struct {
		name string
		d    flow.Dialer
		want bool
	}{
		{"socks5h", dialer(t, "socks5h://192.0.2.1"), true},
		{"socks5", dialer(t, "socks5://192.0.2.1"), false},
		{"socks5 without UDP", dialer(t, "socks5://192.0.2.1?udp=off"), true},
		{"direct", direct, false},
		{"pool", pool("socks5h://192.0.2.1", "http://192.0.2.2"), true},
		{"mixed pool", pool("socks5h://192.0.2.1", "socks5://192.0.2.2"), false},
	} {
		for _, d := range []flow.Dialer{tc.d, WithNames(tc.d, &fakeNames{})} {
			n, ok := d.(flow.UDPNamer)
			if !ok || n.UDPNames() != tc.want {
				t.Errorf("%s (%T): says so: %v, want %v", tc.name, d, ok, tc.want)
			}
		}
	}
}

// TestWaitRead: whoever reads an association can wait without a buffer.
func TestWaitRead(t *testing.T) {
	check := func(t *testing.T, pc flow.PacketConn, send func()) {
		t.Helper()
		w, ok := pc.(flow.Waiter)
		if !ok {
			t.Fatalf("%T cannot wait", pc)
		}
		_ = pc.SetReadDeadline(time.Unix(1, 0))
		if err := w.WaitRead(); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("deadline: %v", err)
		}
		_ = pc.SetReadDeadline(time.Now().Add(5 * time.Second))
		waited := make(chan error, 1)
		go func() { waited <- w.WaitRead() }()
		send()
		if err := <-waited; err != nil {
			t.Fatal(err)
		}
		if err := w.WaitRead(); err != nil { // nothing has been taken
			t.Fatal(err)
		}
		ds := []flow.Datagram{{Buf: make([]byte, 100)}}
		if n, err := pc.ReadBatch(ds); n != 1 || err != nil || string(ds[0].Buf) != "hello" {
			t.Errorf("%d %q %v", n, ds[0].Buf, err)
		}
		_ = pc.SetReadDeadline(time.Time{})
		go func() { waited <- w.WaitRead() }()
		_ = pc.Close()
		if err := <-waited; !errors.Is(err, net.ErrClosed) {
			t.Errorf("closed: %v", err)
		}
	}
	t.Run("socks5", func(t *testing.T) {
		_, pc, relay, me := associate(t, dialertest.Silent())
		check(t, pc, func() { _, _ = relay.WriteToUDPAddrPort([]byte("\x00\x00\x00\x01\xc0\x00\x02\x01\x00\x35hello"), me) })
	})
	t.Run("direct", func(t *testing.T) {
		peer, _ := relaySocket(t)
		pc, err := WithNames(NewDirect("direct", NewNet(NetConfig{})), &fakeNames{}).ListenPacket(testContext(t), nil)
		if err != nil {
			t.Fatal(err)
		}
		port := pc.(*namedPackets).PacketConn.(*plainUDP).LocalAddr().(*net.UDPAddr).AddrPort().Port()
		check(t, pc, func() { _, _ = peer.WriteToUDPAddrPort([]byte("hello"), netip.AddrPortFrom(loopback, port)) })
	})
}
