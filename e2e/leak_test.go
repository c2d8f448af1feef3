// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"net/netip"
	"strings"
	"testing"

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
		silent := strings.Contains(p.Name, "PKTINFO") || strings.Contains(p.Name, "raw") || strings.Contains(p.Name, "multicast") ||
			strings.HasPrefix(p.Name, "dns") && !strings.Contains(p.Name, "127.") && !strings.Contains(p.Name, "::1 ")
		if !silent && !contains(answered, p.Name) {
			t.Errorf("probe %q was not answered", p.Name)
		}
	}
}

func contains(list []string, s string) bool {
	for _, e := range list {
		if e == s {
			return true
		}
	}
	return false
}
