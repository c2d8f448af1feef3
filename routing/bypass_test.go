// SPDX-License-Identifier: GPL-3.0-or-later

package routing

import (
	"net"
	"net/netip"
	"testing"

	"github.com/mutex-proxy/mutex/flow"
)

// TestBypassClasses lists what is in each class, and what is just beside it, of both families.
func TestBypassClasses(t *testing.T) {
	t.Parallel()
	classes := map[string][]string{ // a sign of each range: its ends and what lies between
		"private":    {"10.0.0.0", "10.255.255.255", "172.16.0.1", "172.31.255.255", "192.168.0.1", "192.168.255.255", "fc00::1", "fd77::2", "fdff:ffff::1"},
		"loopback":   {"127.0.0.1", "127.255.255.255", "::1", "::ffff:127.0.0.1"},
		"link-local": {"169.254.0.1", "169.254.169.254", "fe80::1", "febf:ffff::1"},
		"multicast":  {"224.0.0.1", "239.255.255.255", "ff02::fb", "ff0e::1"},
		"unnamed":    {"0.0.0.0", "255.255.255.255", "::", "192.0.2.7"}, // of local alone; the last is on a link of the machine's
		"public":     {"9.255.255.255", "11.0.0.0", "172.15.255.255", "172.32.0.0", "192.169.0.0", "126.255.255.255", "128.0.0.0", "169.253.255.255", "223.255.255.255", "240.0.0.1", "2001:db8::1", "fbff::1", "fe00::1", "fec0::1", "100.64.0.1"},
		"fake":       {"198.18.0.1", "198.19.255.255", "fd4d:5554:4558::1"}, // of no class
	}
	members := map[string][]string{
		"private": {"private"}, "loopback": {"loopback"}, "link-local": {"link-local"}, "multicast": {"multicast"}, "public": {"public"},
		"local": {"loopback", "link-local", "multicast", "unnamed"},
	}
	for class, in := range members {
		table, err := Compile(Input{
			Context: "default", Default: "eu", Upstreams: upstreams, Local: prefixes("192.0.2.0/24"), Bypass: Bypass{Address: []string{class}},
		})
		if err != nil {
			t.Fatal(err)
		}
		for kind, addrs := range classes {
			want := false
			for _, m := range in {
				want = want || m == kind
			}
			for _, a := range addrs {
				d := table.Decide(newFlow(t, "udp", net.JoinHostPort(a, "9")))
				if got := d.Rule == "bypass.address[0]"; got != want {
					t.Errorf("%s: %s: bypassed %v, want %v", class, netip.MustParseAddr(a), got, want)
				}
			}
		}
	}
}

// TestBypassProcess: before all rules, and asked for the owner only when nothing else has decided.
func TestBypassProcess(t *testing.T) {
	t.Parallel()
	table, err := Compile(Input{
		Context: "default", Default: "eu", Upstreams: upstreams, Bypass: Bypass{Address: []string{"private"}, Process: []string{"firefox", "curl"}},
		Rules: []Rule{{Match: Match{Network: []string{"tcp"}}, Upstream: "reject"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	f := newFlow(t, "tcp", "198.51.100.1:443")
	if n := table.Needs(f); n != flow.NeedApp {
		t.Errorf("needs %v", n)
	}
	if n := table.Needs(newFlow(t, "tcp", "10.0.0.1:443")); n != 0 {
		t.Errorf("needs %v of what is bypassed by its address", n)
	}
	if d := table.Decide(f); d.Action != flow.Block {
		t.Errorf("nobody's flow: %+v", d)
	}
	f.App = app
	if d := table.Decide(f); d.Action != flow.Forward || d.Rule != "bypass.process" {
		t.Errorf("firefox: %+v", d)
	}
	if got := table.Explain(f); got[len(got)-1].Rule != "bypass.process" || got[len(got)-1].Result != resultYes {
		t.Errorf("explained: %+v", got)
	}
	if _, err := Compile(Input{Context: "x", Default: "eu", Upstreams: upstreams, Bypass: Bypass{Protocol: []string{"tls"}}}); err == nil {
		t.Error("protocols are not detected yet, and taken all the same")
	}
}
