// SPDX-License-Identifier: GPL-3.0-or-later

package offload

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"net/netip"
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/flow"
)

// The order of things for one flow. Up to step 5 any failure leaves nothing behind, the application has not been answered, and the same SYN
// goes to netstack. From step 5 on there is no way back, and nothing that fails in silence.
//
//	1 ParseSYN                                        what the application has said, if it is there
//	2 socket, transparent, mark, TCP_REPAIR           nothing it does from here on sends a packet
//	3 bind(destination), sequence numbers, connect(application), options, window
//	4 TCP_REPAIR off, without a probe
//	5 the SYN-ACK is written into the TUN             the application is connected
//	6 has it answered? RST: Accept fails. Nothing yet: asked again after silence (hearing.go) and confirmTime, then reset
//	7 Splice: both descriptors to a worker
//
// What the kernel does with the application's packets from step 5 on: policy/accel.go.

// confirmTime is how long the application's kernel may take to answer the SYN-ACK, as long as netstack gives it. It repeats its SYN after 1, 3
// and 7 s, and Answer is written again each time.
const confirmTime = 10 * time.Second

// ourScale is the window scale of our side: windows up to 8 MiB, above the kernel's default limit of receive buffers.
const ourScale = 7

// Keep-alive towards the application, the same as netstack's. It also keeps conntrack's memory of the flow fresh.
const (
	keepAliveIdle     = 5 * 60 // seconds
	keepAliveInterval = 30     // seconds
	keepAliveCount    = 5
)

// leastWindow is the window of a SYN, in bytes, from which on a flow is adopted. The kernel sends no segment longer than half of the largest window seen
// (tcp_bound_to_half_wnd), but learns of it here only when the length is chosen: to a smaller buffer, each would wait for the persist timer.
const leastWindow = 4096

// orphanTimeout bounds, in milliseconds, how long the kernel goes on delivering after Close.
const orphanTimeout = 60_000

// repairOffNoProbe is TCP_REPAIR_OFF_NO_WP (include/uapi/linux/tcp.h): the window probe would reach an application that is not connected yet.
const repairOffNoProbe = -1

const (
	queueRecv = 1 // TCP_RECV_QUEUE
	queueSend = 2 // TCP_SEND_QUEUE
)

var errWindow = errors.New("the application's receive buffer is very small")

var errSocket = errors.New("the application's socket is bound to a device, or gone")

// repairWindow is struct tcp_repair_window.
type repairWindow struct{ sndWl1, sndWnd, maxWindow, rcvWnd, rcvWup uint32 }

// repairOption is struct tcp_repair_opt.
type repairOption struct{ code, value uint32 }

// Adopt makes the established connection of s in the kernel and answers the application by write, which is given the SYN-ACK and reports
// whether the kernel has taken it. An error that is not flow.ErrGone means that the application has heard nothing.
func (e *Engine) Adopt(s *SYN, write func(synACK []byte) error) (*Conn, error) {
	if s.Src.Addr().Is4() != s.Dst.Addr().Is4() {
		return nil, errSYN
	}
	if s.Window < leastWindow {
		return nil, errWindow
	}
	if e.cfg.Waits != nil && !e.cfg.Waits(s.Src, s.Dst) {
		return nil, errSocket
	}
	if err := e.hearing.try(); err != nil {
		return nil, err
	}
	c, err := e.answer(s, write)
	if err != nil {
		e.hearing.unknown()
		return nil, err
	}
	switch confirmed, err := c.confirmed(); {
	case err != nil:
		e.hearing.yes() // if only a reset
		c.Abort()
		return nil, fmt.Errorf("%w: %w", flow.ErrGone, err)
	case confirmed:
		e.hearing.yes()
	default:
		c.doubt()
	}
	return c, nil
}

// answer is steps 2 to 5.
func (e *Engine) answer(s *SYN, write func(synACK []byte) error) (*Conn, error) {
	fd, packet, err := e.build(s)
	if err != nil {
		return nil, err
	}
	spare, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		discard(fd)
		return nil, os.NewSyscallError("dup", err)
	}
	if spare >= e.maxFD { // a low number may have been free for fd, and none for this
		_ = unix.Close(spare)
		discard(fd)
		return nil, errDescriptors
	}
	if err := write(packet); err != nil {
		_ = unix.Close(spare)
		discard(fd)
		return nil, fmt.Errorf("answer: %w", err)
	}
	return newConn(e, fd, spare, s), nil
}

// build returns the connected socket and the SYN-ACK that tells the application of it.
func (e *Engine) build(s *SYN) (fd int, packet []byte, err error) {
	family := unix.AF_INET
	if s.Src.Addr().Is6() {
		family = unix.AF_INET6
	}
	fd, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return -1, nil, os.NewSyscallError("socket", err)
	}
	defer func() {
		if err != nil {
			discard(fd)
			fd = -1
		}
	}()
	if fd >= e.maxFD { // the kernel gives the lowest that is free: as many are taken
		return fd, nil, errDescriptors
	}
	a := answer{seq: rand.Uint32(), mss: loMSS(family), scale: ourScale, ttl: e.cfg.TTL, more: e.cfg.Option}
	if err := e.repair(fd, s, &a); err != nil {
		return fd, nil, err
	}
	if err := settle(fd); err != nil {
		return fd, nil, err
	}
	return fd, synACK(make([]byte, 0, maxAnswer), s, &a), nil
}

// loMSS is the longest segment that lo takes: both ends are on this machine, whatever the TUN's MTU is. The application's kernel takes what its
// own route has room for.
func loMSS(family int) uint16 {
	if family == unix.AF_INET {
		return math.MaxUint16 - ip4Header - tcpHeader
	}
	return math.MaxUint16 - ip6Header - tcpHeader
}

// repair is steps 2 and 3.
func (e *Engine) repair(fd int, s *SYN, a *answer) error {
	level, transparent := unix.IPPROTO_IP, unix.IP_TRANSPARENT
	if s.Src.Addr().Is6() {
		level, transparent = unix.IPPROTO_IPV6, unix.IPV6_TRANSPARENT
	}
	set := func(what string, level, opt, value int) error {
		return os.NewSyscallError(what, unix.SetsockoptInt(fd, level, opt, value))
	}
	if err := errors.Join(
		set("transparent", level, transparent, 1),
		set("mark", unix.SOL_SOCKET, unix.SO_MARK, int(e.cfg.Mark)),
		set("repair", unix.IPPROTO_TCP, unix.TCP_REPAIR, 1),
	); err != nil {
		return err
	}
	if err := unix.Bind(fd, sockaddr(s.Dst)); err != nil {
		return os.NewSyscallError("bind", err)
	}
	if err := errors.Join(
		set("repair queue", unix.IPPROTO_TCP, unix.TCP_REPAIR_QUEUE, queueSend),
		set("sequence", unix.IPPROTO_TCP, unix.TCP_QUEUE_SEQ, int(a.seq+1)),
		set("repair queue", unix.IPPROTO_TCP, unix.TCP_REPAIR_QUEUE, queueRecv),
		set("sequence", unix.IPPROTO_TCP, unix.TCP_QUEUE_SEQ, int(s.Seq+1)),
	); err != nil {
		return err
	}
	if err := unix.Connect(fd, sockaddr(s.Src)); err != nil {
		return os.NewSyscallError("connect", err)
	}
	return negotiate(fd, s, a)
}

// negotiate gives the socket what the two SYNs have agreed on.
func negotiate(fd int, s *SYN, a *answer) error {
	// The application's own MSS is that of the TUN, where nothing of this goes.
	opts := [4]repairOption{{optMSS, uint32(a.mss)}, {optScale, 0}}
	n := 2
	if s.HasScale {
		opts[1].value = uint32(s.Scale) | ourScale<<16
	} // else both are 0: the kernel has already chosen one for its side
	if s.SACK {
		opts[n] = repairOption{optSACK, 0}
		n++
	}
	if s.Timestamps {
		opts[n] = repairOption{optTimestamps, 0}
		n++
	}
	if err := setsockopt(fd, unix.TCP_REPAIR_OPTIONS, unsafe.Pointer(&opts), n*int(unsafe.Sizeof(opts[0]))); err != nil {
		return os.NewSyscallError("repair options", err)
	}
	if s.Timestamps {
		ts, err := unix.GetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_TIMESTAMP)
		if err != nil {
			return os.NewSyscallError("timestamp", err)
		}
		a.ts = uint32(ts)
	}
	var w repairWindow
	if err := getsockopt(fd, unix.TCP_REPAIR_WINDOW, unsafe.Pointer(&w), unsafe.Sizeof(w)); err != nil {
		return os.NewSyscallError("repair window", err)
	}
	// The window of a SYN is never scaled.
	w = repairWindow{sndWl1: s.Seq, sndWnd: uint32(s.Window), maxWindow: uint32(s.Window), rcvWnd: min(w.rcvWnd, 0xffff), rcvWup: s.Seq + 1}
	a.window = uint16(w.rcvWnd)
	if err := setsockopt(fd, unix.TCP_REPAIR_WINDOW, unsafe.Pointer(&w), int(unsafe.Sizeof(w))); err != nil {
		return os.NewSyscallError("repair window", err)
	}
	if !s.HasScale {
		return os.NewSyscallError("window clamp", unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_WINDOW_CLAMP, 0xffff))
	}
	return nil
}

// settle makes an ordinary socket of it. Leaving repair mode forbids sharing the address, which servers of this machine on the same port, and
// other flows to the same destination, need.
func settle(fd int) error {
	for _, o := range [...]struct{ level, opt, value int }{
		{unix.IPPROTO_TCP, unix.TCP_REPAIR, repairOffNoProbe},
		{unix.SOL_SOCKET, unix.SO_REUSEADDR, 1},
		{unix.SOL_SOCKET, unix.SO_OOBINLINE, 1}, // urgent bytes go on as any other, as through netstack
		{unix.IPPROTO_TCP, unix.TCP_NODELAY, 1},
		{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
		{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, keepAliveIdle},
		{unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, keepAliveInterval},
		{unix.IPPROTO_TCP, unix.TCP_KEEPCNT, keepAliveCount},
	} {
		if err := unix.SetsockoptInt(fd, o.level, o.opt, o.value); err != nil {
			return os.NewSyscallError("setsockopt", err)
		}
	}
	return nil
}

// discard closes a socket that the application knows nothing of. In repair mode that sends nothing.
func discard(fd int) {
	_ = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_REPAIR, 1)
	_ = unix.Close(fd)
}

func sockaddr(ap netip.AddrPort) unix.Sockaddr {
	if ap.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(ap.Port()), Addr: ap.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(ap.Port()), Addr: ap.Addr().As16()}
}

func setsockopt(fd, opt int, p unsafe.Pointer, size int) error {
	_, _, e := unix.Syscall6(unix.SYS_SETSOCKOPT, uintptr(fd), unix.IPPROTO_TCP, uintptr(opt), uintptr(p), uintptr(size), 0)
	if e != 0 {
		return e
	}
	return nil
}

func getsockopt(fd, opt int, p unsafe.Pointer, size uintptr) error {
	n := uint32(size)
	_, _, e := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.IPPROTO_TCP, uintptr(opt), uintptr(p), uintptr(unsafe.Pointer(&n)), 0)
	if e != 0 {
		return e
	}
	return nil
}
