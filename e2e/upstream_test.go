// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mutex-proxy/mutex/e2e/lab"
)

// TestUpstreamByName gives the upstream by host name, in global mode: only queries for that name leave, to the machine's own resolver.
func TestUpstreamByName(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	l.Unbound(t)
	s := l.Dante(t, 1080, false)
	trap := lab.NewTrap(t, l.LAN, netip.AddrPortFrom(lab.LANV4, 53))
	const name = "proxy.example.test"
	trap.Host(name, lab.ProxyV4)
	cp := l.Capture(t)
	m := l.Mprox(t)
	m.Up("--proxy", "socks5h://"+name+":1080", "--dns", "fakeip")
	allow := upstreamOnly(s)
	allow.Resolvers, allow.Names = []netip.AddrPort{netip.AddrPortFrom(lab.LANV4, 53)}, []string{name}
	checkProxied(t, l)
	mustCurl(t, l, "http://www.example.test/")
	l.Client.Probe(lab.DNSProbes())
	allow.Check(t, cp.Packets())
	trap.Check(t, name)
	if len(trap.Names()) == 0 {
		t.Error("the machine's resolver was not asked for the upstream's name")
	}
	// Somebody else asking for the upstream's name is captured as anybody.
	cp.Reset()
	trap.Reset()
	dig(t, l, "@"+lab.LANV4.String(), name)
	if n := len(trap.Names()); n != 0 {
		t.Errorf("an application's query for the upstream's name left: %v", trap.Names())
	}

	// The upstream moves: the name is resolved again when it fails.
	_ = syscall.Kill(-s.PID(), syscall.SIGKILL)
	s.Kill()
	l.Proxy.IP(t, "addr add 203.0.113.11/24 dev wan0")
	second := l.DanteAt(t, netip.MustParseAddrPort("203.0.113.11:1080"))
	trap.Host(name, second.Addr.Addr())
	if !lab.Poll(60*time.Second, func() bool { return curl(t, l, originURL(false, "/bytes/10")).Code == 0 }) {
		t.Error("the upstream is not found again after it moved")
	}
	allow.Upstreams = append(allow.Upstreams, second.Addr)
	allow.Check(t, cp.Packets())
}

// TestUpstreamOnLoopback uses `ssh -D` on the client itself: its own connection must not be captured.
func TestUpstreamOnLoopback(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	l.Unbound(t)
	s := l.SSHDynamic(t, 1090)
	cp := l.Capture(t)
	m := l.Mprox(t)
	m.Up("--proxy", s.URL(), "--dns", "fakeip")
	cp.Reset()
	checkProxied(t, l)
	if out := mustCurl(t, l, "http://www.example.test/"); !strings.Contains(out, "www.example.test") {
		t.Errorf("by name: %q", out)
	}
	l.Client.Probe(lab.Probes())
	sshd := netip.AddrPortFrom(lab.ProxyV4, 22)
	lab.Allow{Upstreams: []netip.AddrPort{sshd}, Direct: lab.LANPrefixes}.Check(t, cp.Packets())
	if r := m.CLI("down"); r.Code != 0 {
		t.Errorf("down: %v", r)
	}
	// The ssh session outlives mprox.
	if out := mustCurl(t, l, "-p", "-x", s.URL(), originURL(false, "/bytes/10")); len(out) != 10 {
		t.Errorf("ssh -D after down: %q", out)
	}
}

// TestUpstreamOnLoopbackAbsent gives an upstream on loopback where nothing listens: exit 6 that names it.
func TestUpstreamOnLoopbackAbsent(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	before := l.Snapshot(t)
	m := l.Mprox(t)
	r := m.CLI("up", "--proxy", "socks5h://127.0.0.1:1091")
	if r.Code != 6 || !strings.Contains(r.Stderr, "127.0.0.1:1091") || lines(r.Stderr) != 1 {
		t.Errorf("want exit 6 and one line that names the upstream, got %v", r)
	}
	if d := before.Diff(l.Snapshot(t)); d != "" {
		t.Errorf("left behind:\n%s", d)
	}
}

// TestPool gives two upstreams: what one cannot do another does, while the application's SYN is held.
func TestPool(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	a, b := l.DanteVia(t, 1080, false, lab.ExitV4.String()), l.DanteVia(t, 1081, false, lab.Exit2V4.String())
	m := l.Mprox(t)
	m.Up("--proxy", a.URL(), "--proxy", b.URL(), "--strategy", "round-robin")
	exits := map[netip.Addr]int{}
	for range 6 {
		mustCurl(t, l, originURL(false, "/"))
	}
	for _, v := range l.Origin.Visits("tcp", lab.PortHTTP) {
		exits[v.From.Addr()]++
	}
	if exits[lab.ExitV4] != 3 || exits[lab.Exit2V4] != 3 {
		t.Errorf("round robin: %v", exits)
	}
	_ = syscall.Kill(-a.PID(), syscall.SIGKILL)
	a.Kill()
	for range 6 {
		if out := mustCurl(t, l, originURL(false, "/")); !strings.Contains(out, lab.Exit2V4.String()) {
			t.Errorf("with one member dead: %q", out)
		}
	}
}
