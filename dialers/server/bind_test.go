// SPDX-License-Identifier: GPL-3.0-or-later

package server

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/dialers"
	"github.com/mutex-proxy/mutex/flow"
)

// knock connects from an address.
func knock(t *testing.T, from string, to netip.AddrPort) *net.TCPConn {
	t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}, Timeout: 5 * time.Second}
	c, err := d.DialContext(t.Context(), "tcp", to.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	return c.(*net.TCPConn)
}

func bind(t *testing.T, raw, peer string) (flow.Binding, error) {
	t.Helper()
	a, err := dialers.ParseAddr(peer)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	return dialer(t, raw).(dialers.Binder).Bind(ctx, a)
}

// TestBind lets somebody connect to the client through the server, in every dialect, and moves bytes both ways.
func TestBind(t *testing.T) {
	_, at := start(t, Config{})
	for _, scheme := range []string{"socks4", "socks4a", "socks5", "socks5h"} {
		for _, peer := range []string{"127.0.0.1:0", "127.0.0.1:4711", "0.0.0.0:0"} {
			t.Run(scheme+" "+peer, func(t *testing.T) {
				b, err := bind(t, scheme+"://"+at.String(), peer)
				if err != nil {
					t.Fatal(err)
				}
				if !b.Addr().Addr().IsLoopback() || b.Addr().Port() == 0 {
					t.Errorf("listens on %v", b.Addr())
				}
				app := knock(t, "127.0.0.1", b.Addr())
				_, _ = app.Write([]byte("220 early"))
				c, from, err := b.Accept(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				if from.String() != app.LocalAddr().String() {
					t.Errorf("peer %v, is %v", from, app.LocalAddr())
				}
				big := bytes.Repeat([]byte("0123456789"), 100_000)
				go func() {
					_, _ = c.Write(big)
					_ = c.CloseWrite()
				}()
				if got, err := io.ReadAll(app); err != nil || !bytes.Equal(got, big) {
					t.Errorf("%d bytes, %v", len(got), err)
				}
				_ = app.CloseWrite()
				if got, err := io.ReadAll(c); err != nil || string(got) != "220 early" {
					t.Errorf("%q, %v", got, err)
				}
				if _, err := net.DialTimeout("tcp", b.Addr().String(), time.Second); err == nil {
					t.Error("listens on after its one connection")
				}
			})
		}
	}
}

// TestBindStranger: who was not asked for is reset, and whoever was still gets through.
func TestBindStranger(t *testing.T) {
	_, at := start(t, Config{})
	b, err := bind(t, "socks5://"+at.String(), "127.0.0.2:0")
	if err != nil {
		t.Fatal(err)
	}
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 3)}, Timeout: 5 * time.Second}
	stranger, err := d.DialContext(t.Context(), "tcp", b.Addr().String())
	if err == nil {
		_, err = stranger.Read(make([]byte, 1))
		stranger.Close()
	}
	if !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the stranger was not reset: %v", err)
	}
	app := knock(t, "127.0.0.2", b.Addr())
	c, from, err := b.Accept(t.Context())
	if err != nil || from.String() != app.LocalAddr().String() {
		t.Fatal(from, err)
	}
	c.Close()
}

func TestBindPort(t *testing.T) {
	_, at := start(t, Config{})
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := free.Addr().(*net.TCPAddr).Port
	where := net.JoinHostPort("0.0.0.0", strconv.Itoa(port))
	if _, err := bind(t, "socks5://"+at.String(), where); err == nil {
		t.Error("a port in use was granted")
	}
	free.Close()
	b, err := bind(t, "socks5://"+at.String(), where)
	if err != nil || int(b.Addr().Port()) != port {
		t.Fatal(err)
	}
	b.Close()
}

func TestBindRefused(t *testing.T) {
	deny, err := Destinations(nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	_, closed := start(t, Config{Allow: deny})
	_, chain := start(t, Config{Dialer: fakeOut{flow.ErrRefused}})
	_, users := start(t, Config{Users: map[string]string{"bob": secret}})
	for name, tt := range map[string]struct {
		at     netip.AddrPort
		reason flow.Reason
		is     error
	}{
		"denied peer": {closed, flow.ReasonProhibited, flow.ErrProhibited},
		"chain":       {chain, flow.ReasonRefused, errors.ErrUnsupported},
		"no password": {users, flow.ReasonHostUnreachable, flow.ErrUpstream},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := bind(t, "socks5://"+tt.at.String(), "127.0.0.1:0"); !errors.Is(err, tt.is) {
				t.Errorf("socks5: %v", err)
			}
			if _, err := bind(t, "socks4://"+tt.at.String(), "127.0.0.1:0"); err == nil {
				t.Error("socks4 was granted")
			}
		})
	}
}

// TestBindEnds: a binding ends with its time, with its client, with the server; a place is given back each time.
func TestBindEnds(t *testing.T) {
	s, at := start(t, Config{MaxBinds: 1, BindTimeout: 200 * time.Millisecond})
	b, err := bind(t, "socks5://"+at.String(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := bind(t, "socks5://"+at.String(), "127.0.0.1:0"); err == nil {
		t.Error("one more than the limit")
	}
	if _, _, err := b.Accept(t.Context()); flow.ReasonOf(err) != flow.ReasonHostUnreachable {
		t.Errorf("nobody connected: %v", err)
	}
	for range 3 {
		waitBinds(t, s, 0)
		if b, err = bind(t, "socks5://"+at.String(), "127.0.0.1:0"); err != nil {
			t.Fatal(err)
		}
		b.Close()
	}
	waitBinds(t, s, 0)
}

func waitBinds(t *testing.T, s *Server, n int) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(5 * time.Second); len(s.binds) != n; <-tick.C {
		if time.Now().After(end) {
			t.Fatalf("%d bindings are left", len(s.binds))
		}
	}
}
