// SPDX-License-Identifier: GPL-3.0-or-later

package dns

import (
	"bufio"
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"
	"go.uber.org/goleak"
	"go.uber.org/zap/zaptest"
	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/flow"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fakeVia is an upstream with name servers behind it, in memory.
type fakeVia struct {
	name    string
	noUDP   bool
	dialErr error
	sockets bool // TLS needs a connection with a buffer, which net.Pipe has not
	// serve handles one connection, packet one datagram (nil: silence). The address is the one that was dialed.
	serve  func(addr flow.Addr, c net.Conn)
	packet func(addr flow.Addr, query []byte) [][]byte

	wg      sync.WaitGroup
	mu      sync.Mutex
	dials   []flow.Addr
	listens int
}

func (v *fakeVia) Name() string {
	if v.name == "" {
		return "fake"
	}
	return v.name
}

func (v *fakeVia) Dial(ctx context.Context, dst flow.Addr) (flow.Conn, error) {
	v.mu.Lock()
	v.dials = append(v.dials, dst)
	v.mu.Unlock()
	if v.dialErr != nil {
		return nil, v.dialErr
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	near, far := net.Pipe()
	if v.sockets {
		near, far = socketpair()
	}
	v.wg.Go(func() {
		defer far.Close()
		v.serve(dst, far)
	})
	return pipeConn{near}, nil
}

func (v *fakeVia) ListenPacket(context.Context, *flow.Flow) (flow.PacketConn, error) {
	v.mu.Lock()
	v.listens++
	v.mu.Unlock()
	if v.noUDP {
		return nil, errors.Join(errors.New("no udp here"), errors.ErrUnsupported)
	}
	return newFakePackets(v.packet), nil
}

func (v *fakeVia) dialed() int {
	v.mu.Lock()
	defer v.mu.Unlock()
	return len(v.dials)
}

func socketpair() (near, far net.Conn) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		panic(err)
	}
	var conns [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "")
		if conns[i], err = net.FileConn(f); err != nil {
			panic(err)
		}
		f.Close()
	}
	return conns[0], conns[1]
}

type pipeConn struct{ net.Conn }

func (c pipeConn) CloseWrite() error { return c.Close() }
func (c pipeConn) Abort()            { c.Close() }

// fakePackets is an association whose other end answers at once.
type fakePackets struct {
	packet func(flow.Addr, []byte) [][]byte
	in     chan flow.Datagram
	closed chan struct{}
	once   sync.Once

	mu       sync.Mutex
	deadline time.Time
	moved    chan struct{} // closed when the deadline changes
}

func newFakePackets(packet func(flow.Addr, []byte) [][]byte) *fakePackets {
	return &fakePackets{packet: packet, in: make(chan flow.Datagram, 64), closed: make(chan struct{}), moved: make(chan struct{})}
}

func (p *fakePackets) ReadBatch(ds []flow.Datagram) (int, error) {
	for {
		p.mu.Lock()
		moved, timer := p.moved, time.NewTimer(time.Until(p.deadline))
		p.mu.Unlock()
		select {
		case d := <-p.in:
			timer.Stop()
			ds[0].Addr, ds[0].Buf = d.Addr, ds[0].Buf[:copy(ds[0].Buf, d.Buf)]
			return 1, nil
		case <-moved:
			timer.Stop()
		case <-timer.C:
			return 0, os.ErrDeadlineExceeded
		case <-p.closed:
			timer.Stop()
			return 0, net.ErrClosed
		}
	}
}

func (p *fakePackets) WriteBatch(ds []flow.Datagram) (int, error) {
	for i, d := range ds {
		select {
		case <-p.closed:
			return i, net.ErrClosed
		default:
		}
		for _, reply := range p.packet(d.Addr, d.Buf) {
			p.in <- flow.Datagram{Addr: d.Addr, Buf: reply}
		}
	}
	return len(ds), nil
}

func (p *fakePackets) SetReadDeadline(t time.Time) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.deadline = t
	close(p.moved)
	p.moved = make(chan struct{})
	return nil
}

func (p *fakePackets) Close() error {
	p.once.Do(func() { close(p.closed) })
	return nil
}

// handler is a name server: it answers one query, nil is silence.
type handler func(q *dns.Msg) *dns.Msg

// zone answers from records in presentation format. A name without records does not exist; a TTL 300 SOA says so.
func zone(records ...string) handler {
	var rrs []dns.RR
	for _, s := range records {
		rr, err := dns.NewRR(s)
		if err != nil || rr == nil {
			panic("bad record " + s)
		}
		rrs = append(rrs, rr)
	}
	return func(q *dns.Msg) *dns.Msg {
		m := new(dns.Msg).SetReply(q)
		m.RecursionAvailable = true
		name, exists := q.Question[0].Name, false
		for range 8 {
			next := ""
			for _, rr := range rrs {
				if !strings.EqualFold(rr.Header().Name, name) {
					continue
				}
				exists = true
				if c, ok := rr.(*dns.CNAME); ok {
					next = c.Target
				}
				if t := rr.Header().Rrtype; t == q.Question[0].Qtype || t == dns.TypeCNAME {
					m.Answer = append(m.Answer, dns.Copy(rr))
				}
			}
			if next == "" {
				break
			}
			name = next
		}
		if !exists {
			m.Rcode = dns.RcodeNameError
		}
		if len(m.Answer) == 0 {
			m.Ns = []dns.RR{&dns.SOA{
				Hdr: dns.RR_Header{Name: ".", Rrtype: dns.TypeSOA, Class: dns.ClassINET, Ttl: 300},
				Ns:  "a.", Mbox: "b.", Minttl: 300,
			}}
		}
		return m
	}
}

// streamed serves a handler over connections, in order.
func streamed(h handler) func(flow.Addr, net.Conn) {
	return func(_ flow.Addr, c net.Conn) {
		for r := bufio.NewReader(c); ; {
			wire, err := readMessage(r)
			if err != nil {
				return
			}
			if reply := answered(h, wire); reply != nil {
				if _, err := c.Write(framed(reply)); err != nil {
					return
				}
			}
		}
	}
}

// packeted serves a handler over datagrams.
func packeted(h handler) func(flow.Addr, []byte) [][]byte {
	return func(_ flow.Addr, wire []byte) [][]byte {
		if reply := answered(h, wire); reply != nil {
			return [][]byte{reply}
		}
		return nil
	}
}

func answered(h handler, wire []byte) []byte {
	q := new(dns.Msg)
	if err := q.Unpack(wire); err != nil {
		panic("the server was sent garbage: " + err.Error())
	}
	m := h(q)
	if m == nil {
		return nil
	}
	b, err := m.Pack()
	if err != nil {
		panic(err)
	}
	return b
}

// start builds and starts a Server; at the end of the test it is closed and must have left nothing running.
func start(tb testing.TB, cfg Config) *Server {
	tb.Helper()
	cfg.Context = "test"
	if cfg.Log == nil {
		cfg.Log = zaptest.NewLogger(tb)
	}
	s, err := New(cfg)
	if err != nil {
		tb.Fatal(err)
	}
	if err := s.Start(); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := s.Close(); err != nil {
			tb.Error(err)
		}
	})
	return s
}

func query(name, qtype string) *dns.Msg {
	m := new(dns.Msg).SetQuestion(dns.Fqdn(name), dns.StringToType[qtype])
	return m
}

// exchange asks over the network given and returns the parsed reply.
func exchange(tb testing.TB, s *Server, n flow.Network, q *dns.Msg) *dns.Msg {
	tb.Helper()
	wire, err := q.Pack()
	if err != nil {
		tb.Fatal(err)
	}
	reply, err := s.Exchange(tb.Context(), &flow.Flow{Network: n, Src: netip.MustParseAddrPort("192.0.2.1:4000")}, wire)
	if err != nil {
		tb.Fatalf("exchange: %v", err)
	}
	m := new(dns.Msg)
	if err := m.Unpack(reply); err != nil {
		tb.Fatalf("reply: %v", err)
	}
	if m.Id != q.Id || !m.Response {
		tb.Fatalf("reply has id %d and QR %v, want %d, true", m.Id, m.Response, q.Id)
	}
	return m
}

// ask returns the reply to one query in short: rcode, then the answer's records.
func ask(tb testing.TB, s *Server, name, qtype string) string {
	tb.Helper()
	return short(exchange(tb, s, flow.UDP, query(name, qtype)))
}

func short(m *dns.Msg) string {
	parts := []string{rcodeName(uint16(m.Rcode))}
	for _, rr := range m.Answer {
		parts = append(parts, strings.Join(strings.Fields(rr.String()), " "))
	}
	return strings.Join(parts, "; ")
}

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }
