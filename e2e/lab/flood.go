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

// Flood sends from the client without a pause, on new sockets, so that an open moment of the capture is seen: datagrams, echo requests,
// SYNs and queries, over both families, also past the routes. It never waits for answers.
type Flood struct {
	Sent atomic.Int64
	stop chan struct{}
	once sync.Once
	wg   sync.WaitGroup
}

// floodEvery is the pause between two rounds: shorter than any step of a start or stop of the program takes.
const floodEvery = 500 * time.Microsecond

// StartFlood starts a flood; it ends with the test, or at Stop.
func (l *Lab) StartFlood(t *testing.T) *Flood {
	t.Helper()
	f := &Flood{stop: make(chan struct{})}
	f.wg.Go(func() {
		_ = l.Client.Do(func() error {
			tick := time.NewTicker(floodEvery)
			defer tick.Stop()
			for {
				select {
				case <-f.stop:
					return nil
				case <-tick.C:
					f.round()
				}
			}
		})
	})
	t.Cleanup(f.Stop)
	return f
}

// Stop ends the flood and waits for it.
func (f *Flood) Stop() {
	f.once.Do(func() { close(f.stop) })
	f.wg.Wait()
}

func (f *Flood) round() {
	for _, dst := range []netip.Addr{OriginV4, OriginV6} {
		f.send(dst, unix.SOCK_DGRAM, 0, PortEcho, nil)
		f.send(dst, unix.SOCK_DGRAM, 0, PortEcho, bindToDevice)
		f.send(dst, unix.SOCK_STREAM, 0, PortEcho, nil)
		icmp := unix.IPPROTO_ICMP
		if dst.Is6() {
			icmp = unix.IPPROTO_ICMPV6
		}
		f.send(dst, unix.SOCK_DGRAM, icmp, 0, nil)
	}
	f.send(LANV4, unix.SOCK_DGRAM, 0, 53, nil)
	f.send(LANULA, unix.SOCK_DGRAM, 0, 53, nil)
	f.send(netip.MustParseAddr("127.0.0.53"), unix.SOCK_DGRAM, 0, 53, nil)
}

// floodQuery asks for the A record of flood.test.
var floodQuery = []byte("\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x05flood\x04test\x00\x00\x01\x00\x01")

func (f *Flood) send(dst netip.Addr, typ, proto, port int, control func(int) error) {
	af, sa := sockaddr(dst, port)
	fd, err := unix.Socket(af, typ|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, proto)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	if control != nil && control(fd) != nil {
		return
	}
	switch {
	case typ == unix.SOCK_STREAM:
		err = unix.Connect(fd, sa)
	case proto == unix.IPPROTO_ICMP:
		err = unix.Sendto(fd, []byte{8, 0, 0, 0, 0, 0, 0, 1}, 0, sa)
	case proto == unix.IPPROTO_ICMPV6:
		err = unix.Sendto(fd, []byte{128, 0, 0, 0, 0, 0, 0, 1}, 0, sa)
	case port == 53:
		err = unix.Sendto(fd, floodQuery, 0, sa)
	default:
		err = unix.Sendto(fd, []byte("flood"), 0, sa)
	}
	if err == nil {
		f.Sent.Add(1)
	}
}
