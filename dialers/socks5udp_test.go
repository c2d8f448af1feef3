// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"bytes"
	"errors"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/dialers/dialertest"
	"github.com/mutex-proxy/mutex/flow"
)

// relaySocket is the UDP half of a fake upstream.
func relaySocket(t *testing.T) (*net.UDPConn, netip.AddrPort) {
	t.Helper()
	c, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(loopback, 0)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c, c.LocalAddr().(*net.UDPAddr).AddrPort()
}

// associate opens an association with a fake upstream whose relay is the returned socket.
func associate(t *testing.T, end ...dialertest.Step) (*dialertest.Server, flow.PacketConn, *net.UDPConn, netip.AddrPort) {
	t.Helper()
	relay, at := relaySocket(t)
	reply := string(appendSOCKSAddr([]byte{5, 0, 0}, flow.AddrFrom(at)))
	steps := append([]dialertest.Step{
		dialertest.Expect("\x05\x01\x00"), dialertest.Send("\x05\x00"),
		dialertest.Expect("\x05\x03\x00\x01\x00\x00\x00\x00\x00\x00"), dialertest.Send(reply),
	}, end...)
	s := dialertest.Start(t, steps...)
	pc, err := dialer(t, "socks5h://"+s.Addr.String()).ListenPacket(testContext(t), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { pc.Close() })
	me := pc.(*association).LocalAddr().(*net.UDPAddr).AddrPort()
	return s, pc, relay, me
}

func TestAssociation(t *testing.T) {
	_, pc, relay, me := associate(t, dialertest.Silent())
	big := bytes.Repeat([]byte("x"), 65497)
	out := []flow.Datagram{
		{Addr: addr(t, "192.0.2.1:53"), Buf: []byte("four")},
		{Addr: addr(t, "[2001:db8::1]:53"), Buf: nil},
		{Addr: flow.Addr{Host: "example.com", IP: netip.MustParseAddr("192.0.2.9"), Port: 53}, Buf: []byte("name")},
		{Addr: addr(t, "192.0.2.1:53"), Buf: big},
	}
	if n, err := pc.WriteBatch(out); n != len(out) || err != nil {
		t.Fatal(n, err)
	}
	buf := make([]byte, 65535)
	for _, want := range []string{
		"\x00\x00\x00\x01\xc0\x00\x02\x01\x00\x35four",
		"\x00\x00\x00\x04\x20\x01\x0d\xb8\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01\x00\x35",
		"\x00\x00\x00\x03\x0bexample.com\x00\x35name",
		"\x00\x00\x00\x01\xc0\x00\x02\x01\x00\x35" + string(big),
	} {
		n, err := relay.Read(buf)
		if err != nil || string(buf[:n]) != want {
			t.Errorf("on the wire: %.60q, want %.60q (%v)", buf[:n], want, err)
		}
	}
	for _, in := range []string{
		"\x00\x00\x01\x01\xc0\x00\x02\x01\x00\x35fragment",
		"\x00\x00\x00\x01\xc0\x00\x02\x01\x00\x35four",
		"short",
		"\x00\x00\x00\x09\xc0\x00\x02\x01\x00\x35unknown type",
		"\x00\x00\x00\x04\x20\x01\x0d\xb8\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01\x00\x35six",
		"\x00\x00\x00\x03\x0bexample.com\x00\x35name",
		"\x00\x00\x00\x03\x09192.0.2.7\x00\x35literal",
		"\x00\x00\x00\x01\xc0\x00\x02\x01\x00\x35" + strings.Repeat("L", 2000), // more than there is room for
		"\x00\x00\x00\x01\xc0\x00\x02\x01\x00\x36",
	} {
		if _, err := relay.WriteToUDPAddrPort([]byte(in), me); err != nil {
			t.Fatal(err)
		}
	}
	want := []string{"192.0.2.1:53 four", "[2001:db8::1]:53 six", "example.com:53 name", "192.0.2.7:53 literal", "192.0.2.1:54 "}
	var got []string
	for len(got) < len(want) {
		ds := make([]flow.Datagram, 4)
		for i := range ds {
			ds[i].Buf = make([]byte, 1500)
		}
		_ = pc.SetReadDeadline(time.Now().Add(5 * time.Second))
		n, err := pc.ReadBatch(ds)
		if err != nil {
			t.Fatal(err)
		}
		for i, d := range ds {
			if i < n {
				got = append(got, d.Addr.String()+" "+string(d.Buf))
			} else if len(d.Buf) != 1500 {
				t.Errorf("an unused buffer was cut to %d", len(d.Buf))
			}
		}
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if st := pc.(*association).s.Status(); st.Dropped != 4 || st.Active != 1 || st.UDP != yes {
		t.Errorf("%+v", st)
	}
}

func TestAssociationErrors(t *testing.T) {
	_, pc, _, _ := associate(t, dialertest.Silent())
	ok := flow.Datagram{Addr: addr(t, "192.0.2.1:53"), Buf: []byte("x")}
	for _, tt := range []struct {
		bad  flow.Datagram
		want error
	}{
		{flow.Datagram{Addr: addr(t, "192.0.2.1:53"), Buf: make([]byte, 65498)}, unix.EMSGSIZE},
		{flow.Datagram{Addr: flow.Addr{Port: 53}}, flow.ErrHostUnreachable},
		{flow.Datagram{Addr: flow.Addr{Host: strings.Repeat("a", 256), Port: 53}}, flow.ErrHostUnreachable},
	} {
		n, err := pc.WriteBatch([]flow.Datagram{ok, ok, tt.bad, ok})
		if n != 2 || !errors.Is(err, tt.want) || errors.Is(err, flow.ErrUpstream) {
			t.Errorf("wrote %d, %v, want 2 and %v", n, err, tt.want)
		}
	}
	_ = pc.SetReadDeadline(time.Now().Add(-1))
	if _, err := pc.ReadBatch([]flow.Datagram{{Buf: make([]byte, 1)}}); !timedOut(err) {
		t.Errorf("deadline: %v", err)
	}
	if n, err := pc.ReadBatch(nil); n != 0 || err != nil {
		t.Errorf("nothing to fill: %d, %v", n, err)
	}
	pc.Close()
	pc.Close()
	if _, err := pc.ReadBatch([]flow.Datagram{{Buf: make([]byte, 1)}}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("closed: %v", err)
	}
	if _, err := pc.WriteBatch([]flow.Datagram{ok}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("closed: %v", err)
	}
}

func TestAssociationEnds(t *testing.T) {
	for name, end := range map[string][]dialertest.Step{
		"closed by the server": {},
		"reset by the server":  {dialertest.Reset()},
		"endless control":      {dialertest.Endless("noise")},
	} {
		t.Run(name, func(t *testing.T) {
			_, pc, _, _ := associate(t, end...)
			_, err := pc.ReadBatch([]flow.Datagram{{Buf: make([]byte, 1)}})
			wantError(t, err, flow.ReasonHostUnreachable, true)
		})
	}
	t.Run("the relay's port is gone", func(t *testing.T) {
		_, pc, relay, _ := associate(t, dialertest.Silent())
		relay.Close()
		_, _ = pc.WriteBatch([]flow.Datagram{{Addr: addr(t, "192.0.2.1:53"), Buf: []byte("x")}})
		_, err := pc.ReadBatch([]flow.Datagram{{Buf: make([]byte, 1)}})
		wantError(t, err, flow.ReasonHostUnreachable, true)
	})
}

func TestNoUDP(t *testing.T) {
	for name, tt := range map[string]struct {
		reply string
		asked int // how often of 5
	}{
		"command not supported": {"\x05\x07\x00\x01\x00\x00\x00\x00\x00\x00", 1},
		"not allowed":           {"\x05\x02\x00\x01\x00\x00\x00\x00\x00\x00", 1},
		"failure":               {"\x05\x01\x00\x01\x00\x00\x00\x00\x00\x00", 5},
		"closed":                {"", 3},
	} {
		t.Run(name, func(t *testing.T) {
			s := dialertest.Start(t, dialertest.Read(3), dialertest.Send("\x05\x00"), dialertest.Read(10), dialertest.Send(tt.reply))
			d := dialer(t, "socks5h://"+s.Addr.String())
			for range 5 {
				if _, err := d.ListenPacket(testContext(t), nil); !errors.Is(err, errors.ErrUnsupported) {
					t.Errorf("%v", err)
				}
			}
			if got := s.Accepted(); got != tt.asked {
				t.Errorf("asked %d times, want %d", got, tt.asked)
			}
			if st := StatusOf(d); st.Active != 0 || !st.Up {
				t.Errorf("%+v", st)
			}
		})
	}
	d := dialer(t, "socks5h://127.0.0.1:1?udp=off")
	if _, err := d.ListenPacket(testContext(t), nil); !errors.Is(err, errors.ErrUnsupported) || StatusOf(d).UDP != no {
		t.Errorf("udp=off: %v", err)
	}
	s := dialertest.Start(t, dialertest.Read(3), dialertest.Send("\x05\x00"), dialertest.Read(10), dialertest.Send("\x05\x00\x00\x01\x7f\x00\x00\x01\x00\x00"))
	_, err := dialer(t, "socks5h://"+s.Addr.String()).ListenPacket(testContext(t), nil)
	wantError(t, err, flow.ReasonHostUnreachable, true)
}

func TestRelayAddr(t *testing.T) {
	for _, tt := range []struct{ bound, server, want string }{
		{"203.0.113.5:1", "203.0.113.1", "203.0.113.5:1"},
		{"0.0.0.0:1", "203.0.113.1", "203.0.113.1:1"},
		{"[::]:1", "203.0.113.1", "203.0.113.1:1"},
		{"0.0.0.0:1", "2001:db8::1", "[2001:db8::1]:1"},
		{"10.0.0.5:1", "203.0.113.1", "203.0.113.1:1"},
		{"10.0.0.5:1", "10.0.0.1", "10.0.0.5:1"},
		{"10.0.0.5:1", "127.0.0.1", "10.0.0.5:1"},
		{"127.0.0.1:1", "10.0.0.1", "10.0.0.1:1"},
		{"127.0.0.1:1", "127.0.0.1", "127.0.0.1:1"},
		{"[fd00::1]:1", "2001:db8::1", "[2001:db8::1]:1"},
		{"[fe80::1]:1", "fe80::2%eth0", "[fe80::1%eth0]:1"},
		{"224.0.0.1:1", "203.0.113.1", "203.0.113.1:1"},
		{"relay.example:1", "203.0.113.1", "203.0.113.1:1"},
	} {
		got, err := relayAddr(addr(t, tt.bound), netip.MustParseAddr(tt.server))
		if err != nil || got.String() != tt.want {
			t.Errorf("%s from %s: %v, want %s (%v)", tt.bound, tt.server, got, tt.want, err)
		}
	}
}

// slowUnwrap is the obvious way: put the datagram together, read the header, cut it off.
func slowUnwrap(whole []byte, room int) (flow.Addr, []byte, bool) {
	if len(whole) < 5 || whole[2] != 0 {
		return flow.Addr{}, nil, false
	}
	a, n, err := parseSOCKSAddr(whole[3:])
	if err != nil || len(whole)-3-n > room || a.Host == "" && !a.IP.IsValid() {
		return flow.Addr{}, nil, false
	}
	if ip, err := netip.ParseAddr(a.Host); err == nil {
		a.Host, a.IP = "", ip.Unmap()
	}
	return a, whole[3+n:], true
}

func FuzzUnwrap(f *testing.F) {
	for _, s := range []string{
		"\x00\x00\x00\x01\xc0\x00\x02\x01\x00\x35four", "\x00\x00\x00\x04aaaaaaaaaaaaaaaa\x00\x35six", "\x00\x00\x00\x03\x0bexample.com\x00\x35name",
		"\x00\x00\x00\x03\x01a\x00\x35name", "\x00\x00\x00\x03\x00\x00\x35name", "\x00\x00\x00\x03\xff" + strings.Repeat("a", 255) + "\x00\x35name",
		"\x00\x00\x00\x03\x091.2.3.4.5\x00\x35", "\x00\x00\x01\x01\xc0\x00\x02\x01\x00\x35frag",
	} {
		for _, room := range []uint16{0, 1, 3, 5, 12, 40, 1500} {
			f.Add([]byte(s), room)
		}
	}
	c := new(socksCodec)
	f.Fuzz(func(t *testing.T, whole []byte, room uint16) {
		buf := make([]byte, room)
		var head [headMax]byte
		if len(whole) > int(room)+headMax {
			return // the kernel would have said MSG_TRUNC
		}
		n := copy(head[:headFixed], whole)
		m := copy(buf, whole[n:])
		copy(head[headFixed:], whole[n+m:])
		var got flow.Addr
		size, ok := c.unwrap(head[:], buf, len(whole), &got)
		want, payload, wantOK := slowUnwrap(whole, int(room))
		if ok != wantOK {
			t.Fatalf("%x room %d: %v, want %v", whole, room, ok, wantOK)
		}
		if ok && (got != want || !bytes.Equal(buf[:size], payload)) {
			t.Errorf("%x room %d: %v %q, want %v %q", whole, room, got, buf[:size], want, payload)
		}
	})
}

func TestAssociationAllocates(t *testing.T) {
	_, pc, relay, me := associate(t, dialertest.Silent())
	out := make([]flow.Datagram, 8)
	in := make([]flow.Datagram, 8)
	bufs := make([][]byte, 8)
	for i := range out {
		out[i] = flow.Datagram{Addr: addr(t, "192.0.2.1:53"), Buf: make([]byte, 1200)}
		bufs[i] = make([]byte, 1500)
	}
	out[1].Addr = addr(t, "[2001:db8::1]:53")
	out[2].Addr = addr(t, "example.com:53")
	buf := make([]byte, 2000)
	allocs := testing.AllocsPerRun(200, func() {
		if n, err := pc.WriteBatch(out); n != len(out) || err != nil {
			t.Fatal(n, err)
		}
		for range out {
			n, err := relay.Read(buf)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := relay.WriteToUDPAddrPort(buf[:n], me); err != nil {
				t.Fatal(err)
			}
		}
		for got := 0; got < len(out); {
			for i := range in {
				in[i].Buf = bufs[i]
			}
			n, err := pc.ReadBatch(in)
			if err != nil {
				t.Fatal(err)
			}
			got += n
		}
	})
	if allocs > 0 && !raceEnabled {
		t.Errorf("%v allocations for 8 datagrams each way", allocs)
	}
}

func BenchmarkAssociationWrite(b *testing.B) {
	relay, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(loopback, 0)))
	if err != nil {
		b.Fatal(err)
	}
	defer relay.Close()
	benchmarkWrite(b, NewNet(NetConfig{}), relay)
}

func benchmarkWrite(b *testing.B, n *Net, relay *net.UDPConn) {
	b.Helper()
	c, err := n.DialUDP(b.Context(), relay.LocalAddr().(*net.UDPAddr).AddrPort())
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	s := newSOCKS5("up", Spec{Scheme: SchemeSOCKS5}, n)
	var bc batchConn
	if err := bc.init(n, c, &socksCodec{ipv6: &s.ipv6}, &s.dropped); err != nil {
		b.Fatal(err)
	}
	ds := make([]flow.Datagram, batchSize)
	for i := range ds {
		ds[i] = flow.Datagram{Addr: flow.Addr{IP: loopback, Port: 9}, Buf: make([]byte, 1200)}
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := bc.WriteBatch(ds); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/batchSize, "ns/datagram")
}
