// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/dns"

	"github.com/mutex-proxy/mutex/dialers/dialertest"
	"github.com/mutex-proxy/mutex/flow"
)

// nameServer answers over UDP and TCP on one port of loopback.
type nameServer struct {
	addr    netip.AddrPort
	queries atomic.Int32
	mu      sync.Mutex
	answer  func(q dns.Question, tcp bool) *dns.Msg // nil = silence
}

func startNameServer(t *testing.T, answer func(q dns.Question, tcp bool) *dns.Msg) *nameServer {
	t.Helper()
	ns := &nameServer{answer: answer}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ns.addr = l.Addr().(*net.TCPAddr).AddrPort()
	pc, err := net.ListenPacket("udp", ns.addr.String())
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []*dns.Server{
		{Listener: l, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, m *dns.Msg) { ns.reply(w, m, true) })},
		{PacketConn: pc, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, m *dns.Msg) { ns.reply(w, m, false) })},
	} {
		up := make(chan struct{})
		s.NotifyStartedFunc = func() { close(up) }
		done := make(chan struct{})
		go func() {
			defer close(done)
			_ = s.ActivateAndServe()
		}()
		<-up
		t.Cleanup(func() {
			_ = s.Shutdown()
			<-done
		})
	}
	return ns
}

func (ns *nameServer) reply(w dns.ResponseWriter, m *dns.Msg, tcp bool) {
	ns.queries.Add(1)
	ns.mu.Lock()
	r := ns.answer(m.Question[0], tcp)
	ns.mu.Unlock()
	if r == nil {
		return
	}
	rr := *r
	rr.SetReply(m)
	rr.Rcode, rr.Truncated, rr.Answer = r.Rcode, r.Truncated, r.Answer
	_ = w.WriteMsg(&rr)
}

func (ns *nameServer) set(answer func(q dns.Question, tcp bool) *dns.Msg) {
	ns.mu.Lock()
	defer ns.mu.Unlock()
	ns.answer = answer
}

// records answers with the addresses, by family.
func records(t *testing.T, ttl int, ips ...string) func(q dns.Question, tcp bool) *dns.Msg {
	t.Helper()
	return func(q dns.Question, _ bool) *dns.Msg {
		m := new(dns.Msg)
		for _, ip := range ips {
			typ := "A"
			if strings.Contains(ip, ":") {
				typ = "AAAA"
			}
			if dns.TypeToString[q.Qtype] != typ {
				continue
			}
			rr, err := dns.NewRR(fmt.Sprintf("%s %d IN %s %s", q.Name, ttl, typ, ip))
			if err != nil {
				t.Error(err)
				return nil
			}
			m.Answer = append(m.Answer, rr)
		}
		return m
	}
}

func noHosts(t *testing.T) string {
	t.Helper()
	return filepath.Join(t.TempDir(), "hosts")
}

func addrs(ss ...string) []netip.Addr {
	var out []netip.Addr
	for _, s := range ss {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

var cmpAddr = cmp.Comparer(func(a, b netip.Addr) bool { return a == b })

func TestLookupHost(t *testing.T) {
	now := time.Unix(1000, 0)
	ns := startNameServer(t, records(t, 60, "192.0.2.1", "2001:db8::1", "192.0.2.2"))
	n := NewNet(NetConfig{Nameservers: []netip.AddrPort{ns.addr}, HostsFile: noHosts(t), Now: func() time.Time { return now }})
	want := addrs("192.0.2.1", "192.0.2.2", "2001:db8::1")
	for i, name := range []string{"proxy.example", "Proxy.EXAMPLE."} {
		got, err := n.LookupHost(testContext(t), name)
		if err != nil || cmp.Diff(want, got, cmpAddr) != "" {
			t.Fatal(got, err)
		}
		if q := ns.queries.Load(); q != 2 {
			t.Errorf("look-up %d: %d queries, want 2", i, q)
		}
	}
	now = now.Add(61 * time.Second)
	if _, err := n.LookupHost(testContext(t), "proxy.example"); err != nil || ns.queries.Load() != 4 {
		t.Errorf("after the TTL: %d queries, %v", ns.queries.Load(), err)
	}
	for lit, want := range map[string]string{"192.0.2.9": "192.0.2.9", "::ffff:192.0.2.9": "192.0.2.9", "2001:db8::9": "2001:db8::9"} {
		if got, err := n.LookupHost(testContext(t), lit); err != nil || got[0].String() != want {
			t.Errorf("%s: %v, %v", lit, got, err)
		}
	}
	if got, err := n.LookupHost(testContext(t), "localhost"); err != nil || !got[0].IsLoopback() {
		t.Errorf("localhost: %v, %v", got, err)
	}
	for _, bad := range []string{"", strings.Repeat("a", 300), "a..b"} {
		if _, err := n.LookupHost(testContext(t), bad); !errors.Is(err, flow.ErrHostUnreachable) {
			t.Errorf("%.20q: %v", bad, err)
		}
	}
}

func TestLookupHostFailures(t *testing.T) {
	for name, tt := range map[string]struct {
		answer func(q dns.Question, tcp bool) *dns.Msg
		reason flow.Reason
	}{
		"no such name": {func(dns.Question, bool) *dns.Msg { return &dns.Msg{MsgHdr: dns.MsgHdr{Rcode: dns.RcodeNameError}} }, flow.ReasonHostUnreachable},
		"no address":   {func(dns.Question, bool) *dns.Msg { return new(dns.Msg) }, flow.ReasonHostUnreachable},
		"servfail":     {func(dns.Question, bool) *dns.Msg { return &dns.Msg{MsgHdr: dns.MsgHdr{Rcode: dns.RcodeServerFailure}} }, flow.ReasonHostUnreachable},
		"silence":      {func(dns.Question, bool) *dns.Msg { return nil }, flow.ReasonTimeout},
	} {
		t.Run(name, func(t *testing.T) {
			ns := startNameServer(t, tt.answer)
			n := NewNet(NetConfig{Nameservers: []netip.AddrPort{ns.addr}, HostsFile: noHosts(t)})
			ctx, cancel := context.WithTimeout(t.Context(), short)
			defer cancel()
			_, err := n.LookupHost(ctx, "proxy.example")
			wantError(t, err, tt.reason, false)
		})
	}
	_, err := NewNet(NetConfig{HostsFile: noHosts(t)}).LookupHost(testContext(t), "proxy.example")
	wantError(t, err, flow.ReasonHostUnreachable, false)
}

func TestLookupHostFallsBack(t *testing.T) {
	dead := dialertest.Start(t) // a port on which nothing answers UDP: ICMP says so at once
	broken := startNameServer(t, func(dns.Question, bool) *dns.Msg { return &dns.Msg{MsgHdr: dns.MsgHdr{Rcode: dns.RcodeRefused}} })
	long := records(t, 60, "192.0.2.1")
	good := startNameServer(t, func(q dns.Question, tcp bool) *dns.Msg {
		if tcp {
			return long(q, tcp)
		}
		return &dns.Msg{MsgHdr: dns.MsgHdr{Truncated: true}}
	})
	n := NewNet(NetConfig{Nameservers: []netip.AddrPort{dead.Addr, broken.addr, good.addr}, HostsFile: noHosts(t)})
	got, err := n.LookupHost(testContext(t), "proxy.example")
	if err != nil || cmp.Diff(addrs("192.0.2.1"), got, cmpAddr) != "" {
		t.Error(got, err)
	}
}

// Answers to other questions are forged, or late: they are passed over.
func TestLookupHostForged(t *testing.T) {
	pc, at := relaySocket(t)
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 2000)
		for range 2 {
			n, from, err := pc.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			q := new(dns.Msg)
			if q.Unpack(buf[:n]) != nil {
				return
			}
			send := func(change func(*dns.Msg), ip string) {
				r := new(dns.Msg)
				r.SetReply(q)
				if q.Question[0].Qtype == dns.TypeA {
					rr, _ := dns.NewRR(q.Question[0].Name + " 60 IN A " + ip)
					r.Answer = []dns.RR{rr}
				}
				change(r)
				out, _ := r.Pack()
				_, _ = pc.WriteToUDPAddrPort(out, from)
			}
			send(func(r *dns.Msg) { r.Id++ }, "192.0.2.66")
			send(func(r *dns.Msg) { r.Question[0].Name = "other.example." }, "192.0.2.66")
			send(func(r *dns.Msg) { r.Response = false }, "192.0.2.66")
			_, _ = pc.WriteToUDPAddrPort([]byte("\x00\x01garbage-garbage"), from)
			send(func(*dns.Msg) {}, "192.0.2.1")
		}
	}()
	n := NewNet(NetConfig{Nameservers: []netip.AddrPort{at}, HostsFile: noHosts(t)})
	got, err := n.LookupHost(testContext(t), "proxy.example")
	if err != nil || cmp.Diff(addrs("192.0.2.1"), got, cmpAddr) != "" {
		t.Error(got, err)
	}
	<-done
}

func TestHostsFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "hosts")
	if err := os.WriteFile(path, []byte("# x\n2001:db8::5 proxy.example\n192.0.2.5\tother Proxy.Example # y\nbad proxy.example\n10.0.0.1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	n := NewNet(NetConfig{HostsFile: path})
	got, err := n.LookupHost(testContext(t), "proxy.example")
	if err != nil || cmp.Diff(addrs("192.0.2.5", "2001:db8::5"), got, cmpAddr) != "" {
		t.Error(got, err)
	}
}

func TestLookupCacheIsBounded(t *testing.T) {
	var l lookups
	now := time.Unix(1000, 0)
	for i := range 3 * maxLookups {
		l.put(fmt.Sprint(i), answer{addrs: addrs("192.0.2.1"), expires: now.Add(time.Duration(i%2*2-1) * time.Hour)}, now)
		if len(l.m) > maxLookups {
			t.Fatal(len(l.m))
		}
	}
	if _, ok := l.get(fmt.Sprint(3*maxLookups-1), now); !ok {
		t.Error("the newest answer is not there")
	}
}

// A server that moves is found again by its name when its old address fails, and only then.
func TestUpstreamMoves(t *testing.T) {
	ns := startNameServer(t, records(t, 0, "127.0.0.1"))
	steps := []dialertest.Step{dialertest.Read(3), dialertest.Send("\x05\x00"), dialertest.Read(10), dialertest.Send(okReply)}
	s := dialertest.Start(t, steps...)
	var now atomic.Int64
	n := NewNet(NetConfig{Nameservers: []netip.AddrPort{ns.addr}, HostsFile: noHosts(t), Now: func() time.Time { return time.Unix(now.Load(), 0) }})
	d, err := New("up", spec(t, fmt.Sprintf("socks5://proxy.example:%d", s.Addr.Port())), n)
	if err != nil {
		t.Fatal(err)
	}
	dial := func() error {
		c, err := d.Dial(testContext(t), addr(t, "192.0.2.1:80"))
		if err == nil {
			c.Close()
		}
		return err
	}
	if err := d.(*SOCKS5).Prepare(testContext(t)); err != nil {
		t.Fatal(err)
	}
	if got := d.(*SOCKS5).Servers(); len(got) != 1 || got[0] != s.Addr {
		t.Error(got)
	}
	for range 3 {
		now.Add(3600)
		if err := dial(); err != nil {
			t.Fatal(err)
		}
	}
	if q := ns.queries.Load(); q != 2 {
		t.Errorf("%d queries while the address works", q)
	}
	l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.2:%d", s.Addr.Port()))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	s.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			for _, step := range steps {
				if step(&dialertest.Conv{TCPConn: c.(*net.TCPConn)}) != nil {
					break
				}
			}
			c.Close()
		}
	}()
	ns.set(func(dns.Question, bool) *dns.Msg { return &dns.Msg{MsgHdr: dns.MsgHdr{Rcode: dns.RcodeServerFailure}} })
	wantError(t, dial(), flow.ReasonHostUnreachable, true)
	before := ns.queries.Load()
	wantError(t, dial(), flow.ReasonHostUnreachable, true)
	if q := ns.queries.Load(); q != before {
		t.Errorf("asked again at once: %d queries", q-before)
	}
	ns.set(records(t, 0, "127.0.0.2"))
	now.Add(int64(lookupPause / time.Second))
	if err := dial(); err != nil {
		t.Error(err)
	}
	l.Close()
	<-done
}

func TestUpstreamTriesAllAddresses(t *testing.T) {
	s := dialertest.Start(t, dialertest.Read(3), dialertest.Send("\x05\x00"), dialertest.Read(10), dialertest.Send(okReply))
	path := filepath.Join(t.TempDir(), "hosts")
	if err := os.WriteFile(path, []byte("127.0.0.3 proxy.example\n127.0.0.1 proxy.example\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	d, err := New("up", spec(t, fmt.Sprintf("socks5://proxy.example:%d", s.Addr.Port())), NewNet(NetConfig{HostsFile: path}))
	if err != nil {
		t.Fatal(err)
	}
	c, err := d.Dial(testContext(t), addr(t, "192.0.2.1:80"))
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	if got := d.(*SOCKS5).Servers(); got[0].Addr() != loopback {
		t.Errorf("the address that works is not the first: %v", got)
	}
}

func TestReadNameservers(t *testing.T) {
	path := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(path, []byte("search x\nnameserver 192.0.2.53\nnameserver bad\n#nameserver 1.2.3.4\nnameserver fe80::1%eth0\noptions edns0\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := ReadNameservers(path)
	if err != nil || fmt.Sprint(got) != "[192.0.2.53:53 [fe80::1%eth0]:53]" {
		t.Error(got, err)
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := ReadNameservers(path); err != nil || fmt.Sprint(got) != "[127.0.0.1:53]" {
		t.Error(got, err)
	}
	if _, err := ReadNameservers(path + ".none"); err == nil {
		t.Error("a missing file was read")
	}
}

func FuzzReadHosts(f *testing.F) {
	f.Add("127.0.0.1 localhost a\n::1 a # b\n", "a")
	f.Add("# a\n\x00\xff a", "a")
	f.Fuzz(func(t *testing.T, file, host string) {
		if got := readHosts(strings.NewReader(file), host); len(got) > maxAddrs {
			t.Error(len(got))
		}
	})
}
