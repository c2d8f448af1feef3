// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"
)

// way is one way to send a packet out.
type way struct {
	name string
	want string // how the packet looks when it leaves
	send func(l *lab) error
}

func sockaddr(a netip.Addr, port int) unix.Sockaddr {
	if a.Is4() {
		return &unix.SockaddrInet4{Addr: a.As4(), Port: port}
	}
	return &unix.SockaddrInet6{Addr: a.As16(), Port: port}
}

func domain(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// udp sends one datagram; opts prepare the socket.
func udp(dst netip.Addr, port int, opts ...func(fd int) error) func(*lab) error {
	return send(unix.SOCK_DGRAM, 0, dst, port, []byte("x"), opts...)
}

func send(typ, proto int, dst netip.Addr, port int, payload []byte, opts ...func(fd int) error) func(*lab) error {
	return func(l *lab) error {
		if l != nil {
			l.inside()
		}
		fd, err := unix.Socket(domain(dst), typ|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, proto)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		for _, o := range opts {
			if err := o(fd); err != nil {
				return err
			}
		}
		if typ == unix.SOCK_STREAM {
			err = unix.Connect(fd, sockaddr(dst, port))
			if errors.Is(err, unix.EINPROGRESS) {
				return nil
			}
			return err
		}
		return unix.Sendto(fd, payload, 0, sockaddr(dst, port))
	}
}

func tcp(dst netip.Addr, port int, opts ...func(fd int) error) func(*lab) error {
	return send(unix.SOCK_STREAM, 0, dst, port, nil, opts...)
}

func ping(dst netip.Addr, opts ...func(fd int) error) func(*lab) error {
	if dst.Is4() {
		return send(unix.SOCK_RAW, unix.IPPROTO_ICMP, dst, 0, []byte{8, 0, 0xf7, 0xfd, 0, 1, 0, 1}, opts...)
	}
	return send(unix.SOCK_RAW, unix.IPPROTO_ICMPV6, dst, 0, []byte{128, 0, 0, 0, 0, 1, 0, 1}, opts...)
}

func mark(m uint32) func(int) error {
	return func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, int(m)) }
}

func device(name string) func(int) error {
	return func(fd int) error { return unix.BindToDevice(fd, name) }
}

func unicastIf(name string) func(int) error {
	return func(fd int) error {
		ifi, err := net.InterfaceByName(name)
		if err != nil {
			return err
		}
		idx := binary.NativeEndian.Uint32(binary.BigEndian.AppendUint32(nil, uint32(ifi.Index)))
		if d, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN); err != nil || d == unix.AF_INET6 {
			const ipv6UnicastIf = 76
			return errors.Join(err, unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, ipv6UnicastIf, int(idx)))
		}
		const ipUnicastIf = 50
		return unix.SetsockoptInt(fd, unix.IPPROTO_IP, ipUnicastIf, int(idx))
	}
}
