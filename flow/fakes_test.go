// SPDX-License-Identifier: GPL-3.0-or-later

package flow

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	appAddr  = netip.MustParseAddrPort("10.0.0.2:40000")
	webAddr  = netip.MustParseAddrPort("192.0.2.1:443")
	fakeAddr = netip.MustParseAddrPort("198.18.0.7:443")
)

// decider is a Decider made of a function.
type decider struct {
	decide func(*Flow) Decision
	needs  Needs
}

func (d decider) Decide(f *Flow) Decision { return d.decide(f) }
func (d decider) Needs(*Flow) Needs       { return d.needs }

func always(a Action, via Dialer) Decider {
	return decider{decide: func(*Flow) Decision { return Decision{Action: a, Via: via, Rule: "default"} }}
}

// dialer is a Dialer made of functions.
type dialer struct {
	name   string
	dial   func(context.Context, Addr) (Conn, error)
	listen func(context.Context, *Flow) (PacketConn, error)
	names  bool
}

func (d *dialer) Name() string                                     { return d.name }
func (d *dialer) Dial(ctx context.Context, dst Addr) (Conn, error) { return d.dial(ctx, dst) }
func (d *dialer) UDPNames() bool                                   { return d.names }
func (d *dialer) ListenPacket(ctx context.Context, f *Flow) (PacketConn, error) {
	if d.listen == nil {
		return nil, errors.ErrUnsupported
	}
	return d.listen(ctx, f)
}

// failing is a dialer whose Dial fails.
func failing(err error) *dialer {
	return &dialer{name: "up", dial: func(context.Context, Addr) (Conn, error) { return nil, err }}
}

// pending is a SYN.
type pending struct {
	accept   func() (Conn, error)
	accepted atomic.Bool
	calls    atomic.Int32
	reason   Reason
}

func (p *pending) Accept() (Conn, error) {
	p.calls.Add(1)
	p.accepted.Store(true)
	return p.accept()
}

func (p *pending) Reject(r Reason) {
	p.calls.Add(1)
	p.reason = r
}

// half is one direction of a connection in memory.
type half struct {
	mu       sync.Mutex
	cond     *sync.Cond
	buf      []byte
	eof      bool  // the writer has closed
	dead     error // reset, or closed by the reader
	deadline time.Time
	timer    *time.Timer
}

const halfSize = 64 << 10

func newHalf() *half {
	h := &half{}
	h.cond = sync.NewCond(&h.mu)
	return h
}

func (h *half) read(p []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for {
		switch {
		case h.dead != nil:
			return 0, h.dead
		case !h.deadline.IsZero() && !time.Now().Before(h.deadline):
			return 0, os.ErrDeadlineExceeded
		case len(h.buf) > 0:
			n := copy(p, h.buf)
			h.buf = h.buf[n:]
			h.cond.Broadcast()
			return n, nil
		case h.eof:
			return 0, io.EOF
		}
		h.cond.Wait()
	}
}

func (h *half) write(p []byte) (n int, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for len(p) > 0 {
		switch {
		case h.dead != nil || h.eof:
			return n, &net.OpError{Op: "write", Err: unix.EPIPE}
		case len(h.buf) < halfSize:
			m := min(len(p), halfSize-len(h.buf))
			h.buf = append(h.buf, p[:m]...)
			p, n = p[m:], n+m
			h.cond.Broadcast()
			continue
		}
		h.cond.Wait()
	}
	return n, nil
}

func (h *half) set(f func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	f()
	h.cond.Broadcast()
}

func (h *half) kill(err error) {
	h.set(func() {
		if h.dead == nil {
			h.dead = err
		}
		if h.timer != nil {
			h.timer.Stop()
		}
	})
}

func (h *half) setDeadline(t time.Time) {
	h.set(func() {
		h.deadline = t
		if h.timer != nil {
			h.timer.Stop()
			h.timer = nil
		}
		if !t.IsZero() && h.dead == nil {
			h.timer = time.AfterFunc(time.Until(t), func() { h.set(func() {}) })
		}
	})
}

// memConn is a Conn in memory: usable in a synctest bubble.
type memConn struct{ r, w *half }

func memPipe() (a, b *memConn) {
	x, y := newHalf(), newHalf()
	return &memConn{x, y}, &memConn{y, x}
}

func (c *memConn) Read(p []byte) (int, error)        { return c.r.read(p) }
func (c *memConn) Write(p []byte) (int, error)       { return c.w.write(p) }
func (c *memConn) CloseWrite() error                 { c.w.set(func() { c.w.eof = true }); return nil }
func (c *memConn) LocalAddr() net.Addr               { return nil }
func (c *memConn) RemoteAddr() net.Addr              { return nil }
func (c *memConn) SetDeadline(t time.Time) error     { c.r.setDeadline(t); return nil }
func (c *memConn) SetReadDeadline(t time.Time) error { c.r.setDeadline(t); return nil }
func (c *memConn) SetWriteDeadline(time.Time) error  { return nil }

func (c *memConn) Close() error {
	_ = c.CloseWrite()
	c.r.kill(net.ErrClosed)
	return nil
}

func (c *memConn) Abort() {
	c.w.kill(unix.ECONNRESET)
	c.r.kill(unix.ECONNRESET)
}

// names is a Names with a fixed mapping.
type names struct {
	fake     map[netip.Addr]string
	real     map[string][]netip.Addr
	resolve  func(context.Context, string) ([]netip.Addr, error)
	exchange func(context.Context, *Flow, []byte) ([]byte, error)
	mu       sync.Mutex
	held     map[netip.Addr]int
}

func (n *names) Exchange(ctx context.Context, f *Flow, q []byte) ([]byte, error) {
	if n.exchange == nil {
		return append([]byte("re:"), q...), nil
	}
	return n.exchange(ctx, f, q)
}

func (n *names) HostOf(ip netip.Addr) (string, Source, bool) {
	h, ok := n.fake[ip]
	return h, SourceFakeIP, ok
}

func (n *names) IsFake(ip netip.Addr) bool {
	return netip.MustParsePrefix("198.18.0.0/15").Contains(ip)
}
func (n *names) Hold(ip netip.Addr)    { n.count(ip, 1) }
func (n *names) Release(ip netip.Addr) { n.count(ip, -1) }

func (n *names) count(ip netip.Addr, d int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.held == nil {
		n.held = make(map[netip.Addr]int)
	}
	n.held[ip] += d
}

func (n *names) holds(ip netip.Addr) int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.held[ip]
}

func (n *names) Resolve(ctx context.Context, host string) ([]netip.Addr, error) {
	if n.resolve != nil {
		return n.resolve(ctx, host)
	}
	if ips := n.real[host]; len(ips) > 0 {
		return ips, nil
	}
	return nil, ErrNoServers
}

// recorder notes what metrics would.
type recorder struct {
	mu        sync.Mutex
	ended     []string
	connected []string
	errors    []string
}

func (r *recorder) FlowEnded(i *Info, result string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ended = append(r.ended, i.Network.String()+" "+i.Upstream+" "+result)
}

func (r *recorder) Connected(up string, _ time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.connected = append(r.connected, up)
}

func (r *recorder) UpstreamError(up string, reason Reason) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.errors = append(r.errors, up+" "+reason.String())
}

// rig is a Handler with everything around it observed.
type rig struct {
	*Handler
	table *Table
	rec   *recorder
	logs  *observer.ObservedLogs
}

func newRig(t *testing.T, change func(*HandlerConfig, *TableConfig)) *rig {
	t.Helper()
	core, logs := observer.New(zap.InfoLevel)
	r := &rig{rec: &recorder{}, logs: logs}
	tc := TableConfig{Context: "test", MaxFlows: 16, Log: zap.New(core), Recorder: r.rec}
	hc := HandlerConfig{Context: "test"}
	if change != nil {
		change(&hc, &tc)
	}
	r.table = NewTable(tc)
	hc.Table = r.table
	r.Handler = NewHandler(hc)
	t.Cleanup(func() {
		r.Close()
		if n := r.table.Len(); n != 0 {
			t.Errorf("%d slots taken after Close, want 0", n)
		}
	})
	return r
}

// line returns the fields of the only line logged.
func (r *rig) line(t *testing.T) map[string]any {
	t.Helper()
	all := r.logs.All()
	if len(all) != 1 {
		t.Fatalf("%d lines logged, want 1: %v", len(all), all)
	}
	return all[0].ContextMap()
}

func mustRead(t *testing.T, r io.Reader, want string) {
	t.Helper()
	got := make([]byte, len(want))
	if _, err := io.ReadFull(r, got); err != nil || string(got) != want {
		t.Fatalf("read %q, %v, want %q", got, err, want)
	}
}

func mustEOF(t *testing.T, r io.Reader) {
	t.Helper()
	if n, err := r.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Fatalf("read %d bytes, %v, want EOF", n, err)
	}
}

func mustWrite(t *testing.T, w io.Writer, s string) {
	t.Helper()
	if _, err := io.WriteString(w, s); err != nil {
		t.Fatal(err)
	}
}
