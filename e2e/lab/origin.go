// SPDX-License-Identifier: GPL-3.0-or-later

package lab

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// The services of the origin, on all of its addresses.
const (
	PortEcho     = 7    // TCP and UDP: sends back what it gets, and its end
	PortHTTP     = 80   // GET /bytes/N; PUT /sum answers with SHA-256 in hex
	PortBanner   = 2222 // speaks first, as ssh and SMTP do
	PortSum      = 9000 // see Exchange
	PortCount    = 9001 // reads to the end, then answers with the number of bytes and closes
	PortReset    = 9002 // answers the first byte with a reset
	PortEarlyEnd = 9003 // says "bye", ends its direction, then counts what it still gets: see Origin.AfterEnd
	PortStuck    = 9004 // accepts and never reads
	PortShout    = 9005 // UDP: answers a 4-byte number with that many bytes
	PortOther    = 9006 // UDP: answers from PortOtherReply
	PortHold     = 9008 // TCP: accepts, sends a line for each line
	PortClosed   = 9099 // nobody listens

	PortOtherReply = 9007
)

// Banner is what PortBanner says first.
const Banner = "SSH-2.0-origin of the lab\r\n"

// block is what the test data repeats. Its length is prime, so that a shift by any buffer size changes the checksum.
var block = makeBlock(1_048_573)

func makeBlock(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(b)
	return b
}

// Origin is the server that clients want to reach. It notes who came.
type Origin struct {
	mu       sync.Mutex
	seen     []Visit
	conns    map[net.Conn]struct{}
	afterEnd map[netip.AddrPort]int64
	closed   bool
	done     chan struct{} // closed with the lab
	wg       sync.WaitGroup
	closers  []io.Closer
}

// Visit is one connection, or the first datagram of a socket.
type Visit struct {
	Network string
	From    netip.AddrPort
	Port    uint16
}

func newOrigin(t *testing.T, n *NS) *Origin {
	t.Helper()
	o := &Origin{conns: map[net.Conn]struct{}{}, afterEnd: map[netip.AddrPort]int64{}, done: make(chan struct{})}
	t.Cleanup(o.close)
	for port, serve := range map[int]func(net.Conn){
		PortEcho: o.echo, 443: o.echo, PortBanner: o.banner, PortSum: o.sum, PortCount: o.count, PortReset: o.reset,
		PortEarlyEnd: o.earlyEnd, PortStuck: o.stuck, PortHold: o.hold,
	} {
		l, err := n.Listen("tcp", fmt.Sprintf(":%d", port))
		if err != nil {
			t.Fatalf("origin: %v", err)
		}
		o.serveTCP(l, serve)
	}
	l, err := n.Listen("tcp", fmt.Sprintf(":%d", PortHTTP))
	if err != nil {
		t.Fatalf("origin: %v", err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(o.http), ReadHeaderTimeout: 30 * time.Second, ConnState: func(c net.Conn, s http.ConnState) {
		if s == http.StateNew {
			o.note("tcp", c.RemoteAddr(), PortHTTP)
		}
	}}
	o.closers = append(o.closers, srv)
	o.wg.Go(func() { _ = srv.Serve(l) })
	// One socket an address: a reply must leave from the address that was asked.
	for _, a := range []netip.Addr{OriginV4, OriginV6} {
		o.serveUDP(t, n, a)
	}
	return o
}

func (o *Origin) close() {
	o.mu.Lock()
	o.closed = true
	close(o.done)
	for c := range o.conns {
		c.Close()
	}
	cl := o.closers
	o.mu.Unlock()
	for _, c := range cl {
		c.Close()
	}
	o.wg.Wait()
}

// DropConns closes every open connection to the origin.
func (o *Origin) DropConns() {
	o.mu.Lock()
	defer o.mu.Unlock()
	for c := range o.conns {
		c.Close()
	}
}

func (o *Origin) serveTCP(l net.Listener, serve func(net.Conn)) {
	o.closers = append(o.closers, l)
	port := netip.MustParseAddrPort(l.Addr().String()).Port()
	o.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			o.note("tcp", c.RemoteAddr(), port)
			o.mu.Lock()
			if o.closed {
				o.mu.Unlock()
				c.Close()
				return
			}
			o.conns[c] = struct{}{}
			o.wg.Go(func() {
				serve(c)
				c.Close()
				o.mu.Lock()
				delete(o.conns, c)
				o.mu.Unlock()
			})
			o.mu.Unlock()
		}
	})
}

func (o *Origin) note(network string, from net.Addr, port uint16) {
	ap, err := netip.ParseAddrPort(from.String())
	if err != nil {
		return
	}
	ap = netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.seen) < 1<<16 {
		o.seen = append(o.seen, Visit{network, ap, port})
	}
}

// Visits returns who came to a port, and forgets nothing.
func (o *Origin) Visits(network string, port uint16) []Visit {
	o.mu.Lock()
	defer o.mu.Unlock()
	var out []Visit
	for _, v := range o.seen {
		if v.Network == network && v.Port == port {
			out = append(out, v)
		}
	}
	return out
}

// Forget empties the list of visits.
func (o *Origin) Forget() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.seen = nil
}

// AllFrom reports whether every visit since Forget came from one of the given addresses, and returns those that did not.
func (o *Origin) AllFrom(addrs ...netip.Addr) []Visit {
	o.mu.Lock()
	defer o.mu.Unlock()
	var bad []Visit
next:
	for _, v := range o.seen {
		for _, a := range addrs {
			if v.From.Addr() == a {
				continue next
			}
		}
		bad = append(bad, v)
	}
	return bad
}

// AfterEnd returns how many bytes the peers of PortEarlyEnd sent after the origin had ended its direction, once they ended theirs.
func (o *Origin) AfterEnd() []int64 {
	o.mu.Lock()
	defer o.mu.Unlock()
	var out []int64
	for _, n := range o.afterEnd {
		out = append(out, n)
	}
	return out
}

// echo copies by a small buffer: net's own way, splice, holds two descriptors more for each connection, however idle, and there may be 10,000.
func (o *Origin) echo(c net.Conn) {
	_, _ = io.CopyBuffer(struct{ io.Writer }{c}, struct{ io.Reader }{c}, make([]byte, 4<<10))
}

func (o *Origin) banner(c net.Conn) {
	_, _ = io.WriteString(c, Banner)
	line, _ := bufio.NewReader(c).ReadString('\n')
	_, _ = io.WriteString(c, "you said "+line)
}

func (o *Origin) count(c net.Conn) {
	n, _ := io.Copy(io.Discard, c)
	fmt.Fprintf(c, "%d\n", n)
}

func (o *Origin) reset(c net.Conn) {
	_, _ = io.ReadFull(c, make([]byte, 1))
	_ = c.(*net.TCPConn).SetLinger(0)
}

func (o *Origin) earlyEnd(c net.Conn) {
	_, _ = io.WriteString(c, "bye\n")
	_ = c.(*net.TCPConn).CloseWrite()
	n, err := io.Copy(io.Discard, c)
	if err != nil {
		n = -1
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.afterEnd[netip.MustParseAddrPort(c.RemoteAddr().String())] = n
}

func (o *Origin) stuck(net.Conn) { <-o.done }

func (o *Origin) hold(c net.Conn) {
	s := bufio.NewScanner(c)
	for s.Scan() {
		if _, err := fmt.Fprintf(c, "%s\n", s.Text()); err != nil {
			return
		}
	}
}

// sum is the server's half of Exchange: both directions at once, then the checksum of what came.
func (o *Origin) sum(c net.Conn) {
	var head [8]byte
	if _, err := io.ReadFull(c, head[:]); err != nil {
		return
	}
	_, _, _ = exchange(c, int64(binary.BigEndian.Uint64(head[:])))
}

// Exchange sends n bytes to PortSum and receives n at the same time, each followed by the SHA-256 of what the other side should have got,
// and compares.
func Exchange(c net.Conn, n int64) error {
	var head [8]byte
	binary.BigEndian.PutUint64(head[:], uint64(n))
	if _, err := c.Write(head[:]); err != nil {
		return err
	}
	got, peer, err := exchange(c, n)
	if err != nil {
		return err
	}
	want := checksum(n)
	if got != want {
		return fmt.Errorf("%d bytes down: checksum differs", n)
	}
	if peer != want {
		return fmt.Errorf("%d bytes up: checksum differs", n)
	}
	return nil
}

// exchange writes n bytes of test data and reads n, then tells the other side what it got; it returns what it got and what the peer did.
func exchange(c net.Conn, n int64) (got, peer [32]byte, err error) {
	sent := make(chan error, 1)
	go func() {
		_, err := io.Copy(c, DataReader(n))
		sent <- err
	}()
	h := sha256.New()
	m, err := io.CopyN(h, c, n)
	if serr := <-sent; err != nil || serr != nil {
		return got, peer, errors.Join(fmt.Errorf("after %d of %d bytes", m, n), err, serr)
	}
	h.Sum(got[:0])
	if _, err = c.Write(got[:]); err != nil {
		return got, peer, err
	}
	// Nothing ends before all has arrived: not every server carries half-close.
	if _, err = io.ReadFull(c, peer[:]); err != nil {
		return got, peer, err
	}
	if cw, ok := c.(interface{ CloseWrite() error }); ok {
		_ = cw.CloseWrite()
	}
	if k, err := c.Read(make([]byte, 1)); k != 0 || err == nil {
		return got, peer, fmt.Errorf("after the last byte: %d bytes, %w", k, err)
	}
	return got, peer, nil
}

var (
	sumsMu sync.Mutex
	sums   = map[int64][32]byte{}
)

// checksum is the SHA-256 of n bytes of test data.
func checksum(n int64) [32]byte {
	sumsMu.Lock()
	defer sumsMu.Unlock()
	if s, ok := sums[n]; ok {
		return s
	}
	h := sha256.New()
	_, _ = io.Copy(h, DataReader(n))
	s := [32]byte(h.Sum(nil))
	sums[n] = s
	return s
}

// Checksum is the SHA-256 of n bytes of test data in hex: what `curl /bytes/N | sha256sum` must print.
func Checksum(n int64) string {
	s := checksum(n)
	return hex.EncodeToString(s[:])
}

// DataReader returns n bytes of test data.
func DataReader(n int64) io.Reader {
	k := n/int64(len(block)) + 1
	parts := make([]io.Reader, 0, k)
	for range k {
		parts = append(parts, bytes.NewReader(block))
	}
	return io.LimitReader(io.MultiReader(parts...), n)
}

func (o *Origin) http(w http.ResponseWriter, r *http.Request) {
	switch {
	case strings.HasPrefix(r.URL.Path, "/bytes/"):
		n, err := strconv.ParseInt(strings.TrimPrefix(r.URL.Path, "/bytes/"), 10, 64)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		w.Header().Set("Content-Length", strconv.FormatInt(n, 10))
		_, _ = io.Copy(w, DataReader(n))
	case r.URL.Path == "/sum":
		h := sha256.New()
		_, _ = io.Copy(h, r.Body)
		fmt.Fprintf(w, "%x\n", h.Sum(nil))
	default:
		fmt.Fprintf(w, "hello %s, this is %s\n", r.RemoteAddr, r.Host)
	}
}

func (o *Origin) serveUDP(t *testing.T, n *NS, a netip.Addr) {
	t.Helper()
	listen := func(port uint16) *net.UDPConn {
		c, err := n.ListenUDP("udp", netip.AddrPortFrom(a, port).String())
		if err != nil {
			t.Fatalf("origin: %v", err)
		}
		_ = c.SetReadBuffer(4 << 20)
		o.closers = append(o.closers, c)
		return c
	}
	other := listen(PortOtherReply)
	for port, answer := range map[uint16]func(c *net.UDPConn, b []byte, from netip.AddrPort){
		PortEcho:  func(c *net.UDPConn, b []byte, from netip.AddrPort) { _, _ = c.WriteToUDPAddrPort(b, from) },
		PortOther: func(_ *net.UDPConn, b []byte, from netip.AddrPort) { _, _ = other.WriteToUDPAddrPort(b, from) },
		PortShout: func(c *net.UDPConn, b []byte, from netip.AddrPort) {
			if len(b) == 4 {
				_, _ = c.WriteToUDPAddrPort(block[:min(binary.BigEndian.Uint32(b), 65507)], from)
			}
		},
	} {
		c := listen(port)
		o.wg.Go(func() {
			buf := make([]byte, 65536)
			for {
				n, from, err := c.ReadFromUDPAddrPort(buf)
				if errors.Is(err, net.ErrClosed) {
					return
				}
				if err != nil {
					continue // an ICMP error of an earlier answer
				}
				o.note("udp", net.UDPAddrFromAddrPort(from), port)
				answer(c, buf[:n], from)
			}
		})
	}
}

// Block returns the first n bytes of the test data, at most 1 MiB.
func Block(n int) []byte { return block[:n] }
