// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"bytes"
	"net/netip"
	"testing"

	"github.com/mutex-proxy/mutex/e2e/lab"
)

// TestBaseline runs the cases of the matrix without mprox: what fails here is the lab's fault.
func TestBaseline(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	for _, a := range []netip.Addr{lab.OriginV4, lab.OriginV6} {
		tcpBulk(t, l, a)
		tcpHalfClose(t, l, a, true)
		tcpBanner(t, l, a)
		tcpReset(t, l, a)
		for _, n := range []int{1, 1473, 65497} {
			got, from, err := exchangeUDP(udpSocket(t, l, a), netip.AddrPortFrom(a, lab.PortEcho), lab.Block(n))
			if err != nil || !bytes.Equal(got, lab.Block(n)) || from.Addr() != a {
				t.Errorf("%v: %d bytes: got %d from %v, %v", a, n, len(got), from, err)
			}
		}
		_, from, err := exchangeUDP(udpSocket(t, l, a), netip.AddrPortFrom(a, lab.PortOther), []byte("x"))
		if err != nil || from != netip.AddrPortFrom(a, lab.PortOtherReply) {
			t.Errorf("%v: %v %v", a, from, err)
		}
	}
	if _, err := l.Client.Dial("tcp", netip.AddrPortFrom(lab.OriginV4, lab.PortClosed).String(), 0); !isRefused(err) {
		t.Errorf("closed port: %v", err)
	}
	s := l.Dante(t, 1080, false)
	sshTo := append(l.SSHD(t, l.Client, netipAddrPort("0.0.0.0:22")), "root@"+lab.ClientV4.String())
	startCat(t, l, sshTo).check(t, "without mprox")
	before := l.Snapshot(t)
	mustCurl(t, l, "-p", "-x", s.URL(), originURL(true, "/"))
	if d := before.Diff(l.Snapshot(t)); d != "" {
		t.Errorf("a snapshot changes by itself:\n%s", d)
	}
}
