// SPDX-License-Identifier: GPL-3.0-or-later

// Package server is a proxy server: SOCKS4, SOCKS4a, SOCKS5 (CONNECT, BIND, UDP ASSOCIATE) and HTTP CONNECT on one port. It is what `mprox serve` and
// `mprox demo` run, and an exit node.
//
// It is no part of the path of captured traffic. Where connections go to is a flow.Dialer: this machine, or any upstream for a chain.
package server

import (
	"bufio"
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/dialers"
	"github.com/mutex-proxy/mutex/flow"
)

const (
	defaultMaxConns  = 4096
	defaultMaxUDP    = 512 // 130 KB of buffers each
	defaultHandshake = 10 * time.Second
	defaultDial      = 15 * time.Second
	defaultMaxBinds  = 256 // a listening port each
	defaultBind      = 5 * time.Minute
	defaultIdle      = 2 * time.Hour
	defaultUDPIdle   = 5 * time.Minute
	// readBuffer holds the longest SOCKS5 request, and bounds a line of an HTTP request.
	readBuffer = 8 << 10
	// acceptPause is how long to wait when descriptors have run out: until one is closed, accepting can only fail.
	acceptPause = 50 * time.Millisecond
	// overflowPause is the least time between two lines of the log that say that there are too many connections.
	overflowPause = 10 * time.Second
	// lingerTime and lingerBytes bound what is read of a client that was refused, so that the refusal is not lost in a RST.
	lingerTime  = time.Second
	lingerBytes = 64 << 10
)

// Config says who may do what. The zero value of a limit means its default.
type Config struct {
	Net *dialers.Net // opens the UDP sockets towards clients; required
	// Dialer is where connections and associations go; nil means this machine, names resolved by Net.
	Dialer flow.Dialer
	// Users maps names to passwords. Nil, with Auth nil: nobody needs to authenticate. Empty: nobody can. With Users, HTTP clients may use
	// Digest too.
	Users map[string]string
	// Auth overrides Users. It must take the same time whether the user exists or not.
	Auth func(user, password string) bool
	// Allow is asked for each address before it is dialled or sent to, after names are resolved; nil allows all. Not with a Dialer.
	Allow func(netip.AddrPort) bool

	// MaxConns bounds the open connections; 4096. When there are more, the one that has been longest in its handshake makes room; without
	// any in a handshake the new one is closed at once.
	MaxConns         int
	MaxUDP           int           // open associations; 512. More are refused.
	MaxBinds         int           // connections waited for (BIND); 256. More are refused.
	HandshakeTimeout time.Duration // from accept to the whole request; 10 s
	DialTimeout      time.Duration // to reach a destination; 15 s
	BindTimeout      time.Duration // that somebody has to connect to a BIND; 5 min
	IdleTimeout      time.Duration // of a TCP connection without a byte either way; 2 h
	UDPIdleTimeout   time.Duration // of an association without a datagram either way; 5 min
	Log              *zap.Logger
}

// Server is a proxy server.
type Server struct {
	cfg  Config
	auth func(user, password string) bool // nil = nobody needs to
	// digest is nil unless passwords are known in the clear, which Digest needs.
	digest *digestAuth

	chain bool // the way out is another proxy, not this machine

	wg    sync.WaitGroup // connections and accept loops
	udp   chan struct{}  // a token an association
	binds chan struct{}  // a token a BIND

	mu        sync.Mutex
	closed    bool
	listeners map[net.Listener]struct{}
	conns     map[*session]struct{}

	overflow     uint64 // connections refused or displaced for want of room
	overflowSaid time.Time
}

// New checks the configuration. It opens nothing.
func New(cfg Config) (*Server, error) {
	if cfg.Net == nil {
		return nil, errors.New("serve: no net")
	}
	if cfg.Dialer != nil && cfg.Allow != nil {
		return nil, errors.New("serve: allow needs this machine as the dialer")
	}
	chain := cfg.Dialer != nil
	if !chain {
		cfg.Dialer = dialers.NewExit("direct", cfg.Net, cfg.Allow)
	}
	if cfg.Log == nil {
		cfg.Log = zap.NewNop()
	}
	cfg.MaxConns = or(cfg.MaxConns, defaultMaxConns)
	cfg.MaxUDP = or(cfg.MaxUDP, defaultMaxUDP)
	cfg.MaxBinds = or(cfg.MaxBinds, defaultMaxBinds)
	cfg.BindTimeout = or(cfg.BindTimeout, defaultBind)
	cfg.HandshakeTimeout = or(cfg.HandshakeTimeout, defaultHandshake)
	cfg.DialTimeout = or(cfg.DialTimeout, defaultDial)
	cfg.IdleTimeout = or(cfg.IdleTimeout, defaultIdle)
	cfg.UDPIdleTimeout = or(cfg.UDPIdleTimeout, defaultUDPIdle)
	s := &Server{
		cfg: cfg, auth: cfg.Auth, chain: chain,
		udp: make(chan struct{}, cfg.MaxUDP), binds: make(chan struct{}, cfg.MaxBinds), listeners: make(map[net.Listener]struct{}),
		conns: make(map[*session]struct{}),
	}
	if s.auth == nil && cfg.Users != nil {
		s.auth, s.digest = userList(cfg.Users), newDigestAuth(cfg.Users)
	}
	return s, nil
}

func or[T int | time.Duration](v, def T) T {
	if v <= 0 {
		return def
	}
	return v
}

// Serve accepts connections until ctx ends, Close is called (nil is returned) or l fails. It closes l. Connections go on after it returns.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	if !s.listen(l) {
		return l.Close()
	}
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer func() {
		stop()
		l.Close()
		s.mu.Lock()
		delete(s.listeners, l)
		s.mu.Unlock()
		s.wg.Done()
	}()
	for {
		c, err := l.Accept()
		if err == nil {
			s.accept(c)
			continue
		}
		if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
			return nil
		}
		if !temporary(err) {
			return err
		}
		s.cfg.Log.Warn("accept", zap.Error(err))
		select {
		case <-time.After(acceptPause):
		case <-ctx.Done():
		}
	}
}

// temporary reports whether accept(2) failed for want of something that comes back, or because of the one connection.
func temporary(err error) bool {
	for _, e := range [...]error{unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM, unix.ECONNABORTED, unix.EPERM} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

func (s *Server) listen(l net.Listener) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	s.listeners[l] = struct{}{}
	s.wg.Add(1)
	return true
}

// accept starts a connection's goroutine, or closes the connection if there are too many.
func (s *Server) accept(nc net.Conn) {
	tc, ok := nc.(*net.TCPConn)
	if !ok {
		nc.Close()
		return
	}
	c := &session{s: s, conn: &dialers.TCPConn{TCPConn: tc}, start: time.Now()}
	c.ctx, c.cancel = context.WithCancelCause(context.Background())
	s.mu.Lock()
	full := len(s.conns) >= s.cfg.MaxConns && !s.evictLocked()
	if full || s.closed {
		s.mu.Unlock()
		c.conn.Abort()
		return
	}
	s.conns[c] = struct{}{}
	s.wg.Add(1)
	s.mu.Unlock()
	go func() {
		defer s.wg.Done()
		c.run()
		s.mu.Lock()
		delete(s.conns, c)
		s.mu.Unlock()
	}()
}

// evictLocked makes room for a connection by ending the one that has been longest in its handshake: an honest client needs a round trip or
// two for that, so whoever opens connections and says little (slow loris) only displaces connections of its own. It says so in the log
// once in a while, not once a connection.
func (s *Server) evictLocked() bool {
	var oldest *session
	for c := range s.conns {
		if !c.granted.Load() && (oldest == nil || c.start.Before(oldest.start)) {
			oldest = c
		}
	}
	s.overflow++
	if now := time.Now(); now.Sub(s.overflowSaid) >= overflowPause {
		s.cfg.Log.Warn("too many connections", zap.Int("limit", s.cfg.MaxConns), zap.Uint64("refused or displaced so far", s.overflow))
		s.overflowSaid = now
	}
	if oldest == nil {
		return false
	}
	delete(s.conns, oldest) // its goroutine ends by itself, and Close waits for it
	oldest.cancel(errDisplaced)
	return true
}

// Active returns the number of open connections.
func (s *Server) Active() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.conns)
}

// Shutdown stops accepting and waits for the connections to end by themselves; when ctx ends before, it ends them.
func (s *Server) Shutdown(ctx context.Context) error {
	s.stop()
	done := make(chan struct{})
	go func() {
		s.wg.Wait()
		close(done)
	}()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		err := s.Close()
		<-done
		return errors.Join(context.Cause(ctx), err)
	}
}

// Close stops accepting, ends all connections and waits for them. It is idempotent.
func (s *Server) Close() error {
	s.stop()
	s.mu.Lock()
	for c := range s.conns {
		c.cancel(net.ErrClosed)
	}
	s.mu.Unlock()
	s.wg.Wait()
	return nil
}

func (s *Server) stop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	for l := range s.listeners {
		l.Close()
	}
}

// session is one connection of a client.
type session struct {
	s      *Server
	conn   *dialers.TCPConn
	in     *bufio.Reader   // what the client sends; after the request, what is buffered belongs to the destination
	ctx    context.Context // the connection's life, not a caller's: ends with Close
	cancel context.CancelCauseFunc
	start  time.Time

	granted atomic.Bool // the request has been read and is allowed: no longer in its handshake
	user    string
	dst     string // where it wanted to go, for the log
}

// run serves one connection from its first byte to its end.
func (c *session) run() {
	defer c.cancel(nil)
	stop := context.AfterFunc(c.ctx, c.conn.Abort)
	defer stop()
	_ = c.conn.SetDeadline(time.Now().Add(c.s.cfg.HandshakeTimeout))
	c.in = bufio.NewReaderSize(c.conn, readBuffer)
	err := c.handshake()
	_ = c.conn.Close()
	log := c.s.cfg.Log.With(
		zap.Stringer("client", c.conn.RemoteAddr()), zap.String("user", c.user), zap.String("dst", c.dst),
		zap.Duration("time", time.Since(c.start)),
	)
	if err != nil {
		log.Info("connection failed", zap.Error(err))
		return
	}
	log.Info("connection ended")
}

// handshake finds out what the client speaks by its first byte.
func (c *session) handshake() error {
	first, err := c.in.Peek(1)
	if err != nil {
		return err
	}
	switch {
	case first[0] == socksVersion:
		return c.socks5()
	case first[0] == socks4Version:
		return c.socks4()
	case 'A' <= first[0] && first[0] <= 'Z':
		return c.http()
	}
	c.conn.Abort()
	return errProtocol
}

var (
	errProtocol = errors.New("neither SOCKS nor HTTP")
	errAuth     = errors.New("wrong user or password")

	errDisplaced = errors.New("too many connections, and this one was slow")
)

// dial opens the connection that the client asks for. It gives up when the client does: at once after a reset, and after lingerTime when the
// client has ended its direction, since a few do that as soon as they have sent their request.
func (c *session) dial(dst flow.Addr) (flow.Conn, error) {
	c.granted.Store(true)
	ctx, cancel := context.WithTimeout(c.ctx, c.s.cfg.DialTimeout)
	defer cancel()
	_ = c.conn.SetDeadline(time.Time{})
	dialled := make(chan struct{})
	var watch sync.WaitGroup
	watch.Go(func() {
		gone, reset := c.awaitGone()
		if gone && !reset {
			select {
			case <-time.After(lingerTime):
			case <-dialled:
			}
		}
		if gone {
			cancel()
		}
	})
	out, err := c.s.cfg.Dialer.Dial(ctx, dst)
	close(dialled)
	_ = c.conn.SetReadDeadline(time.Unix(1, 0))
	watch.Wait()
	_ = c.conn.SetReadDeadline(time.Time{})
	if err != nil && errors.Is(ctx.Err(), context.Canceled) && errors.Is(err, context.Canceled) {
		return nil, errClientGone
	}
	return out, err
}

// awaitGone waits until the client has reset its connection, or has ended it without having sent anything that is still to be passed on, and
// reports whether that was it: a read deadline ends the wait too. It reads nothing.
func (c *session) awaitGone() (gone, reset bool) {
	raw, err := c.conn.SyscallConn()
	if err != nil {
		return false, false
	}
	early := c.in.Buffered() > 0
	err = raw.Read(func(fd uintptr) bool { // woken by every change of the socket's state
		p := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		if n, err := unix.Poll(p[:], 0); err != nil || n == 0 {
			return false
		}
		if p[0].Revents&(unix.POLLERR|unix.POLLHUP) != 0 {
			gone, reset = true, true
			return true
		}
		unread, err := unix.IoctlGetInt(int(fd), unix.SIOCINQ)
		gone = err == nil && unread == 0 && !early
		return gone // with something to pass on, only a reset counts
	})
	return err == nil && gone, reset
}

// refuse sends a reply and closes so that the client gets to read it: closing with unread bytes in the socket would send RST.
func (c *session) refuse(reply []byte) {
	_ = c.conn.SetDeadline(time.Now().Add(lingerTime))
	if _, err := c.conn.Write(reply); err != nil || c.conn.CloseWrite() != nil {
		return
	}
	var buf [4096]byte
	for n := 0; n < lingerBytes; {
		k, err := c.in.Read(buf[:])
		if err != nil {
			return
		}
		n += k
	}
}

// clientAddr returns the client's address without a port.
func (c *session) clientAddr() netip.Addr {
	return c.conn.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
}
