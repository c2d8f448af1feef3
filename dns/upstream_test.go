// SPDX-License-Identifier: GPL-3.0-or-later

package dns

import (
	"bufio"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"

	"github.com/mutex-proxy/mutex/flow"
)

const helloTXT = `NOERROR; text.example. 300 IN TXT "hello"`

func askTXT(t *testing.T, s *Server) string { t.Helper(); return ask(t, s, "text.example", "TXT") }

func TestParseServer(t *testing.T) {
	t.Parallel()
	for raw, want := range map[string]string{
		"udp://192.0.2.53":                  "udp://192.0.2.53:53",
		"192.0.2.53":                        "udp://192.0.2.53:53",
		"192.0.2.53:5353":                   "udp://192.0.2.53:5353",
		"2001:db8::53":                      "udp://[2001:db8::53]:53",
		"tcp://[2001:db8::53]:5353":         "tcp://[2001:db8::53]:5353",
		"tls://DNS.Example.":                "tls://dns.example:853",
		"https://dns.example":               "https://dns.example:443",
		"https://dns.example/dns-query?x=1": "https://dns.example:443",
		"https://[::ffff:192.0.2.53]:8443/": "https://192.0.2.53:8443",
	} {
		got, err := parseServer(raw)
		if err != nil || got.String() != want {
			t.Errorf("%s: %s, %v; want %s", raw, got, err, want)
		}
	}
	if got, _ := parseServer("https://dns.example"); got.path != "/dns-query" {
		t.Error(got.path)
	}
	if got, _ := parseServer("https://dns.example/customer/42?a=b"); got.path != "/customer/42?a=b" {
		t.Error(got.path)
	}
}

func TestUDP(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := &fakeVia{packet: packeted(testZone())}
		s := start(t, Config{Servers: []string{"192.0.2.53"}, Via: v})
		for range 3 {
			if got := askTXT(t, s); got != helloTXT {
				t.Error(got)
			}
			s.Flush()
		}
		if v.listens != 1 || v.dialed() != 0 {
			t.Errorf("%d associations, %d connections", v.listens, v.dialed())
		}
		<-time.After(udpIdle)
		if got := askTXT(t, s); got != helloTXT || v.listens != 2 {
			t.Errorf("%s, %d associations", got, v.listens)
		}
	})
}

// Datagrams that do not answer the question are as if they had not come: anyone may have sent them.
func TestUDPForgery(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := testZone()
		forge := zone("text.example. 300 IN TXT forged", "other.example. 300 IN TXT forged")
		v := &fakeVia{packet: func(_ flow.Addr, wire []byte) [][]byte {
			q := new(dns.Msg)
			if err := q.Unpack(wire); err != nil {
				t.Error(err)
			}
			made := func(change func(*dns.Msg)) []byte {
				m := forge(q)
				change(m)
				b, err := m.Pack()
				if err != nil {
					t.Error(err)
				}
				return b
			}
			return [][]byte{
				nil,
				{1, 2, 3},
				wire, wire[:12],
				made(func(m *dns.Msg) { m.Id++ }),
				made(func(m *dns.Msg) { m.Response = false }),
				made(func(m *dns.Msg) { m.Question[0].Name = "other.example." }),
				made(func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeA }),
				made(func(m *dns.Msg) { m.Question[0].Qclass = dns.ClassCHAOS }),
				made(func(m *dns.Msg) { m.Opcode = dns.OpcodeNotify }),
				made(func(m *dns.Msg) { m.Question = nil }),
				slices.Concat(wire[:2], []byte{0x80, 0, 0, 1, 0, 9}, wire[8:]),
				answered(h, wire),
			}
		}}
		s := start(t, Config{Servers: []string{"udp://192.0.2.53"}, Via: v})
		if got := askTXT(t, s); got != helloTXT {
			t.Error(got)
		}
	})
}

func TestUDPFromElsewhere(t *testing.T) {
	a := &association{d: &datagrams{addr: flow.Addr{IP: addr("192.0.2.53"), Port: 53}}}
	b := &association{d: &datagrams{addr: flow.Addr{Host: "dns.example", Port: 53}}}
	for _, tt := range []struct {
		a    *association
		from flow.Addr
		want bool
	}{
		{a, flow.Addr{IP: addr("192.0.2.53"), Port: 53}, true},
		{a, flow.Addr{IP: addr("::ffff:192.0.2.53"), Port: 53}, true},
		{a, flow.Addr{IP: addr("192.0.2.54"), Port: 53}, false},
		{a, flow.Addr{IP: addr("192.0.2.53"), Port: 54}, false},
		{b, flow.Addr{Host: "dns.example", Port: 53}, true},
		{b, flow.Addr{Host: "evil.example", Port: 53}, false},
		{b, flow.Addr{IP: addr("192.0.2.53"), Port: 53}, true}, // the first is it
		{b, flow.Addr{IP: addr("192.0.2.54"), Port: 53}, false},
		{b, flow.Addr{IP: addr("192.0.2.53"), Port: 53}, true},
	} {
		if got := tt.a.isServer(tt.from); got != tt.want {
			t.Errorf("%s for %s: %v", tt.from, tt.a.d.addr, got)
		}
	}
}

// No UDP through the upstream, a cut reply, silence: the same server is asked by TCP.
func TestUDPFallsBackToTCP(t *testing.T) {
	h := testZone()
	cut := func(q *dns.Msg) *dns.Msg { m := h(q); m.Truncated = true; return m }
	for name, tt := range map[string]struct {
		via     *fakeVia
		took    time.Duration
		listens int // after a second question
	}{
		"no udp": {&fakeVia{noUDP: true}, 0, 1},
		"cut":    {&fakeVia{packet: packeted(cut)}, 0, 1},
		"cut anywhere": {&fakeVia{packet: func(_ flow.Addr, wire []byte) [][]byte {
			b := answered(cut, wire)
			return [][]byte{b[:len(b)-7]}
		}}, 0, 1},
		"silence": {&fakeVia{packet: func(flow.Addr, []byte) [][]byte { return nil }}, tcpAfter, 1},
		"garbage": {&fakeVia{packet: func(flow.Addr, []byte) [][]byte { return [][]byte{make([]byte, 4000)} }}, tcpAfter, 1},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				tt.via.serve = streamed(h)
				s := start(t, Config{Servers: []string{"udp://192.0.2.53"}, Via: tt.via})
				begin := time.Now()
				if got := askTXT(t, s); got != helloTXT || time.Since(begin) != tt.took {
					t.Errorf("%s after %s", got, time.Since(begin))
				}
				s.Flush()
				begin = time.Now()
				if got := askTXT(t, s); got != helloTXT || time.Since(begin) != 0 || tt.via.listens != tt.listens {
					t.Errorf("again: %s after %s, %d associations", got, time.Since(begin), tt.via.listens)
				}
				for _, to := range tt.via.dials {
					if to.String() != "192.0.2.53:53" {
						t.Error("asked", to)
					}
				}
			})
		})
	}
}

func TestUDPLoss(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var n atomic.Int64
		h := testZone()
		v := &fakeVia{packet: packeted(func(q *dns.Msg) *dns.Msg {
			if n.Add(1) == 1 {
				return nil
			}
			return h(q)
		})}
		s := start(t, Config{Servers: []string{"udp://192.0.2.53"}, Via: v})
		begin := time.Now()
		if got := askTXT(t, s); got != helloTXT || time.Since(begin) != resendAfter || v.dialed() != 0 {
			t.Errorf("%s after %s", got, time.Since(begin))
		}
	})
}

// Many questions share one connection; answers come in any order.
func TestPipelining(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := testZone()
		v := &fakeVia{serve: func(_ flow.Addr, c net.Conn) {
			r := bufio.NewReader(c)
			var replies [][]byte
			for range 20 {
				wire, err := readMessage(r)
				if err != nil {
					return
				}
				replies = append(replies, answered(h, wire))
			}
			slices.Reverse(replies)
			for _, b := range replies {
				if _, err := c.Write(framed(b)); err != nil {
					t.Error(err)
				}
			}
			_, _ = io.Copy(io.Discard, c)
		}}
		s := start(t, Config{Mode: ModeReal, Servers: []string{"tcp://192.0.2.53"}, Via: v})
		var wg sync.WaitGroup
		for i := range 20 {
			wg.Go(func() {
				name := strings.Repeat("x", i+1) + ".text.example"
				if got := ask(t, s, name, "TXT"); got != "NXDOMAIN" {
					t.Error(name, got)
				}
			})
		}
		wg.Wait()
		if v.dialed() != 1 {
			t.Errorf("%d connections", v.dialed())
		}
		<-time.After(idleTimeout) // the idle connection is closed
		v.wg.Wait()
	})
}

// A server that closes after each answer is asked again on other connections, and soon on one for each question.
func TestServerClosesAfterAnswer(t *testing.T) {
	h := testZone()
	v := &fakeVia{serve: func(_ flow.Addr, c net.Conn) {
		wire, err := readMessage(bufio.NewReader(c))
		if err != nil {
			return
		}
		_, _ = c.Write(framed(answered(h, wire)))
	}}
	s := start(t, Config{Mode: ModeReal, Servers: []string{"tcp://192.0.2.53"}, Via: v})
	for range 5 {
		var wg sync.WaitGroup
		for i := range 20 {
			wg.Go(func() {
				name := strings.Repeat("x", i+1) + ".text.example"
				if got := ask(t, s, name, "TXT"); got != "NXDOMAIN" {
					t.Error(name, got)
				}
			})
		}
		wg.Wait()
		s.Flush()
	}
}

// What a server can do wrong ends in SERVFAIL, in time, and in nothing else.
func TestHostileServers(t *testing.T) {
	h := testZone()
	for name, serve := range map[string]func(flow.Addr, net.Conn){
		"closes":        func(flow.Addr, net.Conn) {},
		"silence":       func(_ flow.Addr, c net.Conn) { _, _ = io.Copy(io.Discard, c) },
		"does not read": func(_ flow.Addr, c net.Conn) { _, _ = c.Read(make([]byte, 1)); _, _ = io.Copy(io.Discard, c) },
		"garbage": func(_ flow.Addr, c net.Conn) {
			go func() { _, _ = io.Copy(io.Discard, c) }()
			for {
				if _, err := c.Write([]byte("HTTP/1.1 400 Bad Request\r\n\r\n")); err != nil {
					return
				}
			}
		},
		"half a message": func(_ flow.Addr, c net.Conn) { _, _ = c.Write([]byte{0xff, 0xff, 1}); _, _ = io.Copy(io.Discard, c) },
		"empty messages": func(_ flow.Addr, c net.Conn) {
			go func() { _, _ = io.Copy(io.Discard, c) }()
			for range 10000 {
				if _, err := c.Write([]byte{0, 0}); err != nil {
					return
				}
			}
		},
		"another question": streamed(func(q *dns.Msg) *dns.Msg { m := h(q); m.Question[0].Name = "other.example."; return m }),
		"truncated":        streamed(func(q *dns.Msg) *dns.Msg { m := h(q); m.Truncated = true; return m }),
		"refused":          streamed(func(q *dns.Msg) *dns.Msg { return new(dns.Msg).SetRcode(q, dns.RcodeRefused) }),
		"the query itself": func(_ flow.Addr, c net.Conn) { _, _ = io.Copy(c, c) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				v := &fakeVia{serve: serve}
				s := start(t, Config{Servers: []string{"tcp://192.0.2.53"}, Via: v})
				begin := time.Now()
				if got := askTXT(t, s); got != "SERVFAIL" || time.Since(begin) > callTimeout {
					t.Errorf("%s after %s", got, time.Since(begin))
				}
				if err := s.Close(); err != nil {
					t.Error(err)
				}
				v.wg.Wait()
			})
		})
	}
}

// A reply that comes a byte at a time is a reply.
func TestSlowBytes(t *testing.T) {
	h := testZone()
	v := &fakeVia{serve: func(_ flow.Addr, c net.Conn) {
		wire, err := readMessage(bufio.NewReader(c))
		if err != nil {
			return
		}
		for _, b := range framed(answered(h, wire)) {
			if _, err := c.Write([]byte{b}); err != nil {
				return
			}
		}
	}}
	s := start(t, Config{Servers: []string{"tcp://192.0.2.53"}, Via: v})
	if got := askTXT(t, s); got != helloTXT {
		t.Error(got)
	}
}

// A connection that died without a word costs one question, not every one.
func TestDeadConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var dead atomic.Bool
		h := testZone()
		v := &fakeVia{}
		v.serve = func(to flow.Addr, c net.Conn) {
			mine := v.dialed()
			streamed(func(q *dns.Msg) *dns.Msg {
				if dead.Load() && mine == 1 {
					return nil
				}
				return h(q)
			})(to, c)
		}
		s := start(t, Config{Servers: []string{"tcp://192.0.2.53"}, Via: v})
		askTXT(t, s)
		dead.Store(true)
		s.Flush()
		if got := askTXT(t, s); got != "SERVFAIL" {
			t.Error(got)
		}
		if got := askTXT(t, s); got != helloTXT {
			t.Error(got)
		}
	})
}

// The next server is asked when one fails, or is slow; the first good answer wins.
func TestNextServer(t *testing.T) {
	for name, tt := range map[string]struct {
		first handler
		took  time.Duration
	}{
		"fails":    {func(q *dns.Msg) *dns.Msg { return new(dns.Msg).SetRcode(q, dns.RcodeServerFailure) }, 0},
		"is slow":  {func(*dns.Msg) *dns.Msg { return nil }, stagger},
		"says no":  {zone("other.example. 1 IN A 192.0.2.1"), -1},
		"is wrong": {func(q *dns.Msg) *dns.Msg { m := zone("x. 1 IN A 192.0.2.1")(q); m.Question[0].Qtype++; return m }, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				second := testZone()
				v := &fakeVia{serve: func(to flow.Addr, c net.Conn) {
					h := tt.first
					if to.IP == addr("192.0.2.54") {
						h = second
					}
					streamed(h)(to, c)
				}}
				s := start(t, Config{Servers: []string{"tcp://192.0.2.53", "tcp://192.0.2.54"}, Via: v})
				begin := time.Now()
				want := helloTXT
				if tt.took < 0 { // a name that does not exist is an answer
					want, tt.took = "NXDOMAIN", 0
				}
				if got := askTXT(t, s); got != want || time.Since(begin) != tt.took {
					t.Errorf("%s after %s", got, time.Since(begin))
				}
			})
		})
	}
}

// Nothing in a reply is believed that does not belong to the question.
func TestBailiwick(t *testing.T) {
	t.Parallel()
	m := query("a.example", "A")
	m.Response = true
	for _, s := range []string{
		"a.example. 60 IN CNAME b.example.", "b.example. 60 IN CNAME c.other.", "c.other. 60 IN A 192.0.2.1", // the chain
		"bank.example. 60 IN A 192.0.2.66", "a.example. 60 IN TXT x", "a.example. 60 CH A 192.0.2.66",
	} {
		rr, err := dns.NewRR(s)
		if err != nil {
			t.Fatal(err)
		}
		m.Answer = append(m.Answer, rr)
	}
	slices.Reverse(m.Answer)
	for _, s := range []string{"other. 60 IN NS ns.other.", "bank.example. 60 IN NS ns.evil."} {
		rr, _ := dns.NewRR(s)
		m.Ns = append(m.Ns, rr)
	}
	rr, _ := dns.NewRR("ns.other. 60 IN A 192.0.2.66")
	m.Extra = []dns.RR{rr}
	wire, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	got, err := parseReply(question{name: "a.example.", qtype: dns.TypeA}, m.Id, wire)
	if err != nil || len(got.Answer) != 3 || len(got.Ns) != 1 || len(got.Extra) != 0 {
		t.Errorf("%v\n%s", err, got)
	}
}
