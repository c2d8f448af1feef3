// SPDX-License-Identifier: GPL-3.0-or-later

// Package tuntest makes links out of nothing: two devices joined in memory, for tests that need no privilege.
package tuntest

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/tun"
)

// Pipe returns two devices, each the other end of the other's cable. Packets and their virtio-net headers arrive as they were written,
// one a read, in order; when the receiver is slow, Write fails with EAGAIN and the packet is lost, as on any link. Both are closed when the test ends.
func Pipe(tb testing.TB, mtu int, offload bool) (a, b *tun.Device) {
	tb.Helper()
	// SOCK_SEQPACKET keeps the bounds of packets, is polled like a TUN, and its reader sees the end when the other side is closed.
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		tb.Fatal(err)
	}
	devices := [2]*tun.Device{}
	for i, fd := range fds {
		// As much as an unprivileged process gets: a few hundred KiB, enough for some full-sized trains in flight.
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 4<<20)
		d, err := tun.New([]string{"a", "b"}[i], mtu, offload, os.NewFile(uintptr(fd), "pipe"))
		if err != nil {
			tb.Fatal(err)
		}
		tb.Cleanup(func() { _ = d.Close() })
		devices[i] = d
	}
	return devices[0], devices[1]
}
