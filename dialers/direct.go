// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/flow"
)

// Direct is the upstream that is none: connections leave by the machine's own routes, past the capture. It takes addresses only; names
// are resolved by WithNames, through the context's DNS. Without that a name is an error: asking the machine's resolver would be a leak.
type Direct struct {
	name  string
	net   *Net
	allow func(netip.AddrPort) bool // nil = all
	stats
}

// NewDirect returns a Direct.
func NewDirect(name string, n *Net) *Direct { return &Direct{name: name, net: n} }

// Name returns the name in the configuration.
func (d *Direct) Name() string { return d.name }

// Status returns the counters. A direct connection is always up: what fails is the destination.
func (d *Direct) Status() Status {
	return Status{
		Name: d.name, URL: SchemeDirect + "://", Up: true, Active: uint64(max(0, d.active.Load())), Total: d.total.Load(),
		Errors: d.errors.Load(), UDP: yes, IPv6: unknown, RemoteDNS: no, Bind: no,
		Dropped: d.dropped.Load(), State: d.State(),
	}
}

// Dial connects to dst.IP.
func (d *Direct) Dial(ctx context.Context, dst flow.Addr) (flow.Conn, error) {
	if d.off() {
		return nil, fmt.Errorf("direct %s: %w", dst, errOff)
	}
	d.total.Add(1)
	if !dst.IP.IsValid() {
		return nil, fmt.Errorf("direct %s: %w: name not resolved", dst, flow.ErrHostUnreachable)
	}
	if d.allow != nil && !d.allow(dst.AddrPort()) {
		return nil, fmt.Errorf("direct %s: %w", dst, flow.ErrProhibited)
	}
	c, err := d.net.dialTCP(ctx, dst.AddrPort())
	if err != nil {
		return nil, fmt.Errorf("direct: %w", withReason(err))
	}
	c.direct, c.onClose = true, func() { d.closed(c) }
	d.opened(c)
	return c, nil
}

// DialContext is Dial for golang.org/x/net/proxy. A name in address is an error, see Direct.
func (d *Direct) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	return dialContext(ctx, d, network, address)
}

// ListenPacket opens one unconnected socket, of both families: every destination sees the same source port (RFC 4787 REQ-1), and
// datagrams of anybody are delivered (REQ-8).
func (d *Direct) ListenPacket(ctx context.Context, _ *flow.Flow) (flow.PacketConn, error) {
	if d.off() {
		return nil, fmt.Errorf("direct: %w", errOff)
	}
	d.total.Add(1)
	c, err := d.net.ListenUDP(ctx, netip.AddrPort{})
	if err != nil {
		return nil, fmt.Errorf("direct: %w", withReason(err))
	}
	pc, err := newPlainUDP(d, c)
	if err != nil {
		_ = c.Close()
		return nil, fmt.Errorf("direct: %w", err)
	}
	pc.onClose = func() { d.closed(pc) }
	d.opened(pc)
	return pc, nil
}

// withReason adds the sentinel of flow that says what a connect(2) error of the destination means.
func withReason(err error) error {
	var reason error
	switch {
	case errors.Is(err, unix.ECONNREFUSED):
		reason = flow.ErrRefused
	case errors.Is(err, unix.ENETUNREACH), errors.Is(err, unix.EAFNOSUPPORT), errors.Is(err, unix.EADDRNOTAVAIL):
		reason = flow.ErrNetUnreachable
	case errors.Is(err, unix.EHOSTUNREACH):
		reason = flow.ErrHostUnreachable
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		reason = flow.ErrProhibited
	case timedOut(err), errors.Is(err, unix.ETIMEDOUT):
		reason = flow.ErrTimeout
	default:
		return err
	}
	return fmt.Errorf("%w: %w", reason, err)
}
