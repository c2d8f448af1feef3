// SPDX-License-Identifier: GPL-3.0-or-later

package client

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// goneInterval is how often Shutdown looks for a daemon whose process it cannot see: short for a person, cheap for the machine.
const goneInterval = 50 * time.Millisecond

// Shutdown stops the daemon and returns when its process has ended, and with it everything it had changed on the machine, save what
// on_stop keeps. A daemon that this process cannot see (another pid namespace) is taken for gone when its socket answers no more.
func (c *Client) Shutdown(ctx context.Context) error { return c.shutdown(ctx, nil) }

// ShutdownClosed is Shutdown, but what is captured stays blocked until the next start, whatever on_stop says: for an upgrade.
func (c *Client) ShutdownClosed(ctx context.Context) error {
	return c.shutdown(ctx, url.Values{"keep": {"closed"}})
}

func (c *Client) shutdown(ctx context.Context, query url.Values) error {
	process, err := c.process(ctx)
	if err != nil {
		return err
	}
	if process != nil {
		defer process.Close()
	}
	resp, err := c.request(ctx, http.MethodPost, "/v1/shutdown", query, nil)
	if err != nil {
		return err
	}
	resp.Body.Close()
	if process != nil {
		return exited(ctx, process)
	}
	return c.gone(ctx)
}

// process opens a pidfd of the process that listens on the socket: nil if it cannot be seen, or is the caller itself (an embedded daemon).
func (c *Client) process(ctx context.Context) (*os.File, error) {
	pid, err := c.PID(ctx)
	if err != nil {
		return nil, err
	}
	if pid == 0 || pid == os.Getpid() {
		return nil, nil
	}
	// Nonblocking, so that the runtime's poller can wait for it with a deadline.
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil, nil
	}
	return os.NewFile(uintptr(fd), "pidfd"), nil
}

// listenerOf returns the process at the other end, which began to listen (unix(7): SO_PEERCRED): 0 if it cannot be seen.
func listenerOf(conn net.Conn) (int, error) {
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) { cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return 0, err
	}
	if credErr != nil {
		return 0, nil
	}
	return int(cred.Pid), nil
}

// waitExited is exited for a part of ctx's time.
func waitExited(ctx context.Context, process *os.File, patience time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	// The deadline of an earlier wait is over.
	if err := process.SetReadDeadline(time.Time{}); err != nil {
		return err
	}
	return exited(ctx, process)
}

// exited waits until the process of the pidfd has ended.
func exited(ctx context.Context, process *os.File) error {
	unhook := context.AfterFunc(ctx, func() { _ = process.SetReadDeadline(time.Unix(1, 0)) })
	defer unhook()
	raw, err := process.SyscallConn()
	if err != nil {
		return err
	}
	err = raw.Read(func(fd uintptr) bool {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		return err == nil && n > 0
	})
	if err != nil && ctx.Err() != nil {
		return fmt.Errorf("the daemon has not ended yet: %w", context.Cause(ctx))
	}
	return err
}

func (c *Client) gone(ctx context.Context) error {
	tick := time.NewTicker(goneInterval)
	defer tick.Stop()
	for {
		conn, err := c.dial(ctx)
		switch {
		case err == nil:
			conn.Close()
		case ctx.Err() == nil && errors.Is(err, ErrUnreachable):
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the daemon has not ended yet: %w", context.Cause(ctx))
		case <-tick.C:
		}
	}
}
