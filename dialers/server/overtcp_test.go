// SPDX-License-Identifier: GPL-3.0-or-later

package server

import (
	"bytes"
	"errors"
	"io"
	"net/netip"
	"testing"
	"time"

	"github.com/mutex-proxy/mutex/dialers/uot"
	"github.com/mutex-proxy/mutex/flow"
)

// TestOverTCP carries datagrams of all sizes in a stream, in both versions and by every protocol that is sent names.
func TestOverTCP(t *testing.T) {
	_, at := start(t, Config{})
	v4, v6 := echoUDP(t, "127.0.0.1:0"), echoUDP(t, "[::1]:0")
	for _, raw := range []string{"socks5h://", "socks4a://", "http://", "auto://"} {
		for _, version := range []string{"over-tcp", "over-tcp-v1"} {
			t.Run(raw+version, func(t *testing.T) {
				pc := listen(t, raw+at.String()+"?udp="+version)
				for _, to := range []flow.Addr{flow.AddrFrom(v4), flow.AddrFrom(v6), {Host: "localhost", Port: v4.Port()}} {
					for _, size := range []int{0, 1, 1200, 9000, 65000} {
						payload := bytes.Repeat([]byte("u"), size)
						if got := exchange(t, pc, to, payload); !bytes.Equal(got.Buf, payload) || got.Addr.Port != to.Port {
							t.Errorf("%v: %d bytes came back as %d from %v", to, size, len(got.Buf), got.Addr)
						}
					}
				}
			})
		}
	}
}

// TestOverTCPConnected is the form for one destination, which others' clients use.
func TestOverTCPConnected(t *testing.T) {
	_, at := start(t, Config{})
	echo := echoUDP(t, "127.0.0.1:0")
	c := connect(t, at)
	msg := append([]byte("\x05\x01\x00\x05\x01\x00\x03\x17"+uot.Magic2+"\x00\x00\x01\x01\x7f\x00\x00\x01"), byte(echo.Port()>>8), byte(echo.Port()))
	msg = append(msg, "\x00\x02hi\x00\x00\x00\x03you"...)
	if _, err := c.Write(msg); err != nil {
		t.Fatal(err)
	}
	want := "\x05\x00\x05\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x02hi\x00\x00\x00\x03you"
	got := make([]byte, len(want))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != want {
		t.Errorf("%q, %v", got, err)
	}
}

// TestOverTCPRefused: the limits, the rules and the time-outs of associations hold in a stream too, and garbage ends it.
func TestOverTCPRefused(t *testing.T) {
	s, at := start(t, Config{MaxUDP: 1, UDPIdleTimeout: 100 * time.Millisecond, Allow: func(netip.AddrPort) bool { return false }})
	pc := listen(t, "socks5h://"+at.String()+"?udp=over-tcp")
	if _, err := dialer(t, "socks5h://"+at.String()+"?udp=over-tcp").ListenPacket(t.Context(), nil); err == nil {
		t.Error("one more than the limit")
	}
	if _, err := pc.WriteBatch([]flow.Datagram{{Addr: flow.AddrFrom(echoUDP(t, "127.0.0.1:0")), Buf: []byte("x")}}); err != nil {
		t.Error(err)
	}
	_ = pc.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := pc.ReadBatch([]flow.Datagram{{Buf: make([]byte, 100)}}); !errors.Is(err, flow.ErrUpstream) { // denied, and then idle
		t.Errorf("%v", err)
	}
	c := connect(t, at)
	_, _ = c.Write([]byte("\x05\x01\x00\x05\x01\x00\x03\x17" + uot.Magic2 + "\x00\x00\x07"))
	if b, _ := io.ReadAll(c); len(b) > 12 {
		t.Errorf("%q", b)
	}
	for end := time.Now().Add(5 * time.Second); s.Active() > 0 && time.Now().Before(end); {
		_, _ = c.Read(make([]byte, 1))
	}
	if s.Active() > 0 {
		t.Error("a stream is left")
	}
}
