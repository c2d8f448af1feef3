// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/e2e/lab"
)

// TestLostConnection: a side is reset while what is sent to it is stuck. The other one must not take what it has got for all there is: it is
// reset as well, whichever of the two directions has noticed it first.
func TestLostConnection(t *testing.T) {
	for _, via := range []string{"direct", "p"} {
		for _, offload := range []string{"auto", "off"} {
			t.Run(via+" offload "+offload, func(t *testing.T) {
				t.Parallel()
				w := newWireVia(t, via, offload, lab.Options{})
				for fam, a := range ways() {
					for who, byApp := range map[string]bool{"origin": false, "app": true} {
						t.Run("reset by "+who+" "+fam, func(t *testing.T) {
							for range 10 {
								app, far := w.open(t, a)
								if byApp {
									app, far = far, app
								}
								lostWhileFull(t, app, far)
							}
						})
					}
				}
			})
		}
	}
}

// lostWhileFull has lost say something, and reset the connection when what c sends to it is stuck.
func lostWhileFull(t *testing.T, c, lost *net.TCPConn) {
	t.Helper()
	const said = "the first half"
	if _, err := io.WriteString(lost, said); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(c, make([]byte, len(said))); err != nil {
		t.Fatal(err)
	}
	_ = c.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
	buf := make([]byte, 64<<10)
	for {
		if _, err := c.Write(buf); errors.Is(err, os.ErrDeadlineExceeded) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	_ = lost.SetLinger(0)
	lost.Close()
	if n, err := c.Read(buf); n != 0 || !isErrno(err, syscall.ECONNRESET) {
		t.Errorf("read: %d, %v; want a reset", n, err)
	}
	_ = c.SetLinger(0)
	c.Close()
}

// TestUnheard: a firewall keeps from adopted flows what the application sends. That is not known before the first; the next ones go through netstack.
func TestUnheard(t *testing.T) {
	t.Parallel()
	w := newWire(t, "auto", lab.Options{})
	if w.path != "kernel" {
		t.Skip("flows are not adopted in this run")
	}
	w.Client.Run(t, "nft", `table inet firewall { chain in { type filter hook input priority filter; iif "lo" drop; }; }`)
	for _, a := range ways() {
		dialOrigin(t, w.Lab, a, portTest) // its application is told that it is connected
		break
	}
	lab.Eventually(t, lab.Patience, "a warning", func() bool {
		return strings.Contains(w.m.Log.String(), "flows are not adopted for now")
	})
	w.path = "netstack"
	for _, a := range ways() {
		app := dialOrigin(t, w.Lab, a, portTest)
		for {
			far := w.far(t, app)
			if reaches(app, far) {
				break
			}
		}
		if f := w.flow(t, app); f.Path != "netstack" || !strings.Contains(f.PathReason, "firewall") {
			t.Errorf("path %q, because %q", f.Path, f.PathReason)
		}
	}
}

// reaches says whether c and far are the ends of one flow: the origin has also seen those of flows that nobody hears.
func reaches(c, far *net.TCPConn) bool {
	b := make([]byte, 5)
	_, _ = io.WriteString(c, "hello")
	_ = far.SetReadDeadline(time.Now().Add(time.Second))
	_, err := io.ReadFull(far, b)
	return err == nil && string(b) == "hello"
}

// TestSmallBuffer: an application with the smallest of receive buffers gets its data as fast as without a proxy.
func TestSmallBuffer(t *testing.T) {
	t.Parallel()
	w := newWire(t, "auto", lab.Options{})
	for fam, a := range ways() {
		t.Run(fam, func(t *testing.T) {
			var c net.Conn
			err := w.Client.Do(func() (err error) {
				d := net.Dialer{Control: func(_, _ string, rc syscall.RawConn) error {
					var serr error
					cerr := rc.Control(func(fd uintptr) { serr = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, 1) })
					return errors.Join(cerr, serr)
				}}
				c, err = d.Dial("tcp", netip.AddrPortFrom(a, portTest).String())
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { c.Close() })
			far := w.far(t, c)
			go func() { _, _ = far.Write(make([]byte, 100_000)) }()
			within(t, 3*time.Second, "100 KB", func() {
				if _, err := io.CopyN(io.Discard, c, 100_000); err != nil {
					t.Error(err)
				}
			})
		})
	}
}
