// SPDX-License-Identifier: GPL-3.0-or-later

package lab

import (
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Flood sends from the client without a pause, so that an open moment of the capture is seen: datagrams, echo requests, SYNs and queries,
// over both families, also past the routes; on sockets that live as long as the flood, and now and then on new ones. It never waits for
// answers.
type Flood struct {
	Sent  atomic.Int64
	socks []*floodSock
	stop  chan struct{}
	once  sync.Once
	wg    sync.WaitGroup
}

const (
	// floodEvery is the pause between two rounds: shorter than any step of a start or stop of the program takes.
	floodEvery = time.Millisecond
	// floodFresh is how many rounds pass between two with new sockets: each costs the program a flow.
	floodFresh = 20
)

// floodSock is what the flood sends, and on which socket.
type floodSock struct {
	dst              netip.Addr
	typ, proto, port int
	control          func(int) error
	fd               int // -1 = a new one for each packet
}

// StartFlood starts a flood; it ends with the test, or at Stop.
func (l *Lab) StartFlood(t *testing.T) *Flood {
	t.Helper()
	f := startFlood(l.Client.Do)
	t.Cleanup(f.Stop)
	return f
}

// startFlood starts a flood by a goroutine that in has called, in the network it is about.
func startFlood(in func(func() error) error) *Flood {
	f := &Flood{stop: make(chan struct{})}
	add := func(dst netip.Addr, typ, proto, port int, control func(int) error) {
		f.socks = append(f.socks, &floodSock{dst, typ, proto, port, control, -1})
	}
	for _, dst := range []netip.Addr{OriginV4, OriginV6} {
		add(dst, unix.SOCK_DGRAM, 0, PortEcho, nil)
		add(dst, unix.SOCK_DGRAM, 0, PortEcho, bindToDevice)
		add(dst, unix.SOCK_STREAM, 0, PortEcho, nil)
		icmp := unix.IPPROTO_ICMP
		if dst.Is6() {
			icmp = unix.IPPROTO_ICMPV6
		}
		add(dst, unix.SOCK_DGRAM, icmp, 0, nil)
	}
	add(LANV4, unix.SOCK_DGRAM, 0, 53, nil)
	add(LANULA, unix.SOCK_DGRAM, 0, 53, nil)
	add(netip.MustParseAddr("127.0.0.53"), unix.SOCK_DGRAM, 0, 53, nil)
	ready := make(chan struct{})
	f.wg.Go(func() {
		_ = in(func() error { f.loop(ready); return nil })
	})
	<-ready
	return f
}

// loop sends until Stop. It closes ready after the first round.
func (f *Flood) loop(ready chan<- struct{}) {
	tick := time.NewTicker(floodEvery)
	defer tick.Stop()
	for _, s := range f.socks {
		if s.typ == unix.SOCK_DGRAM {
			s.fd = s.open()
			defer unix.Close(s.fd)
		}
	}
	for round := 0; ; round++ {
		for _, s := range f.socks {
			if s.fd >= 0 && s.send(s.fd) == nil {
				f.Sent.Add(1)
			}
			if round%floodFresh == 0 {
				if fd := s.open(); fd >= 0 {
					if s.send(fd) == nil {
						f.Sent.Add(1)
					}
					unix.Close(fd)
				}
			}
		}
		if round == 0 {
			close(ready)
		}
		select {
		case <-f.stop:
			return
		case <-tick.C:
		}
	}
}

// Stop ends the flood and waits for it.
func (f *Flood) Stop() {
	f.once.Do(func() { close(f.stop) })
	f.wg.Wait()
}

// floodQuery asks for the A record of flood.test.
var floodQuery = []byte("\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x05flood\x04test\x00\x00\x01\x00\x01")

func (s *floodSock) open() int {
	af, _ := sockaddr(s.dst, s.port)
	fd, err := unix.Socket(af, s.typ|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, s.proto)
	if err != nil {
		return -1
	}
	if s.control != nil {
		_ = s.control(fd)
	}
	return fd
}

func (s *floodSock) send(fd int) error {
	_, sa := sockaddr(s.dst, s.port)
	switch {
	case s.typ == unix.SOCK_STREAM:
		return unix.Connect(fd, sa)
	case s.proto == unix.IPPROTO_ICMP:
		return unix.Sendto(fd, []byte{8, 0, 0, 0, 0, 0, 0, 1}, 0, sa)
	case s.proto == unix.IPPROTO_ICMPV6:
		return unix.Sendto(fd, []byte{128, 0, 0, 0, 0, 0, 0, 1}, 0, sa)
	case s.port == 53:
		return unix.Sendto(fd, floodQuery, 0, sa)
	default:
		return unix.Sendto(fd, []byte("flood"), 0, sa)
	}
}
