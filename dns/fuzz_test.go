// SPDX-License-Identifier: GPL-3.0-or-later

package dns

import (
	"bufio"
	"encoding/binary"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
)

func FuzzReply(f *testing.F) {
	q := question{name: "www.example.", qtype: dns.TypeA, do: true}
	for _, qtype := range []uint16{dns.TypeA, dns.TypeHTTPS} {
		m := new(dns.Msg).SetQuestion("wwW.example.", qtype)
		m.Id = 7
		b, err := testZone()(m).Pack()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
		f.Add(b[:len(b)/2])
	}
	c := newCache(CacheConfig{})
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := parseReply(q, 7, b)
		if err != nil {
			return
		}
		for _, rr := range m.Answer {
			if rr.Header().Class != dns.ClassINET {
				t.Fatal(rr)
			}
		}
		newNames(10).learn("www.example", m.Answer, time.Now())
		c.put(q, m, time.Now())
		r := &request{question: q, asked: "www.example.", id: 7, edns: true, size: 512}
		reply := r.reply(answer{rcode: m.Rcode, rrs: m.Answer, ns: m.Ns, extra: m.Extra})
		if len(reply) > 512 || new(dns.Msg).Unpack(reply) != nil {
			t.Fatalf("%x", reply)
		}
	})
}

func FuzzStream(f *testing.F) {
	f.Add([]byte{0, 2, 1, 2, 0, 0, 0, 1, 9})
	f.Add(binary.BigEndian.AppendUint16(nil, 65535))
	f.Fuzz(func(t *testing.T, b []byte) {
		for r := bufio.NewReader(strings.NewReader(string(b))); ; {
			m, err := readMessage(r)
			if err != nil {
				return
			}
			if cap(m) > 2*len(m)+4096 {
				t.Fatalf("%d bytes for %d", cap(m), len(m))
			}
		}
	})
}

func FuzzParseServer(f *testing.F) {
	for _, s := range []string{"udp://192.0.2.53", "https://dns.example/q?x", "[::1]:53", "tls://a:99999", "://", "https://%zz@a"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, raw string) {
		got, err := parseServer(raw)
		if err == nil && (got.addr.Port == 0 || got.addr.IP.IsValid() == got.addr.IsName() || got.addr.IsName() && !isHostname(got.addr.Host)) {
			t.Fatalf("%q: %+v", raw, got)
		}
	})
}

func FuzzRule(f *testing.F) {
	for _, s := range []string{"a.example", "*.a", "+.b.c", "*", ".x", "A.", "xn--p1ai"} {
		f.Add(s, "x.a.example")
	}
	f.Fuzz(func(t *testing.T, pattern, host string) {
		host = canonical(host)
		if !isHostname(host) {
			return
		}
		m := newMatcher()
		if m.addDomain(pattern, 7) != nil {
			return
		}
		want, p := false, canonical(pattern)
		switch {
		case p == "*":
			want = !strings.Contains(host, ".")
		case strings.HasPrefix(p, "*."):
			want = strings.HasSuffix(host, p[1:])
		case strings.HasPrefix(p, "+."):
			want = strings.HasSuffix("."+host, p[1:])
		default:
			want = host == p
		}
		if got := m.match(host) == 7; got != want {
			t.Fatalf("%q on %q: %v", pattern, host, got)
		}
	})
}
