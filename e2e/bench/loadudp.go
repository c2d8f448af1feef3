// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// lossAfter is how long a flow waits for a reply before it takes all that are outstanding for lost.
const lossAfter = 50 * time.Millisecond

// udpFlow is one flow of echoes: a socket connected to the origin, or to a SOCKS5 server's relay.
type udpFlow struct {
	*net.UDPConn
	control net.Conn // of the association; nil = none
	head    []byte   // in front of each datagram (RFC 1928 section 7)
}

func (l *loader) dialUDP() (*udpFlow, error) {
	dst := netip.AddrPortFrom(l.origin, portEcho)
	f := &udpFlow{}
	if l.SOCKS != "" {
		c, relay, err := socksRequest(l.SOCKS, 3, netip.AddrPortFrom(netip.IPv4Unspecified(), 0))
		if err != nil {
			return nil, err
		}
		f.control = c
		f.head = appendAddr([]byte{0, 0, 0}, dst)
		dst = relay
		if dst.Addr().IsUnspecified() {
			dst = netip.AddrPortFrom(c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr(), dst.Port())
		}
	}
	u, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(dst))
	f.UDPConn = u
	return f, err
}

// udp keeps a number of datagrams outstanding on each flow: one a system call, as most applications do, or a train when so many are back.
func (l *loader) udp() error {
	flows := make([]*udpFlow, l.Streams)
	for i := range flows {
		f, err := l.dialUDP()
		if err != nil {
			return err
		}
		defer f.Close()
		if f.control != nil {
			defer f.control.Close()
		}
		flows[i] = f
	}
	begin := time.Now()
	var wg sync.WaitGroup
	for _, f := range flows {
		wg.Go(func() {
			if err := l.echoes(f, begin.Add(l.length())); err != nil {
				l.fail(err)
			}
		})
	}
	wg.Wait()
	l.results.Seconds = time.Since(begin).Seconds()
	l.results.Bytes = l.count.Load() * uint64(l.Size)
	return nil
}

func (l *loader) echoes(f *udpFlow, end time.Time) error {
	out := append(f.head, make([]byte, l.Size)...)
	train, option := bytes.Repeat(out, max(1, l.Train)), segmentOption(len(out))
	in := make([]byte, 65536)
	flying, got, lost := 0, uint64(0), uint64(0)
	defer func() {
		l.count.Add(got)
		l.mu.Lock()
		l.results.Errors += lost
		l.mu.Unlock()
	}()
	armed := time.Time{}
	for {
		for ; l.Train > 0 && flying+l.Train <= l.Outstanding; flying += l.Train {
			if _, _, err := f.WriteMsgUDPAddrPort(train, option, netip.AddrPort{}); err != nil {
				return err
			}
		}
		for ; l.Train == 0 && flying < l.Outstanding; flying++ {
			if _, err := f.Write(out); err != nil {
				return err
			}
		}
		now := time.Now()
		if now.After(end) {
			return nil
		}
		if now.Sub(armed) > lossAfter/5 { // not for every datagram
			_ = f.SetReadDeadline(now.Add(lossAfter))
			armed = now
		}
		n, err := f.Read(in)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			lost += uint64(flying)
			flying, armed = 0, time.Time{}
		case err != nil:
			return err
		case n == len(out):
			got++
			flying = max(0, flying-1)
		}
	}
}

// segmentOption is the control message that has the kernel split what is sent into datagrams of size bytes (udp(7)).
func segmentOption(size int) []byte {
	b := make([]byte, unix.CmsgSpace(2))
	h := (*unix.Cmsghdr)(unsafe.Pointer(&b[0]))
	h.Level, h.Type = unix.SOL_UDP, unix.UDP_SEGMENT
	h.SetLen(unix.CmsgLen(2))
	binary.NativeEndian.PutUint16(b[unix.CmsgLen(0):], uint16(size))
	return b
}
