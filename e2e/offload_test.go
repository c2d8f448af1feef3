// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"bufio"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mutex-proxy/mutex/e2e/lab"
)

// TestOffloadPath: a flow is adopted into the kernel, says so, and counts every byte.
func TestOffloadPath(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Microsocks(t, 1082)
	m := l.Mprox(t)
	m.Up("--proxy", s.URL(), "--dns", "off")
	for _, a := range []netip.Addr{lab.OriginV4, lab.OriginV6} {
		c := dialOrigin(t, l, a, lab.PortEcho)
		if _, err := c.Write([]byte("hello\n")); err != nil {
			t.Fatal(err)
		}
		if line, err := bufio.NewReader(c).ReadString('\n'); err != nil || line != "hello\n" {
			t.Fatalf("echo: %q, %v", line, err)
		}
		var f lab.Flow
		lab.Eventually(t, 5*time.Second, "the flow", func() bool {
			for _, f = range m.Flows() {
				if f.Src == c.LocalAddr().String() {
					return f.BytesUp == 6 && f.BytesDown == 6
				}
			}
			return false
		})
		if f.Path != "kernel" || f.PathReason != "" {
			t.Errorf("path %q, because %q", f.Path, f.PathReason)
		}
		c.Close()
	}
}

// TestOffloadOff: the same flow stays in netstack if the context, or a rule, says so, and says why; TLS to the upstream has no choice.
func TestOffloadOff(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Microsocks(t, 1082)
	m := l.Mprox(t)
	m.UpConfig(globalConfig(s, fmt.Sprintf(`"dns": { "mode": "off" }, "offload": "off", "rules": [ { "port": %d, "upstream": "p", "offload": "auto" } ],`, lab.PortBanner)))
	for port, want := range map[uint16]string{lab.PortEcho: "netstack", lab.PortBanner: "kernel"} {
		c := dialOrigin(t, l, lab.OriginV4, port)
		var got lab.Flow
		lab.Eventually(t, 5*time.Second, "the flow", func() bool {
			i := slices.IndexFunc(m.Flows(), func(f lab.Flow) bool { return f.Src == c.LocalAddr().String() && f.Path != "" })
			if i >= 0 {
				got = m.Flows()[i]
			}
			return i >= 0
		})
		if got.Path != want || want == "netstack" && got.PathReason != "off" {
			t.Errorf("port %d: path %q, because %q; want %s", port, got.Path, got.PathReason, want)
		}
	}
}

// offloadKills is how often TestOffloadKilled kills the daemon.
const offloadKills = 20

// TestOffloadKilled kills the daemon at random instants while flows are being adopted and move bytes. Not one of their packets may leave the
// machine, neither then nor while the applications go on writing to what the daemon has left them, and cleanup leaves nothing.
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
	adopted := 0
	for i := range offloadKills {
		m.Up("-c", m.ConfigPath())
		cp.Reset()
		var clients sync.WaitGroup
		var moved atomic.Int64
		stop := make(chan struct{})
		for k := range 8 {
			a := []netip.Addr{lab.OriginV4, lab.OriginV6}[k%2]
			clients.Go(func() {
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
					for range 50 { // goes on writing after the daemon has died
						if _, err := c.Write(lab.Block(1000)); err != nil {
							break
						}
						_ = c.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
						n, _ := c.Read(make([]byte, 1000))
						moved.Add(int64(n))
					}
					c.Close()
				}
			})
		}
		lab.Eventually(t, 5*time.Second, "bytes", func() bool { return moved.Load() > 0 })
		if slices.ContainsFunc(m.Flows(), func(f lab.Flow) bool { return f.Path == "kernel" }) {
			adopted++
		}
		after := time.Duration(rnd.Int64N(int64(100 * time.Millisecond)))
		lab.Poll(after, m.Exited)
		m.Kill()
		lab.Never(t, 200*time.Millisecond, "a packet past the guard", func() bool { return len(upstreamOnly(s).Leaks(cp.Packets())) > 0 })
		upstreamOnly(s).Check(t, cp.Packets())
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
	if adopted == 0 {
		t.Error("no flow was adopted: nothing was tested")
	}
}
