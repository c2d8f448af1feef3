// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/e2e/lab"
)

// tunWriter sends raw packets out of the client's TUN device, past the client's IP stack: what the program reads there is as written.
type tunWriter struct {
	fd int
	ix int
}

func newTunWriter(t *testing.T, l *lab.Lab, name string) *tunWriter {
	t.Helper()
	w := &tunWriter{fd: -1}
	err := l.Client.Do(func() (err error) {
		ifi, err := net.InterfaceByName(name)
		if err != nil {
			return err
		}
		w.ix = ifi.Index
		w.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(w.fd) })
	return w
}

func (w *tunWriter) send(v6 bool, packet []byte) {
	proto := uint16(unix.ETH_P_IP)
	if v6 {
		proto = unix.ETH_P_IPV6
	}
	_ = unix.Sendto(w.fd, packet, 0, &unix.SockaddrLinklayer{Protocol: proto<<8 | proto>>8, Ifindex: w.ix})
}

// ip4 makes an IPv4 packet whose header is right, but for what edit changes.
func ip4(proto byte, payload []byte, edit func(h []byte)) []byte {
	h := make([]byte, 20, 20+len(payload))
	h[0], h[8], h[9] = 0x45, 64, proto
	binary.BigEndian.PutUint16(h[2:], uint16(20+len(payload)))
	copy(h[12:], lab.ClientV4.AsSlice())
	copy(h[16:], lab.OriginV4.AsSlice())
	if edit != nil {
		edit(h)
	}
	binary.BigEndian.PutUint16(h[10:], 0)
	binary.BigEndian.PutUint16(h[10:], ^fold(h))
	return append(h, payload...)
}

func ip6(next byte, payload []byte, edit func(h []byte)) []byte {
	h := make([]byte, 40, 40+len(payload))
	h[0], h[6], h[7] = 0x60, next, 64
	binary.BigEndian.PutUint16(h[4:], uint16(len(payload)))
	copy(h[8:], lab.ClientV6.AsSlice())
	copy(h[24:], lab.OriginV6.AsSlice())
	if edit != nil {
		edit(h)
	}
	return append(h, payload...)
}

// fold is the Internet checksum before its complement.
func fold(b []byte) uint16 {
	var s uint32
	for i := 0; i+1 < len(b); i += 2 {
		s += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	if len(b)%2 == 1 {
		s += uint32(b[len(b)-1]) << 8
	}
	for s > 0xffff {
		s = s&0xffff + s>>16
	}
	return uint16(s)
}

// syn makes a TCP SYN of IPv4 with a right checksum.
func syn(port uint16, options []byte) []byte {
	b := make([]byte, 20+len(options))
	binary.BigEndian.PutUint16(b, port)
	binary.BigEndian.PutUint16(b[2:], 7)
	b[12], b[13] = byte(len(b)/4)<<4, 2
	b[14] = 0xff
	copy(b[20:], options)
	pseudo := append(append(lab.ClientV4.AsSlice(), lab.OriginV4.AsSlice()...), 0, 6, byte(len(b)>>8), byte(len(b)))
	binary.BigEndian.PutUint16(b[16:], ^fold(append(pseudo, b...)))
	return b
}

// malformed returns packets that no IP stack sends.
func malformed() map[string][][]byte {
	udp := func(length, sum uint16, data int) []byte {
		b := make([]byte, 8+data)
		binary.BigEndian.PutUint16(b, 4444)
		binary.BigEndian.PutUint16(b[2:], 7)
		binary.BigEndian.PutUint16(b[4:], length)
		binary.BigEndian.PutUint16(b[6:], sum)
		return b
	}
	m := map[string][][]byte{}
	for n := range 60 {
		m["short"] = append(m["short"], ip4(17, udp(48, 0, 40), nil)[:n], ip6(17, udp(48, 1, 40), nil)[:n])
	}
	for v := range 16 {
		m["version and header length"] = append(m["version and header length"], ip4(6, syn(1, nil), func(h []byte) { h[0] = byte(v)<<4 | 5 }),
			ip4(6, syn(1, nil), func(h []byte) { h[0] = 4<<4 | byte(v) }))
	}
	for _, n := range []uint16{0, 1, 7, 8, 19, 20, 21, 41, 1000, 65535} {
		m["IP length"] = append(m["IP length"], ip4(17, udp(28, 0, 20), func(h []byte) { binary.BigEndian.PutUint16(h[2:], n) }),
			ip6(17, udp(28, 1, 20), func(h []byte) { binary.BigEndian.PutUint16(h[4:], n) }))
		m["UDP length"] = append(m["UDP length"], ip4(17, udp(n, 0, 20), nil), ip6(17, udp(n, 1, 20), nil))
	}
	m["checksums"] = [][]byte{
		ip4(17, udp(28, 0xbad1, 20), nil), ip6(17, udp(28, 0, 20), nil), ip4(6, append(syn(1, nil)[:16], 1, 2, 0, 0), nil),
		func() []byte { p := ip4(17, udp(28, 0, 20), nil); p[10] ^= 0xff; return p }(),
	}
	for off := range 16 {
		b := syn(2000, nil)
		b[12] = byte(off) << 4
		m["TCP offset"] = append(m["TCP offset"], ip4(6, b, nil), ip6(6, b, nil))
	}
	for flags := range 256 {
		b := syn(uint16(3000+flags), nil)
		b[13] = byte(flags)
		m["TCP flags"] = append(m["TCP flags"], ip4(6, b, nil))
	}
	m["TCP options"] = [][]byte{
		ip4(6, syn(4000, []byte{2, 0, 0, 0}), nil), ip4(6, syn(4001, []byte{2, 1, 3, 255}), nil), ip4(6, syn(4002, []byte{3, 3, 255, 8}), nil),
		ip4(6, syn(4003, []byte{5, 255, 1, 1}), nil), ip4(6, syn(4004, []byte{2, 4, 0, 0}), nil), ip4(6, syn(4005, []byte{2, 4, 0, 1}), nil),
	}
	m["IP options"] = [][]byte{append(ip4(17, udp(28, 0, 20), func(h []byte) { h[0] = 0x4f }), make([]byte, 40)...)}
	for _, frag := range []uint16{0x2000, 0x2001, 0x1fff, 0x3fff, 0x0001, 0x8000, 0x4001} {
		p := func(h []byte) { binary.BigEndian.PutUint16(h[6:], frag); h[5] = byte(frag) }
		m["fragments"] = append(m["fragments"], ip4(17, make([]byte, 800), p), ip4(17, make([]byte, 8), p), ip4(6, syn(5000, nil), p))
	}
	for _, off := range []uint16{0, 1, 2, 3} { // overlapping
		m["overlap"] = append(m["overlap"], ip4(17, make([]byte, 64), func(h []byte) { binary.BigEndian.PutUint16(h[6:], 0x2000|off); h[4] = 9 }),
			ip6(44, append([]byte{17, 0, byte(off >> 5), byte(off<<3) | 1, 0, 0, 0, 9}, make([]byte, 64)...), nil))
	}
	chain := []byte{}
	for _, next := range []byte{0, 60, 43, 44, 51, 50, 135, 59} {
		chain = append([]byte{next, 0, 0, 0, 0, 0, 0, 0}, chain...)
		m["extension headers"] = append(m["extension headers"], ip6(60, chain, nil), ip6(0, chain, nil), ip6(43, chain, nil))
	}
	long := []byte{}
	for range 150 {
		long = append(long, 60, 0, 1, 4, 0, 0, 0, 0)
	}
	m["extension headers"] = append(m["extension headers"], ip6(60, long, nil), ip6(60, []byte{60, 255, 0, 0, 0, 0, 0, 0}, nil))
	m["ICMP"] = [][]byte{
		ip4(1, []byte{8}, nil), ip4(1, []byte{3, 4, 0, 0, 0, 0, 0, 0}, nil), ip6(58, []byte{128}, nil), ip6(58, []byte{2, 0, 0, 0}, nil),
		ip4(1, append([]byte{3, 3, 0, 0, 0, 0, 0, 0}, ip4(17, udp(8, 0, 0), nil)...), nil),
	}
	m["addresses"] = [][]byte{
		ip4(17, udp(28, 0, 20), func(h []byte) { copy(h[12:], h[16:20]) }), ip4(17, udp(28, 0, 20), func(h []byte) { copy(h[12:], []byte{127, 0, 0, 1}) }),
		ip4(6, syn(1, nil), func(h []byte) { copy(h[16:], []byte{255, 255, 255, 255}) }), ip4(6, syn(1, nil), func(h []byte) { copy(h[16:], []byte{224, 0, 0, 1}) }),
		ip4(6, syn(0, nil), nil), ip6(6, syn(1, nil), func(h []byte) { copy(h[24:], make([]byte, 16)) }), ip6(6, syn(1, nil), func(h []byte) { copy(h[8:], make([]byte, 16)) }),
	}
	return m
}

// TestMalformedPackets writes what no IP stack sends into the TUN: the program must live, stay small, and keep working.
func TestMalformedPackets(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, false)
	m := l.Mprox(t)
	m.Up("--proxy", s.URL())
	checkProxied(t, l)
	w := newTunWriter(t, l, m.Status().Contexts[0].TUN)
	droppedBefore, rssBefore := m.Status().Contexts[0].PacketsDropped, m.RSS()
	for name, packets := range malformed() {
		for range 20 {
			for _, p := range packets {
				w.send(len(p) > 0 && p[0]>>4 == 6, p)
			}
		}
		if m.Exited() {
			t.Fatalf("mprox ended on %s:\n%s", name, m.Log)
		}
	}
	rnd := rand.New(rand.NewPCG(7, 7))
	for range 20_000 { // valid packets with bytes changed
		p := ip4(6, syn(uint16(rnd.Uint32()), []byte{2, 4, 5, 180, 1, 3, 3, 7}), nil)
		if rnd.IntN(2) == 0 {
			p = ip6(byte(rnd.Uint32()), make([]byte, rnd.IntN(200)), nil)
		}
		for range 1 + rnd.IntN(4) {
			p[rnd.IntN(len(p))] = byte(rnd.Uint32())
		}
		w.send(p[0]>>4 == 6, p)
	}
	checkProxied(t, l)
	if n := m.Status().Contexts[0].PacketsDropped; n <= droppedBefore {
		t.Errorf("nothing was counted as dropped: %d", n)
	}
	if grown := m.RSS() - rssBefore; grown > 128<<20 {
		t.Errorf("memory grew by %d MB", grown>>20)
	}
	checkLog(t, m)
}

// checkLog fails the test when the program has panicked.
func checkLog(t *testing.T, m *lab.Mprox) {
	t.Helper()
	for _, bad := range []string{"panic:", "fatal error:", "goroutine 1 ["} {
		if strings.Contains(m.Log.String(), bad) {
			t.Errorf("the log says %q", bad)
		}
	}
	if m.Exited() {
		t.Errorf("mprox ended")
	}
}

// TestSYNFlood sends SYNs from many ports to destinations that never answer: memory and flows stay bounded, others are still served.
func TestSYNFlood(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, false)
	m := l.Mprox(t)
	m.UpConfig(globalConfig(s, `"dial_timeout": "3s",`))
	checkProxied(t, l)
	w := newTunWriter(t, l, m.Status().Contexts[0].TUN)
	before := m.RSS()
	src := lab.ClientV4.As4()
	for i := range 50_000 {
		p := ip4(6, syn(uint16(1024+i%60000), nil), func(h []byte) {
			// Many sources, one silent destination.
			h[12], h[13], h[14], h[15] = src[0], src[1], byte(i>>8), byte(i)
			copy(h[16:], lab.BlackholeV4.AsSlice())
		})
		fixTCPSum(p)
		w.send(false, p)
	}
	if grown := m.RSS() - before; grown > 512<<20 {
		t.Errorf("memory grew by %d MB", grown>>20)
	} else {
		t.Logf("memory grew by %d MB", grown>>20)
	}
	if !lab.Poll(30*time.Second, func() bool { return curl(t, l, "-m", "3", originURL(false, "/bytes/10")).Code == 0 }) {
		t.Error("nobody is served after a SYN flood")
	}
	checkLog(t, m)
}

// TestUDPFlood sends datagrams from very many sockets: associations and memory stay bounded, others are still served.
func TestUDPFlood(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, false)
	m := l.Mprox(t)
	m.Up("--proxy", s.URL())
	checkProxied(t, l)
	w := newTunWriter(t, l, m.Status().Contexts[0].TUN)
	before := m.RSS()
	src := lab.ClientV4.As4()
	for i := range 30_000 {
		b := []byte{byte(i >> 8), byte(i), 0, lab.PortEcho, 0, 12, 0, 0, 'x', 'x', 'x', 'x'} // no checksum: legal in IPv4
		w.send(false, ip4(17, b, func(h []byte) { h[12], h[13], h[14], h[15] = src[0], src[1], byte(i>>12), 2 }))
	}
	grown := m.RSS() - before
	t.Logf("memory grew by %d MB, %d connections to the server", grown>>20, controlConns(t, l, s))
	if grown > 512<<20 {
		t.Errorf("memory grew by %d MB", grown>>20)
	}
	if !lab.Poll(30*time.Second, func() bool { return curl(t, l, "-m", "3", originURL(false, "/bytes/10")).Code == 0 }) {
		t.Error("nobody is served after a flood of datagrams")
	}
	checkLog(t, m)
}

// fixTCPSum recomputes the TCP checksum of an IPv4 packet without options.
func fixTCPSum(p []byte) {
	b := p[20:]
	b[16], b[17] = 0, 0
	pseudo := append(append([]byte{}, p[12:20]...), 0, 6, byte(len(b)>>8), byte(len(b)))
	binary.BigEndian.PutUint16(b[16:], ^fold(append(pseudo, b...)))
}

// TestHostileUpstream gives an upstream that answers with garbage, for ever, in single bytes, or not at all: a connection fails cleanly.
func TestHostileUpstream(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	at := netip.AddrPortFrom(lab.ProxyV4, 1099)
	for _, scheme := range []string{"socks5h", "http"} {
		for name, serve := range map[string]func(net.Conn){
			"garbage": func(c net.Conn) { _, _ = c.Write(lab.Block(100_000)) },
			"endless": func(c net.Conn) {
				for {
					if _, err := c.Write([]byte("HTTP/1.1 200 OK\r\nX: " + strings.Repeat("a", 10_000) + "\r\n")); err != nil {
						return
					}
				}
			},
			"silent": func(c net.Conn) { _, _ = io.Copy(io.Discard, c) },
			"closes": func(net.Conn) {},
			"half a reply": func(c net.Conn) {
				_, _ = c.Write(map[string][]byte{"socks5h": {5, 0, 5, 0, 0, 1, 1, 2}, "http": []byte("HTTP/1.1 20")}[scheme])
				_, _ = io.Copy(io.Discard, c)
			},
		} {
			t.Run(scheme+" "+name, func(t *testing.T) {
				ln, err := l.Proxy.Listen("tcp", at.String())
				if err != nil {
					t.Fatal(err)
				}
				defer ln.Close()
				go func() {
					for {
						c, err := ln.Accept()
						if err != nil {
							return
						}
						go func() {
							defer c.Close()
							serve(c)
						}()
					}
				}()
				m := l.Mprox(t)
				m.UpConfig(fmt.Sprintf(`{ "upstreams": { "p": { "url": "%s://%s" } },
  "contexts": { "default": { "mode": "global", "default": "p", "dial_timeout": "1s" } } }`, scheme, at))
				before := m.RSS()
				within(t, 4*time.Second, "the failure", func() {
					if c, err := l.Client.Dial("tcp", "198.51.100.80:80", 8*time.Second); err == nil {
						c.Close()
						t.Error("connected")
					} else if !isErrno(err, refusals...) {
						t.Error(err)
					}
				})
				if grown := m.RSS() - before; grown > 32<<20 {
					t.Errorf("memory grew by %d MB", grown>>20)
				}
				checkLog(t, m)
				m.Stop()
			})
		}
	}
}

// TestHostileDNS sends malformed queries and asks a server that answers with garbage.
func TestHostileDNS(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, false)
	m := l.Mprox(t)
	m.UpConfig(globalConfig(s, `"dns": { "mode": "fakeip" },`))
	rnd := rand.New(rand.NewPCG(3, 3))
	query := []byte("\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x03www\x07example\x04test\x00\x00\x01\x00\x01")
	c, err := l.Client.Dial("udp", "127.0.0.53:53", time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for i := range 3000 {
		b := append([]byte(nil), query[:1+rnd.IntN(len(query))]...)
		if i%2 == 0 {
			b = append([]byte(nil), query...)
			b[rnd.IntN(len(b))] = byte(rnd.Uint32())
		}
		_, _ = c.Write(b)
	}
	_, _ = c.Write([]byte("\x00\x01\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\xc0\x0c\x00\x01\x00\x01")) // a name that points to itself
	if tc, err := l.Client.Dial("tcp", "127.0.0.53:53", time.Second); err == nil {
		_, _ = tc.Write(append([]byte{0xff, 0xff}, lab.Block(500)...)) // promises more than it sends
		tc.Close()
	}
	if got := dig(t, l, "@127.0.0.53", "www.example.test"); !strings.HasPrefix(got, "198.1") {
		t.Errorf("after malformed queries: %q", got)
	}
	checkLog(t, m)
}

// TestHostileAPI sends malformed requests to the control socket.
func TestHostileAPI(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, false)
	m := l.Mprox(t)
	m.Up("--proxy", s.URL())
	before := m.RSS()
	tr := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", m.Socket)
	}}
	defer tr.CloseIdleConnections()
	for _, req := range []struct{ method, path, body string }{
		{"POST", "/v1/leases", "{"},
		{"POST", "/v1/leases", `{"no_such_field": 1}`},
		{"POST", "/v1/leases", `{"proxy": ["gopher://x"]}`},
		{"POST", "/v1/leases", strings.Repeat("[", 1<<20)},
		{"POST", "/v1/contexts", strings.Repeat("x", 64<<20)},
		{"DELETE", "/v1/flows/notanumber", ""},
		{"DELETE", "/v1/flows/99999999999999999999999", ""},
		{"GET", "/v1/explain?dst=" + strings.Repeat("a", 8000), ""},
		{"GET", "/v1/no/such/thing", ""},
		{"PATCH", "/v1/status", ""},
		{"GET", "/v1/flows?watch=maybe", ""},
		{"GET", "/../../etc/passwd", ""},
	} {
		r, err := http.NewRequestWithContext(t.Context(), req.method, "http://mprox"+req.path, strings.NewReader(req.body))
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		resp, err := tr.RoundTrip(r.WithContext(ctx))
		if err == nil {
			b, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<16))
			resp.Body.Close()
			if resp.StatusCode < 400 && req.path != "/v1/flows?watch=maybe" || resp.StatusCode >= 500 && resp.StatusCode != 501 {
				t.Errorf("%s %.40s: %s %s", req.method, req.path, resp.Status, b)
			}
		}
		cancel()
	}
	for _, raw := range []string{"\x00\x01\x02", "GET / HTTP/9.9\r\n\r\n", strings.Repeat("A", 1<<20), "GET /v1/status HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n"} {
		c, err := net.Dial("unix", m.Socket)
		if err != nil {
			t.Fatal(err)
		}
		_ = c.SetDeadline(time.Now().Add(2 * time.Second))
		_, _ = io.WriteString(c, raw)
		_, _ = io.Copy(io.Discard, io.LimitReader(c, 1<<16))
		c.Close()
	}
	if grown := m.RSS() - before; grown > 64<<20 {
		t.Errorf("memory grew by %d MB", grown>>20)
	}
	checkProxied(t, l)
	checkLog(t, m)
}
