// SPDX-License-Identifier: GPL-3.0-or-later

package dns

import (
	"context"
	"net"

	"github.com/miekg/dns"

	"github.com/mutex-proxy/mutex/flow"
)

// exchanger is Server.Exchange, or what stands before it.
type exchanger func(ctx context.Context, f *flow.Flow, query []byte) ([]byte, error)

// Near answers the queries of one place, a container, where names without a dot are those of its neighbours: Names knows them and nothing else,
// all other queries are Rest's. The zero value of Names is nil: everything is Rest's.
type Near struct{ Names, Rest *Server }

// ServePacket is Server.ServePacket, until Rest is closed or pc.
func (n Near) ServePacket(pc net.PacketConn) error { return n.Rest.servePacket(pc, n.exchange) }

// ServeStream is Server.ServeStream, until Rest is closed or l.
func (n Near) ServeStream(l net.Listener) error { return n.Rest.serveStream(l, n.exchange) }

func (n Near) exchange(ctx context.Context, f *flow.Flow, query []byte) ([]byte, error) {
	if n.Names != nil && oneLabel(query) {
		return n.Names.Exchange(ctx, f, query)
	}
	return n.Rest.Exchange(ctx, f, query)
}

// oneLabel reports whether a message asks for a name of one label, such as `web`.
func oneLabel(query []byte) bool {
	const header = 12
	if len(query) <= header {
		return false
	}
	name, _, err := dns.UnpackDomainName(query, header)
	return err == nil && dns.CountLabel(name) == 1
}
