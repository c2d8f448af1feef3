// SPDX-License-Identifier: GPL-3.0-or-later

package control

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

const (
	// maxConns bounds the connections to the socket: 160 leases, as many watchers, and room for calls.
	maxConns = 1024
	// maxConnsPerUser bounds those of one user without authority, so that no such user can keep the others out.
	maxConnsPerUser = 64
	// maxPath is the room in sockaddr_un, less the final zero.
	maxPath = 107
)

// listenUnix makes the socket, and the directory it lies in. A socket that nobody answers on was left by a crash and is replaced; anything
// else at that path is left alone. The mode is 0666: authority comes from the peer's credentials alone.
func listenUnix(path string) (*net.UnixListener, error) {
	if len(path) > maxPath {
		return nil, fmt.Errorf("control socket %s: the path is longer than the %d bytes a socket may have", path, maxPath)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	addr := &net.UnixAddr{Name: path, Net: "unix"}
	l, err := net.ListenUnix("unix", addr)
	if errors.Is(err, unix.EADDRINUSE) {
		if err := removeStale(path); err != nil {
			return nil, err
		}
		l, err = net.ListenUnix("unix", addr)
	}
	if errors.Is(err, unix.EADDRINUSE) {
		// Somebody was faster.
		return nil, fmt.Errorf("control socket %s: %w: another daemon has just taken it", path, ErrConflict)
	}
	if err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	if err := os.Chmod(path, 0o666); err != nil {
		_ = l.Close()
		return nil, fmt.Errorf("control socket: %w", err)
	}
	return l, nil
}

func removeStale(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("control socket: %w", err)
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("control socket %s: %w: the path is taken by something that is no socket; remove it or choose another", path, ErrConflict)
	}
	conn, err := new(net.Dialer).DialContext(context.Background(), "unix", path) //nolint:forbidigo // a unix socket: nothing leaves, nothing to mark
	if err == nil {
		conn.Close()
		return fmt.Errorf("control socket %s: %w: another daemon answers on it; stop it with \"mprox down\" or choose another --socket", path, ErrConflict)
	}
	if !errors.Is(err, unix.ECONNREFUSED) {
		// A full backlog (EAGAIN) or a missing permission is no proof that nobody is there.
		return fmt.Errorf("control socket %s: %w: cannot tell whether a daemon answers on it: %w", path, ErrConflict, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("control socket: %w", err)
	}
	return nil
}

// peerListener accepts connections that know their peer, within the limits above.
type peerListener struct {
	*net.UnixListener
	trusted func(Peer) bool
	log     *zap.Logger

	mu    sync.Mutex
	total int
	users map[uint32]int // connections of users without authority; an entry is removed at zero
}

// Accept closes connections beyond a limit at once: the caller sees "closed the connection" and not a hang.
func (l *peerListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.AcceptUnix()
		if err != nil {
			return nil, err
		}
		peer, err := peerOf(conn)
		if err != nil {
			l.log.Warn("connection without credentials refused", zap.Error(err))
			_ = conn.Close()
			continue
		}
		trusted := l.trusted(peer)
		if !l.enter(peer.UID, trusted) {
			l.log.Warn("too many connections to the control socket", zap.Uint32("uid", peer.UID), zap.Int("pid", peer.PID))
			_ = conn.Close()
			continue
		}
		c := &peerConn{UnixConn: conn, peer: peer, trusted: trusted}
		c.leave = sync.OnceFunc(func() { l.leave(peer.UID, trusted) })
		return c, nil
	}
}

func (l *peerListener) enter(uid uint32, trusted bool) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	// The last quarter is kept for those who may do something about it.
	if l.total >= maxConns || !trusted && (l.total >= maxConns*3/4 || l.users[uid] >= maxConnsPerUser) {
		return false
	}
	l.total++
	if !trusted {
		l.users[uid]++
	}
	return true
}

func (l *peerListener) leave(uid uint32, trusted bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.total--
	if trusted {
		return
	}
	if l.users[uid]--; l.users[uid] == 0 {
		delete(l.users, uid)
	}
}

// peerConn is one connection and who is at the other end of it.
type peerConn struct {
	*net.UnixConn
	peer    Peer
	trusted bool
	leave   func()
}

// Close gives the connection's place free. It may be called more than once, as net/http does.
func (c *peerConn) Close() error {
	c.leave()
	return c.UnixConn.Close()
}
