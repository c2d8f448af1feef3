// SPDX-License-Identifier: GPL-3.0-or-later

package server

import (
	"bufio"
	"errors"
	"io"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/mutex-proxy/mutex/dialers/uot"
	"github.com/mutex-proxy/mutex/flow"
)

// isOverTCP reports whether what a client asks for is no destination, but an association in the stream (UDP over TCP, see package uot).
func isOverTCP(dst flow.Addr) bool { return dst.Host == uot.Magic1 || dst.Host == uot.Magic2 }

// stream is an association whose datagrams come and go in the client's connection.
type stream struct {
	c    *session
	r    *uot.Reader
	to   flow.Addr // the one destination of a connected stream
	only bool
	out  flow.PacketConn
	last atomic.Int64 // Unix ns of the last datagram
}

// overTCP serves an association in the stream. granted is the reply that grants it, refused makes one that does not.
func (c *session) overTCP(dst flow.Addr, granted []byte, refused func(error) []byte) error {
	c.dst = "udp over tcp"
	out, end, err := c.outside(refused)
	if err != nil {
		return err
	}
	defer end()
	if _, err := c.conn.Write(granted); err != nil {
		return err
	}
	s := &stream{c: c, out: out}
	if dst.Host == uot.Magic2 {
		if err := s.request(c.in); err != nil { // within the handshake's time
			return err
		}
	}
	_ = c.conn.SetDeadline(time.Time{})
	c.granted.Store(true)
	s.r = uot.NewReader(c.in, s.only)
	return c.moveDatagrams(&s.last, func() { _ = out.Close() }, s.up, s.down)
}

// request reads what version 2 begins with.
func (s *stream) request(in *bufio.Reader) error {
	only, err := in.ReadByte()
	if err != nil {
		return err
	}
	if only > 1 {
		return errDatagram
	}
	to, err := readAddr(in)
	s.only, s.to = only == 1, to
	return err
}

// up sends what the client does, until it ends the stream.
func (s *stream) up() error {
	ds := make([]flow.Datagram, 1)
	for {
		to, payload, err := s.r.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if s.only {
			to = s.to
		} else if to.Host != "" {
			port := to.Port
			if to, err = nameAddr(to.Host); err != nil {
				continue // of this datagram alone
			}
			to.Port = port
		}
		s.last.Store(time.Now().UnixNano())
		ds[0] = flow.Datagram{Addr: to, Buf: payload}
		if _, err := s.out.WriteBatch(ds); err != nil && !ofDatagram(err) {
			return err
		}
	}
}

// down passes on what comes. A client that takes nothing holds up nobody but itself.
func (s *stream) down() error {
	buf := make([]byte, maxDatagram)
	ds := make([]flow.Datagram, 1)
	var frame []byte
	for {
		ds[0].Buf = buf
		if _, err := s.out.ReadBatch(ds); err != nil {
			return err
		}
		from := ds[0].Addr
		if !from.IP.IsValid() {
			continue
		}
		s.last.Store(time.Now().UnixNano())
		var err error
		if s.only {
			frame, err = uot.AppendConnected(frame[:0], ds[0].Buf)
		} else {
			frame, err = uot.Append(frame[:0], flow.AddrFrom(netip.AddrPortFrom(from.IP, from.Port)), ds[0].Buf)
		}
		if err != nil {
			continue
		}
		_ = s.c.conn.SetWriteDeadline(time.Now().Add(s.c.s.cfg.DialTimeout))
		if _, err := s.c.conn.Write(frame); err != nil {
			return err
		}
	}
}
