// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
)

// The origin's ports.
const (
	portEcho  = 9003 // TCP and UDP
	portWho   = 9004 // says in text who is asking, and closes
	portIperf = 5201 // iperf3
)

// bulkBuffer is what iperf3 gives to one system call.
const bulkBuffer = 128 << 10

// roles are the programs that this one starts in the namespaces.
func roles() map[string]func([]string) error {
	return map[string]func([]string) error{"origin": runOrigin, "load": runLoad, "redirect": runRedirect, "link": runLink}
}

// runOrigin serves until it is killed.
func runOrigin([]string) error {
	failed := make(chan error)
	for port, serve := range map[int]func(*net.TCPConn){portEcho: echo, portWho: who, idlePort: socksEcho} {
		l, err := net.Listen("tcp", fmt.Sprintf(":%d", port))
		if err != nil {
			return err
		}
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					failed <- err
					return
				}
				go func() {
					defer c.Close()
					serve(c.(*net.TCPConn))
				}()
			}
		}()
	}
	for _, addr := range []string{originV4, originV6} {
		u, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(addr), portEcho)))
		if err != nil {
			return err
		}
		for range 2 { // one thread a core
			go func() { failed <- echoUDP(u) }()
		}
	}
	return <-failed
}

func echo(c *net.TCPConn) {
	buf := make([]byte, 4096)
	for {
		n, err := c.Read(buf)
		if err != nil {
			return
		}
		if _, err := c.Write(buf[:n]); err != nil {
			return
		}
	}
}

func who(c *net.TCPConn) {
	_, _ = io.WriteString(c, c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap().String())
}

// socksEcho says yes to any request, and is itself what was asked for.
func socksEcho(c *net.TCPConn) {
	var buf [3 + 3 + 1 + 16 + 2]byte
	if _, err := io.ReadFull(c, buf[:3]); err != nil {
		return
	}
	if _, err := c.Write([]byte{5, 0}); err != nil {
		return
	}
	if _, err := io.ReadFull(c, buf[:4]); err != nil {
		return
	}
	size := 4 + 2
	if buf[3] == 4 {
		size = 16 + 2
	}
	if _, err := io.ReadFull(c, buf[4:4+size]); err != nil {
		return
	}
	if _, err := c.Write([]byte{5, 0, 0, 1, 0, 0, 0, 0, 0, 0}); err != nil {
		return
	}
	if binary.BigEndian.Uint16(buf[4+size-2:]) == portWho {
		_, _ = io.WriteString(c, proxyV4)
		return
	}
	echo(c)
}

func echoUDP(u *net.UDPConn) error {
	buf := make([]byte, 65536)
	for {
		n, from, err := u.ReadFromUDPAddrPort(buf)
		if err != nil {
			return err
		}
		_, _ = u.WriteToUDPAddrPort(buf[:n], from)
	}
}
