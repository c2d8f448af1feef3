// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"bufio"
	"fmt"
	"net/netip"
	"slices"
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
		if lab.CanAdopt() && (f.Path != "kernel" || f.PathReason != "") || !lab.CanAdopt() && (f.Path != "netstack" || f.PathReason != "repair: operation not permitted") {
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
	auto := "kernel"
	if !lab.CanAdopt() {
		auto = "netstack"
	}
	for port, want := range map[uint16]string{lab.PortEcho: "netstack", lab.PortBanner: auto} {
		c := dialOrigin(t, l, lab.OriginV4, port)
		var got lab.Flow
		lab.Eventually(t, 5*time.Second, "the flow", func() bool {
			i := slices.IndexFunc(m.Flows(), func(f lab.Flow) bool { return f.Src == c.LocalAddr().String() && f.Path != "" })
			if i >= 0 {
				got = m.Flows()[i]
			}
			return i >= 0
		})
		if got.Path != want || port == lab.PortEcho && got.PathReason != "off" {
			t.Errorf("port %d: path %q, because %q; want %s", port, got.Path, got.PathReason, want)
		}
	}
}
