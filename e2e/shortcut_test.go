// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/e2e/lab"
)

// markAndMSS are the mark of a connection's socket and the longest segment that it sends.
func markAndMSS(t *testing.T, c *net.TCPConn) (mark int, mss uint32) {
	t.Helper()
	ofSocket(t, c, func(fd int) error {
		info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
		if err != nil {
			return err
		}
		mss = info.Snd_mss
		mark, err = unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK)
		return err
	})
	return mark, mss
}

// reconnected connects a socket to nowhere (connect(2): AF_UNSPEC), and then to an address.
func reconnected(fd int, to netip.AddrPort) error {
	var nowhere unix.RawSockaddr
	if _, _, e := unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&nowhere)), unsafe.Sizeof(nowhere)); e != 0 {
		return os.NewSyscallError("disconnect", e)
	}
	if mark, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK); err != nil || mark != 0 {
		return errors.Join(err, errors.New("the mark is still there"))
	}
	err := unix.Connect(fd, &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())})
	if err != nil && !errors.Is(err, unix.EINPROGRESS) {
		return os.NewSyscallError("connect", err)
	}
	if n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, 10_000); n != 1 {
		return errors.Join(err, errors.New("not connected"))
	}
	e, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if e != 0 {
		err = unix.Errno(e)
	}
	return err
}

// TestShortcut: the sockets of applications in adopted flows go straight to lo, in large segments, where BPF may say so; and a socket that is
// used again is captured again.
func TestShortcut(t *testing.T) {
	t.Parallel()
	w := newWire(t, "auto", lab.Options{})
	if w.path != "kernel" {
		t.Skip("nothing is adopted here")
	}
	const adopted = 0x4f000000
	local, err := w.Client.Listen("tcp4", "0.0.0.0:9555") // where a socket would arrive that is still marked
	if err != nil {
		t.Fatal(err)
	}
	defer local.Close()
	for _, a := range []netip.Addr{lab.OriginV4, lab.OriginV6} {
		var app, far *net.TCPConn
		lab.Eventually(t, lab.Patience, "a socket with the mark of adopted flows", func() bool { // the program comes soon after the start
			app, far = w.open(t, a)
			mark, _ := markAndMSS(t, app)
			return mark == adopted
		})
		w.check(t, app, far)
		if _, mss := markAndMSS(t, app); mss < 30_000 { // half the first window, at first
			t.Errorf("%s: segments of %d bytes", a, mss)
		}
		if !a.Is4() {
			continue
		}
		ofSocket(t, app, func(fd int) error { return reconnected(fd, netip.AddrPortFrom(a, portTest)) })
		far = w.far(t, app)
		go func() { _, _ = io.Copy(far, far) }()
		if err := echoWord(app, "again"); err != nil {
			t.Error(err)
		}
		if mark, _ := markAndMSS(t, app); mark != adopted {
			t.Errorf("used again: mark %#x", mark)
		}
		ofSocket(t, app, func(fd int) error {
			if err := reconnected(fd, netip.AddrPortFrom(a, 9555)); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("a closed port, on which this machine listens: %v", err)
			}
			return nil
		})
	}
	c, err := w.Client.DialControl("tcp4", netip.AddrPortFrom(lab.OriginV4, portTest).String(), 10*time.Second, func(fd int) error {
		return unix.BindToDevice(fd, "mprox0")
	})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	app := c.(*net.TCPConn)
	w.path = "netstack"
	w.check(t, app, w.far(t, app))
}
