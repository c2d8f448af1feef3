// SPDX-License-Identifier: GPL-3.0-or-later

package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/dialers"
)

// listenTries is how often a port is looked for that is free for both UDP and TCP. One try nearly always suffices.
const listenTries = 16

// resolver answers the queries of whoever connects to a socket. *dns.Server and dns.Near.
type resolver interface {
	ServeStream(net.Listener) error
	ServePacket(net.PacketConn) error
}

// listeners are the sockets that port 53 of a namespace's loopback addresses is redirected to.
type listeners struct {
	packets []net.PacketConn
	streams []net.Listener
	ports   [2]uint16      // on 127.0.0.1 and ::1; 0 = none
	serving sync.WaitGroup // until close
}

// open opens the sockets by n and lets r answer. Without IPv6 there is none for ::1, which is logged at the level given.
func (ls *listeners) open(ctx context.Context, n *dialers.Net, r resolver, log *zap.Logger, level zapcore.Level) error {
	served := func(err error) {
		if err != nil && !errors.Is(err, net.ErrClosed) {
			log.Error("dns listener ended", zap.Error(err))
		}
	}
	for i, addr := range []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()} {
		l, pc, err := listenBoth(ctx, n, addr)
		if err != nil {
			if i == 1 {
				log.Log(level, "no DNS listener on ::1: queries to it are dropped", zap.Error(err))
				return nil
			}
			if errors.Is(err, unix.EADDRNOTAVAIL) {
				return fmt.Errorf("%w: is lo up in this network namespace? (ip link set lo up)", err)
			}
			return err
		}
		ls.streams, ls.packets = append(ls.streams, l), append(ls.packets, pc)
		ls.ports[i] = uint16(l.Addr().(*net.TCPAddr).Port)
		ls.serving.Go(func() { served(r.ServeStream(l)) })
		ls.serving.Go(func() { served(r.ServePacket(pc)) })
	}
	return nil
}

// close closes the sockets. Who serves them may have answers to wait for.
func (ls *listeners) close() {
	for _, pc := range ls.packets {
		_ = pc.Close()
	}
	for _, l := range ls.streams {
		_ = l.Close()
	}
}

// listenBoth returns a TCP listener and a UDP socket with the same port.
func listenBoth(ctx context.Context, n *dialers.Net, addr netip.Addr) (l *net.TCPListener, pc *net.UDPConn, err error) {
	for range listenTries {
		if l, err = n.ListenTCP(ctx, netip.AddrPortFrom(addr, 0)); err != nil {
			return nil, nil, err
		}
		port := uint16(l.Addr().(*net.TCPAddr).Port)
		if pc, err = n.ListenUDP(ctx, netip.AddrPortFrom(addr, port)); err == nil {
			return l, pc, nil
		}
		_ = l.Close()
	}
	return nil, nil, err
}
