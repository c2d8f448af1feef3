// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"context"
	"io"
	"net/netip"
	"syscall"

	"golang.org/x/sys/unix"
)

// A packet that only acknowledges costs both ends nearly as much as one that carries data. To a proxy we always speak first, and at once: our
// first message acknowledges its SYN-ACK, and the server is woken up once, with something to read.

// dialServer is dialTCP for a server to which we speak first. To one that speaks first, 200 ms would pass until it knew of the connection.
func (n *Net) dialServer(ctx context.Context, to netip.AddrPort) (*TCPConn, error) {
	return n.dial(ctx, to, func(network, address string, rc syscall.RawConn) error {
		if err := n.controlDial(network, address, rc); err != nil {
			return err
		}
		return rc.Control(ackWithData)
	})
}

// ackWithData has what comes acknowledged with our next data, or after 40 to 200 ms (TCP_QUICKACK in tcp(7)): before connect(2) the SYN-ACK, and
// as long as data is answered with data. It saves work only, so errors do not matter.
func ackWithData(fd uintptr) { quickACK(fd, 0) }

// lastQuestion ends that: after the answer to what was just written, the destination may be the next to speak, and a server without TCP_NODELAY
// holds that back until its answer is acknowledged.
func lastQuestion(c io.Writer) {
	tcp, ok := c.(*TCPConn)
	if !ok {
		return // inside TLS, where the server has been answered before
	}
	if raw, err := tcp.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { quickACK(fd, 1) })
	}
}

func quickACK(fd uintptr, on int) {
	_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_QUICKACK, on)
}
