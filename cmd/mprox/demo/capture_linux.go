// SPDX-License-Identifier: GPL-3.0-or-later

package demo

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// maxLeaks bounds what is remembered: one line a leaked packet is more than anybody reads.
const maxLeaks = 20

// capture listens on the far end of the client's uplink and counts what arrives from the client.
type capture struct {
	file    *os.File
	proxy   netip.AddrPort
	stopped sync.Once
	done    chan struct{}
	packets int
	leaked  []string
}

func startCapture(far *namespace) (*capture, error) {
	c := &capture{proxy: netip.MustParseAddrPort(proxyAddr()), done: make(chan struct{})}
	err := far.do(func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, int(htons(unix.ETH_P_ALL)))
		if err != nil {
			return fmt.Errorf("demo: capture: %w", err)
		}
		c.file = os.NewFile(uintptr(fd), "capture")
		link, err := net.InterfaceByName(farLink)
		if err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL), Ifindex: link.Index})
	})
	if err != nil {
		return nil, err
	}
	go c.read()
	return c, nil
}

func (c *capture) read() {
	defer close(c.done)
	conn, err := c.file.SyscallConn()
	if err != nil {
		return
	}
	buf := make([]byte, 128) // headers are enough
	for {
		var n int
		var from unix.Sockaddr
		var rerr error
		if err := conn.Read(func(fd uintptr) bool {
			n, from, rerr = unix.Recvfrom(int(fd), buf, unix.MSG_TRUNC)
			return !errors.Is(rerr, unix.EAGAIN)
		}); err != nil || rerr != nil {
			return
		}
		ll, ok := from.(*unix.SockaddrLinklayer)
		if !ok || ll.Pkttype == unix.PACKET_OUTGOING {
			continue
		}
		c.see(htons(ll.Protocol), buf[:min(n, len(buf))])
	}
}

// see judges one packet from the client. What keeps a link alive (ARP, ND, MLD) is the client's own business.
func (c *capture) see(proto uint16, b []byte) {
	var dst netip.Addr
	var transport uint8
	var rest []byte
	switch {
	case proto == unix.ETH_P_IP && len(b) >= 20:
		dst, _ = netip.AddrFromSlice(b[16:20])
		transport, rest = b[9], b[min(len(b), int(b[0]&15)*4):]
	case proto == unix.ETH_P_IPV6 && len(b) >= 40:
		dst, _ = netip.AddrFromSlice(b[24:40])
		transport, rest = b[6], b[40:]
		if transport == unix.IPPROTO_HOPOPTS || transport == unix.IPPROTO_ICMPV6 && len(rest) > 0 && rest[0] >= 130 {
			return
		}
	default:
		return
	}
	c.packets++
	toProxy := dst == c.proxy.Addr() && len(rest) >= 4 && uint16(rest[2])<<8|uint16(rest[3]) == c.proxy.Port() && transport == unix.IPPROTO_TCP
	// The relay port of a UDP association is the proxy's to choose.
	toRelay := dst == c.proxy.Addr() && transport == unix.IPPROTO_UDP
	if !toProxy && !toRelay && len(c.leaked) < maxLeaks {
		c.leaked = append(c.leaked, fmt.Sprintf("protocol %d to %s", transport, dst))
	}
}

// Close ends the capture and returns how many packets the client sent, and those that went anywhere but to the proxy. Idempotent.
func (c *capture) Close() (packets int, leaked []string) {
	c.stopped.Do(func() { c.file.Close() })
	<-c.done
	return c.packets, c.leaked
}
