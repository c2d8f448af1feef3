// SPDX-License-Identifier: GPL-3.0-or-later

package flow

import (
	"errors"
	"fmt"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The kernel tells of a connection that was reset once: to whoever asks next. If that is a write, a read finds an end of file that nobody has sent
// (tcp_recvmsg, tcp_splice_read: sk_err is cleared by sock_error), and a truncated answer or upload would end as a complete one does. After a FIN the
// kernel says EPIPE instead (tcp_reset), and the end of file is one.

// losses remembers what writes have found on the two sides of a flow.
type losses struct {
	mu      sync.Mutex
	app, up loss
}

// loss is what the first write that has failed has found on a side.
type loss struct {
	found    syscall.Errno // 0 = none has
	finished bool          // we have sent FIN: only reads are left to be told
	noted    chan struct{} // closed when one is found; nil if nobody waits
}

// lossWait bounds the wait for a write that has failed to say so. It takes microseconds.
const lossWait = 5 * time.Second

func (l *losses) of(app bool) *loss {
	if app {
		return &l.app
	}
	return &l.up
}

// note remembers that a write to a side has failed.
func (l *losses) note(app bool, err error) {
	errno, ok := errors.AsType[syscall.Errno](err)
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.of(app)
	if !ok || s.found != 0 {
		return
	}
	s.found = errno
	if s.noted != nil {
		close(s.noted)
	}
}

// finish remembers that a side is sent FIN.
func (l *losses) finish(app bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.of(app).finished = true
}

// behind returns what is behind an end of file that c, which is a side, was read to: nil, or what has ended it.
func (l *losses) behind(app bool, c Conn) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.of(app)
	if s.found == 0 && !s.finished {
		switch err := Lost(c); {
		case errors.Is(err, ErrTold):
			s.noted = make(chan struct{})
			l.mu.Unlock()
			select { // the write has returned, and its goroutine has still to come here
			case <-s.noted:
			case <-time.After(lossWait):
			}
			l.mu.Lock()
		case err != nil:
			return fmt.Errorf("read: %w", err)
		}
	}
	if s.found != 0 && s.found != unix.EPIPE {
		return fmt.Errorf("read: %w", s.found)
	}
	return nil
}

// ErrTold is why a socket whose end of file has been read was lost: it has told somebody else.
var ErrTold = errors.New("lost, as somebody else has been told")

// Lost is asked after the end of file of a connection to which we have sent no FIN. It returns ErrTold if c is a socket that has ended and has told
// somebody why, another error if c has been closed, and nil otherwise.
func Lost(c Conn) error {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return nil
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return err
	}
	var lost error
	if err := raw.Control(func(fd uintptr) {
		info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		if err != nil || info.State != unix.BPF_TCP_CLOSE {
			return
		}
		if n, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR); err == nil && n == 0 {
			lost = ErrTold
		}
	}); err != nil {
		return err
	}
	return lost
}
