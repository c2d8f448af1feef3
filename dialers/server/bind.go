// SPDX-License-Identifier: GPL-3.0-or-later

package server

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/mutex-proxy/mutex/dialers"
	"github.com/mutex-proxy/mutex/flow"
)

const (
	cmdBind = 2
	// discard is where a datagram would go to that finds out from which address a peer is reached. None is sent.
	discard = 9
)

var (
	errTooManyBinds = errors.New("too many connections waited for")
	errNobody       = errors.New("nobody has connected")
	errClientGone   = errors.New("the client has gone")
)

// bindReplies is what a protocol says. Both replies to a client that is served have the same form (RFC 1928 section 6).
type bindReplies struct {
	granted func(netip.AddrPort) []byte
	refused func(error) []byte
}

func (c *session) bind5(peer flow.Addr) error {
	return c.bind(peer, bindReplies{
		granted: func(a netip.AddrPort) []byte { return socksReply(repSucceeded, a) },
		refused: func(err error) []byte {
			if errors.Is(err, errors.ErrUnsupported) {
				return socksReply(repCommand, netip.AddrPort{})
			}
			if errors.Is(err, errTooManyBinds) {
				return socksReply(repGeneral, netip.AddrPort{})
			}
			return socksReply(repOf(err), netip.AddrPort{})
		},
	})
}

func (c *session) bind4(peer flow.Addr) error {
	return c.bind(peer, bindReplies{
		granted: func(a netip.AddrPort) []byte { return reply4(socks4Granted, a) },
		refused: func(error) []byte { return reply4(socks4Rejected, netip.AddrPort{}) },
	})
}

// bind listens for one connection and hands it to the client: BIND. peer is who may connect; its port means nothing. With 0.0.0.0 or ::
// anybody may who is an allowed destination, and the port, unless 0, is the one to listen on. Others who connect are reset, and the wait goes
// on: a stranger shall not be able to end it.
func (c *session) bind(peer flow.Addr, say bindReplies) error {
	c.dst = "bind " + peer.String()
	select {
	case c.s.binds <- struct{}{}:
		defer func() { <-c.s.binds }()
	default:
		c.refuse(say.refused(errTooManyBinds))
		return errTooManyBinds
	}
	c.granted.Store(true)
	peers, l, err := c.listen(peer)
	if err != nil {
		c.refuse(say.refused(err))
		return err
	}
	defer func() { _ = l.Close() }()
	if _, err := c.conn.Write(say.granted(l.Addr().(*net.TCPAddr).AddrPort())); err != nil {
		return err
	}
	in, err := c.await(l, peers)
	if err != nil {
		c.refuse(say.refused(err))
		return err
	}
	_ = l.Close() // one connection, no more
	return c.relay(in, say.granted(in.RemoteAddr().(*net.TCPAddr).AddrPort()))
}

// listen opens the listener that peer reaches us at, and returns who may connect; nil is anybody.
func (c *session) listen(peer flow.Addr) ([]netip.Addr, *net.TCPListener, error) {
	if c.s.chain {
		return nil, nil, errors.ErrUnsupported // we are not where the connections of the client come from
	}
	ctx, cancel := context.WithTimeout(c.ctx, c.s.cfg.DialTimeout)
	defer cancel()
	n := c.s.cfg.Net
	if peer.Host == "" && peer.IP.IsUnspecified() {
		at := c.conn.LocalAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
		l, err := n.ListenTCP(ctx, netip.AddrPortFrom(at, peer.Port))
		return nil, l, err
	}
	peers := []netip.Addr{peer.IP}
	var err error
	if peer.Host != "" {
		if peers, err = n.LookupHost(ctx, peer.Host); err != nil {
			return nil, nil, err
		}
	}
	peers = slices.DeleteFunc(peers, func(ip netip.Addr) bool { return !c.allows(netip.AddrPortFrom(ip, peer.Port)) })
	if len(peers) == 0 {
		return nil, nil, flow.ErrProhibited
	}
	var u *net.UDPConn
	for _, ip := range peers { // there may be no route to the first family
		if u, err = n.DialUDP(ctx, netip.AddrPortFrom(ip, discard)); err == nil {
			break
		}
	}
	if err != nil {
		return nil, nil, err
	}
	at := u.LocalAddr().(*net.UDPAddr).AddrPort().Addr()
	_ = u.Close()
	l, err := n.ListenTCP(ctx, netip.AddrPortFrom(at, 0))
	return peers, l, err
}

func (c *session) allows(ap netip.AddrPort) bool { return c.s.cfg.Allow == nil || c.s.cfg.Allow(ap) }

// await accepts one connection of peers. It ends with the bind time-out, and with the client.
func (c *session) await(l *net.TCPListener, peers []netip.Addr) (*dialers.TCPConn, error) {
	_ = c.conn.SetDeadline(time.Time{})
	_ = l.SetDeadline(time.Now().Add(c.s.cfg.BindTimeout))
	stop := context.AfterFunc(c.ctx, func() { _ = l.Close() })
	defer stop()
	var watch sync.WaitGroup
	gone := false
	watch.Go(func() {
		// What the client sends early is the peer's, and stays in the buffer. A deadline is ours, see below.
		if _, err := c.in.Peek(1); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			gone = true
			_ = l.Close()
		}
	})
	in, err := c.acceptOf(l, peers)
	_ = c.conn.SetReadDeadline(time.Unix(1, 0))
	watch.Wait()
	_ = c.conn.SetReadDeadline(time.Time{})
	switch {
	case gone:
		if in != nil {
			in.Abort()
		}
		return nil, errClientGone
	case errors.Is(err, os.ErrDeadlineExceeded):
		return nil, errNobody
	}
	return in, err
}

func (c *session) acceptOf(l *net.TCPListener, peers []netip.Addr) (*dialers.TCPConn, error) {
	for {
		t, err := l.AcceptTCP()
		if err != nil {
			return nil, err
		}
		in := &dialers.TCPConn{TCPConn: t}
		from := t.RemoteAddr().(*net.TCPAddr).AddrPort()
		ip := from.Addr().Unmap().WithZone("")
		if (peers == nil || slices.Contains(peers, ip)) && c.allows(from) {
			return in, nil
		}
		in.Abort()
	}
}
