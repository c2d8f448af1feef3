// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/dialers/dialertest"
	"github.com/mutex-proxy/mutex/flow"
)

func TestDirect(t *testing.T) {
	s := dialertest.Start(t, dialertest.Echo())
	d := NewDirect("direct", NewNet(NetConfig{}))
	c, err := d.Dial(testContext(t), flow.AddrFrom(s.Addr))
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := c.(syscall.Conn); !ok {
		t.Error("not a plain socket")
	}
	if _, err := io.WriteString(c, "hello"); err != nil || c.CloseWrite() != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(c); string(got) != "hello" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	c.Close()
	s.Close()
	_, err = d.Dial(testContext(t), flow.AddrFrom(s.Addr))
	wantError(t, err, flow.ReasonRefused, false)
	_, err = d.Dial(testContext(t), flow.Addr{Host: "localhost", Port: 1})
	wantError(t, err, flow.ReasonHostUnreachable, false)
	if st := d.Status(); st.Active != 0 || st.Total != 3 || !st.Up {
		t.Errorf("%+v", st)
	}
}

func TestWithReason(t *testing.T) {
	for errno, want := range map[unix.Errno]flow.Reason{
		unix.ECONNREFUSED: flow.ReasonRefused, unix.ENETUNREACH: flow.ReasonNetUnreachable, unix.EHOSTUNREACH: flow.ReasonHostUnreachable,
		unix.ETIMEDOUT: flow.ReasonTimeout, unix.EACCES: flow.ReasonProhibited, unix.EPERM: flow.ReasonProhibited,
		unix.EAFNOSUPPORT: flow.ReasonNetUnreachable, unix.EIO: flow.ReasonHostUnreachable,
	} {
		err := withReason(&net.OpError{Op: "dial", Err: os.NewSyscallError("connect", errno)})
		if got := flow.ReasonOf(fmt.Errorf("direct: %w", err)); got != want || !errors.Is(err, errno) {
			t.Errorf("%v: %v, want %v", errno, got, want)
		}
	}
}

func TestDirectUDP(t *testing.T) {
	peer, at := relaySocket(t)
	other, _ := relaySocket(t)
	d := NewDirect("direct", NewNet(NetConfig{}))
	pc, err := d.ListenPacket(testContext(t), nil)
	if err != nil {
		t.Fatal(err)
	}
	if n, err := pc.WriteBatch([]flow.Datagram{{Addr: flow.AddrFrom(at), Buf: []byte("ping")}, {Addr: flow.Addr{Host: "x", Port: 1}}}); n != 1 || !errors.Is(err, flow.ErrHostUnreachable) {
		t.Fatal(n, err)
	}
	buf := make([]byte, 100)
	n, from, err := peer.ReadFromUDPAddrPort(buf)
	if err != nil || string(buf[:n]) != "ping" {
		t.Fatalf("%q, %v", buf[:n], err)
	}
	for _, c := range []*net.UDPConn{peer, other} { // anybody may answer
		if _, err := c.WriteToUDPAddrPort([]byte("pong"), from); err != nil {
			t.Fatal(err)
		}
		ds := []flow.Datagram{{Buf: make([]byte, 100)}}
		_ = pc.SetReadDeadline(time.Now().Add(5 * time.Second))
		if _, err := pc.ReadBatch(ds); err != nil || string(ds[0].Buf) != "pong" || ds[0].Addr.AddrPort() != c.LocalAddr().(*net.UDPAddr).AddrPort() {
			t.Errorf("%v %q, %v", ds[0].Addr, ds[0].Buf, err)
		}
	}
	done := make(chan error, 1)
	go func() {
		_ = pc.SetReadDeadline(time.Time{})
		_, err := pc.ReadBatch([]flow.Datagram{{Buf: make([]byte, 1)}})
		done <- err
	}()
	for range 2 {
		if err := pc.Close(); err != nil {
			t.Error(err)
		}
	}
	if err := <-done; !errors.Is(err, net.ErrClosed) {
		t.Errorf("%v", err)
	}
	if st := d.Status(); st.Active != 0 {
		t.Errorf("%+v", st)
	}
}

func TestExitAllow(t *testing.T) {
	s := dialertest.Start(t, dialertest.Echo())
	n := NewNet(NetConfig{})
	deny := func(ap netip.AddrPort) bool { return !ap.Addr().IsLoopback() }
	d := NewExit("direct", n, deny)
	for _, host := range []string{"127.0.0.1", "localhost", "::1", "::ffff:127.0.0.1"} {
		_, err := d.Dial(testContext(t), addr(t, net.JoinHostPort(host, fmt.Sprint(s.Addr.Port()))))
		wantError(t, err, flow.ReasonProhibited, false)
	}
	pc, err := d.ListenPacket(testContext(t), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	if n, err := pc.WriteBatch([]flow.Datagram{{Addr: flow.AddrFrom(s.Addr), Buf: []byte("x")}}); n != 0 || !errors.Is(err, flow.ErrProhibited) {
		t.Errorf("udp: %d, %v", n, err)
	}
	c, err := NewExit("direct", n, nil).Dial(testContext(t), flow.Addr{Host: "localhost", Port: s.Addr.Port()})
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}
