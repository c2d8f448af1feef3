// SPDX-License-Identifier: GPL-3.0-or-later

// Package uot is the framing of UDP over TCP as SagerNet specifies it (https://sing-box.sagernet.org/configuration/shared/udp-over-tcp/), which
// sing-box, mihomo and others speak: a stream to a magic name carries datagrams. Version 2 begins with a request, version 1 does not.
//
//	request   isConnect(1) | type(1) address port(2)            SOCKS5's types of addresses
//	datagram  type(1) address port(2) | length(2) | payload     types of its own; with isConnect only length and payload
//
// It opens nothing: dialers and dialers/server do, and share it.
package uot

import (
	"encoding/binary"
	"errors"
	"io"
	"net/netip"

	"github.com/mutex-proxy/mutex/flow"
)

// The names that a stream is asked for, with port 0.
const (
	Magic1 = "sp.udp-over-tcp.arpa"
	Magic2 = "sp.v2.udp-over-tcp.arpa"
)

// The types of addresses in front of datagrams.
const (
	typeIPv4 = 0
	typeIPv6 = 1
	typeName = 2
)

const (
	// MaxPayload is the largest datagram.
	MaxPayload = 65535
	// firstRoom is what a Reader begins with; it grows with the datagrams.
	firstRoom = 2048
)

var (
	errType = errors.New("udp over tcp: unknown type of address")
	errName = errors.New("udp over tcp: an empty name, or one of more than 255 bytes")
	errSize = errors.New("udp over tcp: datagram too large")
)

// Append appends a datagram to or from addr: its name if it has one.
func Append(b []byte, addr flow.Addr, payload []byte) ([]byte, error) {
	if len(payload) > MaxPayload {
		return b, errSize
	}
	switch ip := addr.IP.Unmap(); {
	case addr.Host != "":
		if len(addr.Host) > 255 {
			return b, errName
		}
		b = append(append(b, typeName, byte(len(addr.Host))), addr.Host...)
	case ip.Is4():
		v4 := ip.As4()
		b = append(append(b, typeIPv4), v4[:]...)
	case ip.Is6():
		v6 := ip.As16()
		b = append(append(b, typeIPv6), v6[:]...)
	default:
		return b, errType
	}
	b = binary.BigEndian.AppendUint16(b, addr.Port)
	return AppendConnected(b, payload)
}

// AppendConnected appends a datagram of a stream whose request was isConnect.
func AppendConnected(b, payload []byte) ([]byte, error) {
	if len(payload) > MaxPayload {
		return b, errSize
	}
	return append(binary.BigEndian.AppendUint16(b, uint16(len(payload))), payload...), nil
}

// Reader takes datagrams off a stream; it holds at most the largest with its header, less than 65 KiB. An error of the stream loses nothing: after a time-out, Next goes on where it was.
type Reader struct {
	r         io.Reader
	connected bool
	buf       []byte
	from, to  int // what was read and not taken
}

// NewReader returns a Reader; connected streams have no addresses.
func NewReader(r io.Reader, connected bool) *Reader { return &Reader{r: r, connected: connected} }

// Next returns the next datagram. Its payload is valid until the next call.
func (r *Reader) Next() (flow.Addr, []byte, error) {
	for {
		addr, payload, size, err := r.parse()
		if err != nil {
			return addr, nil, err
		}
		if size <= r.to-r.from && size > 0 {
			r.from += size
			return addr, payload, nil
		}
		if err := r.fill(max(size, r.to-r.from+1)); err != nil {
			return addr, nil, err
		}
	}
}

// Wait reads until Next will return without reading.
func (r *Reader) Wait() error {
	for !r.Ready() {
		_, _, size, _ := r.parse()
		if err := r.fill(max(size, r.to-r.from+1)); err != nil {
			return err
		}
	}
	return nil
}

// Ready reports whether Next will return without reading.
func (r *Reader) Ready() bool {
	_, _, size, err := r.parse()
	return err != nil || size > 0 && size <= r.to-r.from
}

// fill reads something, with room for need bytes in all.
func (r *Reader) fill(need int) error {
	if r.from == r.to {
		r.from, r.to = 0, 0
		if len(r.buf) > firstRoom && need <= firstRoom {
			r.buf = nil // a large datagram has gone, and no other is on its way
		}
	}
	if r.from+need > len(r.buf) {
		buf := r.buf
		if need > len(buf) {
			buf = make([]byte, max(firstRoom, need))
		}
		r.to = copy(buf, r.buf[r.from:r.to])
		r.from, r.buf = 0, buf
	}
	n, err := r.r.Read(r.buf[r.to:])
	r.to += n
	if n > 0 {
		return nil
	}
	if err == nil {
		return io.ErrNoProgress
	}
	if errors.Is(err, io.EOF) && r.to > r.from {
		return io.ErrUnexpectedEOF
	}
	return err
}

// parse looks at the datagram that has come so far, and returns its size; 0 while that is not known.
func (r *Reader) parse() (addr flow.Addr, payload []byte, size int, err error) {
	b := r.buf[r.from:r.to]
	head := 0
	if !r.connected {
		if addr, head, err = parseAddr(b); err != nil || head == 0 {
			return addr, nil, 0, err
		}
	}
	if len(b) < head+2 {
		return addr, nil, 0, nil
	}
	size = head + 2 + int(binary.BigEndian.Uint16(b[head:]))
	if len(b) >= size {
		payload = b[head+2 : size]
	}
	return addr, payload, size, nil
}

// parseAddr reads type, address and port; the size is 0 while they have not come.
func parseAddr(b []byte) (a flow.Addr, size int, err error) {
	if len(b) < 2 {
		return a, 0, nil
	}
	switch b[0] {
	case typeIPv4:
		size = 1 + 4 + 2
	case typeIPv6:
		size = 1 + 16 + 2
	case typeName:
		if b[1] == 0 {
			return a, 0, errName
		}
		size = 2 + int(b[1]) + 2
	default:
		return a, 0, errType
	}
	if len(b) < size {
		return a, 0, nil
	}
	a.Port = binary.BigEndian.Uint16(b[size-2:])
	switch b[0] {
	case typeIPv4:
		a.IP = netip.AddrFrom4([4]byte(b[1:5]))
	case typeIPv6:
		a.IP = netip.AddrFrom16([16]byte(b[1:17])).Unmap()
	default:
		a.Host = string(b[2 : size-2])
	}
	return a, size, nil
}
