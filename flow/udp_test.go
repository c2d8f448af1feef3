// SPDX-License-Identifier: GPL-3.0-or-later

package flow

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func TestUDPLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := startUDP(t, nil).run()
		begin := time.Now()
		u.send("192.0.2.1:5000", "one")
		u.send("192.0.2.2:5000", "two")
		u.send("192.0.2.1:5000", "three")
		u.wantSent(0, "192.0.2.1:5000 one", "192.0.2.2:5000 two", "192.0.2.1:5000 three")
		u.reply(0, "192.0.2.1:5000", "yes")
		u.reply(0, "203.0.113.9:7777", "stranger") // endpoint-independent filtering
		u.want([]string{"192.0.2.1:5000 yes", "203.0.113.9:7777 stranger"}, nil)
		if s := u.table.Snapshot(); len(s) != 2 || s[0].State != StateEstablished || s[0].PacketsUp != 2 || s[0].BytesUp != 8 ||
			s[0].PacketsDown != 2 || s[0].Upstream != "up" {
			t.Errorf("%+v", s)
		}
		<-u.done
		if took := time.Since(begin); took != idleUDP {
			t.Errorf("ended after %v, want %v", took, idleUDP)
		}
		if u.made() != 1 || !u.assoc(0).isClosed() {
			t.Errorf("%d associations, closed %v", u.made(), u.assoc(0).isClosed())
		}
		if d := cmp.Diff([]string{"udp up ok", "udp up ok"}, u.rec.ended); d != "" {
			t.Error(d)
		}
		if n := len(u.logs.All()); n != 2 {
			t.Errorf("%d lines logged, want one a flow", n)
		}
	})
}

func TestUDPIdleByProtocol(t *testing.T) {
	for port, want := range map[int]time.Duration{53: idleDNS, 443: idleQUIC, 5000: idleUDP} {
		synctest.Test(t, func(t *testing.T) {
			u := startUDP(t, nil).run()
			begin := time.Now()
			u.send(fmt.Sprintf("192.0.2.1:%d", port), "x")
			<-time.After(want - time.Second)
			u.reply(0, fmt.Sprintf("192.0.2.1:%d", port), "y") // replies keep it alive
			<-u.done
			if took := time.Since(begin); took != 2*want-time.Second {
				t.Errorf("port %d: ended after %v", port, took)
			}
		})
	}
}

func TestUDPWithoutTraffic(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begin := time.Now()
		<-startUDP(t, nil).run().done
		if took := time.Since(begin); took != idleDNS {
			t.Errorf("ended after %v", took)
		}
	})
}

func TestUDPRefusals(t *testing.T) {
	for name, c := range map[string]struct {
		decider Decider
		dst     string
		want    []string
	}{
		"block":          {always(Block, nil), "192.0.2.1:443", []string{"192.0.2.1:443 x refused"}},
		"sniff":          {always(Sniff, nil), "192.0.2.1:443", []string{"192.0.2.1:443 x refused"}},
		"drop":           {always(Drop, nil), "192.0.2.1:443", nil},
		"no udp":         {always(Forward, &dialer{name: "up"}), "192.0.2.1:443", []string{"192.0.2.1:443 x refused"}},
		"upstream fails": {always(Forward, refusing(ErrUpstream)), "192.0.2.1:443", []string{"192.0.2.1:443 x host_unreachable"}},
		"no ipv6":        {always(Forward, refusing(ErrNetUnreachable)), "192.0.2.1:443", []string{"192.0.2.1:443 x net_unreachable"}},
		"unmapped":       {always(Forward, refusing(nil)), "198.18.0.9:443", []string{"198.18.0.9:443 x refused"}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				u := startUDP(t, &names{})
				u.SetDecider(c.decider)
				u.run()
				begin := time.Now()
				u.send(c.dst, "x")
				if time.Since(begin) != 0 {
					t.Error("not at once")
				}
				u.want(nil, c.want)
				u.send(c.dst, "x")
				u.want(nil, c.want)
				if len(u.logs.All()) != 0 || len(u.table.Snapshot()) != 1 {
					t.Errorf("%d lines, %d flows: want one flow, still there", len(u.logs.All()), len(u.table.Snapshot()))
				}
				<-u.done
				if n := len(u.logs.All()); n != 1 {
					t.Errorf("%d lines logged, want 1", n)
				}
			})
		})
	}
}

func refusing(err error) *dialer {
	return &dialer{name: "up", listen: func(context.Context, *Flow) (PacketConn, error) { return nil, err }}
}

// An upstream that fails is asked once a second at most, and heals.
func TestUDPUpstreamHeals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := startUDP(t, nil)
		good, tries, bad := u.via.listen, 0, true
		u.via.listen = func(ctx context.Context, f *Flow) (PacketConn, error) {
			if tries++; bad {
				return nil, fmt.Errorf("%w: down", ErrUpstream)
			}
			return good(ctx, f)
		}
		u.run()
		for range 10 {
			u.send("192.0.2.1:5000", "x")
			u.send("192.0.2.2:5000", "x")
		}
		if _, refused := u.sink.take(); len(refused) != 20 || tries != 1 {
			t.Errorf("%d refused, %d tries", len(refused), tries)
		}
		bad = false
		<-time.After(refusedFor)
		u.send("192.0.2.1:5000", "again")
		u.send("192.0.2.2:5000", "again")
		u.wantSent(0, "192.0.2.1:5000 again", "192.0.2.2:5000 again")
		u.want(nil, nil)
		if d := cmp.Diff([]string{"up host_unreachable"}, u.rec.errors); d != "" {
			t.Error(d)
		}
	})
}

// What is sent while the association is being made waits, in order, and other upstreams do not.
func TestUDPHeldWhileAssociating(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := startUDP(t, nil)
		fast := *u.via
		slow := &dialer{name: "slow", listen: func(ctx context.Context, f *Flow) (PacketConn, error) {
			<-time.After(3 * time.Second)
			return u.via.listen(ctx, f)
		}}
		u.SetDecider(decider{decide: func(f *Flow) Decision {
			if f.Orig.Port() == 1 {
				return Decision{Action: Forward, Via: slow}
			}
			return Decision{Action: Forward, Via: &fast}
		}})
		u.run()
		for i := range maxHeld + 5 {
			u.send("192.0.2.1:1", fmt.Sprint(i))
		}
		u.send("192.0.2.2:2", "at once")
		u.wantSent(0, "192.0.2.2:2 at once")
		<-time.After(3 * time.Second)
		synctest.Wait()
		u.send("192.0.2.1:1", "last")
		var want []string
		for i := range maxHeld {
			want = append(want, fmt.Sprint("192.0.2.1:1 ", i))
		}
		u.wantSent(1, append(want, "192.0.2.1:1 last")...)
		if n := u.table.Stats().Dropped["queue_full"]; n != 5 {
			t.Errorf("%d counted as dropped, want 5", n)
		}
	})
}

func TestUDPHeldIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := startUDP(t, nil)
		u.via.listen = func(ctx context.Context, _ *Flow) (PacketConn, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		u.held.Store(maxAllHeldBytes - 70000)
		u.run()
		big := strings.Repeat("x", 60000)
		for i := range 3 {
			u.send(fmt.Sprintf("192.0.2.%d:1", i), big)
		}
		if n := u.table.Stats().Dropped["queue_full"]; n != 2 {
			t.Errorf("%d dropped, want 2", n)
		}
		<-time.After(DefaultDialTimeout)
		synctest.Wait()
		if n := u.held.Load(); n != maxAllHeldBytes-70000 {
			t.Errorf("%d bytes held after the end", n)
		}
	})
}

func TestUDPAssociationTimesOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := startUDP(t, nil)
		u.via.listen = func(ctx context.Context, _ *Flow) (PacketConn, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		u.run()
		u.send("192.0.2.1:5000", "x")
		<-time.After(DefaultDialTimeout)
		synctest.Wait()
		u.want(nil, []string{"192.0.2.1:5000 x timeout"})
	})
}

// Associations beyond the bound wait for their turn within the time-out, and connections do not wait for them.
func TestUDPAssociationsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := startUDP(t, nil).run()
		for range maxAssocs {
			u.rig.assocs <- struct{}{}
		}
		u.send("192.0.2.1:7", "a")
		u.via.dial = failing(ErrRefused).dial
		p := &pending{}
		u.TCP(t.Context(), appAddr, webAddr, p)
		if p.reason != ReasonRefused {
			t.Errorf("a connection beside them: %v", p.reason)
		}
		if n := u.made(); n != 0 {
			t.Errorf("%d associations beyond the bound", n)
		}
		<-u.rig.assocs
		synctest.Wait()
		if n := u.made(); n != 1 {
			t.Errorf("%d associations after a turn was given back", n)
		}
	})
}

// The server closed the association: the next datagram makes another.
func TestUDPAssociationLost(t *testing.T) {
	for name, lose := range map[string]func(*fakeAssoc){
		"seen by the reader": func(a *fakeAssoc) { a.fail(fmt.Errorf("%w: gone", ErrUpstream)) },
		"seen by the writer": func(a *fakeAssoc) {
			a.wmu.Lock()
			defer a.wmu.Unlock()
			a.writeErr = func(Datagram) error { return fmt.Errorf("%w: gone", ErrUpstream) }
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				u := startUDP(t, nil).run()
				u.send("192.0.2.1:5000", "one")
				u.send("192.0.2.2:5000", "one")
				<-time.After(5 * time.Second)
				lose(u.assoc(0))
				synctest.Wait()
				if name == "seen by the writer" {
					u.send("192.0.2.1:5000", "lost")
				}
				if !u.assoc(0).isClosed() || len(u.table.Snapshot()) != 0 {
					t.Errorf("closed %v, %d flows", u.assoc(0).isClosed(), len(u.table.Snapshot()))
				}
				u.send("192.0.2.1:5000", "two")
				u.wantSent(1, "192.0.2.1:5000 two")
				u.reply(1, "192.0.2.1:5000", "yes")
				u.want([]string{"192.0.2.1:5000 yes"}, nil)
				// One that breaks as soon as it is made is not made again for every datagram.
				u.assoc(1).fail(fmt.Errorf("%w: gone", ErrUpstream))
				synctest.Wait()
				for range 5 {
					u.send("192.0.2.1:5000", "x")
				}
				if u.made() != 2 {
					t.Errorf("%d associations, want 2", u.made())
				}
				if _, refused := u.sink.take(); len(refused) != 5 {
					t.Errorf("%d refused, want 5", len(refused))
				}
				<-time.After(refusedFor)
				u.send("192.0.2.1:5000", "three")
				u.wantSent(2, "192.0.2.1:5000 three")
			})
		})
	}
}

// An error about one datagram is that one's alone.
func TestUDPDatagramErrors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := startUDP(t, nil).run()
		u.send("192.0.2.1:5000", "first")
		u.assoc(0).writeErr = func(d Datagram) error {
			switch {
			case len(d.Buf) > 65497:
				return fmt.Errorf("too large: %w", unix.EMSGSIZE)
			case d.Addr.Port == 6:
				return ErrNetUnreachable
			}
			return nil
		}
		big := strings.Repeat("b", 65507)
		u.in.mu.Lock() // one batch
		for _, d := range []struct{ to, payload string }{{"192.0.2.1:5000", "a"}, {"192.0.2.1:5000", big}, {"192.0.2.1:5000", "c"}, {"192.0.2.1:6", "d"}} {
			u.in.ds = append(u.in.ds, Datagram{AddrFrom(netip.MustParseAddrPort(d.to)), []byte(d.payload)})
		}
		u.in.cond.Broadcast()
		u.in.mu.Unlock()
		synctest.Wait()
		u.wantSent(0, "192.0.2.1:5000 first", "192.0.2.1:5000 a", "192.0.2.1:5000 c")
		u.want(nil, []string{"192.0.2.1:5000 " + big + " prohibited", "192.0.2.1:6 d net_unreachable"})
		if u.made() != 1 || u.table.Stats().Dropped["too_large"] != 1 {
			t.Errorf("%d associations, %v", u.made(), u.table.Stats().Dropped)
		}
	})
}

func TestUDPLargestDatagram(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := startUDP(t, nil).run()
		big := strings.Repeat("x", 65507)
		u.send("192.0.2.1:5000", "small")
		u.send("192.0.2.1:5000", big)
		u.wantSent(0, "192.0.2.1:5000 small", "192.0.2.1:5000 "+big)
		u.reply(0, "192.0.2.1:5000", big)
		u.want([]string{"192.0.2.1:5000 " + big}, nil)
	})
}

func TestUDPReload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := startUDP(t, nil).run()
		u.send("192.0.2.1:5000", "one")
		u.send("192.0.2.2:5000", "one")
		// Still allowed, even through another upstream: the flow lives on where it is.
		other := &dialer{name: "other", listen: u.via.listen}
		u.SetDecider(always(Forward, other))
		u.send("192.0.2.1:5000", "two")
		u.wantSent(0, "192.0.2.1:5000 one", "192.0.2.2:5000 one", "192.0.2.1:5000 two")
		u.send("192.0.2.3:5000", "new")
		u.wantSent(1, "192.0.2.3:5000 new")
		// Blocked: what the table does not find is found by the next datagram.
		u.SetDecider(always(Block, nil))
		u.send("192.0.2.1:5000", "three")
		u.want(nil, []string{"192.0.2.1:5000 three refused"})
		if n := u.table.KillIf(ErrRules, func(i *Info) bool { return i.Upstream != "reject" }); n != 2 {
			t.Errorf("killed %d, want 2", n)
		}
		if !u.assoc(0).isClosed() || !u.assoc(1).isClosed() {
			t.Error("associations without flows are open")
		}
		u.send("192.0.2.2:5000", "x")
		u.want(nil, []string{"192.0.2.2:5000 x refused"})
	})
}

func TestUDPKill(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := startUDP(t, nil).run()
		u.send("192.0.2.1:5000", "one")
		u.table.Kill(u.table.Snapshot()[0].ID)
		if line := u.line(t); line["result"] != ResultKilled || !u.assoc(0).isClosed() {
			t.Errorf("%v, closed %v", line, u.assoc(0).isClosed())
		}
		u.send("192.0.2.1:5000", "two")
		u.wantSent(1, "192.0.2.1:5000 two")
	})
}

// A socket ends with what it waits for given back.
func TestUDPHeldAtShutdown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := startUDP(t, nil)
		u.via.listen = func(ctx context.Context, _ *Flow) (PacketConn, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		u.run()
		u.send("192.0.2.1:1", "x")
		u.Close()
		if n := u.held.Load(); n != 0 {
			t.Errorf("%d bytes held after Close", n)
		}
	})
}

func TestUDPShutdown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := startUDP(t, &names{exchange: func(ctx context.Context, _ *Flow, _ []byte) ([]byte, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}})
		never := &dialer{name: "never", listen: func(ctx context.Context, _ *Flow) (PacketConn, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}}
		u.SetDecider(decider{decide: func(f *Flow) Decision {
			switch f.Orig.Port() {
			case 53:
				return Decision{Action: Resolve}
			case 1:
				return Decision{Action: Forward, Via: never}
			}
			return Decision{Action: Forward, Via: u.via}
		}})
		u.run()
		u.send("192.0.2.1:5000", "x")
		u.send("192.0.2.1:53", "x")
		u.send("192.0.2.1:1", "x")
		u.Close()
		<-u.done
		for _, l := range u.logs.All() {
			if r := l.ContextMap()["result"]; r != ResultShutdown {
				t.Errorf("result %v: %v", r, l.ContextMap())
			}
		}
		if len(u.logs.All()) != 3 || len(u.rec.errors) != 0 {
			t.Errorf("%d lines, upstream blamed: %v", len(u.logs.All()), u.rec.errors)
		}
		u.UDP(t.Context(), appAddr, u.in, u.sink) // returns at once
	})
}

func TestUDPPeersAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := startUDP(t, nil)
		u.table.SetMaxFlows(2 * maxPeers)
		u.run()
		for i := range maxPeers + 10 {
			u.in.push(Addr{IP: netip.AddrFrom4([4]byte{192, 0, byte(i >> 8), byte(i)}), Port: 5000}, "x")
		}
		synctest.Wait()
		if n := u.table.Len(); n != maxPeers {
			t.Errorf("%d flows, want %d", n, maxPeers)
		}
		if st := u.table.Stats(); st.Results[ResultKey{UDP, "up", ResultEvicted}] != 10 {
			t.Errorf("%v", st.Results)
		}
	})
}

// The table's own bound ends flows of the socket that is asking for more.
func TestUDPTableFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := startUDP(t, nil)
		u.table.SetMaxFlows(3)
		u.run()
		for i := range 10 {
			u.send(fmt.Sprintf("192.0.2.%d:5000", i), "x")
			<-time.After(time.Second)
		}
		if u.table.Len() != 3 || u.table.Stats().Evicted != 7 || u.made() != 1 {
			t.Errorf("%d flows, %d evicted, %d associations", u.table.Len(), u.table.Stats().Evicted, u.made())
		}
	})
}
