// SPDX-License-Identifier: GPL-3.0-or-later

package stack

import (
	"context"
	"fmt"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"

	"github.com/mutex-proxy/mutex/flow"
)

var _ flow.Caller = (*conn)(nil)

// Call opens a connection to a socket of the application, as if it came from from (flow.Caller). Refused and reset come back as the errors
// of connect(2); ctx bounds the wait.
func (c *conn) Call(ctx context.Context, from, to netip.AddrPort) (flow.Conn, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	from, to = netip.AddrPortFrom(from.Addr().Unmap(), from.Port()), netip.AddrPortFrom(to.Addr().Unmap(), to.Port())
	if from.Addr().Is4() != to.Addr().Is4() || !from.IsValid() || !to.IsValid() {
		return nil, fmt.Errorf("call %s from %s: not of one family", to, from)
	}
	id := endpointID(from, to)
	n := newConn(c.t, id)
	ep, terr := c.t.s.ns.NewEndpoint(tcp.ProtocolNumber, familyOf(id), &n.queue)
	if terr != nil {
		return nil, fmt.Errorf("call %s: %s", to, terr)
	}
	if err := connect(ctx, ep, &n.queue, spoofed(from), spoofed(to)); err != nil {
		ep.Abort()
		ep.Close()
		return nil, fmt.Errorf("call %s from %s: %w", to, from, err)
	}
	n.start(ep)
	return n, nil
}

// connect completes a handshake that we begin.
func connect(ctx context.Context, ep tcpip.Endpoint, queue *waiter.Queue, local, remote tcpip.FullAddress) error {
	entry, ready := waiter.NewChannelEntry(waiter.WritableEvents | waiter.EventErr | waiter.EventHUp)
	queue.EventRegister(&entry)
	defer queue.EventUnregister(&entry)
	ep.SocketOptions().SetReuseAddress(true) // the server's port 20 is used again and again
	if err := ep.Bind(local); err != nil {
		return errorOf(err)
	}
	err := ep.Connect(remote)
	if _, started := err.(*tcpip.ErrConnectStarted); started {
		select {
		case <-ready:
			err = ep.LastError()
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	if err != nil {
		return errorOf(err)
	}
	return nil
}

func spoofed(a netip.AddrPort) tcpip.FullAddress {
	return tcpip.FullAddress{NIC: nicTrusted, Addr: tcpip.AddrFromSlice(a.Addr().AsSlice()), Port: a.Port()}
}
