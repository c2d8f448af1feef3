// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/mutex-proxy/mutex/e2e/lab"
)

// TestWarm keeps connections to real servers ready: flows use them, others take their place, and none is left when the server is gone.
// What is left of dante when its first process is killed holds clients for a while: flows that take one of those get through as well.
func TestWarm(t *testing.T) {
	l := lab.New(t, lab.Options{})
	for _, s := range []struct {
		*lab.Server
		auth    string // what the server is learned to want
		lasting bool   // its processes outlive the first
	}{{l.Dante(t, 1080, false), "none", true}, {l.Microsocks(t, 1081), "password", false}, {l.Squid(t, 3128), "basic", false}} {
		t.Run(s.Name, func(t *testing.T) {
			m := l.Mprox(t)
			m.UpConfig(fmt.Sprintf(`{ "upstreams": { "p": { "url": %q } }, "contexts": { "default": { "mode": "global", "default": "p" } } }`, s.URL()+"?warm=4"))
			defer m.Stop()
			learned := func() (warm int, auth []string) {
				var out []struct {
					Warm int
					Auth []string
				}
				if err := m.Get("/v1/upstreams", &out); err != nil {
					t.Fatal(err)
				}
				return out[0].Warm, out[0].Auth
			}
			for range 5 {
				mustCurl(t, l, originURL(false, "/bytes/10"))
				lab.Eventually(t, 10*time.Second, "warm connections", func() bool { n, _ := learned(); return n == 4 })
			}
			if _, auth := learned(); !slices.Contains(auth, s.auth) {
				t.Errorf("auth learned: %q, want %q", auth, s.auth)
			}
			s.Kill()
			if s.lasting {
				s.Restart()
				for range 6 {
					mustCurl(t, l, originURL(false, "/bytes/10"))
				}
				return
			}
			lab.Eventually(t, 10*time.Second, "no warm connections", func() bool { n, _ := learned(); return n == 0 })
		})
	}
}
