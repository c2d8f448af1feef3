// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"
)

const (
	// attemptDelay is the head start of one address over the next (RFC 8305 section 5).
	attemptDelay = 250 * time.Millisecond
	// lookupPause is the least time between two look-ups of an upstream whose addresses fail: a dead upstream must not mean a query a flow.
	lookupPause = 5 * time.Second
	// maxTried bounds how many addresses of one upstream are tried for a connection.
	maxTried = 8
)

// serverHost is where an upstream lives. A name is resolved once, before capture, and again only when its addresses fail: these are the
// only queries that leave by the uplink, and a name server that is down must not take a working upstream with it.
type serverHost struct {
	name string

	mu      sync.Mutex
	ips     []netip.Addr  // as last resolved; the one that worked last comes first
	tried   time.Time     // when the last look-up ended
	running chan struct{} // closed when the look-up that runs now has ended; nil when none does
}

func (h *serverHost) known() []netip.Addr {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.ips)
}

// addrs returns the known addresses, or looks them up.
func (h *serverHost) addrs(ctx context.Context, n *Net) ([]netip.Addr, error) {
	if ips := h.known(); len(ips) > 0 {
		return ips, nil
	}
	return h.resolve(ctx, n, nil)
}

// resolve looks the name up and returns the addresses. Of several callers one asks and the others wait. failed are the addresses that did
// not work: if they have been replaced meanwhile, or were asked for a moment ago, nobody is asked.
func (h *serverHost) resolve(ctx context.Context, n *Net, failed []netip.Addr) ([]netip.Addr, error) {
	h.mu.Lock()
	for h.running != nil {
		wait := h.running
		h.mu.Unlock()
		select {
		case <-wait:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
		h.mu.Lock()
	}
	if len(h.ips) > 0 && (!sameAddrs(h.ips, failed) || n.cfg.Now().Sub(h.tried) < lookupPause) {
		defer h.mu.Unlock()
		return slices.Clone(h.ips), nil
	}
	running := make(chan struct{})
	h.running = running
	h.mu.Unlock()

	ips, err := n.lookup(ctx, h.name, len(failed) > 0)

	h.mu.Lock()
	defer h.mu.Unlock()
	h.running, h.tried = nil, n.cfg.Now()
	close(running)
	if err != nil {
		return nil, err
	}
	if len(failed) > 0 && !sameAddrs(ips, failed) {
		n.cfg.Log.Info("upstream has moved", zap.String("host", h.name), zap.Stringers("from", failed), zap.Stringers("to", ips))
	}
	h.ips = ips
	return slices.Clone(ips), nil
}

// prefer puts the address that worked first.
func (h *serverHost) prefer(ip netip.Addr) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if i := slices.Index(h.ips, ip); i > 0 {
		h.ips[0], h.ips[i] = h.ips[i], h.ips[0]
	}
}

// dial connects to the first address that answers, and looks the name up again when none does.
func (h *serverHost) dial(ctx context.Context, n *Net, port uint16) (*TCPConn, error) {
	ips, err := h.addrs(ctx, n)
	if err != nil {
		return nil, err
	}
	c, err := h.dialAny(ctx, n, ips, port)
	if err == nil || ctx.Err() != nil {
		return c, err
	}
	if _, perr := netip.ParseAddr(h.name); perr == nil {
		return nil, err
	}
	fresh, rerr := h.resolve(ctx, n, ips)
	if rerr != nil || sameAddrs(fresh, ips) {
		return nil, err // why the addresses failed says more than why the look-up did
	}
	return h.dialAny(ctx, n, fresh, port)
}

func (h *serverHost) dialAny(ctx context.Context, n *Net, ips []netip.Addr, port uint16) (*TCPConn, error) {
	ips = ips[:min(len(ips), maxTried)]
	c, errs := race(ctx, len(ips), attemptDelay, func(ctx context.Context, i int) (*TCPConn, error) {
		c, err := n.dialServer(ctx, netip.AddrPortFrom(ips[i], port))
		if err == nil && i > 0 {
			h.prefer(ips[i])
		}
		return c, err
	}, func(error) bool { return true }, func(c *TCPConn) { c.Abort() })
	if c == nil {
		return nil, errors.Join(errs...)
	}
	return c, nil
}

func sameAddrs(a, b []netip.Addr) bool {
	if len(a) != len(b) {
		return false
	}
	for _, ip := range a {
		if !slices.Contains(b, ip) {
			return false
		}
	}
	return true
}
