// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sort"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mutex-proxy/mutex/dialers/dialertest"
	"github.com/mutex-proxy/mutex/flow"
)

func names(n int) []flow.Addr {
	out := make([]flow.Addr, n)
	for i := range out {
		out[i] = flow.Addr{Host: fmt.Sprintf("host%d.example", i), Port: uint16(i)}
	}
	return out
}

// owners says which member each destination belongs to.
func owners(p *Pool, dst []flow.Addr) []string {
	out := make([]string, len(dst))
	for i := range dst {
		out[i] = p.members[p.choose(byTCP, p.key(netip.Addr{}, &dst[i]), nil)].Name()
	}
	return out
}

// A member that goes, or is ejected, moves its own flows and no others, and shares are those of the weights.
func TestHashConsistent(t *testing.T) {
	ds, _ := weighties(8, func(i int, w *weighty) { w.spec.Weight = 1 + i%2 })
	dst := names(12000)
	whole := strategyPool(t, Hash, ds)
	before := owners(whole, dst)
	count := make(map[string]int)
	for _, o := range before {
		count[o]++
	}
	for i := range ds {
		want := 1000 * (1 + i%2)
		if got := count[fmt.Sprint("m", i)]; got < want*3/4 || got > want*5/4 {
			t.Errorf("m%d has %d flows, want about %d", i, got, want)
		}
	}
	without := owners(strategyPool(t, Hash, slices.Delete(slices.Clone(ds), 3, 4)), dst)
	whole.members[3].conditions[byTCP].ejectedUntil.Store(time.Now().Add(time.Hour).UnixNano())
	ejected := owners(whole, dst)
	for i := range dst {
		if before[i] != "m3" && (without[i] != before[i] || ejected[i] != before[i]) {
			t.Fatalf("%s moved from %s to %s, %s", dst[i].Host, before[i], without[i], ejected[i])
		}
		if before[i] == "m3" && (without[i] != ejected[i] || ejected[i] == "m3") {
			t.Fatalf("%s: %s without, %s ejected", dst[i].Host, without[i], ejected[i])
		}
	}
}

// The index against a plain binary search, for sizes that are and are not powers of two.
func TestRingModel(t *testing.T) {
	for _, n := range []int{1, 2, 3, 7, 500, maxMembers} {
		ds, _ := weighties(n, func(i int, w *weighty) { w.spec.Weight = 1 + i%5 })
		var ms []*member
		for _, d := range ds {
			ms = append(ms, newMember(d))
		}
		r := newRing(ms)
		if len(r.points) > maxRing+n {
			t.Errorf("%d members: %d points", n, len(r.points))
		}
		seen := make(map[int]bool)
		for _, o := range r.owners {
			seen[int(o)] = true
		}
		if len(seen) != n {
			t.Errorf("%d of %d members are on the ring", len(seen), n)
		}
		for range 2000 {
			key := rand.Uint64()
			want := sort.Search(len(r.points), func(i int) bool { return r.points[i] >= key }) % len(r.points)
			if got := r.at(key); got != want {
				t.Fatalf("%d members, key %x: %d, want %d", n, key, got, want)
			}
		}
	}
}

func TestHashBy(t *testing.T) {
	ds, _ := weighties(50, func(int, *weighty) {})
	member := func(by HashBy, src, host string, port uint16) string {
		d, err := NewPool("eu", Hash, ds, PoolConfig{HashBy: by})
		if err != nil {
			t.Fatal(err)
		}
		f := &flow.Flow{Src: netip.MustParseAddrPort(src), Dst: flow.Addr{Host: host, Port: port}}
		c, err := d.(flow.SourceDialer).DialFlow(t.Context(), f)
		if err != nil {
			t.Fatal(err)
		}
		return c.(*fakeConn).from
	}
	for by, want := range map[HashBy][2]bool{ByDestination: {false, true}, BySource: {true, false}, ByBoth: {true, true}} {
		base := member(by, "10.0.0.1:1000", "a.example", 80)
		if got := member(by, "10.0.0.1:2000", "a.example", 443); got != base {
			t.Errorf("%v: a port changes the member", by)
		}
		if moved := member(by, "10.0.0.2:1000", "a.example", 80) != base; moved != want[0] {
			t.Errorf("%v: another source moved: %v", by, moved)
		}
		if moved := member(by, "10.0.0.1:1000", "b.example", 80) != base; moved != want[1] {
			t.Errorf("%v: another destination moved: %v", by, moved)
		}
	}
}

// A pool in a pool: the flow reaches it whole, its failure is one member's, and a cycle of states does not hide the living.
func TestNestedPools(t *testing.T) {
	m := members(4)
	inner := pool(t, Failover, PoolConfig{}, m[0], m[1])
	d, err := NewPool("world", Failover, []flow.Dialer{inner, m[2], m[3]}, PoolConfig{})
	if err != nil {
		t.Fatal(err)
	}
	if got := dials(t, d, 2); got != "m0 m0" {
		t.Error(got)
	}
	m[0].dial = fails(flow.ErrUpstream)
	if got := dials(t, d, 1); got != "m1" {
		t.Error(got)
	}
	m[1].dial = fails(flow.ErrUpstream)
	if got := dials(t, d, 5); got != "m2 m2 m2 m2 m2" {
		t.Error(got)
	}
	if st := d.(*Pool).Members(); st[0].Up || !st[1].Up {
		t.Errorf("%+v", st)
	}
	ds, _ := weighties(20, func(int, *weighty) {})
	hashed := strategyPool(t, Hash, ds)
	hashed.cfg.HashBy = BySource
	outer := strategyPool(t, Failover, []flow.Dialer{hashed})
	who := make(map[string]bool)
	for i := range 20 {
		f := &flow.Flow{Src: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(i)}), 1), Dst: flow.Addr{Host: "a"}}
		c, err := outer.DialFlow(t.Context(), f)
		if err != nil {
			t.Fatal(err)
		}
		who[c.(*fakeConn).from] = true
	}
	if len(who) < 5 {
		t.Errorf("the source is lost on the way in: %v", who)
	}
}

func TestQuantile(t *testing.T) {
	var q quantile
	for range minSamples - 1 {
		q.add(time.Millisecond)
	}
	if _, ok := q.at(95); ok {
		t.Error("an answer from too little")
	}
	q = quantile{}
	var all []time.Duration
	for range 800 {
		d := time.Duration(rand.ExpFloat64() * float64(50*time.Millisecond))
		all = append(all, d)
		q.add(d)
	}
	slices.Sort(all)
	for _, p := range []int{50, 90, 95, 99} {
		want := all[len(all)*p/100-1]
		if got, _ := q.at(p); got < want*99/100 || got > want*13/10+time.Millisecond {
			t.Errorf("p%d: %v, want %v", p, got, want)
		}
	}
	for range 4 * maxSamples { // what was is forgotten
		q.add(time.Second)
	}
	if got, _ := q.at(50); got < time.Second || got > 1300*time.Millisecond {
		t.Errorf("p50 after a change: %v", got)
	}
	for i := range quantileBuckets - 1 {
		if bucketOf(bucketEnd(i)-1) != i || bucketOf(bucketEnd(i)) != i+1 {
			t.Errorf("bucket %d ends at %v", i, bucketEnd(i))
		}
	}
	if bucketOf(0) != 0 || bucketOf(time.Hour) != quantileBuckets-1 {
		t.Error("out of range")
	}
}

// A member that is slower than usual gets company after its usual time; one that is as fast as always does not.
func TestPoolHedgePercentile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := members(2)
		m[0].dial = after(20*time.Millisecond, nil)
		p := pool(t, Failover, PoolConfig{HedgePercentile: 95}, m...)
		dials(t, p, minSamples)
		if len(m[1].log()) != 0 {
			t.Error("hedged without a reason")
		}
		m[0].dial = after(time.Second, nil)
		begin := time.Now()
		if got := dials(t, p, 1); got != "m1" || time.Since(begin) > 40*time.Millisecond {
			t.Errorf("%s after %v", got, time.Since(begin))
		}
	})
}

func TestPoolHealth(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := members(3)
		var well atomic.Bool
		unless := func(bad func(context.Context, flow.Addr) error) func(context.Context, flow.Addr) error {
			return func(ctx context.Context, a flow.Addr) error {
				if well.Load() {
					return nil
				}
				return bad(ctx, a)
			}
		}
		m[1].dial, m[2].dial = unless(fails(flow.ErrHostUnreachable)), unless(hangs) // alive, but without a way to the target; and not even that
		p := pool(t, RoundRobin, PoolConfig{Health: HealthConfig{Target: "192.0.2.1:443", Interval: 10 * time.Second, Timeout: time.Second}}, m...)
		p.Start()
		p.Start()
		<-time.After(time.Minute)
		if st := p.Members(); !st[0].Up || st[1].Up || st[2].Up {
			t.Errorf("%+v", st)
		}
		if n := len(m[0].log()); n < 5 || n > 8 {
			t.Errorf("checked %d times in a minute, every 10 s", n)
		}
		well.Store(true)
		<-time.After(15 * time.Second)
		if st := p.Members(); !st[1].Up || !st[2].Up {
			t.Errorf("not back: %+v", st)
		}
		if err := p.Close(); err != nil {
			t.Error(err)
		}
		n := len(m[0].log())
		<-time.After(time.Minute)
		if len(m[0].log()) != n {
			t.Error("checks after Close")
		}
		p.Start()
		<-time.After(5 * time.Second)
		if len(m[0].log()) == n {
			t.Error("no checks after a second Start")
		}
		_ = p.Close()
		_ = p.Close()
	})
}

func TestHealthTarget(t *testing.T) {
	for target, ok := range map[string]bool{
		"example.com:443": true, "[2001:db8::1]:80": true, "http://example.com/x?y": true, "https://[2001:db8::1]/": true, "": true,
		"example.com": false, "ftp://a/": false, "http://u:p@a/": false, "http://": false, "http://a/#b": false, "http://a:99999/": false, "http://%": false,
	} {
		_, err := NewPool("eu", "", []flow.Dialer{dialer(t, "socks5h://h")}, PoolConfig{Health: HealthConfig{Target: target}})
		if (err == nil) != ok || err != nil && strings.Contains(err.Error(), "u:p") {
			t.Errorf("%q: %v", target, err)
		}
	}
	for raw, ok := range map[string]bool{"socks5h://h": true, "http://h": true, "auto://h": true, "socks5://h": false, "direct://": false} {
		_, err := NewPool("eu", "", []flow.Dialer{dialer(t, raw)}, PoolConfig{Health: HealthConfig{Target: "example.com:80"}})
		if (err == nil) != ok {
			t.Errorf("%s: %v", raw, err)
		}
	}
}

func TestHealthStatus(t *testing.T) {
	var status atomic.Value
	origin := dialertest.Start(t, func(c *dialertest.Conv) error {
		line, err := bufio.NewReader(c).ReadString('\n')
		if err != nil || line != "GET /ready?x HTTP/1.1\r\n" {
			t.Errorf("%q %v", line, err)
		}
		_, err = io.WriteString(c, status.Load().(string))
		return err
	})
	d := dialer(t, "direct://")
	p, err := NewPool("eu", "", []flow.Dialer{d}, PoolConfig{Health: HealthConfig{Target: "http://" + origin.Addr.String() + "/ready?x"}})
	if err != nil {
		t.Fatal(err)
	}
	for reply, ok := range map[string]bool{
		"HTTP/1.1 200 OK\r\n\r\n": true, "HTTP/1.0 302\r\n": true, "HTTP/1.1 503 no\r\n\r\n": false, "SSH-2.0\r\n": false, "HTTP/1.1 20": false, "": false,
		strings.Repeat("x", maxHealthHead+1): false,
	} {
		status.Store(reply)
		if err := p.(*Pool).reach(testContext(t), d); (err == nil) != ok {
			t.Errorf("%.20q: %v", reply, err)
		}
	}
}

// What is switched off takes nothing new; draining leaves what is there, disabling ends it.
func TestSetState(t *testing.T) {
	origin := dialertest.Start(t, dialertest.Echo())
	a, b := dialer(t, "direct://"), dialer(t, "direct://")
	d, err := NewPool("eu", Failover, []flow.Dialer{a, b}, PoolConfig{})
	if err != nil {
		t.Fatal(err)
	}
	dst := flow.AddrFrom(origin.Addr)
	c, err := d.Dial(testContext(t), dst)
	if err != nil {
		t.Fatal(err)
	}
	echo := func() error {
		if _, err := io.WriteString(c, "x"); err != nil {
			return err
		}
		_, err := io.ReadFull(c, make([]byte, 1))
		return err
	}
	if !SetState(a, Draining) || StatusOf(a).State != Draining {
		t.Fatal("not switched")
	}
	if err := echo(); err != nil {
		t.Errorf("draining ended a connection: %v", err)
	}
	if _, err := a.Dial(testContext(t), dst); !errors.Is(err, errOff) {
		t.Error(err)
	}
	if _, err := a.ListenPacket(testContext(t), nil); !errors.Is(err, errOff) {
		t.Error(err)
	}
	for range 5 {
		c2, err := d.Dial(testContext(t), dst)
		if err != nil {
			t.Fatal(err)
		}
		c2.Close()
	}
	if st := StatusOf(a); st.Active != 1 || st.Total != 1 || StatusOf(b).Total != 5 {
		t.Errorf("%+v", st)
	}
	SetState(a, Disabled)
	if err := echo(); err == nil {
		t.Error("disabling left a connection")
	}
	c.Close()
	if st := StatusOf(a); st.Active != 0 {
		t.Errorf("%+v", st)
	}
	SetState(b, Disabled)
	if _, err := d.Dial(testContext(t), dst); !errors.Is(err, flow.ErrUpstream) || d.(*Pool).members[0].conditions[byTCP].faults.Load() != 0 {
		t.Error(err)
	}
	SetState(a, Enabled)
	SetState(d, Draining)
	if _, err := d.Dial(testContext(t), dst); !errors.Is(err, errOff) {
		t.Error(err)
	}
	SetState(d, Enabled)
	c2, err := d.Dial(context.Background(), dst)
	if err != nil {
		t.Fatal(err)
	}
	c2.Close()
	if up := dialer(t, "socks5h://127.0.0.1:1"); !SetState(up, Disabled) {
		t.Error("a proxy cannot be switched")
	} else if _, err := up.Dial(testContext(t), dst); !errors.Is(err, errOff) || StatusOf(up).Errors != 0 {
		t.Error(err)
	}
}
