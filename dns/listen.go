// SPDX-License-Identifier: GPL-3.0-or-later

package dns

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/miekg/dns"

	"github.com/mutex-proxy/mutex/flow"
)

const (
	// maxQueries bounds the queries of the listeners that are being answered: over UDP further ones are dropped (the client asks again),
	// over TCP they wait unread.
	maxQueries = 512
	// maxClients bounds the connections of ServeStream; further ones are closed at once.
	maxClients = 256
	// clientIdle closes a client's connection (RFC 7766 section 6.2.3: of the order of seconds).
	clientIdle = 10 * time.Second
	// maxPipelined bounds the queries of one client's connection that are being answered.
	maxPipelined = 32
	// acceptPause is how long to wait when the process is out of descriptors.
	acceptPause = 100 * time.Millisecond
)

// own registers what Close has to close, and a goroutine it has to wait for. ok is false after Close.
func (s *Server) own(c io.Closer) (release func(), ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, false
	}
	s.open[c] = struct{}{}
	s.wg.Add(1)
	return func() {
		c.Close()
		s.mu.Lock()
		delete(s.open, c)
		s.mu.Unlock()
		s.wg.Done()
	}, true
}

// ServePacket answers the queries that arrive on pc, until Close, which it then has closed; nil is returned. It is for loopback sockets
// that the kernel redirects captured port-53 traffic to.
func (s *Server) ServePacket(pc net.PacketConn) error { return s.servePacket(pc, s.Exchange) }

func (s *Server) servePacket(pc net.PacketConn, exchange exchanger) error {
	release, ok := s.own(pc)
	if !ok {
		_ = pc.Close()
		return nil
	}
	defer release()
	var wg sync.WaitGroup
	defer wg.Wait()
	local := addrPort(pc.LocalAddr())
	buf := make([]byte, dns.MaxMsgSize)
	for {
		n, from, err := pc.ReadFrom(buf)
		if err != nil {
			if s.life.Err() != nil {
				return nil
			}
			if errors.Is(err, net.ErrClosed) || !s.pause() {
				return err
			}
			continue // an ICMP error to an earlier reply is not the end
		}
		select {
		case s.busy <- struct{}{}:
		default:
			s.dropped.Add(1)
			continue
		}
		query := append([]byte(nil), buf[:n]...)
		wg.Go(func() {
			defer func() { <-s.busy }()
			f := &flow.Flow{Context: s.context, Network: flow.UDP, Src: addrPort(from), Orig: local, Dst: flow.AddrFrom(local), Start: s.now()}
			if reply, err := exchange(s.life, f, query); err == nil {
				_, _ = pc.WriteTo(reply, from) // a client that is gone asks no more
			}
		})
	}
}

// ServeStream answers the queries that arrive on connections to l, until Close, which it then has closed; nil is returned.
func (s *Server) ServeStream(l net.Listener) error { return s.serveStream(l, s.Exchange) }

func (s *Server) serveStream(l net.Listener, exchange exchanger) error {
	release, ok := s.own(l)
	if !ok {
		l.Close()
		return nil
	}
	defer release()
	var wg sync.WaitGroup
	defer wg.Wait()
	clients := make(chan struct{}, maxClients)
	for {
		conn, err := l.Accept()
		if err != nil {
			if s.life.Err() != nil {
				return nil
			}
			if errors.Is(err, net.ErrClosed) || !s.pause() {
				return err
			}
			continue
		}
		select {
		case clients <- struct{}{}:
		default:
			s.dropped.Add(1)
			conn.Close()
			continue
		}
		wg.Go(func() {
			defer func() { <-clients }()
			s.serveConn(conn, exchange)
		})
	}
}

// serveConn answers the queries of one connection, each as soon as it can (RFC 7766 section 7).
func (s *Server) serveConn(conn net.Conn, exchange exchanger) {
	release, ok := s.own(conn)
	if !ok {
		conn.Close()
		return
	}
	defer release()
	ctx, cancel := context.WithCancel(s.life)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel() // who does not listen any more needs no answer
	var write sync.Mutex
	pipelined := make(chan struct{}, maxPipelined)
	local, remote := addrPort(conn.LocalAddr()), addrPort(conn.RemoteAddr())
	for r := bufio.NewReader(conn); ; {
		if err := conn.SetReadDeadline(time.Now().Add(clientIdle)); err != nil {
			return
		}
		query, err := readMessage(r)
		if errors.Is(err, io.EOF) { // it may only have finished asking
			wg.Wait()
			return
		}
		if err != nil {
			return
		}
		pipelined <- struct{}{}
		s.busy <- struct{}{}
		wg.Go(func() {
			defer func() { <-s.busy; <-pipelined }()
			f := &flow.Flow{Context: s.context, Network: flow.TCP, Src: remote, Orig: local, Dst: flow.AddrFrom(local), Start: s.now()}
			reply, err := exchange(ctx, f, query)
			if err != nil { // not DNS: nothing sensible can follow on this stream
				conn.Close()
				return
			}
			write.Lock()
			defer write.Unlock()
			if err := conn.SetWriteDeadline(time.Now().Add(clientIdle)); err != nil {
				return
			}
			if _, err := conn.Write(framed(reply)); err != nil {
				conn.Close()
			}
		})
	}
}

// pause waits before the next attempt after an error. It returns false after Close.
func (s *Server) pause() bool {
	t := time.NewTimer(acceptPause)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-s.life.Done():
		return false
	}
}

// addrPort returns the address of a UDP or TCP endpoint, the zero value of anything else.
func addrPort(a net.Addr) netip.AddrPort {
	if a, ok := a.(interface{ AddrPort() netip.AddrPort }); ok {
		ap := a.AddrPort()
		return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
	}
	return netip.AddrPort{}
}
