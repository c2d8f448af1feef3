// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/e2e/lab"
)

// TestProbesLeakWithoutCapture shows that the leak test can fail: with nothing captured, every kind of probe is seen on the uplink and
// every resolver on loopback is asked.
func TestProbesLeakWithoutCapture(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	trap := lab.NewTrap(t, l.Client, lab.LoopbackResolvers()...)
	cp := l.Capture(t)
	answered := l.Client.Probe(lab.Probes())
	t.Logf("answered: %s", strings.Join(answered, ", "))
	leaks := lab.Allow{Direct: lab.LANPrefixes}.Leaks(cp.Packets())
	for _, want := range []struct {
		what  string
		proto uint8
		dst   netip.Addr
		port  uint16
	}{
		{"tcp4", unix.IPPROTO_TCP, lab.OriginV4, lab.PortEcho},
		{"tcp6", unix.IPPROTO_TCP, lab.OriginV6, lab.PortEcho},
		{"udp4", unix.IPPROTO_UDP, lab.OriginV4, lab.PortEcho},
		{"udp6", unix.IPPROTO_UDP, lab.OriginV6, lab.PortEcho},
		{"icmp4", unix.IPPROTO_ICMP, lab.OriginV4, 0},
		{"icmp6", unix.IPPROTO_ICMPV6, lab.OriginV6, 0},
		{"sctp4", 132, lab.OriginV4, 0},
		{"gre6", 47, lab.OriginV6, 0},
		{"dns to the LAN", unix.IPPROTO_UDP, lab.LANV4, 53},
		{"dns to the LAN by v6", unix.IPPROTO_UDP, lab.LANULA, 53},
		{"dns by tcp", unix.IPPROTO_TCP, lab.LANV4, 53},
		{"dns to a remote", unix.IPPROTO_UDP, lab.OriginV6, 53},
		{"multicast", unix.IPPROTO_UDP, netip.MustParseAddr("239.1.2.3"), 9999},
	} {
		found := false
		for _, p := range leaks {
			found = found || p.Proto == want.proto && p.Dst == want.dst && p.DPort == want.port
		}
		if !found {
			t.Errorf("the capture does not show %s", want.what)
		}
	}
	if n := len(trap.Names()); n < 6 {
		t.Errorf("%d queries at the resolvers on loopback, want 6", n)
	}
	for _, p := range lab.Probes() {
		// What the origin, the traps or the kernel answer must have been answered: a probe that never works proves nothing.
		silent := strings.HasPrefix(p.Name, "packet") || strings.Contains(p.Name, "PKTINFO") || strings.Contains(p.Name, "raw") || strings.Contains(p.Name, "multicast") ||
			strings.HasPrefix(p.Name, "dns") && !strings.Contains(p.Name, "127.") && !strings.Contains(p.Name, "::1 ")
		if !silent && !slices.Contains(answered, p.Name) {
			t.Errorf("probe %q was not answered", p.Name)
		}
	}
}

// TestLeakGlobal records the uplink through the whole life of a daemon: start, work, foreign routes, reload, kill -9, next start, down.
func TestLeakGlobal(t *testing.T) {
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, false)
	before := l.Snapshot(t)
	trap := lab.NewTrap(t, l.Client, lab.LoopbackResolvers()...)
	cp, mon := l.Capture(t), l.StartMonitor(t)
	allow := upstreamOnly(s)
	m := l.Mprox(t)
	m.WriteConfig(globalConfig(s, `"dns": { "mode": "fakeip" },`))
	check := func(phase string) {
		t.Helper()
		answered := l.Client.Probe(lab.Probes())
		for _, a := range answered {
			if strings.Contains(a, "SO_BINDTODEV") {
				t.Errorf("%s: %s was answered", phase, a)
			}
		}
		if !slices.Contains(answered, "tcp4 plain") || !slices.Contains(answered, "udp6 plain") {
			t.Errorf("%s: not carried: only %v", phase, answered)
		}
		if n := len(allow.Leaks(cp.Packets())); n > 0 && phase != "start" {
			t.Errorf("%s: leaks", phase)
			allow.Check(t, cp.Packets())
		}
		trap.Check(t)
		cp.Reset()
		trap.Reset()
	}

	// Start, in the middle of traffic.
	started := time.Now()
	flood := l.StartFlood(t)
	m.Up("-c", m.ConfigPath())
	flood.Stop()
	first := mon.First(started)
	if first.IsZero() {
		t.Fatal("mprox changed nothing in the kernel")
	}
	pkts := cp.Packets()
	if len(allow.Leaks(pkts)) == 0 {
		t.Error("nothing left before the start: the flood proves nothing")
	}
	allow.Check(t, since(pkts, first.Add(startGrace)))
	t.Logf("start: first change after %v, last leak %v after it", first.Sub(started), lastLeak(allow, pkts).Sub(first))
	cp.Reset()
	trap.Reset()
	check("running")

	// TunnelVision: routes that win over a default route must not win over the capture.
	routes := []string{"0.0.0.0/1 via 192.168.77.1", "128.0.0.0/1 via 192.168.77.1", "198.51.100.0/25 dev eth0", "198.51.100.80/32 via 192.168.77.53", "2000::/4 via 2001:db8:1::1"}
	flood = l.StartFlood(t)
	for _, route := range routes {
		l.Client.IP(t, "route add "+route)
	}
	check("with foreign routes")
	checkProxied(t, l)

	m.WriteConfig(globalConfig(s, `"dns": { "mode": "fakeip" }, "rules": [ { "port": 9999, "upstream": "reject" } ],`))
	if r := m.CLI("reload"); r.Code != 0 {
		t.Errorf("reload: %v", r)
	}
	check("after reload")

	m.Kill()
	if answered := l.Client.Probe(lab.Probes()); len(answered) > 0 {
		t.Errorf("answered while the daemon is dead: %v", answered)
	}
	m.Up("-c", m.ConfigPath())
	flood.Stop()
	check("after the next start")
	checkProxied(t, l)

	for _, route := range routes {
		l.Client.IP(t, "route del "+route)
	}
	if r := m.CLI("down"); r.Code != 0 {
		t.Errorf("down: %v", r)
	}
	if d := before.Diff(l.Snapshot(t)); d != "" {
		t.Errorf("left behind:\n%s", d)
	}
}

// lastLeak is when the last packet left that was not allowed.
func lastLeak(allow lab.Allow, pkts []lab.Packet) time.Time {
	var last time.Time
	for _, p := range allow.Leaks(pkts) {
		last = p.At
	}
	return last
}

// startGrace is how far the clocks of the capture and of the monitor may be apart: both note when they are scheduled, not when it was.
// Nothing may leave after the first change of a rule or a route: the guard must be there before.
const startGrace = 20 * time.Millisecond

func since(pkts []lab.Packet, at time.Time) []lab.Packet {
	return slices.DeleteFunc(slices.Clone(pkts), func(p lab.Packet) bool { return p.At.Before(at) })
}

// TestLeakCleanup records what leaves between a kill -9 and the end of cleanup and down.
func TestLeakCleanup(t *testing.T) {
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, false)
	before := l.Snapshot(t)
	for _, how := range []string{"cleanup", "down"} {
		cp := l.Capture(t)
		m := l.Mprox(t)
		m.Up("--proxy", s.URL())
		cp.Reset()
		m.Kill()
		flood := l.StartFlood(t)
		l.Client.Probe(lab.Probes())
		flood.Stop()
		upstreamOnly(s).Check(t, cp.Packets())
		if r := m.CLI(how); r.Code != 0 {
			t.Errorf("%s after kill -9: %v", how, r)
		}
		if d := before.Diff(l.Snapshot(t)); d != "" {
			t.Errorf("%s after kill -9 left:\n%s", how, d)
		}
		if out := mustCurl(t, l, originURL(true, "/")); !strings.Contains(out, lab.ClientV6.String()) {
			t.Errorf("after %s: %q", how, out)
		}
	}
}
