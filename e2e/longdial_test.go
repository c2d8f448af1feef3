// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mutex-proxy/mutex/e2e/lab"
)

// TestLongDial holds the destination's answer back until the application's kernel has repeated its SYN: there is one connection in the end, and
// it works.
func TestLongDial(t *testing.T) {
	for _, offload := range []string{"auto", "off"} {
		t.Run("offload "+offload, func(t *testing.T) {
			t.Parallel()
			w := newWire(t, offload, lab.Options{})
			w.OriginNS.Run(t, "nft", "table inet hold { chain in { type filter hook input priority 0; tcp dport 9100 drop; }; }")
			type result struct {
				c   net.Conn
				err error
			}
			got := make(chan result, 1)
			go func() {
				c, err := w.Client.Dial("tcp", netip.AddrPortFrom(lab.OriginV4, portTest).String(), 20*time.Second)
				got <- result{c, err}
			}()
			lab.Eventually(t, 10*time.Second, "the second SYN", func() bool {
				out, err := w.Client.Output(t.Context(), "ss", "-Htno", "state", "syn-sent", "dport", "=", ":9100")
				return err == nil && strings.Contains(out, ",2)")
			})
			w.OriginNS.Run(t, "nft", "delete table inet hold")
			r := <-got
			if r.err != nil {
				t.Fatal(r.err)
			}
			defer r.c.Close()
			w.check(t, r.c, w.far(t, r.c))
			if n := len(w.accepted); n != 0 {
				t.Errorf("%d more connections", n)
			}
			// A destination that never answers: the dial time-out.
			if err := w.Client.Sysctl(map[string]string{"net/ipv4/tcp_syn_retries": "6"}); err != nil {
				t.Fatal(err)
			}
			if _, err := w.Client.Dial("tcp", netip.AddrPortFrom(lab.BlackholeV4, 80).String(), 25*time.Second); !isErrno(err, syscall.EHOSTUNREACH) {
				t.Errorf("no answer: %v", err)
			}
		})
	}
}

// TestSlowLink moves data over links with delay and loss: the windows grow, nothing is damaged.
func TestSlowLink(t *testing.T) {
	for _, o := range []lab.Options{{RTT: 50 * time.Millisecond, Loss: 0.01}, {RTT: 200 * time.Millisecond, Loss: 0.01}, {RTT: 200 * time.Millisecond}} {
		for _, offload := range []string{"auto", "off"} {
			t.Run(fmt.Sprintf("%v, %v%%, offload %s", o.RTT, o.Loss*100, offload), func(t *testing.T) {
				t.Parallel()
				w := newWire(t, offload, o)
				n := int64(300_000)
				if o.Loss == 0 {
					n = 20_000_000 // windows of 64 KiB, unscaled, would take a minute
				}
				within(t, time.Minute, "the exchange", func() {
					for _, a := range ways() {
						c := dialOrigin(t, w.Lab, a, lab.PortSum)
						if err := lab.Exchange(c, n); err != nil {
							t.Error(err)
						}
					}
				})
				app, far := w.open(t, lab.OriginV4)
				w.check(t, app, far)
			})
		}
	}
}
