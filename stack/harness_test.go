// SPDX-License-Identifier: GPL-3.0-or-later

package stack

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"github.com/mutex-proxy/mutex/flow"
	"github.com/mutex-proxy/mutex/tun"
	"github.com/mutex-proxy/mutex/tun/tuntest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// wait bounds every wait of these tests; reached, it is a failure.
const wait = 20 * time.Second

// handler is a Handler made of functions; nil ones reject.
type handler struct {
	tcp  func(ctx context.Context, src, orig netip.AddrPort, p flow.Pending)
	udp  func(ctx context.Context, src netip.AddrPort, in flow.PacketSource, out flow.PacketSink)
	echo func(ctx context.Context, src, dst netip.Addr) (bool, flow.Reason)
}

func (h *handler) TCP(ctx context.Context, src, orig netip.AddrPort, p flow.Pending) {
	if h.tcp == nil {
		p.Reject(flow.ReasonRefused)
		return
	}
	h.tcp(ctx, src, orig, p)
}

func (h *handler) UDP(ctx context.Context, src netip.AddrPort, in flow.PacketSource, out flow.PacketSink) {
	if h.udp != nil {
		h.udp(ctx, src, in, out)
	}
}

func (h *handler) Echo(ctx context.Context, src, dst netip.Addr) (bool, flow.Reason) {
	if h.echo == nil {
		return false, flow.ReasonHostUnreachable
	}
	return h.echo(ctx, src, dst)
}

// variant is a way to run a test: address family and offloads.
type variant struct {
	name    string
	v6      bool
	offload bool
}

func variants() []variant {
	return []variant{{"v4", false, true}, {"v6", true, true}, {"v4 plain", false, false}, {"v6 plain", true, false}}
}

func (v variant) app() netip.Addr {
	if v.v6 {
		return netip.MustParseAddr("fd00::2")
	}
	return netip.MustParseAddr("10.0.0.2")
}

func (v variant) dst(port uint16) netip.AddrPort {
	if v.v6 {
		return netip.AddrPortFrom(netip.MustParseAddr("2001:db8::80"), port)
	}
	return netip.AddrPortFrom(netip.MustParseAddr("203.0.113.80"), port)
}

func (v variant) proto() tcpip.NetworkProtocolNumber {
	if v.v6 {
		return ipv6.ProtocolNumber
	}
	return ipv4.ProtocolNumber
}

func fullAddress(ap netip.AddrPort) tcpip.FullAddress {
	return tcpip.FullAddress{Addr: tcpip.AddrFromSlice(ap.Addr().AsSlice()), Port: ap.Port()}
}

// startStack starts the stack under test on one end of a cable, and returns the other end.
func startStack(tb testing.TB, h Handler, offload bool, change func(*Config)) (*Stack, *tun.Device) {
	tb.Helper()
	a, b := tuntest.Pipe(tb, tun.DefaultMTU, offload)
	cfg := Config{Device: a, Handler: h}
	if change != nil {
		change(&cfg)
	}
	s, err := New(cfg)
	if err != nil {
		tb.Fatal(err)
	}
	if err := s.Start(); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = s.Close() })
	return s, b
}

// app is an application's host: a netstack of its own at the other end of the cable. Like a kernel that has to, it completes the checksums
// that are left to it, and verifies all.
type app struct {
	variant
	ns  *stack.Stack
	dev *tun.Device
	nic *nic
	buf [tun.MaxPacket]byte

	mu  sync.Mutex
	got [][]byte // every packet received, if keep
	hdr []tun.Header
	sig chan struct{}
}

func startApp(tb testing.TB, v variant, dev *tun.Device) *app {
	tb.Helper()
	a := &app{variant: v, dev: dev, sig: make(chan struct{}, 1)}
	a.ns = stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, ipv6.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4, icmp.NewProtocol6},
	})
	sack := tcpip.TCPSACKEnabled(true)
	a.ns.SetTransportProtocolOption(tcp.ProtocolNumber, &sack)
	cable := newLink(dev, &counters{})
	cable.shakes = nil // nobody writes them here: at once
	a.nic = newChecked(cable)
	if err := a.ns.CreateNIC(1, a.nic); err != nil {
		tb.Fatal(err)
	}
	addr := tcpip.AddrFromSlice(v.app().AsSlice())
	if err := a.ns.AddProtocolAddress(1, tcpip.ProtocolAddress{Protocol: v.proto(), AddressWithPrefix: addr.WithPrefix()}, stack.AddressProperties{}); err != nil {
		tb.Fatal(err)
	}
	a.ns.SetRouteTable([]tcpip.Route{{Destination: header.IPv4EmptySubnet, NIC: 1}, {Destination: header.IPv6EmptySubnet, NIC: 1}})
	var wg sync.WaitGroup
	wg.Go(func() { _ = dev.Queues()[0].Receive(a) })
	tb.Cleanup(func() {
		dev.Queues()[0].Stop()
		wg.Wait()
		a.ns.Destroy()
	})
	return a
}

func (a *app) Buffer() []byte { return a.buf[:] }
func (a *app) Idle()          {}

func (a *app) Packet(h *tun.Header, n int) {
	b := append([]byte(nil), a.buf[:n]...)
	if h.Flags&tun.NeedsChecksum != 0 {
		binary.BigEndian.PutUint16(b[h.CsumStart+h.CsumOffset:], ^checksum.Checksum(b[h.CsumStart:], 0))
	}
	a.mu.Lock()
	a.got = append(a.got, b)
	a.hdr = append(a.hdr, *h)
	a.mu.Unlock()
	select {
	case a.sig <- struct{}{}:
	default:
	}
	proto := header.IPv4ProtocolNumber
	if b[0]>>4 == 6 {
		proto = header.IPv6ProtocolNumber
	}
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(b)})
	a.nic.dispatcher.DeliverNetworkPacket(proto, pkt)
	pkt.DecRef()
}

// packets waits until one that was received satisfies f, and returns it.
func (a *app) packet(tb testing.TB, f func(b []byte) bool) []byte {
	tb.Helper()
	deadline := time.After(wait)
	seen := 0
	for {
		a.mu.Lock()
		got := a.got[seen:]
		seen = len(a.got)
		a.mu.Unlock()
		for _, b := range got {
			if f(b) {
				return b
			}
		}
		select {
		case <-a.sig:
		case <-deadline:
			tb.Fatal("the packet did not come")
		}
	}
}

func (a *app) dial(tb testing.TB, port uint16) (*gonet.TCPConn, error) {
	tb.Helper()
	ctx, cancel := context.WithTimeout(tb.Context(), wait)
	defer cancel()
	c, err := gonet.DialContextTCP(ctx, a.ns, fullAddress(a.dst(port)), a.proto())
	if err == nil {
		tb.Cleanup(func() { _ = c.Close() })
		_ = c.SetDeadline(time.Now().Add(wait))
	}
	return c, err
}

func (a *app) dialUDP(tb testing.TB, port uint16) *gonet.UDPConn {
	tb.Helper()
	to := fullAddress(a.dst(port))
	c, err := gonet.DialUDP(a.ns, nil, &to, a.proto())
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(wait))
	return c
}

// send puts raw packets on the cable.
func sendRaw(tb testing.TB, dev *tun.Device, h tun.Header, b []byte) {
	tb.Helper()
	for {
		err := dev.Queues()[0].Write(&h, b)
		if err == nil {
			return
		}
		if tb.Context().Err() != nil || errors.Is(err, net.ErrClosed) {
			tb.Fatal(err)
		}
	}
}

// origin is a TCP server on loopback that serves every connection with f.
func origin(tb testing.TB, f func(c *net.TCPConn)) netip.AddrPort {
	tb.Helper()
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		tb.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.AcceptTCP()
			if err != nil {
				return
			}
			_ = c.SetDeadline(time.Now().Add(wait))
			wg.Go(func() {
				defer c.Close()
				f(c)
			})
		}
	})
	tb.Cleanup(func() {
		_ = l.Close()
		wg.Wait()
	})
	return l.Addr().(*net.TCPAddr).AddrPort()
}

// tcpUpstream adds Abort.
type tcpUpstream struct{ *net.TCPConn }

func (c tcpUpstream) Abort() {
	_ = c.SetLinger(0)
	_ = c.Close()
}

// relayTo accepts each connection and relays it to the origin, as flow does it in essence: a FIN becomes a FIN, an error a reset.
func relayTo(tb testing.TB, to netip.AddrPort, wrap func(*net.TCPConn) flow.Conn) func(context.Context, netip.AddrPort, netip.AddrPort, flow.Pending) {
	tb.Helper()
	return func(_ context.Context, _, _ netip.AddrPort, p flow.Pending) {
		raw, err := net.DialTCP("tcp", nil, net.TCPAddrFromAddrPort(to))
		if err != nil {
			p.Reject(flow.ReasonOf(err))
			return
		}
		up := flow.Conn(tcpUpstream{raw})
		if wrap != nil {
			up = wrap(raw)
		}
		defer up.Close()
		c, err := p.Accept()
		if err != nil {
			tb.Errorf("accept: %v", err)
			return
		}
		defer c.Close()
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := c.(io.ReaderFrom).ReadFrom(up); err != nil {
				c.Abort()
				up.Abort()
			} else {
				_ = c.CloseWrite()
			}
		})
		if _, err := c.(io.WriterTo).WriteTo(up); err != nil {
			c.Abort()
			up.Abort()
		} else {
			_ = up.CloseWrite()
		}
		wg.Wait()
	}
}

// opaque hides that a connection is a socket.
type opaque struct{ net.Conn }

func (o opaque) CloseWrite() error { return o.Conn.(*net.TCPConn).CloseWrite() }
func (o opaque) Abort()            { tcpUpstream{o.Conn.(*net.TCPConn)}.Abort() }
