// SPDX-License-Identifier: GPL-3.0-or-later

// Package stack is the network stack in user space behind a context's TUN device: it turns packets into connections, datagrams and echo
// requests, and asks a Handler (package flow) what shall become of them.
//
// It is the only importer of gVisor's netstack, which does TCP, reassembly and ICMP; UDP goes past it. It decides nothing, opens no
// sockets and knows no upstream. link.go is the fast path; tcp.go, udp.go and icmp.go what arrives by it; conn.go an accepted connection,
// splice.go its copy-free relay. cmd/mprox/daemon builds one Stack a context.
package stack

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"go.uber.org/zap"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"github.com/mutex-proxy/mutex/flow"
	"github.com/mutex-proxy/mutex/stack/offload"
	"github.com/mutex-proxy/mutex/tun"
)

// Handler is told of everything that arrives; *flow.Handler is one. Each call has a goroutine of its own; ctx ends when the Stack closes, and Close
// waits for the calls.
type Handler interface {
	// TCP answers p and returns when the connection has ended. If it answers nothing, the application is left without one.
	TCP(ctx context.Context, src, orig netip.AddrPort, p flow.Pending)
	// UDP serves the application socket src until it is idle. A datagram that comes later is a new call.
	UDP(ctx context.Context, src netip.AddrPort, in flow.PacketSource, out flow.PacketSink)
	// Echo says whether dst lives and, if not, what to tell src.
	Echo(ctx context.Context, src, dst netip.Addr) (alive bool, r flow.Reason)
}

var _ Handler = (*flow.Handler)(nil)

// Config is what a Stack is built from.
type Config struct {
	Device  *tun.Device // remains the caller's, to be closed after the Stack
	Handler Handler
	Log     *zap.Logger // nil = silence
	// Gone is called when a device can no longer be read, at least once: somebody has deleted it (Replace). nil = it is only logged. It must not block.
	Gone func(*tun.Device)

	// Offload adopts TCP flows into the kernel where flow asks for it; nil = none. It needs what policy.ContextSpec.Offload puts there.
	Offload *offload.Config
	// Forget makes conntrack forget a TCP connection from src to dst. nil = nothing does. Called from the goroutine that reads packets.
	Forget func(src, dst netip.AddrPort)

	MaxPendingTCP  int // unanswered connection requests, half of them from one source; 0 = 16384
	MaxUDPSessions int // application sockets; 0 = 32768
}

// Stack is the network stack of one context.
type Stack struct {
	cfg    Config
	ctx    context.Context // the life of the Stack, for the Handler's calls
	cancel context.CancelFunc
	count  counters
	link   *link
	nics   [2]*nic // trusted, checked
	send   sender
	copies pool
	tcp    *tcpFront
	udp    *udpTable
	echo   *echoTable

	ns      *stack.Stack   // nil before Start
	readers sync.WaitGroup // one a queue
	writers sync.WaitGroup // of SYN-ACKs, and of SYNs that had to wait

	mu      sync.Mutex // guards what follows, and cfg.Device
	started bool
	closed  bool
	done    chan struct{} // closed when Close has finished
}

// New checks the configuration and builds a Stack that does nothing until Start.
func New(cfg Config) (*Stack, error) {
	switch {
	case cfg.Device == nil:
		return nil, errors.New("stack: no device")
	case cfg.Handler == nil:
		return nil, errors.New("stack: no handler")
	case cfg.MaxPendingTCP < 0 || cfg.MaxUDPSessions < 0:
		return nil, errors.New("stack: a negative limit")
	}
	if cfg.Log == nil {
		cfg.Log = zap.NewNop()
	}
	if cfg.MaxPendingTCP == 0 {
		cfg.MaxPendingTCP = defaultPendingTCP
	}
	if cfg.MaxUDPSessions == 0 {
		cfg.MaxUDPSessions = defaultUDPSessions
	}
	s := &Stack{cfg: cfg, copies: pool{size: copySize}, done: make(chan struct{})}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.link = newLink(cfg.Device, &s.count)
	s.send.link = s.link
	s.tcp = &tcpFront{s: s, max: cfg.MaxPendingTCP, pending: map[stack.TransportEndpointID]*syn{}, perSource: map[tcpip.Address]int{}, reuse: newReuse()}
	if cfg.Offload != nil {
		var err error
		if s.tcp.adopted.engine, err = offload.New(*cfg.Offload); err != nil {
			return nil, fmt.Errorf("stack: %w", err)
		}
	}
	s.udp = newUDPTable(s, cfg.MaxUDPSessions)
	s.echo = newEchoTable(s)
	return s, nil
}

// Start begins to read the device. It can be called once.
func (s *Stack) Start() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.started || s.closed {
		return errors.New("stack: started or closed before")
	}
	s.started = true
	if e := s.tcp.adopted.engine; e != nil {
		if err := e.Start(); err != nil {
			return fmt.Errorf("stack: %w", err)
		}
	}
	s.nics = [2]*nic{newTrusted(s.link), newChecked(s.link)}
	if err := s.build(s.nics[0], s.nics[1]); err != nil {
		return fmt.Errorf("stack: %w", err)
	}
	s.writers.Go(func() { s.link.writeShakes(s.ctx.Done()) })
	s.writers.Go(func() { s.tcp.reuse.run(s.ctx.Done()) })
	s.read(s.cfg.Device)
	return nil
}

// read starts the readers of a device.
func (s *Stack) read(dev *tun.Device) {
	for _, q := range dev.Queues() {
		s.readers.Go(func() {
			r := &reader{link: s.link, trusted: s.nics[0], checked: s.nics[1], udp: s.udp.receive, reuse: s.tcp.reuse}
			defer r.close()
			err := q.Receive(r)
			switch {
			case err == nil || s.ctx.Err() != nil:
			case s.cfg.Gone != nil:
				s.cfg.Gone(dev)
			default:
				s.cfg.Log.Error("reading the tun device ended", zap.String("device", dev.Name()), zap.Error(err))
			}
		})
	}
}

// Replace goes on with another device of the same MTU, after somebody has deleted the first: connections and sessions live on, as after a moment
// without a network. The first remains the caller's, to be closed afterwards.
func (s *Stack) Replace(dev *tun.Device) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case !s.started || s.closed:
		return errors.New("stack: not started, or closed")
	case dev.MTU() != s.link.mtu:
		return fmt.Errorf("stack: the MTU was %d and cannot become %d", s.link.mtu, dev.MTU())
	}
	s.cfg.Device = dev
	s.link.dev.Store(dev)
	s.read(dev)
	return nil
}

// build makes netstack.
func (s *Stack) build(trusted, checked *nic) error {
	s.ns = stack.New(stack.Options{
		NetworkProtocols: []stack.NetworkProtocolFactory{
			ipv4.NewProtocol,
			ipv6.NewProtocolWithOptions(ipv6.Options{
				// Nothing of its own on the link: no router solicitations, and no addresses to defend.
				NDPConfigs: ipv6.NDPConfigurations{HandleRAs: ipv6.HandlingRAsDisabled},
			}),
		},
		// UDP is there for what has to be reassembled, ICMP to be asked by the echo handlers.
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4, icmp.NewProtocol6},
		// Every destination counts as local (promiscuous): two applications talking would otherwise meet inside netstack, past every rule.
		HandleLocal: false,
	})
	if err := setTCPOptions(s.ns); err != nil {
		return err
	}
	s.tcp.reuse.ns = s.ns
	s.tcp.fwd = tcp.NewForwarder(s.ns, bufferMin, s.tcp.max, s.tcp.serve)
	s.ns.SetTransportProtocolHandler(tcp.ProtocolNumber, s.tcp.handle)
	s.ns.SetTransportProtocolHandler(udp.ProtocolNumber, s.udp.handle)
	s.ns.SetTransportProtocolHandler(icmp.ProtocolNumber4, s.echo.handle)
	s.ns.SetTransportProtocolHandler(icmp.ProtocolNumber6, s.echo.handle)
	var routes []tcpip.Route
	for id, n := range map[tcpip.NICID]*nic{nicTrusted: trusted, nicChecked: checked} {
		if err := s.ns.CreateNICWithOptions(id, n, stack.NICOptions{Name: n.name}); err != nil {
			return fmt.Errorf("nic %d: %s", id, err)
		}
		// Receive packets to any address, and send packets from any: the applications' destinations.
		if err := s.ns.SetPromiscuousMode(id, true); err != nil {
			return fmt.Errorf("nic %d: promiscuous: %s", id, err)
		}
		if err := s.ns.SetSpoofing(id, true); err != nil {
			return fmt.Errorf("nic %d: spoofing: %s", id, err)
		}
		routes = append(routes, tcpip.Route{Destination: header.IPv4EmptySubnet, NIC: id}, tcpip.Route{Destination: header.IPv6EmptySubnet, NIC: id})
	}
	s.ns.SetRouteTable(routes)
	return nil
}

// Close ends everything: applications are sent RST, the Handler's calls are waited for. It is idempotent and waits in every call.
func (s *Stack) Close() error {
	s.mu.Lock()
	first, started := !s.closed, s.started
	s.closed = true
	s.mu.Unlock()
	if !first {
		<-s.done
		return nil
	}
	defer close(s.done)
	s.cancel()
	s.tcp.close()
	if started {
		for _, q := range s.cfg.Device.Queues() {
			q.Stop()
		}
		s.readers.Wait()
		s.writers.Wait()
	}
	s.udp.close()
	s.echo.close()
	if e := s.tcp.adopted.engine; e != nil {
		_ = e.Close()
	}
	if s.ns != nil {
		s.abortAll()
		s.ns.Close()
		s.ns.Wait()
	}
	s.link.acks.close()
	return nil
}

// abortAll resets every connection, which ends the relays and the handshakes under way, and waits for their goroutines.
func (s *Stack) abortAll() {
	ended := make(chan struct{})
	go func() {
		s.tcp.wg.Wait()
		close(ended)
	}()
	again := time.NewTicker(abortEvery)
	defer again.Stop()
	for {
		for _, ep := range s.ns.RegisteredEndpoints() {
			ep.Abort()
		}
		select {
		case <-ended:
			return
		case <-again.C: // a request may have been accepted since
		}
	}
}

// abortEvery is how long Close waits before it looks for connections that a Handler has accepted in spite of it.
const abortEvery = 20 * time.Millisecond
