// SPDX-License-Identifier: GPL-3.0-or-later

package stack

import (
	"context"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/mutex-proxy/mutex/flow"
	"github.com/mutex-proxy/mutex/tun"
)

// rawApp is an application's host that does what it is told, packet by packet.
type rawApp struct {
	variant
	dev *tun.Device
	buf [tun.MaxPacket]byte
	got chan header.TCPFields
}

func startRawApp(tb testing.TB, v variant, dev *tun.Device) *rawApp {
	tb.Helper()
	a := &rawApp{variant: v, dev: dev, got: make(chan header.TCPFields, 64)}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = dev.Queues()[0].Receive(a)
	}()
	tb.Cleanup(func() {
		dev.Queues()[0].Stop()
		<-ended
	})
	return a
}

func (a *rawApp) Buffer() []byte { return a.buf[:] }
func (a *rawApp) Idle()          {}

func (a *rawApp) Packet(_ *tun.Header, n int) {
	at := header.IPv4MinimumSize
	if a.v6 {
		at = header.IPv6MinimumSize
	}
	if h := header.TCP(a.buf[at:n]); len(h) >= header.TCPMinimumSize {
		a.got <- header.TCPFields{SeqNum: h.SequenceNumber(), AckNum: h.AckNumber(), Flags: h.Flags()}
	}
}

func (a *rawApp) send(tb testing.TB, flags header.TCPFlags, seq, ack uint32) {
	tb.Helper()
	dst := a.dst(80)
	b := make([]byte, header.TCPMinimumSize)
	h := header.TCP(b)
	h.Encode(&header.TCPFields{SrcPort: 1000, DstPort: dst.Port(), SeqNum: seq, AckNum: ack, DataOffset: uint8(len(b)), Flags: flags, WindowSize: 65535})
	h.SetChecksum(^checksum.Checksum(b, pseudoSum(header.TCPProtocolNumber, a.app(), dst.Addr(), len(b))))
	sendRaw(tb, a.dev, tun.Header{}, ip(a.app(), dst.Addr(), 6, b))
}

// next returns the next packet.
func (a *rawApp) next(tb testing.TB) header.TCPFields {
	tb.Helper()
	select {
	case f := <-a.got:
		return f
	case <-time.After(wait):
		tb.Fatal("no packet")
		return header.TCPFields{}
	}
}

// open opens a connection with the sequence number seq, and returns that of the other side.
func (a *rawApp) open(tb testing.TB, seq uint32) (theirs uint32, err error) {
	tb.Helper()
	a.send(tb, header.TCPFlagSyn, seq, 0)
	for {
		f := a.next(tb)
		switch {
		case f.AckNum != seq+1: // of the connection before
		case f.Flags&header.TCPFlagRst != 0:
			return 0, fmt.Errorf("reset: %+v", f)
		case f.Flags&header.TCPFlagSyn != 0:
			a.send(tb, header.TCPFlagAck, seq+1, f.SeqNum+1)
			return f.SeqNum + 1, nil
		}
	}
}

// TestReuseAtOnce: a SYN right behind the packet that ends the last connection with the same ports is answered as any other, and at once.
func TestReuseAtOnce(t *testing.T) {
	for _, v := range variants()[:2] {
		for name, byFIN := range map[string]bool{"reset": false, "fin": true} {
			t.Run(v.name+" "+name, func(t *testing.T) {
				accepted := make(chan flow.Conn, 1)
				s, dev := startStack(t, &handler{tcp: func(_ context.Context, _, _ netip.AddrPort, p flow.Pending) {
					c, err := p.Accept()
					if err != nil {
						t.Error(err)
						return
					}
					accepted <- c
					if byFIN {
						_ = c.CloseWrite()
					}
					_, _ = c.Read(make([]byte, 1)) // until the application's end
					_ = c.Close()
				}}, true, nil)
				a := startRawApp(t, v, dev)
				start := time.Now()
				for i := range uint32(200) {
					seq := 1000 + i*100_000
					theirs, err := a.open(t, seq)
					if err != nil {
						t.Fatalf("connection %d: %v", i, err)
					}
					<-accepted
					if !byFIN {
						a.send(t, header.TCPFlagRst, seq+1, 0)
						continue
					}
					for a.next(t).Flags&header.TCPFlagFin == 0 {
					}
					a.send(t, header.TCPFlagFin|header.TCPFlagAck, seq+1, theirs+1)
				}
				if d := time.Since(start); d > wait/2 { // a lost SYN costs reuseWait
					t.Errorf("took %v", d)
				}
				eventually(t, func() bool { return s.Stats().OpenTCP == 0 && s.tcp.reuse.count.Load() == 0 })
			})
		}
	}
}

// TestReuseWhileOpen: a SYN with the ports of a connection that goes on is asked back, and the connection lives, as long as the application's
// kernel does not deny it; denied, it makes room.
func TestReuseWhileOpen(t *testing.T) {
	for _, v := range variants()[:2] {
		t.Run(v.name, func(t *testing.T) {
			s, dev := startStack(t, &handler{tcp: func(_ context.Context, _, _ netip.AddrPort, p flow.Pending) {
				if c, err := p.Accept(); err == nil {
					_, _ = c.Read(make([]byte, 1))
					_ = c.Close()
				}
			}}, true, nil)
			a := startRawApp(t, v, dev)
			theirs, err := a.open(t, 1000)
			if err != nil {
				t.Fatal(err)
			}
			eventually(t, func() bool { return s.Stats().OpenTCP == 1 })
			a.send(t, header.TCPFlagSyn, 500_000, 0)
			if f := a.next(t); f.Flags != header.TCPFlagAck || f.AckNum != 1001 || f.SeqNum != theirs {
				t.Errorf("the answer to another SYN: %+v", f)
			}
			if n := s.Stats().OpenTCP; n != 1 {
				t.Errorf("%d connections", n)
			}
			a.send(t, header.TCPFlagRst, 1001, 0)
			if _, err := a.open(t, 500_000); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestLateSYN: a repeated SYN that is read when its connection is over opens no other one; one with another sequence number does.
func TestLateSYN(t *testing.T) {
	for _, v := range variants()[:2] {
		t.Run(v.name, func(t *testing.T) {
			calls := make(chan struct{}, 4)
			s, dev := startStack(t, &handler{tcp: func(_ context.Context, _, _ netip.AddrPort, p flow.Pending) {
				calls <- struct{}{}
				if c, err := p.Accept(); err == nil {
					_, _ = c.Read(make([]byte, 1))
					_ = c.Close()
				}
			}}, true, nil)
			a := startRawApp(t, v, dev)
			if _, err := a.open(t, 1000); err != nil {
				t.Fatal(err)
			}
			eventually(t, func() bool { return s.Stats().OpenTCP == 1 })
			a.send(t, header.TCPFlagRst, 1001, 0)
			eventually(t, func() bool { return s.Stats().OpenTCP == 0 })
			a.send(t, header.TCPFlagSyn, 1000, 0)
			if _, err := a.open(t, 500_000); err != nil { // read after the other
				t.Error(err)
			}
			if n := len(calls); n != 2 {
				t.Errorf("%d connections, want 2", n)
			}
		})
	}
}

// TestLateBound: no more than lateMax are remembered, the last ones.
func TestLateBound(t *testing.T) {
	var l late
	id := func(n int) stack.TransportEndpointID { return stack.TransportEndpointID{LocalPort: uint16(n)} }
	for n := range 3 * lateMax {
		l.note(id(n), uint32(n))
	}
	if len(l.syns) != lateMax || len(l.ring) != lateMax {
		t.Errorf("%d and %d", len(l.syns), len(l.ring))
	}
	if l.is(id(2*lateMax-1), 2*lateMax-1) || !l.is(id(2*lateMax), 2*lateMax) || l.is(id(3*lateMax-1), 0) {
		t.Error("not the last ones")
	}
}

// TestReuseBound: no more than reuseMax SYNs wait, and each for itself only once.
func TestReuseBound(t *testing.T) {
	s, dev := startStack(t, &handler{tcp: func(ctx context.Context, _, _ netip.AddrPort, p flow.Pending) {
		if c, err := p.Accept(); err == nil {
			<-ctx.Done()
			c.Abort()
		}
	}}, true, nil)
	a := startRawApp(t, variants()[0], dev)
	if _, err := a.open(t, 1000); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() bool { return s.Stats().OpenTCP == 1 })
	r := newReuse() // nobody takes from it
	r.ns = s.ns
	syn := packet{src: netip.AddrPortFrom(a.app(), 1000), dst: a.dst(80)}
	for range 2 {
		if !r.hold(nil, &syn, nil) {
			t.Error("the SYN does not wait")
		}
	}
	if n := r.count.Load(); n != 1 {
		t.Errorf("%d wait", n)
	}
	clear(r.syns)
	for port := range uint16(reuseMax) {
		r.syns[endpointID(a.dst(80), netip.AddrPortFrom(a.app(), 2000+port))] = waiting{}
	}
	if r.hold(nil, &syn, nil) {
		t.Error("there is no bound")
	}
}
