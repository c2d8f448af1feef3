// SPDX-License-Identifier: GPL-3.0-or-later

package flow

import (
	"context"
	"errors"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"
)

// A name behind a fake IP is resolved; replies come from the fake IP. Two names with one address are kept apart.
func TestUDPFakeIPResolved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		real4, real6 := netip.MustParseAddr("192.0.2.80"), netip.MustParseAddr("2001:db8::80")
		a, b := netip.MustParseAddr("198.18.0.1"), netip.MustParseAddr("198.18.0.2")
		n := &names{
			fake: map[netip.Addr]string{a: "a.example", b: "b.example"},
			real: map[string][]netip.Addr{"a.example": {real6, real4}, "b.example": {real4}},
		}
		u := startUDP(t, n).run()
		u.send("198.18.0.1:443", "to a")
		u.send("198.18.0.2:443", "to b")
		u.send("198.18.0.1:443", "to a again")
		u.wantSent(0, "192.0.2.80:443 to a", "192.0.2.80:443 to a again")
		u.wantSent(1, "192.0.2.80:443 to b")
		u.reply(0, "192.0.2.80:443", "from a")
		u.reply(1, "192.0.2.80:443", "from b")
		u.want([]string{"198.18.0.1:443 from a", "198.18.0.2:443 from b"}, nil)
		if s := u.table.Snapshot(); s[0].Dst.Host != "a.example" || n.holds(a) != 1 {
			t.Errorf("%+v, held %d times", s, n.holds(a))
		}
		<-u.done
		if n.holds(a) != 0 || n.holds(b) != 0 {
			t.Error("still held")
		}
	})
}

// Without servers the name is sent, and replies are given to the name that has waited longest on the port.
func TestUDPFakeIPNamesSent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &names{fake: map[netip.Addr]string{
			netip.MustParseAddr("198.18.0.1"): "a.example", netip.MustParseAddr("198.18.0.2"): "b.example", netip.MustParseAddr("198.18.0.3"): "c.example",
		}}
		u := startUDP(t, n).run()
		u.send("198.18.0.1:443", "to a")
		u.send("198.18.0.2:443", "to b")
		u.send("198.18.0.3:8443", "to c")
		u.send("192.0.2.7:443", "to an address")
		u.wantSent(0, "a.example:443 to a", "b.example:443 to b", "c.example:8443 to c", "192.0.2.7:443 to an address")
		u.reply(0, "192.0.2.7:443", "an address")
		u.reply(0, "192.0.2.50:443", "a")
		u.reply(0, "192.0.2.51:443", "b")
		u.reply(0, "192.0.2.50:443", "a again")
		u.reply(0, "192.0.2.52:443", "stranger")
		u.reply(0, "192.0.2.53:8443", "c")
		u.want([]string{
			"192.0.2.7:443 an address", "198.18.0.1:443 a", "198.18.0.2:443 b", "198.18.0.1:443 a again",
			"192.0.2.52:443 stranger", "198.18.0.3:8443 c",
		}, nil)
	})
}

func TestUDPFakeIPWithoutServersOrNames(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := startUDP(t, &names{fake: map[netip.Addr]string{fakeAddr.Addr(): "example.com"}})
		u.via.names = false
		u.run()
		u.send(fakeAddr.String(), "x")
		u.want(nil, []string{fakeAddr.String() + " x refused"})
	})
}

// A reply that names its sender is the name's; one from nowhere, or of another family, is nobody's.
func TestUDPRepliesOfAllKinds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := startUDP(t, &names{fake: map[netip.Addr]string{fakeAddr.Addr(): "example.com"}}).run()
		u.send(fakeAddr.String(), "x")
		a := u.assoc(0)
		a.push(Addr{Host: "example.com", Port: 443}, "by name")
		a.push(Addr{Host: "other.example", Port: 443}, "by other name")
		a.push(Addr{IP: netip.MustParseAddr("2001:db8::1"), Port: 9}, "v6 stranger")
		a.push(Addr{IP: netip.MustParseAddr("::ffff:192.0.2.9"), Port: 9}, "mapped stranger")
		synctest.Wait()
		u.want([]string{fakeAddr.String() + " by name", "192.0.2.9:9 mapped stranger"}, nil)
		if n := u.table.Stats().Dropped["bad_source"]; n != 2 {
			t.Errorf("%d counted, want 2", n)
		}
	})
}

// A resolver that was known by a fake IP is answered for after the mapping is gone.
func TestUDPDNSToUnmapped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := startUDP(t, &names{})
		u.SetDecider(always(Resolve, nil))
		u.run()
		u.send("198.18.0.9:53", "query")
		u.want([]string{"198.18.0.9:53 re:query"}, nil)
	})
}

func TestUDPDNS(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		block := make(chan struct{})
		n := &names{exchange: func(_ context.Context, f *Flow, q []byte) ([]byte, error) {
			switch string(q) {
			case "junk":
				return nil, errors.New("not dns")
			case "slow":
				<-block
			}
			return []byte(f.Network.String() + ":" + string(q)), nil
		}}
		u := startUDP(t, n)
		u.SetDecider(always(Resolve, nil))
		u.run()
		begin := time.Now()
		u.send("127.0.0.53:53", "query")
		u.send("127.0.0.53:53", "junk")
		u.want([]string{"127.0.0.53:53 udp:query"}, nil)
		for range maxPipelined + 3 {
			u.send("127.0.0.53:53", "slow")
		}
		u.want(nil, nil)
		close(block)
		synctest.Wait()
		if got, _ := u.sink.take(); len(got) != maxPipelined {
			t.Errorf("%d answers, want %d", len(got), maxPipelined)
		}
		if d := u.table.Stats().Dropped; d["dns_busy"] != 3 || d["not_dns"] != 1 {
			t.Error(d)
		}
		<-u.done
		if took := time.Since(begin); took != idleDNS {
			t.Errorf("ended after %v", took)
		}
		if line := u.line(t); line["upstream"] != "dns" || line["result"] != ResultOK {
			t.Error(line)
		}
	})
}
