// SPDX-License-Identifier: GPL-3.0-or-later

package dns

import (
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/dns"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/mutex-proxy/mutex/flow"
)

func testZone() handler {
	return zone(
		"real.example. 300 IN A 192.0.2.10", "real.example. 300 IN AAAA 2001:db8::10",
		"www.example. 60 IN CNAME edge.example.", "edge.example. 20 IN A 192.0.2.20",
		"text.example. 300 IN TXT hello", "loop.example. 300 IN A 198.18.0.77",
		`svc.example. 300 IN HTTPS 1 . alpn=h2 ipv4hint=192.0.2.30`,
		"printer.local. 300 IN A 192.0.2.40", "v4.example. 300 IN A 192.0.2.50",
		"10.2.0.192.in-addr.arpa. 300 IN PTR real.example.",
	)
}

func TestExchange(t *testing.T) {
	t.Parallel()
	base := func(mode Mode) Config {
		h := testZone()
		return Config{
			Mode: mode, Servers: []string{"tcp://192.0.2.53"}, Via: &fakeVia{serve: streamed(h)},
			Hosts: map[string][]netip.Addr{"Pinned.Example.": {addr("192.0.2.99"), addr("2001:db8::99")}},
			Rules: []Rule{{Domain: []string{"*.ads.example"}, Block: true}, {DomainSuffix: []string{"tracker.example"}, Block: true}},
		}
	}
	without := func(mode Mode) Config { c := base(mode); c.Servers = nil; return c }
	tests := []struct {
		name  string
		cfg   Config
		ask   string // name type
		want  string
		fails uint64
	}{
		{"fake A", base(ModeFakeIP), "a.example A", "NOERROR; a.example. 1 IN A 198.18.0.16", 0},
		{"fake AAAA", base(ModeFakeIP), "a.example AAAA", "NOERROR; a.example. 1 IN AAAA fd4d:5554:4558::10", 0},
		{"letter case is kept", base(ModeFakeIP), "A.eXample A", "NOERROR; A.eXample. 1 IN A 198.18.0.16", 0},
		{"fake names have no HTTPS", base(ModeFakeIP), "svc.example HTTPS", "NOERROR", 0},
		{"fake names have no SVCB", base(ModeFakeIP), "_dns.svc.example SVCB", "NOERROR", 0},
		{"fake, other type", base(ModeFakeIP), "text.example TXT", `NOERROR; text.example. 300 IN TXT "hello"`, 0},
		{"fake, excluded", base(ModeFakeIP), "printer.local A", "NOERROR; printer.local. 300 IN A 192.0.2.40", 0},
		{"fake, single label", base(ModeFakeIP), "intranet A", "NOERROR; intranet. 1 IN A 198.18.0.16", 0},
		{"fake, not a host name", base(ModeFakeIP), `a\032b.example A`, "NXDOMAIN", 0},
		{"fake, an IP literal as name", base(ModeFakeIP), "192.0.2.1 A", "NXDOMAIN", 0},
		{"fake, root", base(ModeFakeIP), ". A", "NXDOMAIN", 0},
		{"fake without servers", without(ModeFakeIP), "a.example A", "NOERROR; a.example. 1 IN A 198.18.0.16", 0},
		{"fake without servers, other type", without(ModeFakeIP), "text.example TXT", "SERVFAIL", 1},
		{"fake without servers, excluded", without(ModeFakeIP), "printer.local A", "NXDOMAIN", 0},
		{"real A", base(ModeReal), "real.example A", "NOERROR; real.example. 300 IN A 192.0.2.10", 0},
		{"real AAAA", base(ModeReal), "real.example AAAA", "NOERROR; real.example. 300 IN AAAA 2001:db8::10", 0},
		{"real, letter case is kept", base(ModeReal), "REAL.example A", "NOERROR; REAL.example. 300 IN A 192.0.2.10", 0},
		{"real CNAME", base(ModeReal), "www.example A", "NOERROR; www.example. 60 IN CNAME edge.example.; edge.example. 20 IN A 192.0.2.20", 0},
		{"real HTTPS", base(ModeReal), "svc.example HTTPS", `NOERROR; svc.example. 300 IN HTTPS 1 . alpn="h2" ipv4hint="192.0.2.30"`, 0},
		{"real, no name", base(ModeReal), "none.example A", "NXDOMAIN", 0},
		{"real, no data", base(ModeReal), "v4.example AAAA", "NOERROR", 0},
		{"real PTR", base(ModeReal), "10.2.0.192.in-addr.arpa PTR", "NOERROR; 10.2.0.192.in-addr.arpa. 300 IN PTR real.example.", 0},
		{"real without servers", without(ModeReal), "real.example A", "SERVFAIL", 1},
		{"off", base(ModeOff), "real.example A", "SERVFAIL", 1},
		{"hosts A", base(ModeFakeIP), "pinned.example A", "NOERROR; pinned.example. 60 IN A 192.0.2.99", 0},
		{"hosts AAAA", base(ModeReal), "PINNED.example AAAA", "NOERROR; PINNED.example. 60 IN AAAA 2001:db8::99", 0},
		{"hosts, other type", base(ModeReal), "pinned.example TXT", "NOERROR", 0},
		{"blocked", base(ModeFakeIP), "x.y.ads.example A", "NXDOMAIN", 0},
		{"blocked is below the pattern", base(ModeFakeIP), "ads.example A", "NOERROR; ads.example. 1 IN A 198.18.0.16", 0},
		{"blocked suffix", base(ModeReal), "tracker.example TXT", "NXDOMAIN", 0},
		{"localhost", base(ModeFakeIP), "x.localhost A", "NOERROR; x.localhost. 60 IN A 127.0.0.1", 0},
		{"localhost v6", without(ModeReal), "localhost AAAA", "NOERROR; localhost. 60 IN AAAA ::1", 0},
		{"localhost, reverse", without(ModeReal), "1.0.0.127.in-addr.arpa PTR", "NOERROR; 1.0.0.127.in-addr.arpa. 1 IN PTR localhost.", 0},
		{"invalid", base(ModeFakeIP), "a.invalid A", "NXDOMAIN", 0},
		{"the browser's question", base(ModeFakeIP), "use-application-dns.net A", "NXDOMAIN", 0},
		{"the resolver's resolvers", base(ModeReal), "_dns.resolver.arpa SVCB", "NOERROR", 0},
		{"is there a NAT64", base(ModeFakeIP), "ipv4only.arpa AAAA", "NOERROR", 0},
		{"multicast names are faked if not excluded", func() Config { c := without(ModeFakeIP); c.Fake.Exclude = []string{}; return c }(), "printer.local A", "NOERROR; printer.local. 1 IN A 198.18.0.16", 0},
		{"ANY", base(ModeFakeIP), "real.example ANY", `NOERROR; real.example. 1 IN HINFO "RFC8482" ""`, 0},
		{"transfer", base(ModeReal), "real.example AXFR", "NOTIMP", 0},
		{"reverse of an unmapped fake IP", base(ModeFakeIP), "9.9.18.198.in-addr.arpa PTR", "NXDOMAIN", 0},
		{"a server's answer in the fake range", base(ModeFakeIP), "loop.local A", "NXDOMAIN", 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := start(t, tt.cfg)
			name, qtype, _ := strings.Cut(tt.ask, " ")
			if diff := cmp.Diff(tt.want, ask(t, s, name, qtype)); diff != "" {
				t.Error(diff)
			}
			if st := s.Stats(); st.Failures != tt.fails || st.Queries != 1 {
				t.Errorf("stats %+v, want 1 query and %d failures", st, tt.fails)
			}
		})
	}
}

// Addresses of our own fake ranges in a server's answer stand for other names here: they are taken out.
func TestForeignFakes(t *testing.T) {
	s := start(t, Config{
		Servers: []string{"tcp://192.0.2.53"}, Via: &fakeVia{serve: streamed(testZone())},
		Fake: FakeConfig{Exclude: []string{"loop.example"}},
	})
	if got := ask(t, s, "loop.example", "A"); got != "NOERROR" {
		t.Error(got)
	}
	if ips, err := s.Resolve(t.Context(), "loop.example"); !errors.Is(err, flow.ErrHostUnreachable) {
		t.Errorf("resolve: %v, %v", ips, err)
	}
}

// In fakeip mode the real addresses of what an answer points to stay with us; otherwise they are passed on, if the answer names them.
func TestAdditional(t *testing.T) {
	h := func(q *dns.Msg) *dns.Msg {
		m := zone("example. 300 IN MX 10 mx.example.")(q)
		for _, s := range []string{"mx.example. 300 IN A 192.0.2.25", "bank.example. 300 IN A 192.0.2.66"} {
			rr, _ := dns.NewRR(s)
			m.Extra = append(m.Extra, rr)
		}
		return m
	}
	for mode, want := range map[Mode]int{ModeFakeIP: 0, ModeReal: 1} {
		s := start(t, Config{Mode: mode, Servers: []string{"tcp://192.0.2.53"}, Via: &fakeVia{serve: streamed(h)}})
		if m := exchange(t, s, flow.TCP, query("example", "MX")); len(m.Answer) != 1 || len(m.Extra) != want {
			t.Errorf("mode %v: %v", mode, m)
		}
	}
}

func TestHygiene(t *testing.T) {
	t.Parallel()
	s := start(t, Config{})
	pack := func(change func(*dns.Msg)) []byte {
		m := query("a.example", "A")
		m.Id = 0x1234
		change(m)
		b, err := m.Pack()
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	opt := func(version uint8) *dns.OPT {
		o := &dns.OPT{Hdr: dns.RR_Header{Name: ".", Rrtype: dns.TypeOPT}}
		o.SetUDPSize(1232)
		o.SetVersion(version)
		return o
	}
	good := pack(func(*dns.Msg) {})
	tests := []struct {
		name  string
		query []byte
		want  string // rcode, or "error"
	}{
		{"good", good, "NOERROR"},
		{"empty", nil, "error"},
		{"short", good[:11], "error"},
		{"header only", good[:12], "error"},
		{"question cut", good[:len(good)-1], "error"},
		{"a response", pack(func(m *dns.Msg) { m.Response = true }), "error"},
		{"name that points to itself", append(slices.Clone(good[:12]), 0xc0, 12, 0, 1, 0, 1), "error"},
		{"endless label", append(slices.Clone(good[:12]), 63, 'a'), "error"},
		{"notify", pack(func(m *dns.Msg) { m.Opcode = dns.OpcodeNotify }), "NOTIMP"},
		{"update", pack(func(m *dns.Msg) { m.Opcode = dns.OpcodeUpdate }), "NOTIMP"},
		{"no question", pack(func(m *dns.Msg) { m.Question = nil }), "FORMERR"},
		{"two questions", pack(func(m *dns.Msg) { m.Question = append(m.Question, m.Question[0]) }), "FORMERR"},
		{"an answer in the query", pack(func(m *dns.Msg) { m.Answer = soa() }), "FORMERR"},
		{"promised additional", func() []byte { b := slices.Clone(good); b[11] = 1; return b }(), "FORMERR"},
		{"broken additional", func() []byte { b := slices.Clone(good); b[11] = 1; return append(b, 0, 0) }(), "FORMERR"},
		{"chaos", pack(func(m *dns.Msg) { m.Question[0].Qclass = dns.ClassCHAOS }), "REFUSED"},
		{"any class", pack(func(m *dns.Msg) { m.Question[0].Qclass = dns.ClassANY }), "REFUSED"},
		{"type OPT", pack(func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeOPT }), "NOTIMP"},
		{"type 0", pack(func(m *dns.Msg) { m.Question[0].Qtype = 0 }), "NOTIMP"},
		{"EDNS", pack(func(m *dns.Msg) { m.Extra = []dns.RR{opt(0)} }), "NOERROR"},
		{"EDNS 1", pack(func(m *dns.Msg) { m.Extra = []dns.RR{opt(1)} }), "BADVERS"},
		{"two OPTs", pack(func(m *dns.Msg) { m.Extra = []dns.RR{opt(0), opt(0)} }), "FORMERR"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			reply, err := s.Exchange(t.Context(), &flow.Flow{Network: flow.UDP}, tt.query)
			if err != nil {
				if !errors.Is(err, ErrNotDNS) || reply != nil || tt.want != "error" {
					t.Fatalf("got %x, %v, want %s", reply, err, tt.want)
				}
				return
			}
			m := new(dns.Msg)
			if err := m.Unpack(reply); err != nil {
				t.Fatalf("%v: %s", err, hex.EncodeToString(reply))
			}
			// miekg/dns has the same number for BADVERS and BADSIG.
			if got := strings.Replace(rcodeName(uint16(m.Rcode)), "BADSIG", "BADVERS", 1); got != tt.want || m.Id != 0x1234 || !m.Response {
				t.Errorf("got %s, want %s:\n%s", got, tt.want, m)
			}
			// Clients do not hear a reply to something else.
			if op := int(tt.query[2] >> 3 & 0xf); m.Opcode != op {
				t.Errorf("opcode %d, want %d", m.Opcode, op)
			}
			asked := new(dns.Msg)
			if asked.Unpack(tt.query) == nil && len(m.Question) == 1 && m.Question[0] != asked.Question[0] {
				t.Errorf("a reply to %v, want %v", m.Question[0], asked.Question[0])
			}
		})
	}
}

func TestEDNS(t *testing.T) {
	many := make([]string, 0, 100)
	for i := range 100 {
		many = append(many, fmt.Sprintf("many.example. 300 IN A 192.0.2.%d", i))
	}
	s := start(t, Config{Mode: ModeReal, Servers: []string{"tcp://192.0.2.53"}, Via: &fakeVia{serve: streamed(zone(many...))}})
	tests := []struct {
		name string
		n    flow.Network
		size uint16 // 0 = no EDNS
		cut  bool
	}{
		{"udp, 512", flow.UDP, 0, true},
		{"udp, says 100, means 512", flow.UDP, 100, true},
		{"udp, 1232", flow.UDP, 1232, true},
		{"udp, 4096", flow.UDP, 4096, false},
		{"tcp", flow.TCP, 0, false},
		{"tcp, says 512", flow.TCP, 512, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			q := query("many.example", "A")
			limit := 512
			if tt.size > 0 {
				q.SetEdns0(tt.size, true)
				limit = max(limit, int(tt.size))
			}
			m := exchange(t, s, tt.n, q)
			if m.Truncated != tt.cut || tt.cut == (len(m.Answer) == 100) {
				t.Errorf("truncated %v with %d records", m.Truncated, len(m.Answer))
			}
			if m.Compress = true; tt.n == flow.UDP && m.Len() > limit {
				t.Errorf("reply of %d bytes, limit %d", m.Len(), limit)
			}
			opt := m.IsEdns0()
			if (opt != nil) != (tt.size > 0) || opt != nil && (!opt.Do() || opt.UDPSize() != ednsSize) {
				t.Errorf("edns of the reply: %v", opt)
			}
		})
	}
}

func TestExtendedErrors(t *testing.T) {
	s := start(t, Config{Rules: []Rule{{Domain: []string{"*"}, Block: true}}})
	for name, want := range map[string]uint16{"text.example": dns.ExtendedErrorCodeNotReady, "ads": dns.ExtendedErrorCodeBlocked} {
		m := exchange(t, s, flow.UDP, query(name, "TXT").SetEdns0(1232, false))
		ede, ok := m.IsEdns0().Option[0].(*dns.EDNS0_EDE)
		if !ok || ede.InfoCode != want || ede.ExtraText == "" {
			t.Errorf("%s: %v", name, m)
		}
	}
}

func TestFakeReverse(t *testing.T) {
	s := start(t, Config{})
	for _, qtype := range []string{"A", "AAAA"} {
		var ip netip.Addr
		for _, rr := range exchange(t, s, flow.UDP, query("a.example", qtype)).Answer {
			for ip = range addresses(rr) {
			}
		}
		arpa, err := dns.ReverseAddr(ip.String())
		if err != nil {
			t.Fatal(err)
		}
		if got, want := ask(t, s, arpa, "PTR"), "NOERROR; "+arpa+" 1 IN PTR a.example."; got != want {
			t.Errorf("got %s, want %s", got, want)
		}
		if host, src, ok := s.HostOf(ip); host != "a.example" || src != flow.SourceFakeIP || !ok || !s.IsFake(ip) {
			t.Errorf("HostOf(%s) = %q, %v, %v", ip, host, src, ok)
		}
	}
	if _, _, ok := s.HostOf(addr("198.18.9.9")); ok || !s.IsFake(addr("198.18.9.9")) || !s.IsFake(addr("::ffff:198.18.9.9")) {
		t.Error("an unmapped fake IP has a name or is not fake")
	}
}

// When flows hold every address, a new name gets none, and not one that means something else.
func TestFakesExhausted(t *testing.T) {
	s := start(t, Config{Fake: FakeConfig{V4: netip.MustParsePrefix("198.51.100.8/29")}})
	var held []netip.Addr
	for i := range 6 {
		m := exchange(t, s, flow.UDP, query(fmt.Sprintf("h%d.example", i), "AAAA"))
		for ip := range addresses(m.Answer[0]) {
			held = append(held, ip)
			s.Hold(ip)
		}
	}
	if got := ask(t, s, "new.example", "A"); got != "SERVFAIL" {
		t.Error(got)
	}
	s.Release(held[3])
	if got := ask(t, s, "new.example", "A"); got != "NOERROR; new.example. 1 IN A 198.51.100.12" {
		t.Error(got)
	}
	if host, _, _ := s.HostOf(held[2]); host != "h2.example" {
		t.Error(host)
	}
}

func TestLearnedNames(t *testing.T) {
	s := start(t, Config{Mode: ModeReal, Servers: []string{"tcp://192.0.2.53"}, Via: &fakeVia{serve: streamed(testZone())}})
	ask(t, s, "www.example", "A")
	ask(t, s, "real.example", "AAAA")
	ask(t, s, "svc.example", "HTTPS")
	for ip, want := range map[string]string{
		"192.0.2.20": "www.example", "2001:db8::10": "real.example", "192.0.2.30": "svc.example", "::ffff:192.0.2.20": "www.example", "192.0.2.10": "",
	} {
		host, src, ok := s.HostOf(addr(ip))
		if host != want || ok != (want != "") || ok && src != flow.SourceDNS {
			t.Errorf("HostOf(%s) = %q, %v, %v; want %q", ip, host, src, ok, want)
		}
	}
	if s.IsFake(addr("198.18.0.20")) {
		t.Error("real mode has fake ranges")
	}
}

func TestOneWarning(t *testing.T) {
	core, logs := observer.New(zap.WarnLevel)
	s := start(t, Config{Log: zap.New(core)})
	for range 3 {
		ask(t, s, "text.example", "TXT")
	}
	if logs.Len() != 1 {
		t.Errorf("%d warnings: %v", logs.Len(), logs.All())
	}
}

// One query a name at a time, however many ask.
func TestOneQuestion(t *testing.T) { synctest.Test(t, testOneQuestion) }

func testOneQuestion(t *testing.T) {
	release := make(chan struct{})
	var mu sync.Mutex
	asked := map[string]int{}
	h := testZone()
	v := &fakeVia{serve: streamed(func(q *dns.Msg) *dns.Msg {
		mu.Lock()
		asked[q.Question[0].String()]++
		mu.Unlock()
		<-release
		return h(q)
	})}
	s := start(t, Config{Mode: ModeReal, Servers: []string{"tcp://192.0.2.53"}, Via: v})
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if got := ask(t, s, "real.example", "A"); got != "NOERROR; real.example. 300 IN A 192.0.2.10" {
				t.Error(got)
			}
		})
	}
	synctest.Wait() // all are in
	close(release)
	wg.Wait()
	if len(asked) != 1 {
		t.Errorf("asked: %v", asked)
	}
	for q, n := range asked {
		if n != 1 {
			t.Errorf("%s asked %d times", q, n)
		}
	}
}

func TestQueryLog(t *testing.T) {
	s := start(t, Config{Rules: []Rule{{Domain: []string{"ads.example"}, Block: true}}})
	ask(t, s, "ads.example", "A")
	for range maxLog {
		ask(t, s, "a.example", "AAAA")
	}
	es := s.Log()
	if len(es) != maxLog || es[0].Result != resultFake || es[0].Name != "a.example" || es[0].Type != "AAAA" || es[0].Rcode != "NOERROR" {
		t.Errorf("%d entries, first %+v", len(es), es[0])
	}
	if st := s.Stats(); st.Blocked != 1 || st.Queries != maxLog+1 || st.Fakes != 1 {
		t.Errorf("%+v", st)
	}
}

func TestHostOfDoesNotAllocate(t *testing.T) {
	s := start(t, Config{Servers: []string{"tcp://192.0.2.53"}, Via: &fakeVia{serve: streamed(testZone())}, Fake: FakeConfig{Exclude: []string{"real.example"}}})
	ask(t, s, "a.example", "A")
	ask(t, s, "real.example", "A")
	for _, ip := range []netip.Addr{addr("198.18.0.16"), addr("fd4d:5554:4558::10"), addr("192.0.2.10"), addr("192.0.2.222"), addr("198.18.7.7")} {
		if n := testing.AllocsPerRun(100, func() {
			s.HostOf(ip)
			s.IsFake(ip)
			s.Hold(ip)
			s.Release(ip)
		}); n != 0 {
			t.Errorf("%s: %v allocations", ip, n)
		}
	}
}

func FuzzExchange(f *testing.F) {
	for _, q := range []*dns.Msg{query("a.example", "A"), query("x.local", "HTTPS"), query("1.0.18.198.in-addr.arpa", "PTR"), query(".", "NS")} {
		q.SetEdns0(1232, true)
		b, err := q.Pack()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, true)
		f.Add(b[:len(b)-3], false)
	}
	s := start(f, Config{Log: zap.NewNop(), Rules: []Rule{{Domain: []string{"*"}, Block: true}}})
	f.Fuzz(func(t *testing.T, b []byte, udp bool) {
		n := flow.TCP
		if udp {
			n = flow.UDP
		}
		reply, err := s.Exchange(t.Context(), &flow.Flow{Network: n}, b)
		if err != nil {
			return
		}
		if len(reply) < headerSize || reply[2]&0x80 == 0 || reply[0] != b[0] || reply[1] != b[1] {
			t.Fatalf("reply %x to %x", reply, b)
		}
		if err := new(dns.Msg).Unpack(reply); err != nil {
			t.Fatalf("reply %x to %x: %v", reply, b, err)
		}
	})
}

func BenchmarkExchangeFake(b *testing.B) {
	s := start(b, Config{Log: zap.NewNop()})
	q, err := query("www.example.com", "A").SetEdns0(1232, false).Pack()
	if err != nil {
		b.Fatal(err)
	}
	f := &flow.Flow{Network: flow.UDP}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := s.Exchange(b.Context(), f, q); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkHostOf(b *testing.B) {
	s := start(b, Config{Log: zap.NewNop()})
	ask(b, s, "a.example", "A")
	ip := addr("198.18.0.16")
	b.ReportAllocs()
	for b.Loop() {
		s.HostOf(ip)
	}
}
