// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"bufio"
	"net/netip"
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
