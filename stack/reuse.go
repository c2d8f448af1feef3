// SPDX-License-Identifier: GPL-3.0-or-later

package stack

import (
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// This file is about a SYN with the addresses and ports of a connection that netstack still has. The application's kernel is done with that one,
// and has sent the last packet of it (a reset, the acknowledgement of a FIN) right before the SYN. netstack takes both to the old endpoint, and
// what is left in the queue of an endpoint that has come to its end it answers with RST, without asking the forwarder: the new connection would be
// refused. So the SYN waits here until that endpoint is gone.

const (
	// reuseMax bounds the SYNs that wait; the ones beyond go to the endpoint.
	reuseMax = 256
	// reuseWait is how long a SYN waits. What netstack has still to handle takes it microseconds. After that the connection was not over, as far as
	// this side knows: its endpoint asks the application's kernel, as RFC 5961 section 4 has it, and the SYN that is repeated is a new one's.
	reuseWait = 200 * time.Millisecond
)

// reuse holds SYNs until the connection that has their addresses and ports is gone.
type reuse struct {
	ns    *stack.Stack
	wake  chan struct{} // capacity 1: a connection may be gone, or a SYN has come
	count atomic.Int32  // of syns, for who has no lock

	mu   sync.Mutex
	syns map[stack.TransportEndpointID]waiting
}

// waiting is a SYN as it came.
type waiting struct {
	nic *nic
	b   []byte
	due time.Time
}

func newReuse() *reuse {
	return &reuse{wake: make(chan struct{}, 1), syns: map[stack.TransportEndpointID]waiting{}}
}

// hold takes the SYN in b if there is a connection that it has to wait for.
func (r *reuse) hold(n *nic, p *packet, b []byte) bool {
	id := endpointID(p.dst, p.src)
	if !r.used(id) {
		return false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, repeated := r.syns[id]; repeated {
		return true
	}
	if len(r.syns) >= reuseMax {
		return false
	}
	r.syns[id] = waiting{nic: n, b: append([]byte(nil), b...), due: time.Now().Add(reuseWait)}
	r.count.Add(1)
	r.poke() // the connection may have gone since used has looked
	return true
}

// poke says that a connection may be gone.
func (r *reuse) poke() {
	if r.count.Load() == 0 {
		return
	}
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// used says whether netstack has a connection with these addresses and ports that was established once.
func (r *reuse) used(id stack.TransportEndpointID) bool {
	ep, ok := r.ns.FindTransportEndpoint(familyOf(id), tcp.ProtocolNumber, id, nicTrusted).(*tcp.Endpoint)
	if !ok {
		return false
	}
	switch ep.EndpointState() {
	case tcp.StateInitial, tcp.StateBound, tcp.StateListen, tcp.StateConnecting, tcp.StateSynSent, tcp.StateSynRecv:
		return false // a repeated SYN
	}
	return true
}

// run gives to netstack what has waited long enough, until done.
func (r *reuse) run(done <-chan struct{}) {
	next := time.NewTimer(reuseWait)
	defer next.Stop()
	for {
		select {
		case <-done:
			return
		case <-r.wake:
		case <-next.C:
		}
		ready, left := r.take()
		for id, s := range ready {
			pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(s.b)})
			s.nic.dispatcher.DeliverNetworkPacket(familyOf(id), pkt)
			pkt.DecRef()
		}
		if left {
			next.Reset(reuseWait)
		}
	}
}

// take removes the SYNs whose connection is gone, or that have waited for reuseWait, and says whether there are others.
func (r *reuse) take() (ready map[stack.TransportEndpointID]waiting, left bool) {
	ready = map[stack.TransportEndpointID]waiting{}
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	for id, s := range r.syns {
		if !now.Before(s.due) || !r.used(id) {
			ready[id] = s
			delete(r.syns, id)
			r.count.Add(-1)
		}
	}
	return ready, len(r.syns) > 0
}

// endpointID names a connection as netstack does; remote is the application.
func endpointID(local, remote netip.AddrPort) stack.TransportEndpointID {
	l, r := spoofed(local), spoofed(remote)
	return stack.TransportEndpointID{LocalAddress: l.Addr, LocalPort: l.Port, RemoteAddress: r.Addr, RemotePort: r.Port}
}

// familyOf returns the network protocol of a connection.
func familyOf(id stack.TransportEndpointID) tcpip.NetworkProtocolNumber {
	if id.LocalAddress.Len() == header.IPv6AddressSize {
		return header.IPv6ProtocolNumber
	}
	return header.IPv4ProtocolNumber
}
