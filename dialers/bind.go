// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/mutex-proxy/mutex/flow"
)

const (
	cmdBind = 2
	// bindKeepAlive finds an upstream that dies while a binding waits for its connection, which may be for ever.
	bindKeepAlive = keepAliveIdle
)

var (
	_ Binder       = (*SOCKS4)(nil)
	_ Binder       = (*SOCKS5)(nil)
	_ Binder       = (*Auto)(nil)
	_ flow.Binding = (*binding)(nil)
)

// Binder is an upstream that can be asked to accept connections.
type Binder interface {
	// Bind asks for one connection from peer and returns when the upstream listens for it, or refuses.
	Bind(ctx context.Context, peer flow.Addr) (flow.Binding, error)
}

// Binds reports whether what d speaks has BIND at all; of a pool, whether a member does. Whether the server serves it is learned.
func Binds(d flow.Dialer) bool {
	if p, ok := d.(*Pool); ok {
		return slices.ContainsFunc(p.members, func(m *member) bool { return Binds(m.Dialer) })
	}
	_, ok := d.(Binder)
	return ok
}

// binding is a BIND whose first reply has come: the server listens. It is one connection to the server, which becomes the stream of
// whoever connects.
type binding struct {
	u    *upstream
	op   string
	tcp  *TCPConn
	conn flow.Conn // tcp, or TLS over it
	addr netip.AddrPort
	any  bool                               // anybody may connect
	next func(io.Reader) (flow.Addr, error) // reads the second reply
}

// Addr returns where the server listens. It is an address that can be given to others: see relayAddr.
func (b *binding) Addr() netip.AddrPort { return b.addr }

// Anybody reports whether the server was asked to let everybody connect.
func (b *binding) Anybody() bool { return b.any }

// Accept waits for the second reply: somebody has connected, from the address returned (invalid if the server does not say). The binding
// has become the connection then, or, after an error, is closed.
func (b *binding) Accept(ctx context.Context) (flow.Conn, netip.AddrPort, error) {
	deadline, _ := ctx.Deadline() // none: keep-alive says when the server is dead
	_ = b.conn.SetDeadline(deadline)
	stop := context.AfterFunc(ctx, func() { _ = b.conn.SetDeadline(time.Unix(1, 0)) })
	peer, err := b.next(b.conn)
	if !stop() && err == nil {
		err = context.Cause(ctx)
	}
	if err == nil {
		err = b.conn.SetDeadline(time.Time{})
	}
	if err != nil {
		b.tcp.Abort()
		return nil, netip.AddrPort{}, b.u.ended(ctx, b.op+": waiting at "+b.addr.String(), err)
	}
	return b.conn, peer.AddrPort(), nil
}

// Close gives the binding up; the server stops listening. After Accept it does nothing.
func (b *binding) Close() error { return b.tcp.Close() }

// Bind asks the upstream to accept one connection from peer (RFC 1928 section 6): its address, or 0.0.0.0 or :: for anybody where the
// server allows it. It returns when the server listens. Errors wrap errors.ErrUnsupported if the upstream has said that it cannot.
func (s *SOCKS5) Bind(ctx context.Context, peer flow.Addr) (flow.Binding, error) {
	op := "bind for " + peer.String()
	addr, err := s.target(peer)
	if err != nil {
		return nil, s.wrap(op, err)
	}
	b := &binding{u: &s.upstream, op: op, any: addr.Host == "" && addr.IP.IsUnspecified(), next: readReply}
	err = s.listen(ctx, b, func() (bound flow.Addr, err error) {
		if b.conn, err = secure(ctx, b.tcp, s.tls); err != nil {
			return bound, err
		}
		return s.request(b.conn, cmdBind, addr)
	})
	if err != nil {
		return nil, err
	}
	return b, nil
}

// bindBeside is Bind from the destination of a connection that the server has made from its address local. For a name of both families some
// servers (dante) listen in another family than they have connected in, where the destination, which speaks the one it was reached by, cannot
// come. Then the wildcard of the right family is asked for: the server's address is known to the server alone.
func (s *SOCKS5) bindBeside(ctx context.Context, peer flow.Addr, local netip.Addr) (flow.Binding, error) {
	b, err := s.Bind(ctx, peer)
	if err != nil || peer.Host == "" || !local.IsValid() || local.IsUnspecified() || b.Addr().Addr().Is4() == local.Is4() {
		return b, err
	}
	_ = b.Close()
	if b, err = s.Bind(ctx, flow.Addr{IP: wildcard(local)}); err != nil {
		return nil, err
	}
	if at := b.Addr(); at.Addr().Is4() != local.Is4() {
		_ = b.Close()
		return nil, s.wrap("bind for "+peer.String(), fmt.Errorf("%w: it listens at %s, and has connected from %s", flow.ErrNetUnreachable, at, local))
	}
	return b, nil
}

// Bind asks the upstream to accept one connection from peer, an IPv4 address, or a name for socks4a.
func (s *SOCKS4) Bind(ctx context.Context, peer flow.Addr) (flow.Binding, error) {
	b := &binding{u: &s.upstream, op: "bind for " + peer.String(), any: peer.Host == "" && peer.IP.IsUnspecified(), next: readReply4}
	req, err := s.request(cmdBind, peer)
	if err != nil {
		return nil, s.wrap(b.op, err)
	}
	err = s.listen(ctx, b, func() (flow.Addr, error) {
		b.conn = b.tcp
		return ask4(b.tcp, req)
	})
	if err != nil {
		return nil, err
	}
	return b, nil
}

// listen takes b to its first reply, and counts it as an attempt.
func (u *upstream) listen(ctx context.Context, b *binding, ask func() (flow.Addr, error)) error {
	if !u.bind.allowed() {
		return u.wrap(b.op, fmt.Errorf("%w: the upstream has no BIND", errors.ErrUnsupported))
	}
	tcp, err := u.connect(ctx)
	if err != nil {
		u.done(err)
		return err
	}
	b.tcp = tcp
	err = handshake(ctx, tcp, func() error {
		bound, err := ask()
		if err != nil {
			return err
		}
		b.addr, err = relayAddr(bound, tcp.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap())
		return err
	})
	u.learnBind(err)
	if err != nil {
		tcp.Abort()
		err = u.ended(ctx, b.op, err)
		u.done(err)
		return err
	}
	_ = tcp.SetKeepAlivePeriod(bindKeepAlive)
	u.done(nil)
	u.track(tcp)
	return nil
}

// learnBind notes what an answer says about BIND. SOCKS4 has one code for "no such command" and "not for you"; ssh -D closes.
func (u *upstream) learnBind(err error) {
	var rep replyError
	var rep4 reply4Error
	switch {
	case err == nil:
		u.bind.can()
	case errors.As(err, &rep) && rep == repUnsupported:
		u.bind.cannot()
	case errors.As(err, &rep4), errors.Is(err, errNoReply) && !errors.Is(err, flow.ErrUpstream):
		u.bind.doubt()
	}
}
