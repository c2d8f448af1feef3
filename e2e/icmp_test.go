// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/mutex-proxy/mutex/e2e/lab"
)

// ping sends echo requests from the client.
func ping(t *testing.T, l *lab.Lab, dst string, args ...string) lab.Result {
	t.Helper()
	return lab.Exec(t, l.Client.Command(append(append([]string{"ping", "-n"}, args...), dst)...))
}

// TestPingHonest shows that an echo is answered only for what the upstream reaches.
func TestPingHonest(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	l.Unbound(t)
	s := l.Dante(t, 1080, false)
	m := l.Mprox(t)
	cp := l.Capture(t)
	m.Up("--proxy", s.URL(), "--dns", "fakeip")
	cp.Reset()
	l.Origin.Forget()
	for _, c := range []struct {
		dst   string
		alive bool
	}{
		{lab.OriginV4.String(), true}, // 443 is open
		{lab.OriginV6.String(), true},
		{lab.ExitV4.String(), true}, // 443 and 80 are refused: alive
		{"www.example.test", true},
		{lab.UnreachableV4.String(), false},
		{lab.UnreachableV6.String(), false},
		{lab.NoNetV4.String(), false},
	} {
		r := ping(t, l, c.dst, "-c", "2", "-i", "0.3", "-W", "8")
		if alive := r.Code == 0; alive != c.alive {
			t.Errorf("ping %s: %v", c.dst, r)
		}
		if !c.alive && !strings.Contains(strings.ToLower(r.Stdout), "unreachable") {
			t.Errorf("ping %s does not say unreachable: %v", c.dst, r)
		}
	}
	if n := len(l.Origin.Visits("tcp", 443)); n == 0 || n > 6 {
		t.Errorf("%d probes of 443: want some, but an answer is cached", n)
	}
	if bad := l.Origin.AllFrom(lab.ExitV4, lab.ExitV6); len(bad) > 0 {
		t.Errorf("probes past the proxy: %v", bad)
	}
	upstreamOnly(s).Check(t, cp.Packets())
	// Sizes: the payload comes back.
	if r := ping(t, l, lab.OriginV4.String(), "-c", "1", "-s", "4000", "-W", "5"); r.Code != 0 {
		t.Errorf("ping of 4000 bytes: %v", r)
	}
}

// TestPingRate shows that a flood of echo requests does not become a flood of connections.
func TestPingRate(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, false)
	m := l.Mprox(t)
	m.Up("--proxy", s.URL())
	l.Origin.Forget()
	r := ping(t, l, lab.OriginV4.String(), "-f", "-c", "2000", "-w", "5")
	t.Log(r.Stdout)
	if n := len(l.Origin.Visits("tcp", 443)); n > 5 {
		t.Errorf("2000 echo requests made %d connections", n)
	}
}

// TestPingModes shows icmp: drop and icmp: reject.
func TestPingModes(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, false)
	for mode, says := range map[string]bool{"drop": false, "reject": true} {
		m := l.Mprox(t)
		m.UpConfig(globalConfig(s, `"icmp": "`+mode+`",`))
		for _, a := range []netip.Addr{lab.OriginV4, lab.OriginV6} {
			within(t, 4*time.Second, "ping", func() {
				r := ping(t, l, a.String(), "-c", "1", "-W", "1")
				out := strings.ToLower(r.Stdout)
				said := strings.Contains(out, "unreachable") || strings.Contains(out, "filtered") || strings.Contains(out, "prohibited")
				if r.Code == 0 || said != says {
					t.Errorf("icmp %s, %v: %v", mode, a, r)
				}
			})
		}
		m.Stop()
	}
}
