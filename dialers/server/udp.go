// SPDX-License-Identifier: GPL-3.0-or-later

package server

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mutex-proxy/mutex/flow"
)

const (
	// maxDatagram is the largest UDP payload; maxHeader the largest header in front of one that we send (an IPv6 address).
	maxDatagram = 65535
	maxHeader   = 3 + 1 + 16 + 2
)

// association is one UDP association (RFC 1928 section 7). It lives as long as its control connection, and takes datagrams of its client
// alone: of the control connection's address, and of the port that the first one came from.
type association struct {
	c      *session
	client netip.Addr
	port   atomic.Uint32 // 0 until the first datagram
	in     *net.UDPConn  // towards the client
	out    flow.PacketConn
	last   atomic.Int64 // Unix ns of the last datagram
}

var errTooMany = errors.New("too many associations")

// associate is UDP ASSOCIATE. from is where the client says it will send from; it may be zero, and behind a NAT it is wrong, so only its
// port is believed, and only if the address is the client's.
func (c *session) associate(from flow.Addr) error {
	c.dst = "udp"
	refused := func(err error) []byte {
		switch {
		case errors.Is(err, errTooMany):
			return socksReply(repGeneral, netip.AddrPort{})
		case errors.Is(err, errors.ErrUnsupported):
			return socksReply(repCommand, netip.AddrPort{})
		}
		return socksReply(repOf(err), netip.AddrPort{})
	}
	out, end, err := c.outside(refused)
	if err != nil {
		return err
	}
	defer end()
	c.granted.Store(true)
	a := &association{c: c, client: c.clientAddr(), out: out}
	if from.IP == a.client {
		a.port.Store(uint32(from.Port))
	}
	local := c.conn.LocalAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
	if a.in, err = c.s.cfg.Net.ListenUDP(c.ctx, netip.AddrPortFrom(local, 0)); err != nil {
		c.refuse(socksReply(repGeneral, netip.AddrPort{}))
		return err
	}
	defer func() { _ = a.in.Close() }()
	if _, err = c.conn.Write(socksReply(repSucceeded, a.in.LocalAddr().(*net.UDPAddr).AddrPort())); err != nil {
		return err
	}
	_ = c.conn.SetDeadline(time.Time{})
	return c.moveDatagrams(&a.last, a.close, a.control, a.up, a.down)
}

// outside takes one of the places for associations, opens the side of one that is not the client's, or refuses it. end closes that and gives the
// place back.
func (c *session) outside(refused func(error) []byte) (out flow.PacketConn, end func(), err error) {
	select {
	case c.s.udp <- struct{}{}:
	default:
		c.refuse(refused(errTooMany))
		return nil, nil, errTooMany
	}
	if out, err = c.s.cfg.Dialer.ListenPacket(c.ctx, nil); err != nil {
		<-c.s.udp
		c.refuse(refused(err))
		return nil, nil, err
	}
	return out, func() {
		_ = out.Close()
		<-c.s.udp
	}, nil
}

// control reads the control connection until it ends; nothing else is expected of it.
func (a *association) control() error {
	_, err := io.Copy(io.Discard, a.c.in)
	return err
}

// close ends both ways.
func (a *association) close() {
	_ = a.in.Close()
	_ = a.out.Close()
}

// moveDatagrams runs the parts of an association until one ends, or no datagram has moved for a while (last, in Unix ns, is when one did).
// shut and the connection's deadline then end the others. It returns why the first one ended.
func (c *session) moveDatagrams(last *atomic.Int64, shut func(), parts ...func() error) error {
	var once sync.Once
	var cause error
	end := func(err error) {
		once.Do(func() {
			cause = err
			shut()
			_ = c.conn.SetDeadline(time.Unix(1, 0))
		})
	}
	last.Store(time.Now().UnixNano())
	idle := watchDatagrams(last, c.s.cfg.UDPIdleTimeout, func() { end(errIdle) })
	defer idle.Stop()
	var wg sync.WaitGroup
	for _, part := range parts {
		wg.Go(func() { end(part()) })
	}
	wg.Wait()
	return cause
}

// watchDatagrams calls end when no datagram has moved for limit. last is when one did, in Unix ns.
func watchDatagrams(last *atomic.Int64, limit time.Duration, end func()) *time.Timer {
	ready := make(chan *time.Timer, 1)
	t := time.AfterFunc(limit, func() {
		t := <-ready
		ready <- t
		if quiet := time.Since(time.Unix(0, last.Load())); quiet < limit {
			t.Reset(limit - quiet)
			return
		}
		end()
	})
	ready <- t
	return t
}

// up moves datagrams from the client. Those of others, fragments, and malformed ones are dropped, as RFC 1928 says.
func (a *association) up() error {
	buf := make([]byte, maxDatagram)
	ds := make([]flow.Datagram, 1)
	for {
		n, from, err := a.in.ReadFromUDPAddrPort(buf)
		if err != nil {
			return err
		}
		if from.Addr().Unmap() != a.client || !a.port.CompareAndSwap(0, uint32(from.Port())) && a.port.Load() != uint32(from.Port()) {
			continue
		}
		dst, payload, err := parseDatagram(buf[:n])
		if err != nil {
			continue
		}
		a.last.Store(time.Now().UnixNano())
		ds[0] = flow.Datagram{Addr: dst, Buf: payload}
		if _, err := a.out.WriteBatch(ds); err != nil && !ofDatagram(err) {
			return err
		}
	}
}

// ofDatagram reports whether an error is about one datagram alone: to be lost, as the network would lose it.
func ofDatagram(err error) bool {
	return !errors.Is(err, flow.ErrUpstream) && !errors.Is(err, net.ErrClosed)
}

// down moves datagrams to the client. The header is written into the room in front of the payload.
func (a *association) down() error {
	buf := make([]byte, maxHeader+maxDatagram)
	ds := make([]flow.Datagram, 1)
	for {
		ds[0].Buf = buf[maxHeader:]
		if _, err := a.out.ReadBatch(ds); err != nil {
			return err
		}
		port := a.port.Load()
		if port == 0 || !ds[0].Addr.IP.IsValid() {
			continue
		}
		a.last.Store(time.Now().UnixNano())
		size := headerSize(ds[0].Addr.IP)
		msg := buf[maxHeader-size : maxHeader+len(ds[0].Buf)]
		putHeader(msg, ds[0].Addr.AddrPort())
		_, err := a.in.WriteToUDPAddrPort(msg, netip.AddrPortFrom(a.client, uint16(port)))
		if errors.Is(err, net.ErrClosed) {
			return err
		}
	}
}

func headerSize(ip netip.Addr) int {
	if ip.Unmap().Is4() {
		return 3 + 1 + 4 + 2
	}
	return maxHeader
}

// putHeader writes the header of a datagram from an address into b, which has room for it.
func putHeader(b []byte, from netip.AddrPort) {
	b[0], b[1], b[2] = 0, 0, 0
	if ip := from.Addr().Unmap(); ip.Is4() {
		b[3] = atypIPv4
		v4 := ip.As4()
		copy(b[4:], v4[:])
		binary.BigEndian.PutUint16(b[8:], from.Port())
		return
	}
	b[3] = atypIPv6
	v6 := from.Addr().As16()
	copy(b[4:], v6[:])
	binary.BigEndian.PutUint16(b[20:], from.Port())
}

var errDatagram = errors.New("malformed datagram")

// parseDatagram takes the header of RFC 1928 section 7 off.
func parseDatagram(b []byte) (flow.Addr, []byte, error) {
	var dst flow.Addr
	if len(b) < 5 || b[2] != 0 {
		return dst, nil, errDatagram
	}
	at := 4
	var err error
	switch b[3] {
	case atypIPv4:
		if at += 4; len(b) >= at {
			dst.IP = netip.AddrFrom4([4]byte(b[4:at]))
		}
	case atypIPv6:
		if at += 16; len(b) >= at {
			dst.IP = netip.AddrFrom16([16]byte(b[4:at])).Unmap()
		}
	case atypDomain:
		if at += 1 + int(b[4]); len(b) >= at {
			dst, err = nameAddr(string(b[5:at]))
		}
	default:
		return dst, nil, errDatagram
	}
	if len(b) < at+2 {
		return dst, nil, errDatagram
	}
	if err != nil {
		return dst, nil, fmt.Errorf("%w: %w", errDatagram, err)
	}
	dst.Port = binary.BigEndian.Uint16(b[at:])
	return dst, b[at+2:], nil
}
