// SPDX-License-Identifier: GPL-3.0-or-later

package control

import (
	"net/http"
	"os"
)

// NewServerWithoutAuthority returns a server in whose eyes nobody has authority, not even the root that runs the tests.
func NewServerWithoutAuthority(cfg Config) *Server {
	s := NewServer(cfg)
	s.distrust = true
	return s
}

// HandlerAs serves requests that come through no listener, as if the test's process had sent them.
func HandlerAs(s *Server, trusted bool) http.Handler {
	h := s.handler()
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c := &peerConn{peer: Peer{PID: os.Getpid(), UID: uint32(os.Getuid())}, trusted: trusted}
		h.ServeHTTP(w, r.WithContext(withConn(r.Context(), c)))
	})
}

// Names for the tests of package control_test.
var (
	DecodeLease   = decodeLease
	DecodeContext = decodeContext
	Routes        = (*Server).routes
	OpenAPI       = openAPI
	GroupID       = groupID
)

// RouteOf returns what a test may know of a route.
func (r route) RouteOf() (method, path string) { return r.method, r.path }
