// SPDX-License-Identifier: GPL-3.0-or-later

package dns

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"

	"github.com/mutex-proxy/mutex/flow"
)

// slowLRU is what a lru is meant to do: a list of keys in order of use.
type slowLRU struct {
	max  int
	keys []int
	m    map[int]int
}

func (l *slowLRU) touch(k int) {
	l.keys = append(slices.DeleteFunc(l.keys, func(o int) bool { return o == k }), k)
}

func TestLRUAgainstSlow(t *testing.T) {
	t.Parallel()
	for seed := range uint64(20) {
		r := rand.New(rand.NewPCG(seed, 2))
		size := r.IntN(9)
		fast, slow := newLRU[int, int](size), &slowLRU{max: size, m: map[int]int{}}
		for step := range 2000 {
			k, v := r.IntN(15), r.Int()
			switch op := r.IntN(10); {
			case op < 4:
				fast.put(k, v)
				if size > 0 {
					slow.m[k] = v
					slow.touch(k)
					if len(slow.keys) > size {
						delete(slow.m, slow.keys[0])
						slow.keys = slow.keys[1:]
					}
				}
			case op < 6:
				fast.remove(k)
				delete(slow.m, k)
				slow.keys = slices.DeleteFunc(slow.keys, func(o int) bool { return o == k })
			default:
				look := fast.get
				if op == 9 {
					look = fast.peek
				}
				got, ok := look(k)
				want, wantOK := slow.m[k]
				if got != want || ok != wantOK {
					t.Fatalf("seed %d, step %d: %d, %v; want %d, %v", seed, step, got, ok, want, wantOK)
				}
				if ok && op != 9 {
					slow.touch(k)
				}
			}
			if fast.len() != len(slow.m) {
				t.Fatalf("seed %d, step %d: %d entries, want %d", seed, step, fast.len(), len(slow.m))
			}
		}
	}
}

// TestCacheAgainstSlow puts answers with random TTLs and asks at random times. What comes back was put last, has not expired, and has the
// TTL that is left.
func TestCacheAgainstSlow(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(3, 3))
	cfg := CacheConfig{Entries: 1000, MinTTL: 3 * time.Second, MaxTTL: 40 * time.Second, Stale: 10 * time.Second}
	c := newCache(cfg)
	type put struct {
		at  time.Time
		ttl uint32
	}
	puts := map[question]put{}
	now := time.Unix(1e9, 0)
	for range 20000 {
		now = now.Add(time.Duration(r.IntN(1500)) * time.Millisecond)
		q := question{name: fmt.Sprintf("h%d.example.", r.IntN(20)), qtype: dns.TypeA, do: r.IntN(2) == 0}
		if r.IntN(3) == 0 {
			ttl := uint32(r.IntN(60))
			m := new(dns.Msg).SetQuestion(q.name, q.qtype)
			m.Answer = []dns.RR{addressRR(q.name, addr("192.0.2.1"), ttl)}
			c.put(q, m, now)
			puts[q] = put{now, min(max(ttl, 3), 40)}
			continue
		}
		got, want := c.get(q, now), puts[q]
		age := now.Sub(want.at)
		life := time.Duration(want.ttl) * time.Second
		switch {
		case age < life && (got.msg == nil || got.stale || got.msg.Answer[0].Header().Ttl != want.ttl-uint32(age/time.Second)):
			t.Fatalf("%v after %s of %s: %+v", q, age, life, got)
		case age >= life && age < life+cfg.Stale && (got.msg == nil || !got.stale || got.msg.Answer[0].Header().Ttl != 30):
			t.Fatalf("%v after %s of %s: %+v, want it stale", q, age, life, got)
		case age >= life+cfg.Stale && got.msg != nil:
			t.Fatalf("%v after %s of %s: %+v, want nothing", q, age, life, got)
		}
	}
}

func TestCacheLimits(t *testing.T) {
	t.Parallel()
	rr := func(s string) dns.RR {
		rr, err := dns.NewRR(s)
		if err != nil {
			t.Fatal(err)
		}
		return rr
	}
	soa := func(ttl, minimum int) []dns.RR {
		return []dns.RR{rr(fmt.Sprintf("example. %d IN SOA a. b. 1 2 3 4 %d", ttl, minimum))}
	}
	big := []dns.RR{}
	for i := range 300 {
		big = append(big, rr(fmt.Sprintf("a.example. 300 IN TXT %q", strings.Repeat("x", 20)+fmt.Sprint(i))))
	}
	for _, tt := range []struct {
		name  string
		rcode int
		an    []dns.RR
		ns    []dns.RR
		want  time.Duration // 0: not kept
	}{
		{"shortest answer", 0, []dns.RR{rr("a.example. 300 IN CNAME b.example."), rr("b.example. 20 IN A 192.0.2.1")}, nil, 20 * time.Second},
		{"zero", 0, []dns.RR{rr("a.example. 0 IN A 192.0.2.1")}, nil, 0},
		{"too long", 0, []dns.RR{rr("a.example. 900000 IN A 192.0.2.1")}, nil, 24 * time.Hour},
		{"top bit", 0, []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: "a.example.", Rrtype: dns.TypeA, Class: 1, Ttl: 1 << 31}}}, nil, 0},
		{"no name, minimum", dns.RcodeNameError, nil, soa(600, 50), 50 * time.Second},
		{"no name, ttl", dns.RcodeNameError, nil, soa(60, 500), 60 * time.Second},
		{"no data, at most 3 hours", 0, nil, soa(90000, 90000), 3 * time.Hour},
		{"no data behind a CNAME", 0, []dns.RR{rr("a.example. 10 IN CNAME b.example.")}, soa(600, 600), 10 * time.Second},
		{"none without SOA", dns.RcodeNameError, nil, nil, 0},
		{"failure", dns.RcodeServerFailure, nil, soa(60, 60), 0},
		{"too big", 0, big, nil, 0},
	} {
		c := newCache(CacheConfig{})
		q := question{name: "a.example.", qtype: dns.TypeA}
		m := new(dns.Msg).SetQuestion(q.name, q.qtype)
		m.Rcode, m.Answer, m.Ns = tt.rcode, tt.an, tt.ns
		now := time.Unix(1e9, 0)
		c.put(q, m, now)
		if tt.want > 0 && c.get(q, now.Add(tt.want-1)).msg == nil || c.get(q, now.Add(tt.want)).msg != nil {
			t.Errorf("%s: not kept for exactly %s", tt.name, tt.want)
		}
	}
}

// counted is a server that counts what it is asked, and fails when told to.
type counted struct {
	handler
	asked atomic.Int64
	down  atomic.Bool
}

func (c *counted) serve(q *dns.Msg) *dns.Msg {
	c.asked.Add(1)
	if c.down.Load() {
		return new(dns.Msg).SetRcode(q, dns.RcodeServerFailure)
	}
	return c.handler(q)
}

func cached1(t *testing.T, cfg CacheConfig) (*Server, *counted) {
	t.Helper()
	up := &counted{handler: zone("a.example. 100 IN A 192.0.2.1")}
	return start(t, Config{
		Mode: ModeReal, Servers: []string{"tcp://192.0.2.53"}, Via: &fakeVia{serve: streamed(up.serve)}, Cache: cfg,
	}), up
}

func TestCacheTTL(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, up := cached1(t, CacheConfig{})
		for _, step := range []struct {
			wait time.Duration
			want string
			n    int64
		}{
			{0, "NOERROR; a.example. 100 IN A 192.0.2.1", 1},
			{30 * time.Second, "NOERROR; a.example. 70 IN A 192.0.2.1", 1},
			{69 * time.Second, "NOERROR; a.example. 1 IN A 192.0.2.1", 1},
			{time.Second, "NOERROR; a.example. 100 IN A 192.0.2.1", 2},
		} {
			<-time.After(step.wait)
			if got := ask(t, s, "a.example", "A"); got != step.want || up.asked.Load() != step.n {
				t.Errorf("after %s: %s after %d questions, want %s after %d", step.wait, got, up.asked.Load(), step.want, step.n)
			}
		}
		if st := s.Stats(); st.CacheHits != 2 || st.Cached != 1 {
			t.Errorf("%+v", st)
		}
		// A client that wants DNSSEC records is not given an answer without them.
		exchange(t, s, flow.UDP, query("a.example", "A").SetEdns0(1232, true))
		if up.asked.Load() != 3 {
			t.Error("DO shares the entry of a plain question")
		}
		s.Flush()
		if ask(t, s, "a.example", "A"); up.asked.Load() != 4 {
			t.Error("flush kept the answer")
		}
	})
}

func TestCacheNegative(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, up := cached1(t, CacheConfig{})
		for i, want := range []int64{1, 1, 2} {
			m := exchange(t, s, flow.UDP, query("none.example", "A"))
			if m.Rcode != dns.RcodeNameError || up.asked.Load() != want || m.Ns[0].Header().Ttl != []uint32{300, 50, 300}[i] {
				t.Errorf("%d questions: %s", up.asked.Load(), m)
			}
			<-time.After(250 * time.Second)
		}
	})
}

func TestCacheStale(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, up := cached1(t, CacheConfig{Stale: time.Hour})
		ask(t, s, "a.example", "A")
		up.down.Store(true)
		<-time.After(200 * time.Second)
		for range 5 { // one attempt, then none for a while
			m := exchange(t, s, flow.UDP, query("a.example", "A").SetEdns0(1232, false))
			ede, _ := m.IsEdns0().Option[0].(*dns.EDNS0_EDE)
			if short(m) != "NOERROR; a.example. 30 IN A 192.0.2.1" || ede == nil || ede.InfoCode != dns.ExtendedErrorCodeStaleAnswer {
				t.Errorf("%s", m)
			}
		}
		if n := up.asked.Load(); n != 2 {
			t.Errorf("%d questions", n)
		}
		<-time.After(staleTTL)
		up.down.Store(false)
		if got := ask(t, s, "a.example", "A"); got != "NOERROR; a.example. 100 IN A 192.0.2.1" {
			t.Error(got)
		}
		up.down.Store(true)
		<-time.After(2 * time.Hour)
		if got := ask(t, s, "a.example", "A"); got != "SERVFAIL" {
			t.Error("after the stale time:", got)
		}
	})
}

// A server that is silent costs 1.8 s where there is a stale answer.
func TestCacheStaleSoon(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := zone("a.example. 100 IN A 192.0.2.1")
		var silent atomic.Bool
		v := &fakeVia{serve: streamed(func(q *dns.Msg) *dns.Msg {
			if silent.Load() {
				return nil
			}
			return h(q)
		})}
		s := start(t, Config{Mode: ModeReal, Servers: []string{"tcp://192.0.2.53"}, Via: v, Cache: CacheConfig{Stale: time.Hour}})
		ask(t, s, "a.example", "A")
		silent.Store(true)
		<-time.After(200 * time.Second)
		begin := time.Now()
		if got := ask(t, s, "a.example", "A"); got != "NOERROR; a.example. 30 IN A 192.0.2.1" || time.Since(begin) != staleAfter {
			t.Errorf("%s after %s", got, time.Since(begin))
		}
	})
}

func TestCachePrefetch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, up := cached1(t, CacheConfig{Prefetch: true})
		ask(t, s, "a.example", "A")
		<-time.After(80 * time.Second)
		ask(t, s, "a.example", "A")
		synctest.Wait()
		if n := up.asked.Load(); n != 1 {
			t.Errorf("%d questions before the last tenth", n)
		}
		<-time.After(15 * time.Second)
		for range 3 {
			if got := ask(t, s, "a.example", "A"); got != "NOERROR; a.example. 5 IN A 192.0.2.1" && up.asked.Load() == 1 {
				t.Error(got)
			}
		}
		synctest.Wait()
		<-time.After(20 * time.Second)
		if got := ask(t, s, "a.example", "A"); got != "NOERROR; a.example. 80 IN A 192.0.2.1" || up.asked.Load() != 2 {
			t.Errorf("%s after %d questions", got, up.asked.Load())
		}
	})
}

// Learned names outlive their records by a grace, and no more.
func TestNamesExpire(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, _ := cached1(t, CacheConfig{})
		ask(t, s, "a.example", "A")
		<-time.After(100*time.Second + namesGrace)
		if host, _, ok := s.HostOf(addr("192.0.2.1")); !ok || host != "a.example" {
			t.Error("forgotten too early")
		}
		<-time.After(time.Nanosecond)
		if _, _, ok := s.HostOf(addr("192.0.2.1")); ok {
			t.Error("not forgotten")
		}
	})
}

func TestNamesBound(t *testing.T) {
	n := newNames(10)
	now := time.Now()
	for i := range 100 {
		n.learn("a.example", []dns.RR{addressRR("a.example.", addr(fmt.Sprintf("192.0.2.%d", i)), 1)}, now)
	}
	if n.len() != 10 {
		t.Error(n.len())
	}
	n.learn("evil\r\nname", []dns.RR{addressRR("a.", addr("192.0.2.200"), 1)}, now)
	if _, ok := n.hostOf(addr("192.0.2.200"), now); ok {
		t.Error("learned a name that is no host name")
	}
}
