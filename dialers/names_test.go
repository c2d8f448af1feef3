// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mutex-proxy/mutex/dialers/dialertest"
	"github.com/mutex-proxy/mutex/flow"
)

// fakeDialer answers each Dial with what dial says, and writes down what it was asked.
type fakeDialer struct {
	name string
	dial func(ctx context.Context, dst flow.Addr) error

	mu    sync.Mutex
	asked []string
	pc    flow.PacketConn
	pcErr error
}

func (d *fakeDialer) Name() string { return d.name }

func (d *fakeDialer) Dial(ctx context.Context, dst flow.Addr) (flow.Conn, error) {
	d.mu.Lock()
	d.asked = append(d.asked, dst.AddrPort().String()+" "+dst.Host)
	d.mu.Unlock()
	if d.dial != nil {
		if err := d.dial(ctx, dst); err != nil {
			return nil, err
		}
	}
	return &fakeConn{Conn: &dialertest.Conn{}, from: d.name}, nil
}

func (d *fakeDialer) ListenPacket(context.Context, *flow.Flow) (flow.PacketConn, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.asked = append(d.asked, "udp")
	return d.pc, d.pcErr
}

func (d *fakeDialer) log() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.asked)
}

type fakeConn struct {
	net.Conn
	from string
	mu   sync.Mutex
	rst  bool
}

func (c *fakeConn) CloseWrite() error { return nil }

func (c *fakeConn) Abort() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.rst = true
}

type fakeNames struct {
	flow.Names
	hosts map[string][]netip.Addr
	wait  chan struct{} // nil = none
	mu    sync.Mutex
	asked int
}

func (f *fakeNames) Resolve(ctx context.Context, host string) ([]netip.Addr, error) {
	f.mu.Lock()
	f.asked++
	f.mu.Unlock()
	if f.wait != nil {
		select {
		case <-f.wait:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	if host == "noservers" {
		return nil, fmt.Errorf("dns: %w", flow.ErrNoServers)
	}
	ips, ok := f.hosts[host]
	if !ok {
		return nil, errors.New("NXDOMAIN")
	}
	return ips, nil
}

func TestWithNames(t *testing.T) {
	names := &fakeNames{hosts: map[string][]netip.Addr{"a": addrs("2001:db8::1", "2001:db8::2", "192.0.2.1", "192.0.2.2"), "none": nil}}
	refuse := func(_ context.Context, dst flow.Addr) error {
		if dst.IP.String() != "192.0.2.2" {
			return fmt.Errorf("x: %w", flow.ErrRefused)
		}
		return nil
	}
	d := &fakeDialer{name: "up", dial: refuse}
	n := WithNames(d, names)
	if _, err := n.Dial(testContext(t), flow.Addr{Host: "a", Port: 80}); err != nil {
		t.Fatal(err)
	}
	want := []string{"192.0.2.1:80 a", "[2001:db8::1]:80 a", "192.0.2.2:80 a"}
	if got := d.log(); !slices.Equal(got, want) {
		t.Errorf("asked %q, want %q", got, want)
	}
	if _, err := n.Dial(testContext(t), flow.Addr{Host: "a", IP: netip.MustParseAddr("192.0.2.2"), Port: 80}); err != nil || names.asked != 1 {
		t.Errorf("a known address was resolved again: %v", err)
	}
	_, err := n.Dial(testContext(t), flow.Addr{Host: "nowhere", Port: 80})
	wantError(t, err, flow.ReasonHostUnreachable, false)
	_, err = n.Dial(testContext(t), flow.Addr{Host: "none", Port: 80})
	wantError(t, err, flow.ReasonHostUnreachable, false)
	_, err = n.Dial(testContext(t), flow.Addr{Host: "noservers", Port: 80})
	if !errors.Is(err, flow.ErrNoServers) {
		t.Error(err)
	}
	d.dial = func(context.Context, flow.Addr) error { return fmt.Errorf("x: %w", flow.ErrRefused) }
	_, err = n.Dial(testContext(t), flow.Addr{Host: "a", Port: 80})
	wantError(t, err, flow.ReasonRefused, false)
	d.dial = func(context.Context, flow.Addr) error { return fmt.Errorf("x: %w", flow.ErrUpstream) }
	before := len(d.log())
	_, err = n.Dial(testContext(t), flow.Addr{Host: "a", Port: 80})
	wantError(t, err, flow.ReasonHostUnreachable, true)
	if got := len(d.log()) - before; got != 1 {
		t.Errorf("a dead upstream was asked %d times", got)
	}
}

func TestWithNamesWhoNeedsIt(t *testing.T) {
	names := new(fakeNames)
	for raw, wrapped := range map[string]bool{"socks5://h": true, "socks5h://h": false, "http://h": false, "direct://": true} {
		d := dialer(t, raw)
		got := WithNames(d, names)
		if (got != d) != wrapped {
			t.Errorf("%s: wrapped %v", raw, got != d)
		}
		if StatusOf(got).URL != StatusOf(d).URL || got.Name() != "up" {
			t.Errorf("%s: %+v", raw, StatusOf(got))
		}
		if again := WithNames(got, names); again != got {
			t.Errorf("%s: wrapped twice", raw)
		}
		if WithNames(d, nil) != d {
			t.Errorf("%s: wrapped without names", raw)
		}
	}
}

func TestInterleave(t *testing.T) {
	in := addrs("192.0.2.1", "192.0.2.2", "2001:db8::1", "::ffff:192.0.2.3")
	if got := fmt.Sprint(interleave(in, false)); got != "[192.0.2.1 2001:db8::1 192.0.2.2 192.0.2.3]" {
		t.Error(got)
	}
	if got := fmt.Sprint(interleave(in, true)); got != "[2001:db8::1 192.0.2.1 192.0.2.2 192.0.2.3]" {
		t.Error(got)
	}
}

// fakePackets is an association in memory.
type fakePackets struct {
	mu     sync.Mutex
	sent   []string
	in     chan flow.Datagram
	closed chan struct{}
	once   sync.Once
}

func newFakePackets() *fakePackets {
	return &fakePackets{in: make(chan flow.Datagram, 16), closed: make(chan struct{})}
}

func (p *fakePackets) ReadBatch(ds []flow.Datagram) (int, error) {
	select {
	case d := <-p.in:
		ds[0].Addr, ds[0].Buf = d.Addr, append(ds[0].Buf[:0], d.Buf...)
		return 1, nil
	case <-p.closed:
		return 0, net.ErrClosed
	}
}

func (p *fakePackets) WriteBatch(ds []flow.Datagram) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, d := range ds {
		if string(d.Buf) == "too large" {
			return i, errors.New("too large")
		}
		p.sent = append(p.sent, d.Addr.AddrPort().String()+" "+string(d.Buf))
	}
	return len(ds), nil
}

func (p *fakePackets) log() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.sent)
}

func (p *fakePackets) SetReadDeadline(time.Time) error { return nil }

func (p *fakePackets) Close() error {
	p.once.Do(func() { close(p.closed) })
	return nil
}

func TestNamedPackets(t *testing.T) {
	names := &fakeNames{hosts: map[string][]netip.Addr{"a": addrs("2001:db8::1", "192.0.2.1")}, wait: make(chan struct{})}
	fp := newFakePackets()
	pc, err := WithNames(&fakeDialer{name: "up", pc: fp}, names).ListenPacket(testContext(t), nil)
	if err != nil {
		t.Fatal(err)
	}
	name := flow.Addr{Host: "a", Port: 53}
	ip := addr(t, "192.0.2.9:53")
	write := func(ds ...flow.Datagram) {
		t.Helper()
		if n, err := pc.WriteBatch(ds); n != len(ds) || err != nil {
			t.Fatal(n, err)
		}
	}
	write(flow.Datagram{Addr: name, Buf: []byte("1")}, flow.Datagram{Addr: ip, Buf: []byte("2")}, flow.Datagram{Addr: name, Buf: []byte("3")})
	if got := fp.log(); !slices.Equal(got, []string{"192.0.2.9:53 2"}) {
		t.Errorf("while the look-up runs: %q", got)
	}
	for range 2 * maxWaiting {
		write(flow.Datagram{Addr: name, Buf: []byte("more")})
	}
	close(names.wait)
	waitFor(t, "the look-up", func() bool { return len(fp.log()) == 1+maxWaiting })
	if got := fp.log(); got[1] != "192.0.2.1:53 1" || got[2] != "192.0.2.1:53 3" {
		t.Errorf("after the look-up: %q", got)
	}
	write(flow.Datagram{Addr: name, Buf: []byte("4")}, flow.Datagram{Addr: ip, Buf: []byte("5")})
	if got := fp.log()[1+maxWaiting:]; !slices.Equal(got, []string{"192.0.2.1:53 4", "192.0.2.9:53 5"}) {
		t.Errorf("%q", got)
	}
	if n, err := pc.WriteBatch([]flow.Datagram{{Addr: name}, {Addr: ip}, {Addr: ip, Buf: []byte("too large")}, {Addr: ip}}); n != 2 || err == nil {
		t.Errorf("%d, %v", n, err)
	}
	fp.in <- flow.Datagram{Addr: addr(t, "192.0.2.1:53"), Buf: []byte("reply")}
	ds := []flow.Datagram{{Buf: make([]byte, 10)}}
	if _, err := pc.ReadBatch(ds); err != nil || ds[0].Addr.Host != "a" || ds[0].Addr.IP.String() != "192.0.2.1" {
		t.Errorf("%v, %v", ds[0].Addr, err)
	}
	write(flow.Datagram{Addr: flow.Addr{Host: "nowhere", Port: 1}})
	waitFor(t, "a failure", func() bool {
		n := pc.(*namedPackets)
		n.mu.Lock()
		defer n.mu.Unlock()
		return n.byName["nowhere"] == nil
	})
	if err := pc.Close(); err != nil {
		t.Error(err)
	}
	write(flow.Datagram{Addr: flow.Addr{Host: "late", Port: 1}})
	if _, err := pc.ReadBatch(ds); !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
}

// Closing ends look-ups that run.
func TestNamedPacketsClose(t *testing.T) {
	names := &fakeNames{wait: make(chan struct{})}
	pc, err := WithNames(&fakeDialer{name: "up", pc: newFakePackets()}, names).ListenPacket(testContext(t), nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 2 * maxNamed {
		_, _ = pc.WriteBatch([]flow.Datagram{{Addr: flow.Addr{Host: fmt.Sprint("h", i), Port: 1}}})
	}
	n := pc.(*namedPackets)
	n.mu.Lock()
	if len(n.byName) != maxNamed {
		t.Errorf("%d names", len(n.byName))
	}
	n.mu.Unlock()
	pc.Close()
}

func TestResolvingDialContext(t *testing.T) {
	s := dialertest.Start(t, dialertest.Send("hi"))
	n := NewNet(NetConfig{})
	c, err := NewExit("direct", n, nil).(interface {
		DialContext(ctx context.Context, network, address string) (net.Conn, error)
	}).DialContext(testContext(t), "tcp", strings.Replace(s.Addr.String(), "127.0.0.1", "localhost", 1))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if got, err := io.ReadAll(c); err != nil || string(got) != "hi" {
		t.Errorf("%q, %v", got, err)
	}
}
