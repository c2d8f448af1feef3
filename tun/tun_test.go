// SPDX-License-Identifier: GPL-3.0-or-later

package tun_test

import (
	"bytes"
	"errors"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/tun"
	"github.com/mutex-proxy/mutex/tun/tuntest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// wait bounds every wait; reached, it is a failure.
const wait = 20 * time.Second

// collector is a Receiver that passes copies on.
type collector struct {
	buf  [tun.MaxPacket]byte
	got  chan received
	idle chan struct{}
}

type received struct {
	h tun.Header
	b []byte
}

func newCollector() *collector {
	return &collector{got: make(chan received, 1000), idle: make(chan struct{}, 1)}
}

func (c *collector) Buffer() []byte { return c.buf[:] }

func (c *collector) Packet(h *tun.Header, n int) {
	c.got <- received{*h, append([]byte(nil), c.buf[:n]...)}
}

func (c *collector) Idle() {
	select {
	case c.idle <- struct{}{}:
	default:
	}
}

// next waits for a packet that satisfies f.
func (c *collector) next(t *testing.T, f func(received) bool) received {
	t.Helper()
	deadline := time.After(wait)
	for {
		select {
		case r := <-c.got:
			if f(r) {
				return r
			}
		case <-deadline:
			t.Fatal("the packet did not come")
		}
	}
}

// receive runs a queue's Receive until the test ends or it returns by itself.
func receive(t *testing.T, q *tun.Queue, r tun.Receiver) <-chan error {
	t.Helper()
	done := make(chan error, 1)
	var wg sync.WaitGroup
	wg.Go(func() { done <- q.Receive(r) })
	t.Cleanup(func() {
		q.Stop()
		wg.Wait()
	})
	return done
}

func TestPipe(t *testing.T) {
	a, b := tuntest.Pipe(t, 1500, true)
	c := newCollector()
	done := receive(t, b.Queues()[0], c)
	h := tun.Header{Flags: tun.NeedsChecksum, GSOType: tun.GSOTCP6, HdrLen: 60, GSOSize: 1440, CsumStart: 40, CsumOffset: 16}
	big := bytes.Repeat([]byte("0123456789"), 6553)
	var many [][]byte
	for i := range big {
		if i%1000 == 0 {
			many = append(many, nil, big[i:min(i+1000, len(big))])
		}
	}
	for name, pieces := range map[string][][]byte{"one": {big}, "three": {big[:20], nil, big[20:]}, "many": many} {
		if err := a.Queues()[0].Write(&h, pieces...); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if r := c.next(t, func(received) bool { return true }); r.h != h || !bytes.Equal(r.b, big) {
			t.Errorf("%s: header %+v, %d bytes", name, r.h, len(r.b))
		}
	}
	<-c.idle
	b.Queues()[0].Stop()
	if err := <-done; err != nil {
		t.Errorf("stopped: %v", err)
	}
	if err := b.Queues()[0].Write(&h, []byte("still")); err != nil {
		t.Errorf("write after stop: %v", err)
	}
	for range 2 {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	}
	if err := b.Queues()[0].Write(&h, big); !errors.Is(err, os.ErrClosed) {
		t.Errorf("write after close: %v", err)
	}
	if err := a.Queues()[0].Receive(newCollector()); !errors.Is(err, os.ErrClosed) {
		t.Errorf("the other end is gone: %v", err)
	}
}

// TestCloseEndsReceive: Close alone, without Stop, ends a waiting reader.
func TestCloseEndsReceive(t *testing.T) {
	a, _ := tuntest.Pipe(t, 1500, true)
	c := newCollector()
	done := receive(t, a.Queues()[0], c)
	<-c.idle
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Errorf("closed: %v", err)
	}
}

func TestAllocations(t *testing.T) {
	a, b := tuntest.Pipe(t, 1500, true)
	go func() { _ = b.Queues()[0].Receive(discard{make([]byte, tun.MaxPacket)}) }()
	h := tun.Header{Flags: tun.NeedsChecksum}
	x, y := make([]byte, 40), make([]byte, 1400)
	if n := testing.AllocsPerRun(1000, func() {
		_ = a.Queues()[0].Write(&h, x, y) // EAGAIN counts as well
	}); n != 0 {
		t.Errorf("%v allocations a packet", n)
	}
}

type discard struct{ buf []byte }

func (d discard) Buffer() []byte        { return d.buf }
func (discard) Packet(*tun.Header, int) {}
func (discard) Idle()                   {}

func TestConfig(t *testing.T) {
	for _, cfg := range []tun.Config{
		{Name: "a-name-that-is-too-long"}, {MTU: 1279}, {MTU: 65536}, {Queues: -1}, {Queues: 257},
	} {
		if _, err := tun.Open(cfg); err == nil {
			t.Errorf("%+v: no error", cfg)
		}
	}
}

func FuzzHeader(f *testing.F) {
	f.Add([]byte{1, 4, 60, 0, 160, 5, 40, 0, 16, 0})
	f.Add(make([]byte, tun.HeaderLen))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < tun.HeaderLen {
			return
		}
		in := [tun.HeaderLen]byte(b)
		var h tun.Header
		h.Decode(&in)
		var out [tun.HeaderLen]byte
		h.Encode(&out)
		if in != out {
			t.Fatalf("% x became % x", in, out)
		}
	})
}

// TestDevice opens real devices in a namespace of its own.
func TestDevice(t *testing.T) {
	for _, cfg := range []tun.Config{
		{Name: "mprox0"}, {Name: "mprox%d", MTU: 9000, Queues: 2}, {Name: "plain", NoOffload: true},
	} {
		t.Run(cfg.Name, func(t *testing.T) {
			ns := tuntest.NewNamespace(t)
			var d *tun.Device
			ns.Do(func() {
				var err error
				if d, err = tun.Open(cfg); err != nil {
					t.Error(err)
				}
			})
			if d == nil {
				return
			}
			defer d.Close()
			if strings.Contains(d.Name(), "%") || d.Index() == 0 || len(d.Queues()) != max(cfg.Queues, 1) || d.Offload() == cfg.NoOffload {
				t.Errorf("%s %d, %d queues, offload %v", d.Name(), d.Index(), len(d.Queues()), d.Offload())
			}
			ns.Do(func() {
				i, err := net.InterfaceByName(d.Name())
				if err != nil || i.MTU != d.MTU() || i.Index != d.Index() || i.Flags&net.FlagUp != 0 {
					t.Errorf("%+v, %v", i, err)
				}
				// A name that is taken, also by a device that would let further queues attach.
				if _, err := tun.Open(tun.Config{Name: d.Name(), Queues: cfg.Queues}); !errors.Is(err, tun.ErrBusy) {
					t.Errorf("second: %v", err)
				}
			})
			if err := d.Queues()[0].Write(&tun.Header{}, []byte{0x45, 0}); !errors.Is(err, unix.EIO) {
				t.Errorf("write while down: %v", err)
			}
			testTraffic(t, ns, d, !cfg.NoOffload)
			if err := d.Close(); err != nil {
				t.Error(err)
			}
			ns.Do(func() {
				if _, err := net.InterfaceByName(d.Name()); err == nil {
					t.Error("the device is still there")
				}
			})
		})
	}
}

// testTraffic sends a datagram of an application through the device both ways.
func testTraffic(t *testing.T, ns *tuntest.Namespace, d *tun.Device, offload bool) {
	t.Helper()
	ns.Configure(d, netip.MustParsePrefix("10.99.0.1/24"))
	c := newCollector()
	for _, q := range d.Queues() {
		receive(t, q, c)
	}
	var app *net.UDPConn
	ns.Do(func() {
		var err error
		if app, err = net.DialUDP("udp4", nil, &net.UDPAddr{IP: net.IPv4(203, 0, 113, 1), Port: 7}); err != nil {
			t.Error(err)
		}
	})
	if app == nil {
		return
	}
	defer app.Close()
	_ = app.SetDeadline(time.Now().Add(wait))
	if _, err := app.Write([]byte("ping")); err != nil {
		t.Fatal(err)
	}
	r := c.next(t, func(r received) bool { return len(r.b) == 32 && r.b[9] == 17 })
	if open := r.h.Flags&tun.NeedsChecksum != 0; open != offload || string(r.b[28:]) != "ping" {
		t.Errorf("header %+v, % x", r.h, r.b)
	}
	// Back, with addresses and ports swapped: the sums stay right.
	b := append([]byte(nil), r.b...)
	copy(b[12:16], r.b[16:20])
	copy(b[16:20], r.b[12:16])
	copy(b[20:22], r.b[22:24])
	copy(b[22:24], r.b[20:22])
	if err := d.Queues()[len(d.Queues())-1].Write(&r.h, b[:20], b[20:]); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 10)
	if n, err := app.Read(got); err != nil || string(got[:n]) != "ping" {
		t.Errorf("%q, %v", got[:n], err)
	}
}
