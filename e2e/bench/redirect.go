// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// runRedirect is a proxy without a network stack: the kernel terminates the application's connection and hands it over by REDIRECT, or, as
// "tproxy", by TPROXY. As "splice" and "tproxy" the kernel moves the bytes too; as "floor" they are copied through 64 KiB, which is the least that any proxy does which lets
// them pass through its own memory. All answer before they dial: they are not honest, only fast.
func runRedirect(args []string) error {
	if len(args) != 3 {
		return errors.New("redirect floor|splice|tproxy PORT SOCKS")
	}
	way := args[0]
	var lc net.ListenConfig
	if way == subTPROXY {
		lc.Control = transparent
	}
	l, err := lc.Listen(context.Background(), "tcp", ":"+args[1])
	if err != nil {
		return err
	}
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go redirect(c.(*net.TCPConn), args[2], way)
	}
}

// transparent lets a socket accept connections to any address (Documentation/networking/tproxy.rst).
func transparent(_, _ string, rc syscall.RawConn) error {
	var err error
	cerr := rc.Control(func(fd uintptr) {
		err = errors.Join(unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1), unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_TRANSPARENT, 1))
	})
	return errors.Join(cerr, err)
}

func redirect(c *net.TCPConn, socks, way string) {
	defer c.Close()
	dst := c.LocalAddr().(*net.TCPAddr).AddrPort()
	dst = netip.AddrPortFrom(dst.Addr().Unmap(), dst.Port())
	var err error
	if way != subTPROXY {
		dst, err = originalDst(c)
	}
	if err != nil {
		_ = c.SetLinger(0)
		return
	}
	up, err := dialSOCKS(socks, dst)
	if err != nil {
		_ = c.SetLinger(0)
		return
	}
	defer up.Close()
	var wg sync.WaitGroup
	copying := way == subFloor
	wg.Go(func() { move(up, c, copying) })
	move(c, up, copying)
	wg.Wait()
}

// move copies one direction; an end of file is passed on, an error ends both.
func move(dst, src *net.TCPConn, copying bool) {
	var err error
	if copying {
		_, err = io.CopyBuffer(struct{ io.Writer }{dst}, struct{ io.Reader }{src}, make([]byte, 64<<10))
	} else {
		_, err = io.Copy(dst, src)
	}
	if err != nil {
		_ = src.SetLinger(0)
		_ = src.Close()
		_ = dst.SetLinger(0)
		_ = dst.Close()
		return
	}
	_ = dst.CloseWrite()
}

// originalDst asks netfilter where the connection was meant to go. SO_ORIGINAL_DST and IP6T_SO_ORIGINAL_DST are both 80.
func originalDst(c *net.TCPConn) (netip.AddrPort, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return netip.AddrPort{}, err
	}
	v4 := c.LocalAddr().(*net.TCPAddr).AddrPort().Addr().Unmap().Is4()
	level := unix.IPPROTO_IPV6
	if v4 {
		level = unix.IPPROTO_IP
	}
	var sa unix.RawSockaddrInet6 // the larger of the two
	size := uint32(unsafe.Sizeof(sa))
	var errno unix.Errno
	err = raw.Control(func(fd uintptr) {
		_, _, errno = unix.Syscall6(unix.SYS_GETSOCKOPT, fd, uintptr(level), 80, uintptr(unsafe.Pointer(&sa)), uintptr(unsafe.Pointer(&size)), 0)
	})
	if err != nil {
		return netip.AddrPort{}, err
	}
	if errno != 0 {
		return netip.AddrPort{}, fmt.Errorf("original destination: %w", errno)
	}
	port := binary.BigEndian.Uint16((*[2]byte)(unsafe.Pointer(&sa.Port))[:])
	if v4 {
		return netip.AddrPortFrom(netip.AddrFrom4((*unix.RawSockaddrInet4)(unsafe.Pointer(&sa)).Addr), port), nil
	}
	return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), port), nil
}

// dialSOCKS asks a SOCKS5 server for a connection, one step after the other as the engine does.
func dialSOCKS(server string, dst netip.AddrPort) (*net.TCPConn, error) {
	c, _, err := socksRequest(server, 1, dst)
	return c, err
}

// socksRequest sends a request (RFC 1928) and returns the address in the reply.
func socksRequest(server string, cmd byte, dst netip.AddrPort) (*net.TCPConn, netip.AddrPort, error) {
	conn, err := net.Dial("tcp", server)
	if err != nil {
		return nil, netip.AddrPort{}, err
	}
	c := conn.(*net.TCPConn)
	bound, err := socksHandshake(c, cmd, dst)
	if err != nil {
		c.Close()
		return nil, bound, err
	}
	return c, bound, nil
}

func socksHandshake(c io.ReadWriter, cmd byte, dst netip.AddrPort) (netip.AddrPort, error) {
	var none netip.AddrPort
	if _, err := c.Write([]byte{5, 1, 0}); err != nil {
		return none, err
	}
	var buf [22]byte
	if _, err := io.ReadFull(c, buf[:2]); err != nil {
		return none, err
	}
	if _, err := c.Write(appendAddr([]byte{5, cmd, 0}, dst)); err != nil {
		return none, err
	}
	if _, err := io.ReadFull(c, buf[:4]); err != nil {
		return none, err
	}
	size := 4
	if buf[3] == 4 {
		size = 16
	}
	if buf[1] != 0 {
		return none, fmt.Errorf("socks: reply %d", buf[1])
	}
	if _, err := io.ReadFull(c, buf[4:4+size+2]); err != nil {
		return none, err
	}
	addr, _ := netip.AddrFromSlice(buf[4 : 4+size])
	return netip.AddrPortFrom(addr, binary.BigEndian.Uint16(buf[4+size:])), nil
}

func appendAddr(b []byte, a netip.AddrPort) []byte {
	b = append(b, 1)
	if a.Addr().Is6() {
		b[len(b)-1] = 4
	}
	b = append(b, a.Addr().AsSlice()...)
	return binary.BigEndian.AppendUint16(b, a.Port())
}
