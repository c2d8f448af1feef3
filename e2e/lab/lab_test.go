// SPDX-License-Identifier: GPL-3.0-or-later

package lab

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// TestServers proves that the lab itself works, without mprox: each server carries curl to the origin, over both families.
func TestServers(t *testing.T) {
	l := New(t, Options{})
	ca := l.Unbound(t)
	for _, s := range []*Server{
		l.Dante(t, 1080, false), l.Dante(t, 1081, true), l.Microsocks(t, 1082), l.Squid(t, 3128), l.Tinyproxy(t, 8888), l.SSHDynamic(t, 1090),
	} {
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
