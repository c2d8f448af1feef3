// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/mutex-proxy/mutex/e2e/lab"
)

// TestNeighbours puts the rules, routes, marks and bridges of others into the kernel: mprox leaves them alone, whole and working, from start to
// end, and where they would overlap it ends with exit 6 and the other's name.
func TestNeighbours(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, true)
	// A container behind a bridge; Tailscale's rules; wg-quick's.
	container := newHost(t, l, "docker0", "172.17.0", "fd17")
	l.Client.Run(t, "sh", "-ec", `
		echo 1 > /proc/sys/net/ipv4/ip_forward
		for f in -4 -6; do
			ip $f rule add pref 5210 fwmark 0x80000/0xff0000 lookup main
			ip $f rule add pref 5230 fwmark 0x80000/0xff0000 lookup default
			ip $f rule add pref 5250 fwmark 0x80000/0xff0000 unreachable
			ip $f rule add pref 5270 lookup 52
			ip $f rule add pref 32764 not fwmark 51820 lookup 51820
			ip $f rule add pref 32763 lookup main suppress_prefixlength 0
		done
		ip route add 100.64.0.9/32 dev docker0 table 52
		nft 'add table ip docker; add chain ip docker post { type nat hook postrouting priority 100; }; add rule ip docker post ip saddr 172.17.0.0/16 oifname "eth0" masquerade'`)
	before := l.Snapshot(t)
	m := l.Mprox(t)
	m.UpConfig(globalConfig(s, ""))
	checkProxied(t, l)
	for _, name := range []string{"Docker", "Tailscale", "wg-quick"} {
		if !strings.Contains(m.Log.String(), name) {
			t.Errorf("the log does not tell of %s", name)
		}
	}
	during := l.Snapshot(t)
	for key, lines := range before {
		for _, line := range lines {
			if !slices.Contains(during[key], line) && !strings.Contains(line, "fwmark_accept") {
				t.Errorf("%s: gone while mprox runs: %s", key, line)
			}
		}
	}
	if r := lab.Exec(t, l.Client.Command("ping", "-c", "1", "-W", "2", "172.17.0.2")); r.Code != 0 {
		t.Errorf("from the host to the container: %v", r)
	}
	if r := container.run(t, "ping", "-c", "1", "-W", "2", "172.17.0.1"); r.Code != 0 {
		t.Errorf("from the container to the host: %v", r)
	}
	if out := container.run(t, "curl", "-sS", "-m", "5", originURL(false, "/")); out.Code != 0 || fromProxy(out.Stdout) {
		t.Errorf("the container is not its own any more: %v", out)
	}
	must(t, m, "down")
	if d := before.Diff(l.Snapshot(t)); d != "" {
		t.Errorf("not as before:\n%s", d)
	}

	for _, tt := range []struct{ kernel, add, del, want string }{
		{`"rule_priority": 5000`, "true", "true", "Tailscale"},
		{`"table_base": 51700`, "true", "true", "wg-quick"},
		{`"mark_mask": "0xff000000"`, "ip rule add pref 40 fwmark 0x6d6f6c65 lookup main", "ip rule del pref 40", "Mullvad VPN"},
		{`"mark_mask": "0xff000000"`, "ip rule add pref 40 fwmark 0x8000000/0x8000000 lookup 2023", "ip rule del pref 40", "dae"},
		{`"table_base": 19760`, "ip route add 203.0.113.99/32 dev docker0 table 19770", "ip route flush table 19770", "Docker"},
	} {
		l.Client.Run(t, "sh", "-ec", tt.add)
		m.WriteConfig(fmt.Sprintf(`{ "kernel": { %s }, "upstreams": { "p": { "url": %q } }, "contexts": { "default": { "mode": "global", "default": "p" } } }`, tt.kernel, s.URL()))
		if r := m.CLI("up", "-c", m.ConfigPath()); r.Code != 6 || lines(r.Stderr) != 1 || !strings.Contains(r.Stderr, tt.want) {
			t.Errorf("%s: want exit 6 and one line that names %s, got %v", tt.kernel, tt.want, r)
		}
		l.Client.Run(t, "sh", "-ec", tt.del)
		if d := before.Diff(l.Snapshot(t)); d != "" {
			t.Errorf("%s: not as before:\n%s", tt.kernel, d)
		}
	}
}
