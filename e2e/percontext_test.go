// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mutex-proxy/mutex/e2e/lab"
)

// TestOwnDNSAndLimits: of two contexts side by side each keeps to its own: one gives fake addresses, has a bounded bandwidth and a small table of flows;
// the other asks a server, and is bounded by nothing of this.
func TestOwnDNSAndLimits(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, true)
	l.Unbound(t)
	m := l.Mprox(t)
	m.UpConfig(fmt.Sprintf(`{ "upstreams": { "p": { "url": %q } }, "contexts": {
		"bounded": { "mode": "process", "default": "p", "select": { "uid": 4001 }, "dns": { "mode": "fakeip", "fake": { "v4": "198.19.0.0/24" } }, "limits": { "flows": 16, "bandwidth": "1MB" } },
		"free": { "mode": "process", "default": "p", "select": { "uid": 4002 }, "dns": { "mode": "real", "servers": "tcp://%s" } } } }`, s.URL(), lab.OriginV4))
	user := func(uid int, args ...string) lab.Result {
		t.Helper()
		id := fmt.Sprint(uid)
		return lab.Exec(t, l.Client.Command(append([]string{"setpriv", "--reuid", id, "--regid", id, "--clear-groups"}, args...)...))
	}
	ask := func(uid int) netip.Addr {
		t.Helper()
		r := user(uid, "dig", "+short", "+tries=1", "+time=5", "@"+lab.LANV4.String(), "www.example.test", "A")
		a, err := netip.ParseAddr(strings.TrimSpace(r.Stdout))
		if err != nil {
			t.Errorf("user %d: %v", uid, r)
		}
		return a
	}
	if a := ask(4001); !netip.MustParsePrefix("198.19.0.0/24").Contains(a) {
		t.Errorf("the one with fake addresses of its own says %s", a)
	}
	if a := ask(4002); a != lab.OriginV4 {
		t.Errorf("the one with a server says %s", a)
	}

	var moving sync.WaitGroup
	took := map[int]time.Duration{}
	var mu sync.Mutex
	for uid, size := range map[int]int{4001: 3_000_000, 4002: 6_000_000} {
		moving.Go(func() {
			began := time.Now()
			r := user(uid, "curl", "-sS", "-m", "20", "-o", "/dev/null", "-w", "%{size_download}", originURL(false, fmt.Sprintf("/bytes/%d", size)))
			if r.Code != 0 || strings.TrimSpace(r.Stdout) != fmt.Sprint(size) {
				t.Errorf("user %d: %v", uid, r)
			}
			mu.Lock()
			took[uid] = time.Since(began)
			mu.Unlock()
		})
	}
	moving.Wait()
	if took[4001] < 2500*time.Millisecond { // 3 MB, less what may pass at once
		t.Errorf("3 MB at 1 MB/s took %s", took[4001])
	}
	if took[4002] > 5*time.Second {
		t.Errorf("6 MB that nothing bounds took %s", took[4002])
	}

	const opened = 24
	script := fmt.Sprintf("for i in {1..%d}; do { exec {f}<>/dev/tcp/%s/%d; } 2>/dev/null || :; done; sleep 100", opened, lab.OriginV4, lab.PortEcho)
	for _, uid := range []string{"4001", "4002"} {
		lab.Start(t, "user "+uid, l.Client.Command("setpriv", "--reuid", uid, "--regid", uid, "--clear-groups", "bash", "-c", script))
	}
	lab.Eventually(t, 10*time.Second, "the connections of the one that nothing bounds are there, and those for which the other has room", func() bool {
		of := map[string]int{}
		for _, f := range m.Flows() {
			if f.Network == "tcp" {
				of[f.Context]++
			}
		}
		return of["free"] == opened && of["bounded"] == 16
	})
}
