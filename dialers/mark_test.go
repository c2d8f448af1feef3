// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/dialers/dialertest"
	"github.com/mutex-proxy/mutex/flow"
)

func option(t *testing.T, c syscall.Conn, level, name int) uint32 {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	v := 0
	if cerr := raw.Control(func(fd uintptr) { v, err = unix.GetsockoptInt(int(fd), level, name) }); cerr != nil || err != nil {
		t.Fatal(cerr, err)
	}
	return uint32(v)
}

// Every socket carries the mark, or is not opened at all.
func TestMark(t *testing.T) {
	s := dialertest.Start(t, dialertest.Silent())
	n := NewNet(NetConfig{Mark: 0x4d000000, MarkMask: 0xff000000})
	tcp, err := n.DialTCP(testContext(t), s.Addr)
	udp, err2 := n.ListenUDP(testContext(t), netip.AddrPort{})
	conn, err3 := n.DialUDP(testContext(t), s.Addr)
	l, err4 := n.ListenTCP(testContext(t), netip.AddrPortFrom(loopback, 0))
	if !privileged(t) {
		for i, err := range []error{err, err2, err3, err4} {
			if err == nil || !strings.Contains(err.Error(), "set mark 0x4d000000/0xff000000") {
				t.Errorf("%d: without privilege: %v", i, err)
			}
		}
		return
	}
	for i, err := range []error{err, err2, err3, err4} {
		if err != nil {
			t.Fatal(i, err)
		}
	}
	for i, c := range []syscall.Conn{tcp.(syscall.Conn), udp, conn, l} {
		if got := option(t, c, unix.SOL_SOCKET, unix.SO_MARK); got != 0x4d000000 {
			t.Errorf("%d: mark %#x", i, got)
		}
	}
	tcp.Close()
	udp.Close()
	conn.Close()
	l.Close()
}

// An IPv4 address to listen on means IPv4, also that of all of them.
func TestListenTCPFamily(t *testing.T) {
	l, err := NewNet(NetConfig{}).ListenTCP(testContext(t), netip.MustParseAddrPort("0.0.0.0:0"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	at := l.Addr().(*net.TCPAddr).AddrPort()
	if !at.Addr().Is4() {
		t.Errorf("listens on %v", at)
	}
	if c, err := net.Dial("tcp6", net.JoinHostPort("::1", fmt.Sprint(at.Port()))); err == nil {
		c.Close()
		t.Error("IPv6 is accepted")
	}
}

// privileged reports whether this process may set marks.
func privileged(t *testing.T) bool {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	ok := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, 1) == nil
	if !ok && os.Getenv("CI") == "true" {
		t.Error("CI runs as root")
	}
	return ok
}

func TestSetMarkKeepsOtherBits(t *testing.T) {
	if !privileged(t) {
		return // TestMark has shown what happens then
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	for _, tt := range []struct{ old, mark, mask, want uint32 }{
		{0x00000001, 0x4d000000, 0xff000000, 0x4d000001},
		{0xffffffff, 0x4d000000, 0xff000000, 0x4dffffff},
		{0x50123456, 0x4d0000ff, 0xff000000, 0x4d123456},
		{0x50123456, 0, 0xff000000, 0x00123456},
	} {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, int(tt.old)); err != nil {
			t.Fatal(err)
		}
		if err := setMark(fd, tt.mark, tt.mask); err != nil {
			t.Fatal(err)
		}
		got, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK)
		if err != nil || uint32(got) != tt.want {
			t.Errorf("%#x with %#x/%#x: %#x, want %#x", tt.old, tt.mark, tt.mask, got, tt.want)
		}
	}
}

func TestSocketOptions(t *testing.T) {
	s := dialertest.Start(t, dialertest.Silent())
	c, err := NewNet(NetConfig{}).dialTCP(testContext(t), s.Addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for _, tt := range []struct {
		name       string
		level, opt int
		want       uint32
	}{
		{"TCP_NODELAY", unix.IPPROTO_TCP, unix.TCP_NODELAY, 1},
		{"SO_KEEPALIVE", unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
		{"TCP_KEEPIDLE", unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 60},
		{"TCP_KEEPINTVL", unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, 15},
		{"TCP_KEEPCNT", unix.IPPROTO_TCP, unix.TCP_KEEPCNT, 8},
		{"IP_BIND_ADDRESS_NO_PORT", unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1},
		{"SO_MARK", unix.SOL_SOCKET, unix.SO_MARK, 0},
	} {
		if got := option(t, c, tt.level, tt.opt); got != tt.want {
			t.Errorf("%s: %d, want %d", tt.name, got, tt.want)
		}
	}
	off, err := NewNet(NetConfig{KeepAlive: -1}).dialTCP(testContext(t), s.Addr)
	if err != nil {
		t.Fatal(err)
	}
	defer off.Close()
	if option(t, off, unix.SOL_SOCKET, unix.SO_KEEPALIVE) != 0 {
		t.Error("keep-alive is on")
	}
	// A socket that is bound has its port at once: the SOCKS5 server tells it to its client.
	u, err := NewNet(NetConfig{}).ListenUDP(testContext(t), netip.AddrPortFrom(loopback, 0))
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	if netip.MustParseAddrPort(u.LocalAddr().String()).Port() == 0 {
		t.Error("a UDP socket without a port")
	}
}

// The last descriptors are not for flows: what would have one is refused as if there were none left.
func TestMaxFD(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	to := netip.MustParseAddrPort(l.Addr().String())
	if c, err := NewNet(NetConfig{MaxFD: 3}).DialTCP(t.Context(), to); err == nil || !flow.OutOfDescriptors(err) {
		t.Errorf("%v, %v", c, err)
	}
	c, err := NewNet(NetConfig{MaxFD: 1 << 20}).DialTCP(t.Context(), to)
	if err != nil {
		t.Fatal(err)
	}
	c.Abort()
}
