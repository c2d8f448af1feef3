// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/flow"
)

const (
	// keepAliveIdle is below the shortest TCP time-out of common NATs that still hold state for established connections (RFC 5382 asks
	// for 2 h 4 min, home routers have been seen to forget after 5 min), so that connections idle for hours live.
	keepAliveIdle = 60 * time.Second
	// keepAliveInterval and keepAliveCount declare a peer dead two minutes after the first probe.
	keepAliveInterval = 15 * time.Second
	keepAliveCount    = 8
	// udpBuffer holds 16 datagrams of the largest size: fewer, and a burst of an application is lost while we are scheduled. The kernel
	// caps it at net.core.{r,w}mem_max.
	udpBuffer = 1 << 20
)

// NetConfig says how sockets are opened.
type NetConfig struct {
	// Mark and MarkMask are the bits of SO_MARK that keep our own packets out of the capture; bits outside the mask are left as they are.
	// 0, 0 sets no mark: for serve and tests.
	Mark, MarkMask uint32
	// Nameservers are the machine's own resolvers as they were before capture, asked only for the names of upstreams.
	Nameservers []netip.AddrPort
	// HostsFile is looked at before Nameservers; "" means /etc/hosts.
	HostsFile string
	// KeepAlive is the idle time before the first TCP keep-alive probe; 0 means 60 s, negative turns probes off.
	KeepAlive time.Duration
	// MaxFD is the first descriptor that no socket may have: the rest of the process's is for what is not a flow (the control socket, files). It is
	// refused as EMFILE, like one beyond the limit of open files. 0 = all may be used.
	MaxFD int
	// NoSegment sends datagrams one by one, as on kernels without UDP_SEGMENT: for tests of that fall-back.
	NoSegment bool
	// Inside runs what opens sockets in another network namespace; nil = this one.
	Inside func(func() error) error
	Log    *zap.Logger      // nil = none
	Now    func() time.Time // nil = time.Now
}

// Net is the only opener of sockets in the project. Every socket carries the bypass mark from before its first packet: without it the
// packet would be captured and handed to us again, for ever, so a mark that cannot be set fails the dial.
type Net struct {
	cfg     NetConfig
	lookups lookups
	ports   ports
	dialing atomic.Int32 // connections to servers that are being opened
	batches sync.Pool    // of *batch: a datagram batch is needed only while a system call runs, not while an association waits
}

// NewNet returns a Net. It opens nothing.
func NewNet(cfg NetConfig) *Net {
	if cfg.Log == nil {
		cfg.Log = zap.NewNop()
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.HostsFile == "" {
		cfg.HostsFile = "/etc/hosts"
	}
	if cfg.Inside == nil {
		cfg.Inside = func(f func() error) error { return f() }
	}
	return &Net{cfg: cfg}
}

// Logger returns the logger of the configuration, or one that writes nothing.
func (n *Net) Logger() *zap.Logger { return n.cfg.Log }

// DialTCP connects to an address. The result is a plain socket: it implements syscall.Conn.
func (n *Net) DialTCP(ctx context.Context, to netip.AddrPort) (flow.Conn, error) {
	c, err := n.dialTCP(ctx, to)
	if err != nil {
		return nil, err
	}
	return c, nil
}

func (n *Net) dialTCP(ctx context.Context, to netip.AddrPort) (*TCPConn, error) {
	return n.dial(ctx, to, n.controlDial)
}

// control is a net.Dialer's Control.
type control = func(network, address string, rc syscall.RawConn) error

func (n *Net) dial(ctx context.Context, to netip.AddrPort, control control) (*TCPConn, error) {
	var c *net.TCPConn
	err := n.cfg.Inside(func() (err error) {
		c, err = n.connect(ctx, to, control)
		return err
	})
	if err != nil {
		if oe, ok := errors.AsType[*net.OpError](err); ok {
			oe.Source = nil // "dial tcp :0->…": no address was asked for
		}
		return nil, err
	}
	return &TCPConn{TCPConn: c}, nil // Go's dialer sets TCP_NODELAY
}

// ListenTCP listens on an address. Accepted connections inherit the mark and have keep-alive on.
func (n *Net) ListenTCP(ctx context.Context, laddr netip.AddrPort) (*net.TCPListener, error) {
	lc := net.ListenConfig{Control: n.control, KeepAliveConfig: n.keepAlive(), KeepAlive: n.cfg.KeepAlive}
	lc.SetMultipathTCP(false) // an MPTCP socket can be neither spliced nor asked for TCP_INFO
	network := "tcp"
	if laddr.Addr().Is4() {
		network = "tcp4" // 0.0.0.0 would be every address of both families
	}
	var l net.Listener
	err := n.cfg.Inside(func() (err error) {
		l, err = lc.Listen(ctx, network, laddr.String())
		return err
	})
	if err != nil {
		return nil, err
	}
	return l.(*net.TCPListener), nil
}

// ListenUDP opens an unconnected UDP socket. An invalid laddr means any port of both families, or of IPv4 where the machine has no IPv6.
func (n *Net) ListenUDP(ctx context.Context, laddr netip.AddrPort) (*net.UDPConn, error) {
	network, addr := "udp", ":0"
	if laddr.IsValid() {
		addr = laddr.String()
		network = "udp6"
		if laddr.Addr().Is4() {
			network = "udp4"
		}
	}
	lc := net.ListenConfig{Control: n.control}
	var pc net.PacketConn
	err := n.cfg.Inside(func() (err error) {
		pc, err = lc.ListenPacket(ctx, network, addr)
		return err
	})
	if err != nil {
		return nil, err
	}
	return sizeBuffers(pc.(*net.UDPConn)), nil
}

// DialUDP opens a UDP socket connected to an address: the kernel drops what comes from elsewhere and reports its ICMP errors.
func (n *Net) DialUDP(ctx context.Context, to netip.AddrPort) (*net.UDPConn, error) {
	d := net.Dialer{Control: n.control}
	var c net.Conn
	err := n.cfg.Inside(func() (err error) {
		c, err = d.DialContext(ctx, "udp", to.String())
		return err
	})
	if err != nil {
		return nil, err
	}
	return sizeBuffers(c.(*net.UDPConn)), nil
}

// sizeBuffers asks for large buffers; what the kernel grants is enough, so errors do not matter.
func sizeBuffers(c *net.UDPConn) *net.UDPConn {
	_ = c.SetReadBuffer(udpBuffer)
	_ = c.SetWriteBuffer(udpBuffer)
	return c
}

func (n *Net) keepAlive() net.KeepAliveConfig {
	if n.cfg.KeepAlive < 0 {
		return net.KeepAliveConfig{}
	}
	idle := n.cfg.KeepAlive
	if idle == 0 {
		idle = keepAliveIdle
	}
	return net.KeepAliveConfig{Enable: true, Idle: idle, Interval: keepAliveInterval, Count: keepAliveCount}
}

// control runs on every new socket before bind and connect, so that not even a SYN leaves without the mark.
func (n *Net) control(network, _ string, rc syscall.RawConn) error {
	var err error
	if cerr := rc.Control(func(fd uintptr) { err = n.prepare(int(fd), network) }); cerr != nil {
		return cerr
	}
	return err
}

// controlDial is control for a connection whose source port the kernel chooses.
func (n *Net) controlDial(network, address string, rc syscall.RawConn) error {
	if err := n.control(network, address, rc); err != nil {
		return err
	}
	return rc.Control(func(fd uintptr) { n.ports.window(int(fd)) })
}

func (n *Net) prepare(fd int, network string) error {
	if n.cfg.MaxFD > 0 && fd >= n.cfg.MaxFD { // the kernel gives the lowest that is free: as many are taken
		return unix.EMFILE
	}
	if n.cfg.MarkMask != 0 {
		if err := setMark(fd, n.cfg.Mark, n.cfg.MarkMask); err != nil {
			return fmt.Errorf("set mark %#x/%#x: %w (needs CAP_NET_ADMIN)", n.cfg.Mark, n.cfg.MarkMask, err)
		}
	}
	if strings.HasPrefix(network, "tcp") {
		// A bind to a source address alone then chooses its port at connect(), by 4-tuple: otherwise one source address has 28,000 ports
		// for all destinations together. Kernels before 4.2 do not know it, and nothing breaks without. Not for UDP, where a socket that
		// is never connected would stay without a port.
		_ = unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1)
		// Once the connection has ended, its port may be bound again: connect names it when ports run out.
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	}
	return nil
}

// setMark changes the bits of the socket's mark that lie in mask and no others: a BPF program or our parent may have set the rest.
func setMark(fd int, mark, mask uint32) error {
	old, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK)
	if err != nil {
		return err
	}
	return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, int(uint32(old)&^mask|mark&mask))
}
