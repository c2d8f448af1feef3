// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

const (
	// portWindow is how many ports the kernel looks at for one connection. By itself it looks at every second one of the whole range in turn, those of
	// ended connections (TIME_WAIT, a minute) included: after 14,000 connections to one server each connect takes a millisecond.
	portWindow = 64
	// portTries bounds the ports that we try ourselves when the kernel has found none.
	portTries = 16
)

// ports is what source ports may be chosen from (Documentation/networking/ip-sysctl.rst). It is read once: of a window outside a range that was
// changed since, the kernel takes no notice (ip(7), IP_LOCAL_PORT_RANGE).
type ports struct {
	once     sync.Once
	lo, hi   uint16      // ip_local_port_range, both included
	reserved [][2]uint16 // ip_local_reserved_ports: what services are going to listen on
}

func (p *ports) read() {
	p.lo, p.hi = 32768, 60999 // the kernel's own default
	if b, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range"); err == nil {
		if f := strings.Fields(string(b)); len(f) == 2 {
			lo, err := strconv.ParseUint(f[0], 10, 16)
			hi, err2 := strconv.ParseUint(f[1], 10, 16)
			if err == nil && err2 == nil && lo > 0 && lo <= hi {
				p.lo, p.hi = uint16(lo), uint16(hi)
			}
		}
	}
	if b, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_reserved_ports"); err == nil {
		p.reserved = parsePorts(strings.TrimSpace(string(b)))
	}
}

// parsePorts reads a list like "8080,9000-9010". What is none is left out.
func parsePorts(list string) (ranges [][2]uint16) {
	for part := range strings.SplitSeq(list, ",") {
		first, last, isRange := strings.Cut(part, "-")
		if !isRange {
			last = first
		}
		lo, err := strconv.ParseUint(first, 10, 16)
		hi, err2 := strconv.ParseUint(last, 10, 16)
		if err == nil && err2 == nil && lo <= hi {
			ranges = append(ranges, [2]uint16{uint16(lo), uint16(hi)})
		}
	}
	return ranges
}

// window sets a part of the range as the one that the kernel may choose from. Kernels before 6.3 do not know that, and look at all of it.
func (p *ports) window(fd int) {
	lo := int(p.lo)
	if n := int(p.hi) - lo + 1; n > portWindow {
		lo += rand.IntN(n - portWindow + 1)
	}
	hi := min(lo+portWindow-1, int(p.hi))
	_ = unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_LOCAL_PORT_RANGE, hi<<16|lo)
}

// one returns a port that a connection to port to may be tried from, if there is any.
func (p *ports) one(to uint16) (port uint16, ok bool) {
	for range portTries {
		port = p.lo + uint16(rand.IntN(int(p.hi)-int(p.lo)+1))
		if port != to && !p.isReserved(port) { // from its own port, a socket that listens nowhere would connect to itself
			return port, true
		}
	}
	return 0, false
}

func (p *ports) isReserved(port uint16) bool {
	for _, r := range p.reserved {
		if r[0] <= port && port <= r[1] {
			return true
		}
	}
	return false
}

// wildcard is the unspecified address of the family of ip.
func wildcard(ip netip.Addr) netip.Addr {
	if ip.Is4() {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

// connect connects from a port that is free, or from one whose last connection to the same place has ended: where both have used timestamps,
// the kernel lets a port that is named be used again at once (tcp_twsk_unique; RFC 6191), and one that it looks for itself only if
// net.ipv4.tcp_tw_reuse is set. Without that, 28,000 connections a minute to one server were the limit.
func (n *Net) connect(ctx context.Context, to netip.AddrPort, control control) (*net.TCPConn, error) {
	n.ports.once.Do(n.ports.read)
	d := net.Dialer{Control: control, KeepAliveConfig: n.keepAlive(), KeepAlive: n.cfg.KeepAlive}
	c, err := d.DialTCP(ctx, "tcp", netip.AddrPort{}, to) // not DialContext, which would parse and resolve
	if !errors.Is(err, unix.EADDRNOTAVAIL) {
		return c, err
	}
	d.Control = n.control
	for range portTries {
		port, ok := n.ports.one(to.Port())
		if !ok {
			break
		}
		c, err := d.DialTCP(ctx, "tcp", netip.AddrPortFrom(wildcard(to.Addr().Unmap()), port), to)
		if !errors.Is(err, unix.EADDRNOTAVAIL) && !errors.Is(err, unix.EADDRINUSE) {
			return c, err
		}
	}
	c, err = d.DialTCP(ctx, "tcp", netip.AddrPort{}, to)
	if errors.Is(err, unix.EADDRNOTAVAIL) {
		err = fmt.Errorf("no source address, or no source port of %d to %d: %w", n.ports.lo, n.ports.hi, err)
	}
	return c, err
}
