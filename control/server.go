// SPDX-License-Identifier: GPL-3.0-or-later

package control

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/net/netutil"
	"golang.org/x/sys/unix"
)

// Limits of one request. A local caller that needs longer to send a kilobyte is broken or hostile.
const (
	maxBody       = 64 << 10 // a lease names a handful of proxies; configurations are files
	maxHeader     = 16 << 10
	headerTimeout = 5 * time.Second
	bodyTimeout   = 5 * time.Second
	writeTimeout  = 30 * time.Second
	idleTimeout   = 60 * time.Second
	// closeTimeout is how long Close lets requests finish: long enough for an answer, too short for a caller that does not read.
	closeTimeout = 2 * time.Second
	// maxHTTPConns bounds the TCP listener: a Prometheus or two, and probes.
	maxHTTPConns = 64
)

// Config is what a Server needs.
type Config struct {
	Socket     string // path of the unix socket
	Group      string // name or number of the group whose members may do everything; "" = root alone
	UserLeases int    // how many leases each user without authority may hold
	HTTPListen string // address:port of /metrics, /livez and /readyz; "" = none
	Backend    Backend
	Metrics    *Metrics // may be nil: no /metrics
	Log        *zap.Logger
	Now        func() time.Time // nil = time.Now
}

// Server serves the API on the unix socket, and metrics and probes on HTTPListen.
type Server struct {
	cfg    Config
	log    *zap.Logger
	now    func() time.Time
	events hub[Event]
	leases leaseTable

	distrust bool // of tests that run as root: nobody has authority

	mu       sync.Mutex // guards what follows
	started  bool
	closed   bool
	api      *http.Server
	web      *http.Server
	webAddr  net.Addr
	group    uint32
	hasGroup bool
	cancel   context.CancelFunc
	wg       sync.WaitGroup
}

// NewServer returns a Server that does nothing yet.
func NewServer(cfg Config) *Server {
	s := &Server{cfg: cfg, log: cfg.Log, now: cfg.Now}
	if s.log == nil {
		s.log = zap.NewNop()
	}
	if s.now == nil {
		s.now = time.Now
	}
	return s
}

// Start makes the sockets and serves. When it fails it leaves nothing behind. It wraps ErrConflict when an address is taken.
func (s *Server) Start() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.started || s.closed {
		return errors.New("control: already started")
	}
	s.group, s.hasGroup = groupID(s.cfg.Group)
	if s.cfg.Group != "" && !s.hasGroup {
		s.log.Info("the control group does not exist: only root has authority", zap.String("group", s.cfg.Group))
	}
	unixListener, err := listenUnix(s.cfg.Socket)
	if err != nil {
		return err
	}
	var web net.Listener
	if s.cfg.HTTPListen != "" {
		if web, err = listenHTTP(s.cfg.HTTPListen); err != nil {
			_ = unixListener.Close()
			return err
		}
		s.webAddr = web.Addr()
		s.warnExposed()
	}
	s.started = true
	ctx, cancel := context.WithCancel(context.Background())
	s.cancel = cancel
	quiet := zap.NewStdLog(s.log.WithOptions(zap.IncreaseLevel(zap.ErrorLevel))) // net/http's own complaints are about callers
	s.api = &http.Server{
		Handler:           s.handler(),
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          quiet,
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ConnContext:       withConn,
	}
	l := &peerListener{UnixListener: unixListener, trusted: s.trusted, log: s.log, users: make(map[uint32]int)}
	s.serve(s.api, l)
	if web != nil {
		s.web = &http.Server{
			Handler:           s.webHandler(),
			ReadHeaderTimeout: headerTimeout,
			ReadTimeout:       headerTimeout + bodyTimeout,
			WriteTimeout:      writeTimeout,
			IdleTimeout:       idleTimeout,
			MaxHeaderBytes:    maxHeader,
			ErrorLog:          quiet,
		}
		s.serve(s.web, netutil.LimitListener(web, maxHTTPConns))
	}
	return nil
}

func listenHTTP(addr string) (net.Listener, error) {
	l, err := new(net.ListenConfig).Listen(context.Background(), "tcp", addr)
	if errors.Is(err, unix.EADDRINUSE) {
		return nil, fmt.Errorf("http.listen %s: %w: the address is in use; choose another, or \"\" for none", addr, ErrConflict)
	}
	if err != nil {
		return nil, fmt.Errorf("http.listen %s: %w", addr, err)
	}
	return l, nil
}

// warnExposed tells of a listener that other machines may reach: metrics name upstreams and contexts, and there is no authentication.
func (s *Server) warnExposed() {
	if ap, err := netip.ParseAddrPort(s.webAddr.String()); err == nil && !ap.Addr().IsLoopback() {
		s.log.Warn("http.listen is not a loopback address: anyone who reaches it reads the metrics", zap.String("listen", s.cfg.HTTPListen))
	}
}

func (s *Server) serve(srv *http.Server, l net.Listener) {
	s.wg.Go(func() {
		if err := srv.Serve(l); err != nil && !errors.Is(err, http.ErrServerClosed) {
			s.log.Error("control listener ended", zap.Stringer("listen", l.Addr()), zap.Error(err))
		}
	})
}

// Close ends streams and leases, lets other requests finish for a moment, removes the socket and waits. It is idempotent.
func (s *Server) Close() error {
	s.mu.Lock()
	started := s.started && !s.closed
	s.closed = true
	s.mu.Unlock()
	if started {
		s.cancel()
		s.leases.closeAll()
		ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
		defer cancel()
		for _, srv := range []*http.Server{s.api, s.web} {
			if srv == nil {
				continue
			}
			if err := srv.Shutdown(ctx); err != nil {
				_ = srv.Close()
			}
		}
	}
	s.wg.Wait()
	s.leases.wait()
	return nil
}

// HTTPAddr returns the address of the TCP listener, nil if there is none: the port is the kernel's choice when it was given as 0.
func (s *Server) HTTPAddr() net.Addr {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.webAddr
}

// Publish sends an event to everyone who reads /v1/events. It never blocks: a reader that is too slow loses events.
func (s *Server) Publish(e Event) {
	if e.Time.IsZero() {
		e.Time = s.now()
	}
	s.events.send(e)
}

// trusted reports whether the peer may do everything.
func (s *Server) trusted(p Peer) bool {
	if s.distrust {
		return false
	}
	return p.UID == 0 || s.hasGroup && p.In(s.group)
}

// connKey is the key of the connection in a request's context: net/http has no other way from a connection to its requests.
type connKey struct{}

func withConn(ctx context.Context, c net.Conn) context.Context {
	return context.WithValue(ctx, connKey{}, c)
}
