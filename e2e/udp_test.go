// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/mutex-proxy/mutex/e2e/lab"
)

// udpSocket is an unconnected socket of the client.
func udpSocket(t *testing.T, l *lab.Lab, a netip.Addr) *net.UDPConn {
	t.Helper()
	network := "udp4"
	if a.Is6() {
		network = "udp6"
	}
	c, err := l.Client.ListenUDP(network, ":0")
	if err != nil {
		t.Fatal(err)
	}
	_ = c.SetReadBuffer(4 << 20)
	t.Cleanup(func() { c.Close() })
	return c
}

// exchangeUDP sends a datagram and returns the first answer, and from where it came. Loss is not an error of UDP: it tries three times.
func exchangeUDP(c *net.UDPConn, dst netip.AddrPort, b []byte) ([]byte, netip.AddrPort, error) {
	buf := make([]byte, 1<<16)
	var err error
	for range 3 {
		if _, err = c.WriteToUDPAddrPort(b, dst); err != nil {
			return nil, netip.AddrPort{}, err
		}
		_ = c.SetReadDeadline(time.Now().Add(2 * time.Second))
		var n int
		var from netip.AddrPort
		if n, from, err = c.ReadFromUDPAddrPort(buf); err == nil {
			return buf[:n], netip.AddrPortFrom(from.Addr().Unmap(), from.Port()), nil
		}
	}
	return nil, netip.AddrPort{}, err
}

func TestUDPSizes(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, true)
	m := l.Mprox(t)
	m.Up("--proxy", s.URL())
	udpSizes(t, l, m)
}

// udpSizes echoes datagrams of all sizes, so that both directions fragment.
func udpSizes(t *testing.T, l *lab.Lab, m *lab.Mprox) {
	t.Helper()
	sizes := []int{1, 2, 3, 100, 1232, 1400, 1452, 1453, 1472, 1473, 1500, 2000, 2960, 8000, 9000, 20000, 32767, 32768, 40001, 60000, 65000, 65480, 65485, 65486, 65497}
	for _, c := range []struct {
		dst  netip.Addr
		most int
	}{{lab.OriginV4, 65497}, {lab.OriginV6, 65485}} {
		sock := udpSocket(t, l, c.dst)
		dst := netip.AddrPortFrom(c.dst, lab.PortEcho)
		for _, n := range sizes {
			if n > c.most {
				continue
			}
			got, from, err := exchangeUDP(sock, dst, lab.Block(n))
			if err != nil || !bytes.Equal(got, lab.Block(n)) || from != dst {
				t.Errorf("%v: %d bytes: got %d from %v, %v", c.dst, n, len(got), from, err)
			}
		}
		// What does not fit into a datagram of the upstream is refused and counted.
		before := m.Status().Contexts[0].PacketsDropped
		for _, n := range []int{c.most + 1, 65507} {
			_, _ = sock.WriteToUDPAddrPort(lab.Block(n), dst)
			_ = sock.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
			if k, _, err := sock.ReadFromUDPAddrPort(make([]byte, 1<<16)); err == nil {
				t.Errorf("%v: %d bytes were carried (%d came back)", c.dst, n, k)
			}
		}
		if !lab.Poll(2*time.Second, func() bool { return m.Status().Contexts[0].PacketsDropped >= before+2 }) {
			t.Errorf("%v: too large datagrams are not counted: %d, was %d", c.dst, m.Status().Contexts[0].PacketsDropped, before)
		}
		// The flow survives them.
		if got, _, err := exchangeUDP(sock, dst, []byte("after")); err != nil || string(got) != "after" {
			t.Errorf("%v: after too large datagrams: %q %v", c.dst, got, err)
		}
		// A small question with a large answer: only the way back fragments.
		var ask [4]byte
		binary.BigEndian.PutUint32(ask[:], 60001)
		if got, _, err := exchangeUDP(sock, netip.AddrPortFrom(c.dst, lab.PortShout), ask[:]); err != nil || !bytes.Equal(got, lab.Block(60001)) {
			t.Errorf("%v: large answer: %d bytes, %v", c.dst, len(got), err)
		}
	}
	if bad := l.Origin.AllFrom(lab.ExitV4, lab.ExitV6); len(bad) > 0 {
		t.Errorf("reached the origin without the proxy: %v", bad)
	}
}

// TestUDPEndpointIndependent shows one mapping for all destinations of a socket, and that others than the one asked may answer.
func TestUDPEndpointIndependent(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, false)
	m := l.Mprox(t)
	m.Up("--proxy", s.URL())
	for _, a := range []netip.Addr{lab.OriginV4, lab.OriginV6} {
		l.Origin.Forget()
		c := udpSocket(t, l, a)
		for _, port := range []uint16{lab.PortEcho, lab.PortOther, lab.PortShout} {
			b := []byte{0, 0, 0, 9}
			_, from, err := exchangeUDP(c, netip.AddrPortFrom(a, port), b)
			want := port
			if port == lab.PortOther {
				want = lab.PortOtherReply
			}
			if err != nil || from != netip.AddrPortFrom(a, want) {
				t.Errorf("%v port %d: answer from %v, %v", a, port, from, err)
			}
		}
		froms := map[netip.AddrPort]bool{}
		for _, port := range []uint16{lab.PortEcho, lab.PortOther, lab.PortShout} {
			for _, v := range l.Origin.Visits("udp", port) {
				froms[v.From] = true
			}
		}
		if len(froms) != 1 {
			t.Errorf("%v: one socket came from %d addresses: %v", a, len(froms), froms)
		}
	}
	// One application socket is one association: one control connection at the server.
	n := controlConns(t, l, s)
	if n > 2 {
		t.Errorf("%d control connections for two sockets", n)
	}
}

// controlConns counts the established connections to a server.
func controlConns(t *testing.T, l *lab.Lab, s *lab.Server) int {
	t.Helper()
	out, err := l.Client.Output(t.Context(), "ss", "-Htn", "state", "established", "dst", s.Addr.String())
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Count([]byte(out), []byte("\n"))
}

// TestUDPAssociationReturns restarts the server: the socket's association is made again.
func TestUDPAssociationReturns(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, false)
	m := l.Mprox(t)
	m.Up("--proxy", s.URL())
	c := udpSocket(t, l, lab.OriginV4)
	dst := netip.AddrPortFrom(lab.OriginV4, lab.PortEcho)
	if got, _, err := exchangeUDP(c, dst, []byte("before")); string(got) != "before" {
		t.Fatal(err)
	}
	_ = syscall.Kill(-s.PID(), syscall.SIGKILL)
	s.Kill()
	_, _, _ = exchangeUDP(c, dst, []byte("while it is dead"))
	s.Restart()
	if !lab.Poll(15*time.Second, func() bool {
		got, _, _ := exchangeUDP(c, dst, []byte("after"))
		return string(got) == "after"
	}) {
		t.Error("the socket does not work again after the server came back")
	}
}

// TestUDPWithoutUpstream shows that an upstream without UDP makes the first datagram fail at once, by ICMP port unreachable.
func TestUDPWithoutUpstream(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	for _, s := range []*lab.Server{l.Squid(t, 3128), l.Microsocks(t, 1082)} {
		t.Run(s.Name, func(t *testing.T) {
			cp := l.Capture(t)
			m := l.Mprox(t)
			m.Up("--proxy", s.URL())
			cp.Reset()
			for _, a := range []netip.Addr{lab.OriginV4, lab.OriginV6} {
				// Twice: what was learned from the first must hold for the second.
				for i := range 2 {
					within(t, time.Second, "the refusal of UDP", func() {
						c, err := l.Client.Dial("udp", netip.AddrPortFrom(a, 443).String(), time.Second)
						if err != nil {
							t.Fatal(err)
						}
						defer c.Close()
						_ = c.SetDeadline(time.Now().Add(3 * time.Second))
						_, _ = c.Write([]byte("a QUIC client hello"))
						if _, err := c.Read(make([]byte, 16)); !isRefused(err) {
							t.Errorf("%v, %d: %v", a, i, err)
						}
					})
				}
			}
			upstreamOnly(s).Check(t, cp.Packets())
			m.Stop()
		})
	}
}

// TestUDPBurst sends a burst each way; on a link without loss nearly all must arrive.
func TestUDPBurst(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, false)
	m := l.Mprox(t)
	m.Up("--proxy", s.URL())
	c := udpSocket(t, l, lab.OriginV4)
	dst := netip.AddrPortFrom(lab.OriginV4, lab.PortEcho)
	if _, _, err := exchangeUDP(c, dst, []byte("warm")); err != nil {
		t.Fatal(err)
	}
	const n = 500
	got := make(chan int, 1)
	go func() {
		seen := map[string]bool{}
		buf := make([]byte, 2048)
		_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
		for len(seen) < n {
			k, _, err := c.ReadFromUDPAddrPort(buf)
			if err != nil {
				break
			}
			seen[string(buf[:k])] = true
		}
		got <- len(seen)
	}()
	for i := range n {
		_, _ = c.WriteToUDPAddrPort(fmt.Appendf(nil, "datagram %d", i), dst)
		if i%50 == 49 {
			lab.Poll(5*time.Millisecond, func() bool { return false })
		}
	}
	if k := <-got; k < n*95/100 {
		t.Errorf("%d of %d datagrams came back", k, n)
	}
}
