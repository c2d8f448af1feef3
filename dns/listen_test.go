// SPDX-License-Identifier: GPL-3.0-or-later

package dns

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/mutex-proxy/mutex/flow"
)

// listening starts both listeners on loopback and returns their addresses.
func listening(t *testing.T, s *Server) (udp, tcp string) {
	t.Helper()
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := s.ServePacket(pc); err != nil {
			t.Error(err)
		}
	})
	wg.Go(func() {
		if err := s.ServeStream(l); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() { // before the Server's own: Close is idempotent
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		wg.Wait()
	})
	return pc.LocalAddr().String(), l.Addr().String()
}

func connect(t *testing.T, network, to string) net.Conn {
	t.Helper()
	c, err := net.Dial(network, to)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return c
}

func packed(t *testing.T, name, qtype string) []byte {
	t.Helper()
	b, err := query(name, qtype).Pack()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestServePacket(t *testing.T) {
	s := start(t, Config{})
	udp, _ := listening(t, s)
	c := connect(t, "udp", udp)
	buf := make([]byte, 512)
	for i := range 20 {
		name := fmt.Sprintf("h%d.example.", i)
		for _, b := range [][]byte{{}, []byte("\xff\xff\xff garbage that is longer than a header"), packed(t, name, "A")} {
			if _, err := c.Write(b); err != nil {
				t.Fatal(err)
			}
		}
		n, err := c.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		m := new(dns.Msg)
		if err := m.Unpack(buf[:n]); err != nil || len(m.Answer) != 1 || m.Question[0].Name != name {
			t.Fatalf("%v: %s", err, m)
		}
	}
	if es := s.Log(); es[0].Client.String() != c.LocalAddr().String() {
		t.Errorf("logged client %s", es[0].Client)
	}
}

func TestServeStream(t *testing.T) {
	s := start(t, Config{})
	_, tcp := listening(t, s)
	c := connect(t, "tcp", tcp)
	var all []byte
	want := map[string]bool{}
	for i := range 50 { // all at once, cut anywhere
		name := fmt.Sprintf("h%d.example.", i)
		want[name] = true
		all = append(all, framed(packed(t, name, "AAAA"))...)
	}
	for part := range slices.Chunk(all, 37) {
		if _, err := c.Write(part); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil { // done asking, not done listening
		t.Fatal(err)
	}
	r := bufio.NewReader(c)
	for len(want) > 0 {
		b, err := readMessage(r)
		if err != nil {
			t.Fatal(err)
		}
		m := new(dns.Msg)
		if err := m.Unpack(b); err != nil || len(m.Answer) != 1 || !want[m.Question[0].Name] {
			t.Fatalf("%v: %s", err, m)
		}
		delete(want, m.Question[0].Name)
	}
	if _, err := readMessage(r); !errors.Is(err, io.EOF) {
		t.Error(err)
	}
}

// A stream that is not DNS is closed.
func TestServeStreamGarbage(t *testing.T) {
	s := start(t, Config{})
	_, tcp := listening(t, s)
	for name, b := range map[string]string{"a response": "\x00\x0c" + strings.Repeat("\xff", 12), "empty": "\x00\x00"} {
		c := connect(t, "tcp", tcp)
		_, _ = c.Write([]byte(b))
		if n, err := io.Copy(io.Discard, c); n != 0 {
			t.Errorf("%s: %d bytes, %v", name, n, err)
		}
	}
}

// Close ends listeners, connections that are open and queries that wait for a server, and returns only then.
func TestCloseEndsEverything(t *testing.T) {
	asked := make(chan struct{}, 10)
	silent := &fakeVia{serve: func(_ flow.Addr, c net.Conn) {
		asked <- struct{}{}
		_, _ = io.Copy(io.Discard, c)
	}}
	s := start(t, Config{Mode: ModeReal, Servers: []string{"tcp://192.0.2.53"}, Via: silent})
	udp, tcp := listening(t, s)
	idle := connect(t, "tcp", tcp)
	busy := connect(t, "tcp", tcp)
	if _, err := busy.Write(framed(packed(t, "a.example", "A"))); err != nil {
		t.Fatal(err)
	}
	if _, err := connect(t, "udp", udp).Write(packed(t, "b.example", "A")); err != nil {
		t.Fatal(err)
	}
	<-asked
	begin := time.Now()
	if err := s.Close(); err != nil || time.Since(begin) > 5*time.Second {
		t.Errorf("%v after %s", err, time.Since(begin))
	}
	silent.wg.Wait()
	for _, c := range []net.Conn{idle, busy} {
		if _, err := io.Copy(io.Discard, c); err != nil && strings.Contains(err.Error(), "timeout") {
			t.Error("the connection is still open")
		}
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.ServePacket(pc); err != nil {
		t.Error(err)
	}
}
