// SPDX-License-Identifier: GPL-3.0-or-later

package leak

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/policy"
)

// errReached is returned by a way that has seen by itself that it got through.
var errReached = errors.New("reached")

// way is one way to send past the capture.
type way struct {
	name  string
	proto uint8
	dst   netip.Addr
	skip  string
	try   func(port uint16) error
}

// is reports whether a packet is this way's.
func (w *way) is(p []byte, port uint16) bool {
	proto, dst, payload := packetOf(p)
	if proto != w.proto || dst != w.dst {
		return false
	}
	if proto != unix.IPPROTO_TCP && proto != unix.IPPROTO_UDP && proto != unix.IPPROTO_ICMP && proto != unix.IPPROTO_ICMPV6 {
		return true
	}
	if len(payload) < 6 {
		return false
	}
	if proto == unix.IPPROTO_ICMP || proto == unix.IPPROTO_ICMPV6 {
		return binary.BigEndian.Uint16(payload[4:]) == port // the identifier of the echo
	}
	got := binary.BigEndian.Uint16(payload[2:])
	return got == port || got == 53 && w.name[:3] == "DNS"
}

// unusedSlot is one that hardly any context has: they get theirs from both ends.
const unusedSlot = policy.MaxContexts / 2

type option func(fd int) error

// ways lists them all, for both families.
func ways(dev string, opt Options, v6 bool) []way {
	_, to4, _, to6 := addresses()
	var out []way
	for _, dst := range []netip.Addr{to4.Addr(), to6.Addr()} {
		fam, skip := "4", ""
		if dst.Is6() {
			fam = "6"
			if !v6 {
				skip = "no IPv6 on this host"
			}
		}
		add := func(name string, proto uint8, try func(port uint16) error) {
			out = append(out, way{name: name + ", v" + fam, proto: proto, dst: dst, skip: skip, try: try})
		}
		for _, o := range []struct {
			name string
			opt  option
		}{
			{"", nil},
			{", SO_BINDTODEVICE", bound(dev)},
			{", IP_UNICAST_IF", unicastIf(dev, dst)},
			{", bypass mark", marked(policy.BypassMark(opt.Mask))},
			{", inbound mark", marked(policy.InboundMark(opt.Mask))},
			{", unused context's mark", marked(policy.ContextMark(opt.Mask, unusedSlot))},
			{", bypass mark and device", both(marked(policy.BypassMark(opt.Mask)), bound(dev))},
		} {
			saved := skip
			if opt.OwnMark && strings.Contains(o.name, "bypass") {
				skip = "the mark counts for all processes of the daemon's user: no writable cgroup v2"
			}
			add("TCP"+o.name, unix.IPPROTO_TCP, func(port uint16) error { return send(dst, unix.SOCK_STREAM, 0, port, nil, o.opt) })
			add("UDP"+o.name, unix.IPPROTO_UDP, func(port uint16) error { return send(dst, unix.SOCK_DGRAM, 0, port, []byte("x"), o.opt) })
			skip = saved
		}
		icmp := uint8(unix.IPPROTO_ICMP)
		if dst.Is6() {
			icmp = unix.IPPROTO_ICMPV6
		}
		add("ICMP echo", icmp, func(port uint16) error { return send(dst, unix.SOCK_RAW, int(icmp), 0, echo(dst, port), nil) })
		add("ICMP echo, SO_BINDTODEVICE", icmp, func(port uint16) error { return send(dst, unix.SOCK_RAW, int(icmp), 0, echo(dst, port), bound(dev)) })
		// 253 is for experiments (RFC 3692).
		add("raw IP protocol 253", 253, func(uint16) error { return send(dst, unix.SOCK_RAW, 253, 0, []byte("x"), nil) })
		add("raw IP protocol 253, SO_BINDTODEVICE", 253, func(uint16) error { return send(dst, unix.SOCK_RAW, 253, 0, []byte("x"), bound(dev)) })
		add("fragmented UDP", unix.IPPROTO_UDP, func(port uint16) error { return send(dst, unix.SOCK_DGRAM, 0, port, make([]byte, 4000), nil) })
		add("fragmented UDP, SO_BINDTODEVICE", unix.IPPROTO_UDP, func(port uint16) error { return send(dst, unix.SOCK_DGRAM, 0, port, make([]byte, 4000), bound(dev)) })
		add("DNS over UDP, SO_BINDTODEVICE", unix.IPPROTO_UDP, func(uint16) error { return send(dst, unix.SOCK_DGRAM, 0, 53, query(), bound(dev)) })
		add("DNS over TCP, SO_BINDTODEVICE", unix.IPPROTO_TCP, func(uint16) error { return send(dst, unix.SOCK_STREAM, 0, 53, nil, bound(dev)) })
		if opt.NoPacket != "" {
			skip = opt.NoPacket
		}
		add("AF_PACKET", unix.IPPROTO_UDP, func(port uint16) error { return packet(dev, dst, port) })
	}
	return append(out, way{name: "DNS to a resolver on loopback", try: func(uint16) error { return loopbackDNS() }})
}

func bound(dev string) option { return func(fd int) error { return unix.BindToDevice(fd, dev) } }

func marked(mark uint32) option {
	return func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, int(mark)) }
}

func both(a, b option) option { return func(fd int) error { return errors.Join(a(fd), b(fd)) } }

// unicastIf chooses the device as IP_UNICAST_IF (ip(7)) and IPV6_UNICAST_IF (76, uapi/linux/in6.h) do, with the index in network order.
func unicastIf(dev string, dst netip.Addr) option {
	return func(fd int) error {
		ifi, err := net.InterfaceByName(dev)
		if err != nil {
			return err
		}
		index := int(binary.NativeEndian.Uint32(binary.BigEndian.AppendUint32(nil, uint32(ifi.Index))))
		if dst.Is6() {
			return unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, 76, index)
		}
		return unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_UNICAST_IF, index)
	}
}

// send opens a socket of its own and sends one packet, or a SYN. Not through dialers, whose sockets carry a mark.
func send(dst netip.Addr, typ, proto int, port uint16, payload []byte, o option) error {
	domain := unix.AF_INET
	var to unix.Sockaddr
	if dst.Is4() {
		to = &unix.SockaddrInet4{Addr: dst.As4(), Port: int(port)}
	} else {
		domain, to = unix.AF_INET6, &unix.SockaddrInet6{Addr: dst.As16(), Port: int(port)}
	}
	fd, err := unix.Socket(domain, typ|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, proto)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer closeFD(fd)
	if o != nil {
		if err := o(fd); err != nil {
			return os.NewSyscallError("setsockopt", err)
		}
	}
	if typ == unix.SOCK_STREAM {
		if err := unix.Connect(fd, to); err != nil && !errors.Is(err, unix.EINPROGRESS) {
			return os.NewSyscallError("connect", err)
		}
		// The SYN is sent at once, or not at all; the time is for a refusal.
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
		if n, err := unix.Poll(p, int(settle.Milliseconds())); err == nil && n > 0 {
			if errno, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR); err == nil && errno != 0 {
				return os.NewSyscallError("connect", unix.Errno(errno))
			}
		}
		return nil
	}
	return os.NewSyscallError("sendto", unix.Sendto(fd, payload, 0, to))
}

func closeFD(fd int) { _ = unix.Close(fd) }

func echo(dst netip.Addr, id uint16) []byte {
	typ := byte(8)
	if dst.Is6() {
		typ = 128 // its checksum is the kernel's (RFC 3542, section 3.1)
	}
	b := binary.BigEndian.AppendUint16([]byte{typ, 0, 0, 0}, id)
	b = append(b, 0, 1)
	if dst.Is4() {
		binary.BigEndian.PutUint16(b[2:], checksum(b))
	}
	return b
}

func checksum(b []byte) uint16 {
	sum := uint32(0)
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// query asks for the address of leaktest.invalid (RFC 6761).
func query() []byte {
	q := []byte{0x6d, 0x70, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 8}
	q = append(append(q, "leaktest\x07invalid"...), 0, 0, 1, 0, 1)
	return q
}

// packet sends a UDP datagram past IP altogether.
func packet(dev string, dst netip.Addr, port uint16) error {
	own4, _, own6, _ := addresses()
	src, proto := own4.Addr(), uint16(unix.ETH_P_IP)
	if dst.Is6() {
		src, proto = own6.Addr(), unix.ETH_P_IPV6
	}
	ifi, err := net.InterfaceByName(dev)
	if err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer closeFD(fd)
	udp := binary.BigEndian.AppendUint16(nil, firstPort-1)
	udp = append(binary.BigEndian.AppendUint16(udp, port), 0, 9, 0, 0, 'x')
	var p []byte
	if dst.Is6() {
		p = append([]byte{0x60, 0, 0, 0, 0, byte(len(udp)), unix.IPPROTO_UDP, 64}, src.AsSlice()...)
	} else {
		p = append([]byte{0x45, 0, 0, byte(20 + len(udp)), 0, 0, 0, 0, 64, unix.IPPROTO_UDP, 0, 0}, src.AsSlice()...)
	}
	p = append(p, dst.AsSlice()...)
	if dst.Is4() {
		binary.BigEndian.PutUint16(p[10:], checksum(p))
	}
	to := &unix.SockaddrLinklayer{Protocol: proto>>8 | proto<<8, Ifindex: ifi.Index}
	return os.NewSyscallError("sendto", unix.Sendto(fd, append(p, udp...), 0, to))
}

// loopbackDNS is a resolver on loopback, and whoever asks it: the query must not arrive.
func loopbackDNS() error {
	at := &unix.SockaddrInet4{Addr: [4]byte{127, 0, 77, 53}, Port: 53}
	server, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer closeFD(server)
	if err := unix.Bind(server, at); err != nil {
		return os.NewSyscallError("bind", err)
	}
	if err := send(netip.AddrFrom4(at.Addr), unix.SOCK_DGRAM, 0, 53, query(), nil); err != nil {
		return err
	}
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(server), Events: unix.POLLIN}}, int(settle.Milliseconds()))
	if err == nil && n > 0 {
		return errReached
	}
	return os.NewSyscallError("poll", err)
}
