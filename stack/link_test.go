// SPDX-License-Identifier: GPL-3.0-or-later

package stack

import (
	"context"
	"net/netip"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/mutex-proxy/mutex/flow"
	"github.com/mutex-proxy/mutex/tun"
	"github.com/mutex-proxy/mutex/tun/tuntest"
)

// TestShakeBounds: what does not fit, or finds the queue full, is left to the caller, and what was taken is written as it was.
func TestShakeBounds(t *testing.T) {
	a, b := tuntest.Pipe(t, tun.DefaultMTU, true)
	l := newLink(a, &counters{})
	h := tun.Header{Flags: tun.ChecksumValid}
	if l.shake(0, &h, [][]byte{make([]byte, header.IPv6MinimumSize), make([]byte, header.TCPHeaderMaximumSize+1)}) {
		t.Error("more than a header was taken")
	}
	packet := ip4(netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2"), 6, []byte("segment"))
	for i := range shakesMax {
		if !l.shake(0, &h, [][]byte{packet[:20], packet[20:]}) {
			t.Fatalf("number %d was not taken", i)
		}
	}
	if l.shake(0, &h, [][]byte{packet}) {
		t.Error("one too many was taken")
	}
	done := make(chan struct{})
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		l.writeShakes(done)
	}()
	r := &recording{until: shakesMax, stop: b.Queues()[0].Stop}
	if err := b.Queues()[0].Receive(r); err != nil {
		t.Error(err)
	}
	close(done)
	<-ended
	if r.n != shakesMax || string(r.last) != string(packet) {
		t.Errorf("%d packets, the last %x", r.n, r.last)
	}
}

// recording is a receiver that stops after so many packets.
type recording struct {
	buf      [tun.MaxPacket]byte
	n, until int
	last     []byte
	stop     func()
}

func (r *recording) Buffer() []byte { return r.buf[:] }
func (r *recording) Idle()          {}

func (r *recording) Packet(_ *tun.Header, n int) {
	r.last = append(r.last[:0], r.buf[:n]...)
	if r.n++; r.n == r.until {
		r.stop()
	}
}

// TestShakeAnswersByItsOwnGoroutine: a connection is accepted although nobody but writeShakes may write the SYN-ACK.
func TestShakeAnswersByItsOwnGoroutine(t *testing.T) {
	v := variants()[0]
	accepted := make(chan error, 1)
	s, dev := startStack(t, &handler{tcp: func(_ context.Context, _, _ netip.AddrPort, p flow.Pending) {
		c, err := p.Accept()
		if err == nil {
			c.Close()
		}
		accepted <- err
	}}, v.offload, nil)
	a := startApp(t, v, dev)
	c, err := a.dial(t, 443)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := <-accepted; err != nil {
		t.Error(err)
	}
	if n := len(s.link.shakes); n != 0 {
		t.Errorf("%d left", n)
	}
}
