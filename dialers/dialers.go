// SPDX-License-Identifier: GPL-3.0-or-later

// Package dialers speaks to upstreams: SOCKS4, SOCKS4a, SOCKS5, HTTP CONNECT, direct, and pools of them. It opens every socket of the project, each with
// the bypass mark, and resolves the names of upstreams themselves.
//
// It decides nothing (routing does) and resolves no destination (dns does, through flow.Names). The daemon builds upstreams with
// ParseURL, New and NewPool; flow calls Dial and ListenPacket.
package dialers

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/mutex-proxy/mutex/flow"
)

// Status is what an upstream knows about itself.
type Status struct {
	Name    string
	URL     string // without the password
	Up      bool   // false since the last attempt failed because of the upstream itself
	Latency time.Duration
	Active  uint64 // connections and associations open now
	Total   uint64 // attempts
	Errors  uint64 // attempts that failed because of the upstream itself
	Dropped uint64 // datagrams that could not be sent or delivered
	State   State
	// What has been learned: "yes", "no" or "unknown". They are re-learned: a "no" is tried again after a while.
	UDP, IPv6, RemoteDNS, Bind string
	// Auth is what the server last asked for, or took, with spaces between: none, password (SOCKS5), and the schemes of HTTP; "" = unknown. Of a pool,
	// what its members' have.
	Auth string
	Warm int // connections that are ready for flows to come
}

// Learned and unlearned.
const (
	yes     = "yes"
	no      = "no"
	unknown = "unknown"
)

// New returns the upstream that a Spec describes. It opens nothing; read the secret files before (Spec.ReadSecrets). reject and drop are
// actions of routing, not upstreams.
func New(name string, s Spec, n *Net) (flow.Dialer, error) {
	if s.tls == nil && (s.CAFile != "" || s.CertFile != "") {
		return nil, fmt.Errorf("upstream %s: the certificates have not been read", name) // the system's instead would trust too many
	}
	switch s.Scheme {
	case SchemeDirect:
		return NewDirect(name, n), nil
	case SchemeSOCKS4, SchemeSOCKS4a:
		return newSOCKS4(name, s, n), nil
	case SchemeSOCKS5, SchemeSOCKS5h, SchemeSOCKS5s:
		return newSOCKS5(name, s, n), nil
	case SchemeHTTP, SchemeHTTPS:
		return newHTTP(name, s, n), nil
	case SchemeAuto:
		return newAuto(name, s, n), nil
	case SchemeReject, SchemeDrop:
		return nil, fmt.Errorf("upstream %s: %s is an action, not a server to dial", name, s.Scheme)
	}
	return nil, fmt.Errorf("upstream %s: %s://: %w", name, s.Scheme, flow.ErrNotSupported)
}

// upstream is what all proxies have in common: a server, its address, counters.
type upstream struct {
	name string
	spec Spec
	net  *Net
	host *serverHost
	places
	stats
	ipv6 capability
	udp  capability
	bind capability
	auth authSchemes
	warm *warm // nil unless asked for
}

func (u *upstream) init(name string, s Spec, n *Net) {
	u.name, u.spec, u.net, u.most = name, s, n, int64(s.MaxFlows)
	u.host = &serverHost{name: s.Host}
	u.ipv6.now, u.udp.now, u.bind.now = n.cfg.Now, n.cfg.Now, n.cfg.Now
}

// Name returns the name in the configuration.
func (u *upstream) Name() string { return u.name }

// Spec returns what the upstream was made from.
func (u *upstream) Spec() Spec { return u.spec }

// Prepare resolves the server's name. The daemon calls it before capture starts, while the machine's resolvers can still be reached by
// everybody; later look-ups go over marked sockets.
func (u *upstream) Prepare(ctx context.Context) error {
	_, err := u.host.addrs(ctx, u.net)
	return err
}

// Servers returns the addresses of the server as last resolved, without asking anybody.
func (u *upstream) Servers() []netip.AddrPort {
	var out []netip.AddrPort
	for _, ip := range u.host.known() {
		out = append(out, netip.AddrPortFrom(ip, u.spec.Port))
	}
	return out
}

// connect opens a TCP connection to the server. Errors wrap flow.ErrUpstream, unless the caller gave up.
func (u *upstream) connect(ctx context.Context) (*TCPConn, error) {
	if u.off() {
		return nil, u.wrap("connect", errOff)
	}
	if err := u.take(); err != nil {
		return nil, u.wrap("connect", err)
	}
	c, err := u.knock(ctx)
	if err != nil {
		u.leave()
		return nil, err
	}
	c.leave = u.leave
	if u.warm != nil {
		u.warm.drop(u.room())
	}
	return c, nil
}

// knock is connect for an upstream that may be switched off.
func (u *upstream) knock(ctx context.Context) (*TCPConn, error) {
	begin := u.net.cfg.Now()
	c, err := u.host.dial(ctx, u.net, u.spec.Port)
	if err != nil {
		return nil, u.fault(ctx, "connect", err)
	}
	end := u.net.cfg.Now()
	u.observe(end, end.Sub(begin))
	return c, nil
}

// fault wraps an error that the upstream itself is to blame for. A caller that gave up (a closed application, a lost race) blames nobody.
func (u *upstream) fault(ctx context.Context, op string, err error) error {
	if errors.Is(ctx.Err(), context.Canceled) {
		return u.wrap(op, context.Cause(ctx))
	}
	return u.wrap(op, fmt.Errorf("%w: %w", flow.ErrUpstream, err))
}

func (u *upstream) wrap(op string, err error) error {
	return fmt.Errorf("%s %s: %s: %w", u.spec.Scheme, u.spec.Server(), op, err)
}

// handshake runs f on a new connection and closes the connection if f fails. All waits of f end with ctx.
func handshake(ctx context.Context, c net.Conn, f func() error) error {
	if deadline, ok := ctx.Deadline(); ok {
		_ = c.SetDeadline(deadline)
	} else {
		_ = c.SetDeadline(time.Now().Add(maxHandshake))
	}
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })
	err := f()
	if !stop() && err == nil { // the deadline in the past may be set after ours is cleared
		err = context.Cause(ctx)
	}
	if err == nil {
		err = c.SetDeadline(time.Time{})
	}
	return err
}

// maxHandshake ends a handshake whose caller gave no deadline.
const maxHandshake = time.Minute

// done counts the end of an attempt.
func (u *upstream) done(err error) {
	if errors.Is(err, errOff) || errors.Is(err, errFull) {
		return // it has not been asked
	}
	u.total.Add(1)
	switch {
	case err == nil:
		u.down.Store(false)
	case errors.Is(err, flow.ErrUpstream):
		u.errors.Add(1)
		u.down.Store(true)
	}
}

func (u *upstream) status() Status {
	ready := 0
	if u.warm != nil {
		ready = u.warm.waiting()
	}
	return Status{
		Auth: u.auth.String(), Warm: ready,
		Name: u.name, URL: u.spec.String(), Up: !u.down.Load(), Latency: time.Duration(u.latency.Load()),
		Active: uint64(max(0, u.active.Load())), Total: u.total.Load(), Errors: u.errors.Load(),
		UDP: u.udp.String(), IPv6: u.ipv6.String(), RemoteDNS: unknown, Bind: u.bind.String(),
		Dropped: u.dropped.Load(), State: u.State(),
	}
}

// track counts a connection as active until it is closed.
func (u *upstream) track(c *TCPConn) {
	c.onClose = func() { u.closed(c) }
	u.opened(c)
}

// stats are the counters of one upstream.
type stats struct {
	total, errors atomic.Uint64
	latency       atomic.Int64 // ns, the time the server takes to accept a connection; see observe
	observed      atomic.Int64 // when that was last seen, Unix ns
	dropped       atomic.Uint64
	down          atomic.Bool
	gate
}

// observe updates the latency: a peak is believed at once, and forgotten with weight 1/8, as TCP's smoothed round-trip time (RFC 6298). A
// server that has become slow loses flows with its first slow answer, not with its eighth. A lost update does not matter.
func (s *stats) observe(now time.Time, d time.Duration) {
	old := s.latency.Load()
	s.observed.Store(now.UnixNano())
	if int64(d) >= old {
		s.latency.Store(int64(d))
		return
	}
	s.latency.Store(old + (int64(d)-old)/8)
}

// dialContext is DialContext of golang.org/x/net/proxy over a flow.Dialer.
func dialContext(ctx context.Context, d flow.Dialer, network, address string) (net.Conn, error) {
	switch network {
	case "tcp", "tcp4", "tcp6":
	default:
		return nil, net.UnknownNetworkError(network)
	}
	dst, err := ParseAddr(address)
	if err != nil {
		return nil, err
	}
	return d.Dial(ctx, dst)
}

// ParseAddr reads host:port, where host is a name or an IP literal.
func ParseAddr(address string) (flow.Addr, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return flow.Addr{}, err
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return flow.Addr{}, &net.AddrError{Err: "invalid port", Addr: address}
	}
	if ip, err := netip.ParseAddr(host); err == nil {
		return flow.AddrFrom(netip.AddrPortFrom(ip, uint16(n))), nil
	}
	if host == "" {
		return flow.Addr{}, &net.AddrError{Err: "missing host", Addr: address}
	}
	return flow.Addr{Host: strings.ToLower(strings.TrimSuffix(host, ".")), Port: uint16(n)}, nil
}

// sendable reports whether a name can be put into a request: DNS limits, and no byte that could end a line or a field.
func sendable(host string) bool {
	if host == "" || len(host) > 253 {
		return false
	}
	for _, c := range []byte(host) {
		if c <= ' ' || c >= 0x7f || strings.IndexByte(`/\@:?#[]"<>`, c) >= 0 {
			return false
		}
	}
	return true
}
