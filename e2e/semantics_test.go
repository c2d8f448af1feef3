// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/e2e/lab"
)

// portTest is where a wire's own listener at the origin is.
const portTest = 9100

// wire is a lab whose origin hands every connection to the test, so that both ends of a flow are in its hands.
type wire struct {
	*lab.Lab
	m        *lab.Mprox
	s        *lab.Server
	path     string // the path that flows are to take
	accepted chan *net.TCPConn
}

// newWire starts a lab and a daemon whose flows are adopted (auto) or are not (off).
func newWire(t *testing.T, offload string, o lab.Options) *wire {
	t.Helper()
	return newWireVia(t, "p", offload, o)
}

// newWireVia is newWire for flows that go by an upstream: "p", the server, or "direct".
func newWireVia(t *testing.T, upstream, offload string, o lab.Options) *wire {
	t.Helper()
	w := &wire{Lab: lab.New(t, o), path: "kernel", accepted: make(chan *net.TCPConn, 16)}
	if offload == "off" || !lab.CanAdopt() {
		w.path = "netstack"
	}
	ln, err := w.OriginNS.Listen("tcp", fmt.Sprintf(":%d", portTest))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			w.accepted <- c.(*net.TCPConn)
		}
	}()
	w.s = w.Serve(t, 1083)
	w.m = w.Mprox(t)
	w.m.UpConfig(fmt.Sprintf(`{ "upstreams": { "p": { "url": %q } }, "contexts": { "default": { "mode": "global", "default": %q, "dial_timeout": "15s",
  "offload": %q, "dns": { "mode": "off" } } } }`, w.s.URL(), upstream, offload))
	return w
}

// far returns the origin's end of the flow of c, which was just opened.
func (w *wire) far(t *testing.T, c net.Conn) *net.TCPConn {
	t.Helper()
	select {
	case far := <-w.accepted:
		t.Cleanup(func() { far.Close() })
		_ = errors.Join(far.SetDeadline(time.Now().Add(30*time.Second)), c.SetDeadline(time.Now().Add(30*time.Second)))
		return far
	case <-time.After(10 * time.Second):
		t.Fatal("the origin has seen no connection")
		return nil
	}
}

// open returns both ends of a new flow.
func (w *wire) open(t *testing.T, a netip.Addr) (app, far *net.TCPConn) {
	t.Helper()
	app = dialOrigin(t, w.Lab, a, portTest)
	return app, w.far(t, app)
}

// openBoth returns the ends of a new flow of each family, over which bytes have gone.
func (w *wire) openBoth(t *testing.T) (pairs [][2]net.Conn) {
	t.Helper()
	for _, a := range ways() {
		app, far := w.open(t, a)
		w.check(t, app, far)
		pairs = append(pairs, [2]net.Conn{app, far})
	}
	return pairs
}

// flow returns the flow of an application's connection, established.
func (w *wire) flow(t *testing.T, app net.Conn) (f lab.Flow) {
	t.Helper()
	src := app.LocalAddr().String()
	lab.Eventually(t, lab.Patience, "the flow of "+src, func() bool {
		all := w.m.Flows()
		i := slices.IndexFunc(all, func(f lab.Flow) bool { return f.Src == src && f.Path != "" })
		if i >= 0 {
			f = all[i]
		}
		return i >= 0
	})
	return f
}

// check exchanges a word both ways and looks at the path.
func (w *wire) check(t *testing.T, app, far net.Conn) {
	t.Helper()
	for _, d := range [][2]net.Conn{{app, far}, {far, app}} {
		got := make([]byte, 5)
		if _, err := io.WriteString(d[0], "hello"); err != nil {
			t.Error(err)
		} else if _, err := io.ReadFull(d[1], got); err != nil || string(got) != "hello" {
			t.Errorf("%q, %v", got, err)
		}
	}
	if f := w.flow(t, app); f.Path != w.path {
		t.Errorf("path %q, because %q; want %q", f.Path, f.PathReason, w.path)
	}
}

// ways are the addresses of the origin, by family.
func ways() map[string]netip.Addr {
	return map[string]netip.Addr{"v4": lab.OriginV4, "v6": lab.OriginV6}
}

// TestSemantics: what an application sees of a connection is the same whether the kernel or netstack has it.
func TestSemantics(t *testing.T) {
	for _, offload := range []string{"auto", "off"} {
		t.Run("offload "+offload, func(t *testing.T) {
			t.Parallel()
			w := newWire(t, offload, lab.Options{})
			t.Run("refused", func(t *testing.T) { tcpRefused(t, w.Lab, w.s) })
			t.Run("unreachable", func(t *testing.T) { tcpUnreachable(t, w.Lab, w.s) })
			for fam, a := range ways() {
				for name, f := range map[string]func(*testing.T, *wire, netip.Addr){
					"half-close":      func(t *testing.T, w *wire, a netip.Addr) { t.Helper(); tcpHalfClose(t, w.Lab, a, true) },
					"reset by origin": func(t *testing.T, w *wire, a netip.Addr) { t.Helper(); resets(t, w, a, false) },
					"reset by app":    func(t *testing.T, w *wire, a netip.Addr) { t.Helper(); resets(t, w, a, true) },
					"slow reader":     slowReaders,
					"no delay":        noDelay,
					"urgent data":     urgentData,
					"fast open":       fastOpen,
					"multipath":       multipath,
					"tuple reuse":     tupleReuse,
					"bytes":           countedBytes,
					"keep-alive":      keptAlive,
				} {
					t.Run(name+" "+fam, func(t *testing.T) { f(t, w, a) })
				}
			}
		})
	}
}

// resets: a reset on one side is one on the other.
func resets(t *testing.T, w *wire, a netip.Addr, byApp bool) {
	t.Helper()
	app, far := w.open(t, a)
	w.check(t, app, far)
	if byApp {
		app, far = far, app
	}
	_ = far.SetLinger(0)
	far.Close()
	if n, err := app.Read(make([]byte, 1)); n != 0 || !isErrno(err, syscall.ECONNRESET) {
		t.Errorf("read: %d, %v; want a reset", n, err)
	}
	if _, err := app.Write([]byte("x")); !isErrno(err, syscall.EPIPE, syscall.ECONNRESET) {
		t.Errorf("write: %v", err)
	}
}

// slowReaders: who does not read stops the sender, in a bounded amount of memory, and gets all of it in the end.
func slowReaders(t *testing.T, w *wire, a netip.Addr) {
	t.Helper()
	app, far := w.open(t, a)
	w.check(t, app, far)
	rss := w.m.RSS()
	bound := 3 * (mostBuffered(t, "tcp_rmem") + mostBuffered(t, "tcp_wmem")) // of the proxy, the daemon, and who does not read
	for _, d := range [][2]*net.TCPConn{{app, far}, {far, app}} {
		_ = d[0].SetWriteDeadline(time.Now().Add(time.Second))
		sent, err := io.Copy(d[0], lab.DataReader(1<<30))
		if !isTimeout(err) || sent > bound {
			t.Errorf("%d bytes were taken, %v", sent, err)
		}
		if grown := w.m.RSS() - rss; grown > 16<<20 {
			t.Errorf("the daemon has grown by %d MB", grown>>20)
		}
		if n, err := io.CopyN(io.Discard, d[1], sent); err != nil {
			t.Errorf("%d of %d bytes arrived: %v", n, sent, err)
		}
		_ = d[0].SetWriteDeadline(time.Now().Add(30 * time.Second))
	}
	w.check(t, app, far)
}

// mostBuffered is how many bytes the kernel keeps at most in one direction of a TCP socket; new namespaces have what the machine has.
func mostBuffered(t *testing.T, which string) (most int64) {
	t.Helper()
	b, err := os.ReadFile("/proc/sys/net/ipv4/" + which)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Sscan(string(b), new(int64), new(int64), &most); err != nil {
		t.Fatal(err)
	}
	return most
}

// noDelay: of two small writes the second does not wait for the acknowledgement of the first, which a kernel may delay for 40 ms.
func noDelay(t *testing.T, w *wire, a netip.Addr) {
	t.Helper()
	app, far := w.open(t, a)
	w.check(t, app, far)
	for name, d := range map[string][2]*net.TCPConn{"up": {app, far}, "down": {far, app}} {
		var took []time.Duration
		b := make([]byte, 1)
		for range 21 {
			_, _ = d[0].Write([]byte("a"))
			if _, err := io.ReadFull(d[1], b); err != nil {
				t.Fatal(err)
			}
			begin := time.Now()
			_, _ = d[0].Write([]byte("b"))
			if _, err := io.ReadFull(d[1], b); err != nil {
				t.Fatal(err)
			}
			took = append(took, time.Since(begin))
		}
		slices.Sort(took)
		if took[10] > 20*time.Millisecond {
			t.Errorf("%s: the second byte takes %v", name, took[10])
		}
	}
}

// urgentData: urgent bytes are bytes as any other, in their place.
func urgentData(t *testing.T, w *wire, a netip.Addr) {
	t.Helper()
	app, far := w.open(t, a)
	w.check(t, app, far)
	urgently(t, app, far)
	app, far = w.open(t, a)
	urgently(t, far, app)
}

// urgently sends urgent data among other, and wants it to arrive in its place.
func urgently(t *testing.T, from, to *net.TCPConn) {
	t.Helper()
	want := ""
	for i := range 5 {
		text := fmt.Sprintf("before %d ", i)
		if _, err := io.WriteString(from, text); err != nil {
			t.Fatal(err)
		}
		ofSocket(t, from, func(fd int) error { return unix.Sendto(fd, []byte("!"), unix.MSG_OOB, nil) })
		want += text + "!"
	}
	if _, err := io.WriteString(from, "after"); err != nil {
		t.Fatal(err)
	}
	_ = from.CloseWrite()
	got, err := io.ReadAll(to)
	if err != nil || string(got) != want+"after" {
		t.Errorf("%q, %v; want %q", got, err, want+"after")
	}
}

// fastOpen sends data with the SYN, as far as the application's kernel lets it.
func fastOpen(t *testing.T, w *wire, a netip.Addr) {
	t.Helper()
	const tcpFastOpenNoCookie = 34
	for range 2 {
		var fd int
		err := w.Client.Do(func() (err error) {
			af, sa := sockaddrOf(netip.AddrPortFrom(a, portTest))
			if fd, err = unix.Socket(af, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
				return err
			}
			if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, tcpFastOpenNoCookie, 1); err != nil {
				return err
			}
			return unix.Sendto(fd, []byte("with the SYN"), unix.MSG_FASTOPEN, sa)
		})
		if err != nil {
			t.Fatal(err)
		}
		app := connOf(t, fd)
		far := w.far(t, app)
		got := make([]byte, 12)
		if _, err := io.ReadFull(far, got); err != nil || string(got) != "with the SYN" {
			t.Errorf("%q, %v", got, err)
		}
		w.check(t, app, far)
	}
}

// multipath: an application that asks for MPTCP gets TCP.
func multipath(t *testing.T, w *wire, a netip.Addr) {
	t.Helper()
	var fd int
	err := w.Client.Do(func() (err error) {
		af, sa := sockaddrOf(netip.AddrPortFrom(a, portTest))
		if fd, err = unix.Socket(af, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_MPTCP); err != nil {
			return err
		}
		return unix.Connect(fd, sa)
	})
	if errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.ENOPROTOOPT) {
		t.Skip("this kernel has no MPTCP")
	}
	if err != nil {
		t.Fatal(err)
	}
	app := connOf(t, fd)
	w.check(t, app, w.far(t, app))
}

// tupleReuse opens connections from the same port right after one another: ended by the origin, by a reset, and without timestamps.
func tupleReuse(t *testing.T, w *wire, a netip.Addr) {
	t.Helper()
	port := 21000
	if a.Is6() {
		port++
	}
	dial := func() *net.TCPConn {
		t.Helper()
		var c net.Conn
		connect := func() (err error) {
			d := net.Dialer{Timeout: 10 * time.Second, LocalAddr: &net.TCPAddr{Port: port}, Control: func(_, _ string, rc syscall.RawConn) error {
				return rc.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
			}}
			c, err = d.Dial("tcp", netip.AddrPortFrom(a, portTest).String())
			return err
		}
		var err error
		lab.Poll(lab.Patience, func() bool { // until the application's own kernel has seen the end of the last one
			err = w.Client.Do(connect)
			return !isErrno(err, syscall.EADDRNOTAVAIL)
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c.(*net.TCPConn)
	}
	for _, timestamps := range []string{"1", "0"} {
		if err := w.Client.Sysctl(map[string]string{"net/ipv4/tcp_timestamps": timestamps}); err != nil {
			t.Fatal(err)
		}
		for range 5 {
			within(t, 3*time.Second, "a connection from the same port", func() {
				app := dial()
				far := w.far(t, app)
				far.Close()
				if _, err := io.ReadAll(app); err != nil {
					t.Error(err)
				}
				app.Close()
				app = dial()
				far = w.far(t, app)
				if _, err := io.WriteString(app, "again"); err != nil {
					t.Error(err)
				}
				if got, err := io.ReadAll(io.LimitReader(far, 5)); string(got) != "again" {
					t.Errorf("%q, %v", got, err)
				}
				_ = app.SetLinger(0)
				app.Close()
			})
		}
	}
	if err := w.Client.Sysctl(map[string]string{"net/ipv4/tcp_timestamps": "1"}); err != nil {
		t.Fatal(err)
	}
}

// countedBytes: `flows` shows exactly what was moved.
func countedBytes(t *testing.T, w *wire, a netip.Addr) {
	t.Helper()
	c := dialOrigin(t, w.Lab, a, lab.PortSum)
	other, far := w.open(t, a)
	const n = 5_000_003
	if _, err := io.CopyN(other, lab.DataReader(n), n); err != nil {
		t.Fatal(err)
	}
	if _, err := io.CopyN(io.Discard, far, n); err != nil {
		t.Fatal(err)
	}
	if _, err := far.Write(lab.Block(77)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(other, make([]byte, 77)); err != nil {
		t.Fatal(err)
	}
	var f lab.Flow
	if !lab.Poll(lab.Patience, func() bool { f = w.flow(t, other); return f.BytesUp == n && f.BytesDown == 77 }) {
		t.Errorf("%d up, %d down; want %d and 77", f.BytesUp, f.BytesDown, n)
	}
	before := w.m.Status().Contexts[0]
	if err := lab.Exchange(c, n); err != nil { // both directions at once, to the end
		t.Fatal(err)
	}
	c.Close()
	var up, down uint64
	if !lab.Poll(lab.Patience, func() bool {
		now := w.m.Status().Contexts[0]
		up, down = now.BytesUp-before.BytesUp, now.BytesDown-before.BytesDown
		return up == 8+n+32 && down == n+32
	}) {
		t.Errorf("the context has counted %d up, %d down; want %d, %d", up, down, 8+n+32, n+32)
	}
}

// keptAlive: while nothing moves, both sockets of a flow are watched by keep-alive, and hours make no difference: the kernel may have forgotten
// the connection (conntrack's time-out, which is 5 days and here a second), and either side may be the first to speak.
func keptAlive(t *testing.T, w *wire, a netip.Addr) {
	t.Helper()
	app, far := w.open(t, a)
	w.check(t, app, far)
	timers := func(filter ...string) string {
		out, err := w.Client.Output(t.Context(), append([]string{"ss", "-Htno", "state", "established"}, filter...)...)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	if w.path == "kernel" {
		_, port, _ := net.SplitHostPort(app.LocalAddr().String())
		lab.Eventually(t, lab.Patience, "keep-alive towards the application", func() bool {
			return strings.Contains(timers("dport", "=", ":"+port), "timer:(keepalive,")
		})
	}
	lab.Eventually(t, lab.Patience, "keep-alive towards the upstream", func() bool {
		return strings.Contains(timers("dst", w.s.Addr.String()), "timer:(keepalive,")
	})
	const timeout = "net/netfilter/nf_conntrack_tcp_timeout_established"
	if err := w.Client.Sysctl(map[string]string{timeout: "1"}); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = w.Client.Sysctl(map[string]string{timeout: "432000"}) }()
	for i, d := range [][2]net.Conn{{far, app}, {app, far}} {
		lab.Never(t, 2500*time.Millisecond, "something moves", func() bool { return false })
		within(t, 5*time.Second, "a word after a long time", func() {
			if _, err := io.WriteString(d[0], "x"); err != nil {
				t.Error(i, err)
			}
			if _, err := io.ReadFull(d[1], make([]byte, 1)); err != nil {
				t.Error(i, err)
			}
		})
	}
	w.check(t, app, far)
}

func sockaddrOf(ap netip.AddrPort) (family int, sa unix.Sockaddr) {
	if ap.Addr().Is4() {
		return unix.AF_INET, &unix.SockaddrInet4{Port: int(ap.Port()), Addr: ap.Addr().As4()}
	}
	return unix.AF_INET6, &unix.SockaddrInet6{Port: int(ap.Port()), Addr: ap.Addr().As16()}
}

// connOf makes a connection of a descriptor, which it takes.
func connOf(t *testing.T, fd int) net.Conn {
	t.Helper()
	f := os.NewFile(uintptr(fd), "tcp")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}
