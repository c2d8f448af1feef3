// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mutex-proxy/mutex/e2e/lab"
)

// TestHTTP2Proxy sends many connections of an application through few of a real HTTP/2 proxy, bulk among them; and shows that a refused port
// and a proxy that was killed are what they are.
func TestHTTP2Proxy(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Nghttpx(t, 8443, l.PKI(t), l.Tinyproxy(t, 3128))
	m := l.Mprox(t)
	m.Up("--proxy", s.URL())
	mustCurl(t, l, originURL(false, "/bytes/10"))
	var wg sync.WaitGroup
	for i := range 30 {
		wg.Go(func() {
			mustCurl(t, l, "-H", "Connection: close", "-o", "/dev/null", originURL(i%2 == 0, "/bytes/1000000"))
		})
	}
	wg.Wait()
	conn, err := l.Client.Dial("tcp", fmt.Sprintf("%s:%d", lab.OriginV4, lab.PortSum), 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	if err := lab.Exchange(conn, 10_000_000); err != nil {
		t.Error(err)
	}
	conn.Close()
	out, err := l.Client.Output(t.Context(), "ss", "-Htn", "state", "established", "dport", "=", ":8443")
	if n := len(strings.Split(strings.TrimSpace(out), "\n")); err != nil || n > 2 {
		t.Errorf("%d connections to the proxy for 32 flows (%v):\n%s", n, err, out)
	}
	within(t, 5*time.Second, "a refused port", func() {
		if c, err := l.Client.Dial("tcp", fmt.Sprintf("%s:%d", lab.OriginV4, lab.PortClosed), 10*time.Second); err == nil {
			c.Close()
			t.Error("a closed port was connected to")
		}
	})
	s.Kill()
	within(t, 10*time.Second, "a dead proxy", func() {
		if r := curl(t, l, originURL(false, "/bytes/10")); r.Code == 0 {
			t.Error("something came through a dead proxy")
		}
	})
	s.Restart()
	if !lab.Poll(20*time.Second, func() bool { return curl(t, l, originURL(false, "/bytes/10")).Code == 0 }) {
		t.Error("the proxy is back, and nothing goes through it")
	}
}
