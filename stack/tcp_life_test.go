// SPDX-License-Identifier: GPL-3.0-or-later

package stack

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/mutex-proxy/mutex/flow"
	"github.com/mutex-proxy/mutex/tun"
)

// TestSYNFlood: requests beyond the bounds are dropped and counted, and what is answered makes room.
func TestSYNFlood(t *testing.T) {
	answer := make(chan struct{})
	s, dev := startStack(t, &handler{tcp: func(_ context.Context, _, _ netip.AddrPort, p flow.Pending) {
		<-answer
		p.Reject(flow.ReasonDrop)
	}}, true, func(c *Config) { c.MaxPendingTCP = 8 })
	syn := func(last byte, port uint16, flags header.TCPFlags) []byte {
		return tcp4(netip.AddrFrom4([4]byte{10, 0, 0, last}), netip.MustParseAddr("203.0.113.1"), port, 80, flags)
	}
	for i := range uint16(20) {
		sendRaw(t, dev, tun.Header{}, syn(1, 1000+i, header.TCPFlagSyn))
		sendRaw(t, dev, tun.Header{}, syn(1, 1000+i, header.TCPFlagSyn)) // repeated
	}
	for i := range uint16(20) {
		sendRaw(t, dev, tun.Header{}, syn(2+byte(i), 1000, header.TCPFlagSyn))
	}
	sendRaw(t, dev, tun.Header{}, syn(100, 1, header.TCPFlagSyn|header.TCPFlagFin))
	sendRaw(t, dev, tun.Header{}, syn(100, 1, header.TCPFlagSyn|header.TCPFlagRst))
	// One source has half of the 8: of its 20 requests, and their 20 repetitions, 4 wait and 32 more are refused.
	eventually(t, func() bool { return s.Stats().Drops["malformed"] == 2 })
	st := s.Stats()
	if st.PendingTCP != 8 || st.Drops["syn_source"] != 32 || st.Drops["syn_flood"] != 16 {
		t.Errorf("pending %d, drops %v", st.PendingTCP, st.Drops)
	}
	close(answer)
	eventually(t, func() bool { return s.Stats().PendingTCP == 0 })
}

// TestPortReuse: the same tuple again, right after our side has closed it and so has the connection in TIME_WAIT.
func TestPortReuse(t *testing.T) {
	to := origin(t, func(c *net.TCPConn) { _, _ = c.Write([]byte("x")) })
	s, dev := startStack(t, &handler{tcp: relayTo(t, to, nil)}, true, nil)
	a := startApp(t, variants()[0], dev)
	start := time.Now()
	for range 5 {
		var c *gonet.TCPConn
		var err error
		eventually(t, func() bool { // until the application's own side has let go of the port
			c, err = gonetDialFrom(t, a, 40000, 80)
			return err == nil || !strings.Contains(err.Error(), "in use")
		})
		if err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(c); err != nil || string(b) != "x" {
			t.Fatal(b, err)
		}
		_ = c.Close()
		eventually(t, func() bool { return s.Stats().OpenTCP == 0 })
	}
	if d := time.Since(start); d > 8*time.Second { // one lost SYN costs 1 s; TIME_WAIT as it was, 12 s each
		t.Errorf("took %v", d)
	}
}

// TestClose ends a Stack in the middle of everything.
func TestClose(t *testing.T) {
	s, _, theirs, ours := accepted(t, variants()[0])
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := theirs.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("the application was not told: %v", err)
	}
	ours.Close()
	if err := s.Start(); err == nil {
		t.Error("started again")
	}
	idle, err := New(Config{Device: s.cfg.Device, Handler: &handler{}})
	if err != nil {
		t.Fatal(err)
	}
	if err := idle.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestHandshakeTime: an application that never acknowledges the SYN-ACK is given up, and with it its place among the pending.
func TestHandshakeTime(t *testing.T) {
	for _, v := range variants()[:2] {
		accepting := make(chan error, 1)
		s, dev := startStack(t, &handler{tcp: func(_ context.Context, _, _ netip.AddrPort, p flow.Pending) {
			p.(*pending).t.handshake = 50 * time.Millisecond
			_, err := p.Accept()
			accepting <- err
		}}, true, nil)
		syn := tcp4(v.app(), v.dst(0).Addr(), 1000, 80, header.TCPFlagSyn)
		sendRaw(t, dev, tun.Header{}, syn)
		select {
		case err := <-accepting:
			if err == nil {
				t.Errorf("%s: accepted", v.name)
			}
		case <-time.After(wait):
			t.Fatalf("%s: still waits", v.name)
		}
		eventually(t, func() bool { return s.Stats().PendingTCP == 0 })
	}
}

// TestCloseDuringHandshake: an application that never acknowledges the SYN-ACK does not hold up Close, nor does a late Accept.
func TestCloseDuringHandshake(t *testing.T) {
	accepting := make(chan error, 2)
	begun := make(chan struct{}, 2)
	s, dev := startStack(t, &handler{tcp: func(ctx context.Context, _, orig netip.AddrPort, p flow.Pending) {
		begun <- struct{}{}
		if orig.Port() == 2 {
			<-ctx.Done()
		}
		_, err := p.Accept()
		accepting <- err
	}}, true, nil)
	v := variants()[0]
	for port := range uint16(2) {
		sendRaw(t, dev, tun.Header{}, tcp4(v.app(), v.dst(0).Addr(), 1000, 1+port, header.TCPFlagSyn))
		<-begun
	}
	eventually(t, func() bool { return s.Stats().PacketsOut > 0 }) // the SYN-ACK
	start := time.Now()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if d := time.Since(start); d > 5*time.Second {
		t.Errorf("took %v", d)
	}
	for range 2 {
		if err := <-accepting; err == nil {
			t.Error("accepted")
		}
	}
}

// TestUrgentData: bytes after urgent data arrive, although the count of queued bytes stops before it.
func TestUrgentData(t *testing.T) {
	to := origin(t, func(c *net.TCPConn) {
		_, _ = c.Write([]byte("ab"))
		raw, _ := c.SyscallConn()
		_ = raw.Control(func(fd uintptr) { _ = unix.Sendto(int(fd), []byte("!"), unix.MSG_OOB, nil) })
		_, _ = c.Write([]byte("cd"))
	})
	_, dev := startStack(t, &handler{tcp: relayTo(t, to, nil)}, true, nil)
	a := startApp(t, variants()[0], dev)
	c, err := a.dial(t, 80)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(c); err != nil || string(b) != "abcd" {
		t.Fatalf("%q, %v", b, err)
	}
}

func TestBufferSize(t *testing.T) {
	total := int64(0)
	for n := range int64(2048) {
		size := bufferSize(n + 1)
		if size < bufferMin || size > bufferMax {
			t.Fatalf("%d: %d", n, size)
		}
		total += 2 * size
	}
	if total > 4*bufferBudget {
		t.Errorf("2048 stalled connections can hold %d MiB", total>>20)
	}
}
