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
// first message can acknowledge its SYN-ACK, and the server is woken up once, with something to read. With few connections at a time it is
// better woken up as early as can be, so that it gets ready while the message is on its way.

// manyDials is from how many connections on, being opened at the same time, work counts for more than the time that one takes.
const manyDials = 128

// TCP_QUICKACK (tcp(7)) says whether what comes is acknowledged at once, or with the next data that is sent, or after 40 to 200 ms. Off, it holds for the
// SYN-ACK if it is set before connect(2), and as long as data is answered with data. It saves work only, so errors do not matter.

// dialServer is dialTCP for a server to which we speak first. To one that speaks first, 200 ms could pass until it knew of the connection.
func (n *Net) dialServer(ctx context.Context, to netip.AddrPort) (*TCPConn, error) {
	defer n.dialing.Add(-1)
	if n.dialing.Add(1) < manyDials {
		return n.dialTCP(ctx, to)
	}
	c, err := n.dial(ctx, to, func(network, address string, rc syscall.RawConn) error {
		if err := n.controlDial(network, address, rc); err != nil {
			return err
		}
		return rc.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_QUICKACK, 0) })
	})
	if err == nil {
		c.lazy = true
	}
	return c, err
}

// lastQuestion has the answer to what was just written acknowledged at once: the destination may be the next to speak, and a server without
// TCP_NODELAY holds that back until then.
func lastQuestion(c io.Writer) {
	if tcp, ok := c.(*TCPConn); ok && tcp.lazy { // inside TLS, the server has been answered before
		_ = tcp.setTCP(unix.TCP_QUICKACK, 1)
	}
}
