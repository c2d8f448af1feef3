// SPDX-License-Identifier: GPL-3.0-or-later

package lab

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// TestServers proves that the lab itself works, without mprox: each server carries curl to the origin, over both families.
func TestServers(t *testing.T) {
	l := New(t, Options{})
	ca := l.Unbound(t)
	started := []*Server{
		l.Dante(t, 1080, false), l.Dante(t, 1081, true), l.Microsocks(t, 1082), l.Squid(t, 3128), l.Tinyproxy(t, 8888), l.SSHDynamic(t, 1090),
	}
	for _, s := range started {
		for _, target := range []string{"198.51.100.80", "[2001:db8:3::80]", "www.example.test"} {
			t.Run(s.Name+"/"+target, func(t *testing.T) {
				l.Origin.Forget()
				out, err := l.Client.Output(t.Context(), "curl", "-sS", "-m", "10", "-p", "-x", s.URL(), "http://"+target+"/bytes/10")
				if err != nil || len(out) != 10 {
					t.Errorf("got %q, %v\n%s", out, err, s.Log)
				}
				if bad := l.Origin.AllFrom(ExitV4, ExitV6); len(bad) > 0 {
					t.Errorf("not from the proxy: %v", bad)
				}
			})
		}
	}
	t.Run("half-close", func(t *testing.T) {
		for _, s := range started {
			c, err := s.Connect(l.Client, netip.AddrPortFrom(OriginV4, PortCount))
			if err != nil {
				t.Errorf("%s: %v", s.Name, err)
				continue
			}
			defer c.Close()
			_, _ = c.Write(Block(5000))
			_ = c.(*net.TCPConn).CloseWrite()
			b, _ := io.ReadAll(c)
			if got := string(b) == "5000\n"; got != s.HalfClose {
				t.Errorf("%s carries half-close: %v, want %v (%q)", s.Name, got, s.HalfClose, b)
			}
		}
	})
	t.Run("unbound", func(t *testing.T) {
		for _, args := range [][]string{
			{"dig", "+short", "@" + OriginV4.String(), "www.example.test"},
			{"dig", "+short", "+tcp", "@" + OriginV6.String(), "www.example.test"},
			{"kdig", "+short", "+https=/dns-query", "+tls-ca=" + ca, "-p", "8443", "@" + OriginV4.String(), "www.example.test"},
		} {
			out, err := l.Client.Output(t.Context(), args...)
			if err != nil || strings.TrimSpace(out) != OriginV4.String() {
				t.Errorf("%v: %q, %v", args, out, err)
			}
		}
	})
}

// TestOriginExchange checks the test data against itself over a plain connection, and the capture and its classifier.
func TestOriginExchange(t *testing.T) {
	l := New(t, Options{})
	cp := l.Capture(t)
	for _, a := range []netip.Addr{OriginV4, OriginV6} {
		c, err := l.Client.Dial("tcp", netip.AddrPortFrom(a, PortSum).String(), 5*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if err := Exchange(c, 5_000_000); err != nil {
			t.Error(err)
		}
	}
	if _, err := l.Client.Output(t.Context(), "ping", "-c1", "-W1", OriginV4.String()); err != nil {
		t.Error(err)
	}
	pkts := cp.Packets()
	if n := len((Allow{}).Leaks(pkts)); n < 100 {
		t.Errorf("%d of %d packets are leaks", n, len(pkts))
	}
	all := Allow{Direct: []netip.Prefix{netip.MustParsePrefix("198.51.100.0/24"), netip.MustParsePrefix("2001:db8::/32")}}
	all.Check(t, pkts)
}

// TestRelay checks the delay and the loss of the relayed link.
func TestRelay(t *testing.T) {
	l := New(t, Options{RTT: 50 * time.Millisecond, Loss: 0.01})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	started := time.Now()
	c, err := l.Client.Dial("tcp", fmt.Sprintf("%s:%d", OriginV4, PortSum), 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if d := time.Since(started); d < 50*time.Millisecond {
		t.Errorf("connected after %v", d)
	}
	if err := Exchange(c, 1_000_000); err != nil {
		t.Error(err)
	}
	out, err := l.Client.Output(ctx, "ping", "-c", "3", "-i", "0.1", OriginV6.String())
	t.Log(out, err)
}

// TestDanteUDP finds out what dante itself carries, by a SOCKS5 client of a few lines, so that a test of mprox blames the right program.
func TestDanteUDP(t *testing.T) {
	l := New(t, Options{})
	s := l.Dante(t, 1080, false)
	ctl, err := l.Client.Dial("tcp", s.Addr.String(), 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer ctl.Close()
	_, _ = ctl.Write([]byte{5, 1, 0})
	buf := make([]byte, 70000)
	if _, err := io.ReadFull(ctl, buf[:2]); err != nil {
		t.Fatal(err)
	}
	_, _ = ctl.Write([]byte{5, 3, 0, 1, 0, 0, 0, 0, 0, 0})
	if _, err := io.ReadFull(ctl, buf[:10]); err != nil || buf[1] != 0 {
		t.Fatal(err, buf[:10])
	}
	relay := netip.AddrPortFrom(netip.AddrFrom4([4]byte(buf[4:8])), binary.BigEndian.Uint16(buf[8:10]))
	c, err := l.Client.Dial("udp", relay.String(), time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	v4 := append([]byte{0, 0, 0, 1}, OriginV4.AsSlice()...)
	v6 := append([]byte{0, 0, 0, 4}, OriginV6.AsSlice()...)
	for _, n := range []int{1, 1400, 8000, 20000, 40000, 65000, 65485, 65497} {
		for name, head := range map[string][]byte{"v4": v4, "v6": v6} {
			if name == "v6" && n > 65485 {
				continue
			}
			d := append(append([]byte{}, head...), 0, PortEcho)
			d = append(d, Block(n)...)
			if _, err := c.Write(d); err != nil {
				t.Errorf("%s %d: %v", name, n, err)
				continue
			}
			_ = c.SetReadDeadline(time.Now().Add(2 * time.Second))
			k, err := c.Read(buf)
			if err != nil || k != len(d) || !bytes.Equal(buf[len(head)+2:k], Block(n)) {
				t.Errorf("%s %d: %d bytes, %v", name, n, k, err)
			}
		}
	}
	t.Log(s.Log)
}
