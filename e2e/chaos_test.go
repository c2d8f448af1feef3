// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/mutex-proxy/mutex/e2e/lab"
)

const (
	// chaosRate is how many connections a second the load makes.
	chaosRate = 500
	// chaosMembers is how many servers are in the pool.
	chaosMembers = 4
)

// load makes short connections at a constant rate, each of which must work. A connection that was open through a server at the moment that
// server was killed is lost with it; whoever kills says so by calling struck.
type load struct {
	l    *lab.Lab
	wg   sync.WaitGroup
	stop chan struct{}

	mu      sync.Mutex
	made    int
	failed  []string
	slowest time.Duration // connect
	strikes []time.Time
}

func startLoad(l *lab.Lab) *load {
	g := &load{l: l, stop: make(chan struct{})}
	g.wg.Go(func() {
		tick := time.NewTicker(time.Second / chaosRate)
		defer tick.Stop()
		begin, begun := time.Now(), 0
		for {
			select {
			case <-g.stop:
				return
			case <-tick.C:
				for due := int(time.Since(begin).Seconds() * chaosRate); begun < due; begun++ { // a busy machine skips ticks
					g.wg.Go(g.one)
				}
			}
		}
	})
	return g
}

// one connects, echoes and closes.
func (g *load) one() {
	begin := time.Now()
	c, err := g.l.Client.Dial("tcp", netip.AddrPortFrom(lab.OriginV4, lab.PortEcho).String(), 15*time.Second)
	took := time.Since(begin)
	connected := err == nil
	if connected {
		_ = c.SetDeadline(time.Now().Add(15 * time.Second))
		err = echoes(c)
		c.Close()
	}
	end := time.Now()
	g.mu.Lock()
	defer g.mu.Unlock()
	g.made++
	g.slowest = max(g.slowest, took)
	if err == nil {
		return
	}
	for _, at := range g.strikes {
		if connected && at.After(begin) && at.Before(end) {
			return
		}
	}
	g.failed = append(g.failed, fmt.Sprintf("after %v, connected %v: %v", took.Round(time.Millisecond), connected, err))
}

// struck notes that a server is killed now.
func (g *load) struck() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.strikes = append(g.strikes, time.Now())
}

// phase runs f and reports on the connections made meanwhile.
func (g *load) phase(t *testing.T, name string, f func()) {
	t.Helper()
	g.mu.Lock()
	g.made, g.failed, g.slowest = 0, nil, 0
	g.mu.Unlock()
	begin := time.Now()
	f()
	took := time.Since(begin)
	g.mu.Lock()
	defer g.mu.Unlock()
	t.Logf("%-28s %5d flows in %5.1f s, %d failed, slowest connect %v", name, g.made, took.Seconds(), len(g.failed), g.slowest.Round(time.Millisecond))
	for i, s := range g.failed {
		if i == 5 {
			break
		}
		t.Errorf("%s: a flow failed %s", name, s)
	}
}

// chaosConfig is a pool that watches its members closely.
func chaosConfig(extra string) string {
	ups, members := "", ""
	for i := range chaosMembers {
		ups += fmt.Sprintf(`"m%d": { "url": "socks5h://203.0.113.10:%d" }, `, i, 1101+i)
		members += fmt.Sprintf(`"m%d", `, i)
	}
	return fmt.Sprintf(`{ "upstreams": { %s }, "pools": { "all": { "members": [ %s ], "strategy": "round-robin", "hedge": "p95",
  "health": { "interval": "1s", "timeout": "500ms", "target": "%s:7", "passive": { "failures": 3, "eject": "1s" } } } },
  "contexts": { "default": { "mode": "global", "default": "all" %s } } }`, ups, members, lab.OriginV4, extra)
}

// TestChaos kills, stops, restarts and flaps members of a pool under load: no flow fails that has a healthy member.
func TestChaos(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	var members []*lab.Server
	for i := range chaosMembers {
		members = append(members, l.Serve(t, uint16(1101+i), "--log-level", "error"))
	}
	cp := l.Capture(t)
	m := l.Mprox(t)
	m.UpConfig(chaosConfig(""))
	up := func(i int) bool {
		for _, u := range m.Status().Upstreams {
			if u.Name == fmt.Sprintf("m%d", i) {
				return u.Up
			}
		}
		return false
	}
	until := func(what string, i int, want bool) {
		t.Helper()
		begin := time.Now()
		if !lab.Poll(15*time.Second, func() bool { return up(i) == want }) {
			t.Errorf("%s: not noticed", what)
		}
		t.Logf("%-28s noticed after %v", what, time.Since(begin).Round(10*time.Millisecond))
	}
	g := startLoad(l)
	kill := func(i int) {
		g.struck()
		members[i].Kill()
	}
	steady := func() { _ = lab.Poll(time.Second, func() bool { return false }) }
	g.phase(t, "all well", steady)
	g.phase(t, "one killed", func() { kill(0); until("killed", 0, false); steady() })
	g.phase(t, "that one back", func() { members[0].Restart(); until("restarted", 0, true) })
	g.phase(t, "one hangs (SIGSTOP)", func() { members[1].Signal(syscall.SIGSTOP); until("hanging", 1, false); steady() })
	g.phase(t, "that one goes on (SIGCONT)", func() { members[1].Signal(syscall.SIGCONT); until("going on", 1, true) })
	g.phase(t, "one flaps", func() {
		for range 20 {
			kill(2)
			members[2].Restart()
		}
	})
	g.phase(t, "all but one killed", func() {
		for i := range chaosMembers - 1 {
			kill(i)
		}
		steady()
	})
	for i := range chaosMembers - 1 {
		members[i].Restart()
	}
	g.phase(t, "they are back", func() {
		for i := range chaosMembers - 1 {
			until("restarted", i, true)
		}
	})
	chaosGentle(t, g, m, l)
	close(g.stop)
	g.wg.Wait()
	chaosAllDown(t, l, members)
	allow := lab.Allow{Direct: lab.LANPrefixes}
	for _, s := range members {
		allow.Upstreams = append(allow.Upstreams, s.Addr)
	}
	allow.Check(t, cp.Packets())
}

// chaosGentle drains, reloads and switches under load, with connections open that must live on.
func chaosGentle(t *testing.T, g *load, m *lab.Mprox, l *lab.Lab) {
	t.Helper()
	var held []net.Conn
	for range 4 * chaosMembers {
		held = append(held, dialOrigin(t, l, lab.OriginV4, lab.PortHold))
	}
	alive := func(when string) {
		t.Helper()
		for i, c := range held {
			_, _ = io.WriteString(c, "still there\n")
			if line, err := bufio.NewReader(c).ReadString('\n'); line != "still there\n" {
				t.Errorf("%s: connection %d: %q %v", when, i, line, err)
			}
		}
	}
	g.phase(t, "one drained", func() {
		if r := m.CLI("upstreams", "drain", "m3"); r.Code != 0 {
			t.Error(r)
		}
		alive("drain")
		if r := m.CLI("upstreams", "enable", "m3"); r.Code != 0 {
			t.Error(r)
		}
	})
	g.phase(t, "five reloads", func() {
		for i := range 5 {
			m.WriteConfig(chaosConfig(fmt.Sprintf(`, "rules": [ { "port": %d, "upstream": "reject" } ]`, 100+i)))
			if r := m.CLI("reload"); r.Code != 0 {
				t.Error(r)
			}
		}
		alive("reload")
	})
}

// chaosAllDown kills all members: flows fail, at once, and never go direct; and work again when one is back.
func chaosAllDown(t *testing.T, l *lab.Lab, members []*lab.Server) {
	t.Helper()
	for _, s := range members {
		s.Kill()
	}
	var failed atomic.Int32
	var wg sync.WaitGroup
	for range 100 {
		wg.Go(func() {
			c, err := l.Client.Dial("tcp", netip.AddrPortFrom(lab.OriginV4, lab.PortEcho).String(), 15*time.Second)
			if err == nil {
				c.Close()
			} else if isErrno(err, refusals...) {
				failed.Add(1)
			}
		})
	}
	within(t, 10*time.Second, "failing with all members down", wg.Wait)
	if failed.Load() != 100 {
		t.Errorf("%d of 100 flows failed with all members down", failed.Load())
	}
	members[0].Restart()
	if !lab.Poll(10*time.Second, func() bool { return curl(t, l, originURL(false, "/bytes/10")).Code == 0 }) {
		t.Error("no connection after a member is back")
	}
	if bad := l.Origin.AllFrom(lab.ExitV4, lab.ExitV6); len(bad) > 0 {
		t.Errorf("%d flows reached the origin without a proxy", len(bad))
	}
}
