// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/mutex-proxy/mutex/flow"
)

const (
	// familyDelay is the head start of one address of a destination over the next (RFC 8305 section 5).
	familyDelay = 250 * time.Millisecond
	// maxNamed bounds the names one association has looked up; maxWaiting the datagrams that wait for one of them.
	maxNamed   = 256
	maxWaiting = 8
	// nameTTL is how long an association believes an address. Flows of an application do not outlive it by much, and a name that moves
	// within it would have moved under a plain socket too.
	nameTTL = 5 * time.Minute
	// nameTimeout bounds one look-up for an association.
	nameTimeout = 10 * time.Second
)

// resolver is the one thing WithNames needs of flow.Names.
type resolver interface {
	Resolve(ctx context.Context, host string) ([]netip.Addr, error)
}

// named is implemented by the upstreams of this package.
type named interface {
	// takesNames reports whether the upstream resolves names itself.
	takesNames() bool
}

// memberWise is implemented by pools, whose members may differ.
type memberWise interface {
	withNames(r resolver) flow.Dialer
}

// WithNames returns d for one context, whose DNS is names. An upstream that takes no names (direct, socks5://) then dials the addresses
// that the context's DNS has for a name; one that takes them is returned as it is. Counters and health stay shared with d.
func WithNames(d flow.Dialer, names flow.Names) flow.Dialer {
	if names == nil {
		return d
	}
	return withResolver(d, names)
}

// NewExit returns a Direct that resolves names with n's own resolver: for servers, which are somebody else's upstream. allow is asked for
// each address before a packet goes there, so that a server need not be a way into its own machine; nil allows all.
func NewExit(name string, n *Net, allow func(netip.AddrPort) bool) flow.Dialer {
	d := NewDirect(name, n)
	d.allow = allow
	return withResolver(d, exitNames{n})
}

type exitNames struct{ n *Net }

func (e exitNames) Resolve(ctx context.Context, host string) ([]netip.Addr, error) {
	return e.n.LookupHost(ctx, host)
}

func withResolver(d flow.Dialer, r resolver) flow.Dialer {
	if m, ok := d.(memberWise); ok {
		return m.withNames(r)
	}
	if t, ok := d.(named); ok && t.takesNames() {
		return d
	}
	return &resolving{Dialer: d, names: r}
}

// resolving puts addresses in the place of names.
type resolving struct {
	flow.Dialer
	names resolver
}

// Status is that of the upstream.
func (r *resolving) Status() Status { return StatusOf(r.Dialer) }

func (r *resolving) takesNames() bool { return true }

// DialContext is Dial for golang.org/x/net/proxy.
func (r *resolving) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	return dialContext(ctx, r, network, address)
}

// Dial resolves dst.Host unless its address is known, and tries its addresses until one answers.
func (r *resolving) Dial(ctx context.Context, dst flow.Addr) (flow.Conn, error) {
	if dst.IP.IsValid() || dst.Host == "" {
		return r.Dialer.Dial(ctx, dst)
	}
	ips, err := r.resolve(ctx, dst.Host)
	if err != nil {
		return nil, fmt.Errorf("%s: resolve %s: %w", r.Name(), dst.Host, err)
	}
	c, errs := race(ctx, len(ips), familyDelay, func(ctx context.Context, i int) (flow.Conn, error) {
		return r.Dialer.Dial(ctx, flow.Addr{Host: dst.Host, IP: ips[i], Port: dst.Port})
	}, func(err error) bool { return !errors.Is(err, flow.ErrUpstream) }, flow.Conn.Abort)
	if c == nil {
		return nil, bestError(errs)
	}
	return c, nil
}

// resolve returns the addresses of a name in the order in which they are tried: families in turn, the one that works first.
func (r *resolving) resolve(ctx context.Context, host string) ([]netip.Addr, error) {
	ips, err := r.names.Resolve(ctx, host)
	if err != nil {
		if errors.Is(err, flow.ErrNoServers) || timedOut(err) {
			return nil, err
		}
		return nil, fmt.Errorf("%w: %w", flow.ErrHostUnreachable, err)
	}
	if len(ips) == 0 {
		return nil, fmt.Errorf("%w: no address", flow.ErrHostUnreachable)
	}
	return interleave(ips, StatusOf(r.Dialer).IPv6 == yes)[:min(len(ips), maxTried)], nil
}

// interleave orders addresses by turns of family (RFC 8305 section 4), with the given family first. IPv4 is first where IPv6 has not
// been seen to work: through a proxy without it each attempt would cost a round trip.
func interleave(ips []netip.Addr, v6First bool) []netip.Addr {
	var fam [2][]netip.Addr
	for _, ip := range ips {
		ip = ip.Unmap()
		i := 0
		if ip.Is6() != v6First {
			i = 1
		}
		fam[i] = append(fam[i], ip)
	}
	out := make([]netip.Addr, 0, len(ips))
	for i := range max(len(fam[0]), len(fam[1])) {
		for _, f := range fam {
			if i < len(f) {
				out = append(out, f[i])
			}
		}
	}
	return out
}

// ListenPacket opens an association that takes names: each is resolved once, and answers from its address carry the name again.
func (r *resolving) ListenPacket(ctx context.Context, f *flow.Flow) (flow.PacketConn, error) {
	pc, err := r.Dialer.ListenPacket(ctx, f)
	if err != nil {
		return nil, err
	}
	n := &namedPackets{PacketConn: pc, r: r, byName: make(map[string]*nameEntry)}
	n.ctx, n.cancel = context.WithCancel(context.Background())
	return n, nil
}

// namedPackets is a PacketConn that resolves the names of destinations. The writer never waits for a look-up: datagrams to a name that is
// being looked up wait in a short queue, and the rest goes on.
type namedPackets struct {
	flow.PacketConn
	r      *resolving
	ctx    context.Context // the association's life, not a caller's: ends with Close
	cancel context.CancelFunc
	wg     sync.WaitGroup
	write  sync.Mutex // look-ups that end write too

	mu     sync.Mutex
	byName map[string]*nameEntry
	byAddr map[netip.Addr]string // nil until a name is known, so that associations without names pay nothing
}

type nameEntry struct {
	ip      netip.Addr // invalid while the look-up runs
	expires time.Time
	waiting []flow.Datagram // copies
}

// ReadBatch fills ds; answers from the address of a name carry the name and the address.
func (n *namedPackets) ReadBatch(ds []flow.Datagram) (int, error) {
	k, err := n.PacketConn.ReadBatch(ds)
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.byAddr != nil {
		for i := range ds[:k] {
			if ds[i].Addr.Host == "" {
				ds[i].Addr.Host = n.byAddr[ds[i].Addr.IP]
			}
		}
	}
	return k, err
}

// WriteBatch sends ds, in order but for datagrams that wait for a look-up. Those count as taken.
func (n *namedPackets) WriteBatch(ds []flow.Datagram) (int, error) {
	for i := 0; i < len(ds); {
		j := i
		for j < len(ds) && n.ready(&ds[j]) {
			j++
		}
		if j > i {
			n.write.Lock()
			k, err := n.PacketConn.WriteBatch(ds[i:j])
			n.write.Unlock()
			if err != nil {
				return i + k, err
			}
		}
		if i = j; i < len(ds) {
			i++ // this one waits, or was dropped
		}
	}
	return len(ds), nil
}

// ready fills in the address of d's name, if it is known; else it sees to it that d is sent later.
func (n *namedPackets) ready(d *flow.Datagram) bool {
	if d.Addr.IP.IsValid() || d.Addr.Host == "" {
		return true
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	e := n.byName[d.Addr.Host]
	if e != nil && e.ip.IsValid() {
		if time.Now().Before(e.expires) {
			d.Addr.IP = e.ip
			return true
		}
		e = nil
	}
	if e == nil {
		if len(n.byName) >= maxNamed && !n.evictLocked() || n.ctx.Err() != nil {
			return false
		}
		e = new(nameEntry)
		n.byName[d.Addr.Host] = e
		n.wg.Go(func() { n.lookup(d.Addr.Host, e) })
	}
	if len(e.waiting) < maxWaiting {
		e.waiting = append(e.waiting, flow.Datagram{Addr: d.Addr, Buf: slices.Clone(d.Buf)})
	}
	return false
}

// evictLocked forgets a name that is not being looked up.
func (n *namedPackets) evictLocked() bool {
	for host, e := range n.byName {
		if e.ip.IsValid() {
			delete(n.byName, host)
			delete(n.byAddr, e.ip)
			return true
		}
	}
	return false
}

// lookup resolves a name and sends what waits for it. A failure is not remembered: the next datagram asks again.
func (n *namedPackets) lookup(host string, e *nameEntry) {
	ctx, cancel := context.WithTimeout(n.ctx, nameTimeout)
	defer cancel()
	ips, err := n.r.resolve(ctx, host)
	n.mu.Lock()
	waiting := e.waiting
	e.waiting = nil
	if err != nil {
		delete(n.byName, host)
		n.mu.Unlock()
		return
	}
	e.ip, e.expires = ips[0], time.Now().Add(nameTTL)
	if n.byAddr == nil {
		n.byAddr = make(map[netip.Addr]string)
	}
	n.byAddr[e.ip] = host
	n.mu.Unlock()
	for i := range waiting {
		waiting[i].Addr.IP = e.ip
	}
	n.write.Lock()
	defer n.write.Unlock()
	_, _ = n.PacketConn.WriteBatch(waiting) // an association that has ended says so to its reader
}

// Close ends the association and the look-ups for it.
func (n *namedPackets) Close() error {
	n.mu.Lock() // no look-up starts after this
	n.cancel()
	n.mu.Unlock()
	err := n.PacketConn.Close()
	n.wg.Wait()
	return err
}

// StatusOf returns the status of an upstream, wrapped or not; of a dialer that has none, its name.
func StatusOf(d flow.Dialer) Status {
	if s, ok := d.(interface{ Status() Status }); ok {
		return s.Status()
	}
	return Status{Name: d.Name(), Up: true, UDP: unknown, IPv6: unknown, RemoteDNS: unknown, Bind: unknown}
}
