// SPDX-License-Identifier: GPL-3.0-or-later

package stack

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"net/netip"
	"os"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/mutex-proxy/mutex/flow"
	"github.com/mutex-proxy/mutex/tun"
	"github.com/mutex-proxy/mutex/tun/tuntest"
)

// echoUDP sends every datagram back from where it was sent to.
func echoUDP(ctx context.Context, _ netip.AddrPort, in flow.PacketSource, out flow.PacketSink) {
	stop := context.AfterFunc(ctx, func() { _ = in.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	ds := make([]flow.Datagram, 4)
	for {
		for i := range ds {
			ds[i].Buf = make([]byte, slabLarge)
		}
		n, err := in.ReadBatch(ds)
		if err != nil {
			return
		}
		out.Deliver(ds[:n])
		out.Flush()
	}
}

func TestUDPSizes(t *testing.T) {
	for _, v := range variants() {
		t.Run(v.name, func(t *testing.T) {
			s, dev := startStack(t, &handler{udp: echoUDP}, v.offload, nil)
			a := startApp(t, v, dev)
			c := a.dialUDP(t, 5000)
			endpointOf(c).SocketOptions().SetReceiveBufferSize(1<<20, false)
			endpointOf(c).SocketOptions().SetSendBufferSize(1<<20, false)
			sizes := []int{0, 1, 2, 1231, 1232, 1233, 1451, 1452, 1453, 1471, 1472, 1473, 2048, 2049, 9000, 65000, 65485, 65497, 65507}
			if v.v6 {
				sizes[len(sizes)-1] = 65527
				sizes = sizes[:len(sizes)-1] // gVisor itself stops at IPv4's limit
			}
			for _, size := range sizes {
				want := randomBytes(size)
				if _, err := c.Write(want); err != nil {
					t.Fatalf("%d: %v", size, err)
				}
				got := make([]byte, 1<<17)
				n, err := c.Read(got)
				if err != nil || !bytes.Equal(got[:n], want) {
					t.Fatalf("%d: got %d bytes, %v; %v", size, n, err, s.Stats())
				}
			}
			if n := s.Stats().UDPSockets; n != 1 {
				t.Errorf("%d sessions", n)
			}
		})
	}
}

// TestUDPOneSession: one session for all destinations of a socket, and replies from anywhere.
func TestUDPOneSession(t *testing.T) {
	calls := make(chan netip.AddrPort, 8)
	s, dev := startStack(t, &handler{udp: func(ctx context.Context, src netip.AddrPort, in flow.PacketSource, out flow.PacketSink) {
		calls <- src
		echoUDP(ctx, src, in, out)
	}}, true, nil)
	v := variants()[0]
	a := startApp(t, v, dev)
	src := netip.AddrPortFrom(v.app(), 999)
	for port := range uint16(5) {
		sendRaw(t, dev, tun.Header{}, udpPacket(src, v.dst(100+port), []byte{byte(port)}))
	}
	for port := range uint16(5) {
		a.packet(t, func(b []byte) bool {
			h := header.UDP(b[20:])
			return b[9] == 17 && h.SourcePort() == 100+port && h.DestinationPort() == 999 && b[28] == byte(port)
		})
	}
	if len(calls) != 1 || s.Stats().UDPSockets != 1 {
		t.Errorf("%d calls, %d sessions", len(calls), s.Stats().UDPSockets)
	}
}

// TestUDPQueue: what a flow does not take is dropped and counted, the reader goes on, and a flow that returned is started again.
func TestUDPQueue(t *testing.T) {
	release := make(chan struct{})
	sizes := make(chan int, 2*queueDatagrams)
	s, dev := startStack(t, &handler{udp: func(ctx context.Context, src netip.AddrPort, in flow.PacketSource, _ flow.PacketSink) {
		if src.Port() != 1 {
			return // a flow that wants nothing
		}
		<-release
		stop := context.AfterFunc(ctx, func() { _ = in.SetReadDeadline(time.Unix(1, 0)) })
		defer stop()
		ds := []flow.Datagram{{Buf: make([]byte, 100)}}
		for range 10 { // then return, with more waiting
			ds[0].Buf = ds[0].Buf[:100]
			if _, err := in.ReadBatch(ds); err != nil {
				return
			}
			sizes <- len(ds[0].Buf)
		}
	}}, true, func(c *Config) { c.MaxUDPSessions = 2 })
	v := variants()[0]
	src := netip.AddrPortFrom(v.app(), 1)
	for range queueDatagrams + 20 {
		sendRaw(t, dev, tun.Header{}, udpPacket(src, v.dst(53), []byte("0123456789")))
	}
	eventually(t, func() bool { return s.Stats().Drops["udp_queue"] >= 20 })
	sendRaw(t, dev, tun.Header{}, udpPacket(netip.AddrPortFrom(v.app(), 2), v.dst(53), nil))
	eventually(t, func() bool { return s.Stats().Drops["udp_closed"] == 1 && s.Stats().UDPSockets == 1 })
	close(release)
	for range queueDatagrams {
		if n := <-sizes; n != 10 {
			t.Fatalf("%d bytes", n)
		}
	}
	sendRaw(t, dev, tun.Header{}, udpPacket(src, v.dst(53), make([]byte, 101))) // more than the flow has room for
	eventually(t, func() bool { return s.Stats().Drops["udp_room"] == 1 })
	if n := s.udp.queued.Load(); n != 0 {
		t.Errorf("%d bytes still accounted for", n)
	}
}

func TestUDPSessionLimit(t *testing.T) {
	s, dev := startStack(t, &handler{udp: echoUDP}, true, func(c *Config) { c.MaxUDPSessions = 2 })
	v := variants()[1]
	for port := range uint16(5) {
		sendRaw(t, dev, tun.Header{}, udpPacket(netip.AddrPortFrom(v.app(), 1+port), v.dst(53), nil))
	}
	eventually(t, func() bool { return s.Stats().Drops["udp_sockets"] == 3 })
	if n := s.Stats().UDPSockets; n != 2 {
		t.Errorf("%d sessions", n)
	}
}

func TestUDPDeadline(t *testing.T) {
	results := make(chan error, 3)
	_, dev := startStack(t, &handler{udp: func(_ context.Context, _ netip.AddrPort, in flow.PacketSource, _ flow.PacketSink) {
		ds := []flow.Datagram{{Buf: make([]byte, 100)}}
		_, err := in.ReadBatch(ds)
		results <- err
		_ = in.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
		_, err = in.ReadBatch(ds)
		results <- err
		_ = in.SetReadDeadline(time.Time{})
		_, err = in.ReadBatch(ds)
		results <- err
	}}, true, nil)
	v := variants()[0]
	src := netip.AddrPortFrom(v.app(), 1)
	sendRaw(t, dev, tun.Header{}, udpPacket(src, v.dst(53), nil))
	if err := <-results; err != nil {
		t.Fatal(err)
	}
	if err := <-results; !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal(err)
	}
	sendRaw(t, dev, tun.Header{}, udpPacket(src, v.dst(53), nil))
	if err := <-results; err != nil {
		t.Fatal(err)
	}
}

// TestUDPUnreachable: the ICMP error reaches the socket that sent.
func TestUDPUnreachable(t *testing.T) {
	for _, v := range variants()[:2] {
		t.Run(v.name, func(t *testing.T) {
			_, dev := startStack(t, &handler{udp: func(ctx context.Context, _ netip.AddrPort, in flow.PacketSource, out flow.PacketSink) {
				stop := context.AfterFunc(ctx, func() { _ = in.SetReadDeadline(time.Unix(1, 0)) })
				defer stop()
				ds := []flow.Datagram{{Buf: make([]byte, 100)}}
				for {
					ds[0].Buf = ds[0].Buf[:100]
					if _, err := in.ReadBatch(ds); err != nil {
						return
					}
					out.Unreachable(ds[0].Addr.AddrPort(), ds[0].Buf, flow.ReasonRefused)
				}
			}}, v.offload, nil)
			a := startApp(t, v, dev)
			c := a.dialUDP(t, 443)
			if _, err := c.Write([]byte("quic")); err != nil {
				t.Fatal(err)
			}
			eventually(t, func() bool {
				_, refused := endpointOf(c).LastError().(*tcpip.ErrConnectionRefused)
				return refused
			})
			b := a.packet(t, func([]byte) bool { return true })
			want := []byte{3, 3}
			if v.v6 {
				want = []byte{1, 4}
				b = b[40:]
			} else {
				b = b[20:]
			}
			if !bytes.Equal(b[:2], want) || !bytes.HasSuffix(b, []byte("quic")) {
				t.Errorf("% x", b)
			}
		})
	}
}

func TestUDPReplyRefused(t *testing.T) {
	bad := []flow.Datagram{
		{Addr: flow.Addr{IP: netip.MustParseAddr("2001:db8::1"), Port: 1}, Buf: []byte("other family")},
		{Addr: flow.Addr{Host: "name.example", Port: 1}, Buf: []byte("no address")},
		{Addr: flow.Addr{IP: netip.MustParseAddr("203.0.113.1"), Port: 1}, Buf: make([]byte, 65508)},
	}
	s, dev := startStack(t, &handler{udp: func(_ context.Context, _ netip.AddrPort, in flow.PacketSource, out flow.PacketSink) {
		_, _ = in.ReadBatch([]flow.Datagram{{Buf: make([]byte, 100)}})
		out.Deliver(bad)
		out.Unreachable(netip.MustParseAddrPort("[2001:db8::1]:1"), nil, flow.ReasonRefused)
		out.Unreachable(netip.AddrPort{}, nil, flow.ReasonRefused)
		out.Unreachable(netip.MustParseAddrPort("203.0.113.1:1"), nil, flow.ReasonDrop)
	}}, true, nil)
	v := variants()[0]
	a := startApp(t, v, dev)
	sendRaw(t, dev, tun.Header{}, udpPacket(netip.AddrPortFrom(v.app(), 1), v.dst(53), nil))
	eventually(t, func() bool { return s.Stats().Drops["udp_reply"] == 5 })
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.got) != 0 {
		t.Errorf("%d packets", len(a.got))
	}
}

// TestFragmentsFromApplication: fragments in any order, repeated, overlapping, and ones that never become whole.
func TestFragmentsFromApplication(t *testing.T) {
	for _, v := range variants()[:2] {
		t.Run(v.name, func(t *testing.T) {
			s, dev := startStack(t, &handler{udp: echoUDP}, v.offload, nil)
			src, dst := netip.AddrPortFrom(v.app(), 1), v.dst(53)
			whole := udpPacket(src, dst, randomBytes(3000))
			at := 20
			if v.v6 {
				at = 40
			}
			parts := fragments(v, src.Addr(), dst.Addr(), whole[at:], 1000, 1)
			for _, i := range []int{2, 0, 0, 3, 1} {
				sendRaw(t, dev, tun.Header{}, parts[i])
			}
			eventually(t, func() bool { return s.Stats().PacketsOut == 3 }) // the echo, in fragments too
			// Overlapping: the datagram must not come out (RFC 5722).
			bad := fragments(v, src.Addr(), dst.Addr(), whole[at:], 1000, 2)
			shifted := fragments(v, src.Addr(), dst.Addr(), whole[at:], 1008, 2)
			before := s.Stats().PacketsOut
			sendRaw(t, dev, tun.Header{}, bad[0])
			sendRaw(t, dev, tun.Header{}, shifted[1])
			sendRaw(t, dev, tun.Header{}, bad[1])
			sendRaw(t, dev, tun.Header{}, bad[2])
			sendRaw(t, dev, tun.Header{}, bad[3])
			// A wrong checksum, seen only when whole.
			broken := append([]byte(nil), whole[at:]...)
			broken[100] ^= 1
			for _, p := range fragments(v, src.Addr(), dst.Addr(), broken, 1000, 3) {
				sendRaw(t, dev, tun.Header{}, p)
			}
			eventually(t, func() bool { return s.Stats().Drops["checksum"] == 1 })
			if n := s.Stats().PacketsOut; n != before {
				t.Errorf("%d packets for broken datagrams", n-before)
			}
		})
	}
}

// fragments cuts a transport packet into fragments of size bytes.
func fragments(v variant, src, dst netip.Addr, b []byte, size int, id uint32) [][]byte {
	var out [][]byte
	for at := 0; at < len(b); at += size &^ 7 {
		p := b[at:min(at+size&^7, len(b))]
		more := at+len(p) < len(b)
		if v.v6 {
			ext := make([]byte, 8)
			ext[0] = 17
			field := uint16(at)
			if more {
				field |= 1
			}
			binary.BigEndian.PutUint16(ext[2:], field)
			binary.BigEndian.PutUint32(ext[4:], id)
			out = append(out, ip6(src, dst, 44, append(ext, p...)))
			continue
		}
		f := ip4(src, dst, 17, p)
		field := uint16(at / 8)
		if more {
			field |= ip4MoreFragments
		}
		binary.BigEndian.PutUint16(f[4:], uint16(id))
		binary.BigEndian.PutUint16(f[6:], field)
		f[10], f[11] = 0, 0
		binary.BigEndian.PutUint16(f[10:], ^checksum.Checksum(f[:20], 0))
		out = append(out, f)
	}
	return out
}

// TestUDPOptions: options and extension headers take the way through netstack, and arrive.
func TestUDPOptions(t *testing.T) {
	got := make(chan string, 4)
	s, dev := startStack(t, &handler{udp: func(ctx context.Context, _ netip.AddrPort, in flow.PacketSource, _ flow.PacketSink) {
		stop := context.AfterFunc(ctx, func() { _ = in.SetReadDeadline(time.Unix(1, 0)) })
		defer stop()
		for {
			ds := []flow.Datagram{{Buf: make([]byte, 100)}}
			if _, err := in.ReadBatch(ds); err != nil {
				return
			}
			got <- ds[0].Addr.String() + " " + string(ds[0].Buf)
		}
	}}, true, nil)
	v4, v6 := variants()[0], variants()[1]
	p := udpPacket(netip.AddrPortFrom(v4.app(), 1), v4.dst(7), []byte("options"))
	opt := append(append(append([]byte(nil), p[:20]...), 1, 1, 1, 0), p[20:]...) // three no-operations and an end
	opt[0]++
	binary.BigEndian.PutUint16(opt[2:], uint16(len(opt)))
	opt[10], opt[11] = 0, 0
	binary.BigEndian.PutUint16(opt[10:], ^checksum.Checksum(opt[:24], 0))
	sendRaw(t, dev, tun.Header{}, opt)
	if g := <-got; g != "203.0.113.80:7 options" {
		t.Error(g)
	}
	p = udpPacket(netip.AddrPortFrom(v6.app(), 1), v6.dst(7), []byte("extension"))
	dest := append([]byte{17, 0, 1, 4, 0, 0, 0, 0}, p[40:]...) // destination options: padding
	sendRaw(t, dev, tun.Header{}, ip6(v6.app(), v6.dst(7).Addr(), 60, dest))
	if g := <-got; g != "[2001:db8::80]:7 extension" {
		t.Error(g)
	}
	dest[len(dest)-1] ^= 1
	sendRaw(t, dev, tun.Header{}, ip6(v6.app(), v6.dst(7).Addr(), 60, dest))
	eventually(t, func() bool { return s.Stats().Drops["checksum"] == 1 })
}

// TestUDPAllocations: nothing is allocated for a datagram, in either direction.
func TestUDPAllocations(t *testing.T) {
	if race {
		t.Skip("the race detector allocates")
	}
	for _, v := range variants()[:2] {
		a, _ := tuntest.Pipe(t, tun.DefaultMTU, true)
		s, err := New(Config{Device: a, Handler: &handler{}})
		if err != nil {
			t.Fatal(err)
		}
		src := netip.AddrPortFrom(v.app(), 1)
		u := &udpSession{t: s.udp, src: src, wake: make(chan struct{}, 1)}
		s.udp.sessions[src] = u
		r := &reader{link: s.link, udp: s.udp.receive}
		wire := udpPacket(src, v.dst(53), randomBytes(1200))
		ds := []flow.Datagram{{}}
		buf := make([]byte, 2048)
		up := testing.AllocsPerRun(200, func() {
			n := copy(r.Buffer(), wire)
			r.Packet(&tun.Header{}, n)
			ds[0].Buf = buf
			if n, err := u.ReadBatch(ds); n != 1 || err != nil {
				t.Fatal(n, err)
			}
		})
		down := testing.AllocsPerRun(200, func() {
			u.Deliver(ds)
		})
		if up != 0 || down != 0 {
			t.Errorf("%s: %v allocations up, %v down", v.name, up, down)
		}
		if s.count.drops[dropChecksum].Load() != 0 {
			t.Error("checksum")
		}
		r.close()
		_ = a.Close()
	}
}
