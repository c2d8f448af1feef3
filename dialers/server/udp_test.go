// SPDX-License-Identifier: GPL-3.0-or-later

package server

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/mutex-proxy/mutex/dialers"
	"github.com/mutex-proxy/mutex/flow"
)

// echoUDP sends back what comes, on a loopback address.
func echoUDP(t *testing.T, at string) netip.AddrPort {
	t.Helper()
	c, err := dialers.NewNet(dialers.NetConfig{}).ListenUDP(t.Context(), netip.MustParseAddrPort(at))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, maxDatagram)
		for {
			n, from, err := c.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			_, _ = c.WriteToUDPAddrPort(buf[:n], from)
		}
	}()
	t.Cleanup(func() {
		c.Close()
		<-done
	})
	return c.LocalAddr().(*net.UDPAddr).AddrPort()
}

func listen(t *testing.T, raw string) flow.PacketConn {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	pc, err := dialer(t, raw).ListenPacket(ctx, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { pc.Close() })
	return pc
}

// exchange sends a datagram until its echo is back: UDP may lose it, and a name has to be looked up.
func exchange(t *testing.T, pc flow.PacketConn, to flow.Addr, payload []byte) flow.Datagram {
	t.Helper()
	ds := []flow.Datagram{{Buf: make([]byte, maxDatagram)}}
	for range 20 {
		if _, err := pc.WriteBatch([]flow.Datagram{{Addr: to, Buf: payload}}); err != nil {
			t.Fatal(err)
		}
		_ = pc.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
		if n, err := pc.ReadBatch(ds); err == nil && n == 1 {
			return ds[0]
		}
	}
	t.Fatalf("no echo of %d bytes from %v", len(payload), to)
	return flow.Datagram{}
}

func TestUDP(t *testing.T) {
	_, at := start(t, Config{})
	v4, v6 := echoUDP(t, "127.0.0.1:0"), echoUDP(t, "[::1]:0")
	pc := listen(t, "socks5h://"+at.String())
	for _, tt := range []struct {
		to   flow.Addr
		from netip.AddrPort
		size int
	}{
		{flow.AddrFrom(v4), v4, 0},
		{flow.AddrFrom(v4), v4, 1},
		{flow.AddrFrom(v4), v4, 65497},
		{flow.AddrFrom(v6), v6, 1},
		{flow.AddrFrom(v6), v6, 65485},
		{flow.Addr{Host: "localhost", Port: v4.Port()}, v4, 5},
	} {
		payload := bytes.Repeat([]byte("x"), tt.size)
		got := exchange(t, pc, tt.to, payload)
		if got.Addr.AddrPort() != tt.from || !bytes.Equal(got.Buf, payload) {
			t.Errorf("%v, %d bytes: from %v, %d bytes", tt.to, tt.size, got.Addr, len(got.Buf))
		}
	}
}

// The relay takes datagrams of its client alone, and ends with the control connection.
func TestUDPIsLocked(t *testing.T) {
	s, at := start(t, Config{MaxUDP: 1})
	echo := echoUDP(t, "127.0.0.1:0")
	ctl := connect(t, at)
	if _, err := io.WriteString(ctl, "\x05\x01\x00\x05\x03\x00\x01\x00\x00\x00\x00\x00\x00"); err != nil {
		t.Fatal(err)
	}
	reply := make([]byte, 12)
	if _, err := io.ReadFull(ctl, reply); err != nil || reply[3] != repSucceeded {
		t.Fatalf("%x, %v", reply, err)
	}
	relay := netip.AddrPortFrom(netip.AddrFrom4([4]byte(reply[6:10])), uint16(reply[10])<<8|uint16(reply[11]))
	if relay.Addr() != at.Addr() || relay.Port() == 0 {
		t.Fatal(relay)
	}
	n := dialers.NewNet(dialers.NetConfig{})
	dial := func() *net.UDPConn {
		c, err := n.DialUDP(t.Context(), relay)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	me, other := dial(), dial()
	msg := appendAddr([]byte{0, 0, 0}, echo)
	fragment := bytes.Clone(msg)
	fragment[2] = 1
	buf := make([]byte, 100)
	ask := func(c *net.UDPConn, m []byte, wait time.Duration) error {
		if _, err := c.Write(m); err != nil {
			return err
		}
		_ = c.SetReadDeadline(time.Now().Add(wait))
		_, err := c.Read(buf)
		return err
	}
	if err := ask(me, append(msg, 'x'), 5*time.Second); err != nil {
		t.Fatal(err)
	}
	if err := ask(other, append(msg, 'x'), 50*time.Millisecond); err == nil {
		t.Error("another port was served")
	}
	for _, bad := range [][]byte{fragment, {0, 0, 0, 9, 0}, {0}, {0, 0, 0, 1, 127}} {
		if err := ask(me, bad, 20*time.Millisecond); err == nil {
			t.Errorf("%x was served", bad)
		}
	}
	if _, err := dialer(t, "socks5://"+at.String()).ListenPacket(t.Context(), nil); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("above the limit: %v", err)
	}
	ctl.Close()
	for s.Active() > 0 {
		<-time.After(time.Millisecond)
	}
	if err := ask(me, append(msg, 'x'), 5*time.Second); err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the relay outlived its control connection: %v", err)
	}
}

func TestUDPIdle(t *testing.T) {
	_, at := start(t, Config{UDPIdleTimeout: 50 * time.Millisecond})
	pc := listen(t, "socks5://"+at.String())
	if _, err := pc.ReadBatch([]flow.Datagram{{Buf: make([]byte, 1)}}); !errors.Is(err, flow.ErrUpstream) {
		t.Errorf("%v", err)
	}
}

// A chain: our server behind our server.
func TestUDPChain(t *testing.T) {
	_, far := start(t, Config{})
	_, near := start(t, Config{Dialer: dialer(t, "socks5h://"+far.String())})
	echo := echoUDP(t, "127.0.0.1:0")
	pc := listen(t, "socks5h://"+near.String())
	if got := exchange(t, pc, flow.AddrFrom(echo), []byte("x")); got.Addr.AddrPort() != echo {
		t.Error(got.Addr)
	}
}

func FuzzParseDatagram(f *testing.F) {
	f.Add([]byte("\x00\x00\x00\x01\x7f\x00\x00\x01\x00\x35payload"))
	f.Add([]byte("\x00\x00\x00\x03\x09localhost\x00\x35payload"))
	f.Add([]byte("\x00\x00\x00\x04aaaaaaaaaaaaaaaa\x00\x35"))
	f.Fuzz(func(t *testing.T, in []byte) {
		dst, payload, err := parseDatagram(in)
		if err != nil {
			return
		}
		if !bytes.HasSuffix(in, payload) || dst.Host == "" && !dst.IP.IsValid() {
			t.Errorf("%x: %v %x", in, dst, payload)
		}
		if dst.IP.IsValid() {
			b := make([]byte, headerSize(dst.IP))
			putHeader(b, dst.AddrPort())
			if again, _, err := parseDatagram(b); err != nil || again != dst {
				t.Errorf("%v written as %x: %v, %v", dst, b, again, err)
			}
		}
	})
}
