// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mutex-proxy/mutex/e2e/lab"
)

// TestOffloadKilled kills the daemon at random instants: before the first flow, while flows are being adopted, while they move bytes. Not one of
// their packets may leave the machine, neither then nor while the applications go on writing to what the daemon has left them, and cleanup leaves
// nothing. The long version is MPROX_KILLS=200.
func TestOffloadKilled(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Microsocks(t, 1082)
	m := l.Mprox(t)
	m.WriteConfig(globalConfig(s, `"dns": { "mode": "off" },`))
	before := l.Snapshot(t)
	cp := l.Capture(t)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	var adopted, early int
	kills := times(t, "MPROX_KILLS", 12)
	for i := range kills {
		m.Up("-c", m.ConfigPath())
		cp.Reset()
		var clients sync.WaitGroup
		var moved atomic.Int64
		stop := make(chan struct{})
		for k := range 8 {
			a := []netip.Addr{lab.OriginV4, lab.OriginV6}[k%2]
			clients.Go(func() { writeOn(l, a, &moved, stop) })
		}
		after := time.Duration(rnd.Int64N(int64(100 * time.Millisecond)))
		lab.Poll(after, m.Exited)
		if moved.Load() == 0 {
			early++
		} else {
			adopted++
		}
		m.Kill()
		lab.Never(t, 200*time.Millisecond, "a packet past the guard", func() bool { return len(upstreamOnly(s).Leaks(cp.Packets())) > 0 })
		close(stop)
		clients.Wait()
		upstreamOnly(s).Check(t, cp.Packets())
		if r := m.CLI("cleanup"); r.Code != 0 {
			t.Fatalf("kill %d after %v: cleanup: %v", i, after, r)
		}
		var diff string
		if !lab.Poll(2*time.Second, func() bool { diff = before.Diff(l.Snapshot(t)); return diff == "" }) {
			t.Fatalf("kill %d after %v: cleanup left:\n%s", i, after, diff)
		}
	}
	t.Logf("%d kills before the first byte, %d after", early, adopted)
	if adopted == 0 {
		t.Error("no flow has moved a byte: nothing was tested")
	}
}

// writeOn opens connections and writes to them until stop is closed, also when the daemon has died.
func writeOn(l *lab.Lab, a netip.Addr, moved *atomic.Int64, stop <-chan struct{}) {
	for {
		select {
		case <-stop:
			return
		default:
		}
		c, err := l.Client.Dial("tcp", netip.AddrPortFrom(a, lab.PortEcho).String(), time.Second)
		if err != nil {
			continue
		}
		for range 10 {
			if _, err := c.Write(lab.Block(1000)); err != nil {
				break
			}
			_ = c.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
			n, _ := c.Read(make([]byte, 1000))
			moved.Add(int64(n))
		}
		c.Close()
	}
}

// TestOffloadStateLost takes from adopted flows what the kernel knows of them (connection tracking, the ip rules, their table, the nftables), while
// they move bytes and while they are idle. None of their packets leaves; the flows go on when the daemon has restored what was lost.
func TestOffloadStateLost(t *testing.T) {
	for _, c := range []struct {
		name string
		lose func(t *testing.T, w *wire, before lab.Snapshot)
	}{
		{"conntrack -F", func(t *testing.T, w *wire, _ lab.Snapshot) { t.Helper(); w.Client.Run(t, "conntrack", "-F") }},
		{"nft flush ruleset", func(t *testing.T, w *wire, _ lab.Snapshot) { t.Helper(); w.Client.Run(t, "nft", "flush", "ruleset") }},
		// Without the rules of the bypass mark too, netstack would get, and reset, what the daemon sends to the upstream.
		{"ip rule del", func(t *testing.T, w *wire, _ lab.Snapshot) {
			t.Helper()
			for fam, key := range map[string]string{"-4": "rule4", "-6": "rule6"} {
				for _, line := range w.Snapshot(t)[key] {
					if pref, rest, _ := strings.Cut(line, ":"); strings.Contains(rest, "fwmark 0x4f000000") {
						w.Client.Run(t, "ip", fam, "rule", "del", "pref", pref)
					}
				}
			}
		}},
		{"ip route flush", func(t *testing.T, w *wire, before lab.Snapshot) { t.Helper(); removeRoutes(t, w.Lab, before) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			w := newWire(t, "auto", lab.Options{})
			w.m.Stop()
			before := w.Snapshot(t)
			w.m.Up("-c", w.m.ConfigPath())
			cp := w.Capture(t)
			defer func() { upstreamOnly(w.s).Check(t, cp.Packets()) }()
			var pairs [][2]net.Conn
			for _, a := range ways() {
				for range 4 {
					app, far := w.open(t, a)
					w.check(t, app, far)
					pairs = append(pairs, [2]net.Conn{app, far})
				}
			}
			whole := w.Snapshot(t)
			for round := range 2 {
				var wg sync.WaitGroup
				begun := make(chan struct{})
				for i, p := range pairs {
					from, to := p[i%2], p[1-i%2] // half of the origin's, half of the application's
					if round%2 == 0 {            // busy: a stream is under way
						wg.Go(func() { stream(t, from, to, func() { begun <- struct{}{} }) })
					}
				}
				if round%2 == 0 {
					for range pairs {
						<-begun
					}
				}
				c.lose(t, w, before)
				if round%2 == 1 { // idle: the first word afterwards
					for i, p := range pairs {
						from, to := p[i%2], p[1-i%2]
						wg.Go(func() { stream(t, from, to, func() {}) })
					}
				}
				wg.Wait()
				if diff := ""; !lab.Poll(lab.Patience, func() bool { diff = whole.Diff(w.Snapshot(t)); return diff == "" }) {
					t.Errorf("not restored:\n%s", diff)
				}
			}
			for _, p := range pairs {
				w.check(t, p[0], p[1])
			}
		})
	}
}

// TestUntracked: what conntrack does not know of the daemon's connections, or takes for invalid (it has missed some of it: nftables were flushed and
// are back), goes to the upstream all the same, not into the TUN, where netstack would reset it.
func TestUntracked(t *testing.T) {
	for _, offload := range []string{"auto", "off"} {
		t.Run("offload "+offload, func(t *testing.T) {
			t.Parallel()
			w := newWire(t, offload, lab.Options{})
			cp := w.Capture(t)
			defer func() { upstreamOnly(w.s).Check(t, cp.Packets()) }()
			pairs := w.openBoth(t)
			w.Client.Run(t, "nft", `table inet untracked {
  chain out { type filter hook output priority raw; tcp dport 1083 notrack; }
  chain in { type filter hook prerouting priority raw; tcp sport 1083 notrack; }
}`)
			for _, a := range ways() {
				app, far := w.open(t, a)
				pairs = append(pairs, [2]net.Conn{app, far})
			}
			for _, p := range pairs {
				stream(t, p[0], p[1], func() {})
				stream(t, p[1], p[0], func() {})
				w.check(t, p[0], p[1])
			}
		})
	}
}

// stream sends a few MB and calls begun when the first have arrived.
func stream(t *testing.T, from, to net.Conn, begun func()) {
	t.Helper()
	const n = 8 << 20
	begin := time.Now()
	deadline := begin.Add(20 * time.Second)
	_, _ = from.SetWriteDeadline(deadline), to.SetReadDeadline(deadline)
	sent := make(chan error, 1)
	go func() {
		_, err := io.Copy(from, lab.DataReader(n))
		sent <- err
	}()
	var first [1]byte
	_, err := io.ReadFull(to, first[:])
	begun()
	if err == nil {
		_, err = io.CopyN(io.Discard, to, n-1)
	}
	if err != nil {
		t.Errorf("%v to %v after %v: read: %v", from.LocalAddr(), to.LocalAddr(), time.Since(begin), err)
		_ = from.SetWriteDeadline(time.Now())
	}
	if err := <-sent; err != nil {
		t.Errorf("%v to %v: write: %v", from.LocalAddr(), to.LocalAddr(), err)
	}
}
