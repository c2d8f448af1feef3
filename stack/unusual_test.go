// SPDX-License-Identifier: GPL-3.0-or-later

package stack

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/flow"
	"github.com/mutex-proxy/mutex/tun"
)

// TestKernelOptions: connections of applications that send IP options (IPv4) or destination options (IPv6). The kernel leaves their checksums open
// too, where the link does not look for them.
func TestKernelOptions(t *testing.T) {
	k := startKernel(t, &handler{tcp: func(_ context.Context, _, _ netip.AddrPort, p flow.Pending) {
		c, err := p.Accept()
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Close()
		_, _ = io.Copy(c, c)
	}}, tun.Config{Name: "mprox0"})
	for _, v := range variants()[:2] {
		d := net.Dialer{Timeout: wait, Control: func(_, _ string, raw syscall.RawConn) (err error) {
			level, option, value := unix.IPPROTO_IP, unix.IP_OPTIONS, "\x01\x01\x01\x00" // three times "no operation", and the end
			if v.v6 {
				level, option, value = unix.IPPROTO_IPV6, unix.IPV6_DSTOPTS, "\x00\x00\x01\x04\x00\x00\x00\x00" // padding
			}
			if cerr := raw.Control(func(fd uintptr) { err = unix.SetsockoptString(int(fd), level, option, value) }); cerr != nil {
				return cerr
			}
			return err
		}}
		var c net.Conn
		var err error
		k.Do(func() { c, err = d.DialContext(t.Context(), "tcp", v.dst(7).String()) })
		if err != nil {
			t.Fatalf("%s: %v", v.name, err)
		}
		_ = c.SetDeadline(time.Now().Add(wait))
		want, got := randomBytes(20000), make([]byte, 20000)
		go func() { _, _ = c.Write(want) }()
		if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %v; %+v", v.name, err, k.s.Stats())
		}
		_ = c.Close()
	}
}
