// SPDX-License-Identifier: GPL-3.0-or-later

package client

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// ErrSilent is wrapped, beside ErrUnreachable, by the error about a daemon that lives and does not answer.
var ErrSilent = errors.New("does not answer")

// killPatience bounds the wait for the end of a process that has been killed: the kernel may have much memory and many sockets to free.
const killPatience = 10 * time.Second

// Alive asks the daemon for a sign of life, within ctx: any answer is one. It asks for what needs none of the daemon's state, so that a daemon
// that is busy with a change, or with its end, is not taken for one that hangs. The error of one that does not answer wraps ErrSilent.
func (c *Client) Alive(ctx context.Context) error {
	_, err := c.OpenAPI(ctx)
	for errors.Is(err, unix.EAGAIN) && ctx.Err() == nil { // nobody takes the connections that wait, and there is no room for another
		select {
		case <-ctx.Done():
			err = ctx.Err()
		case <-time.After(goneInterval):
			_, err = c.OpenAPI(ctx)
		}
	}
	switch {
	case Code(err) != "":
		return nil
	case !errors.Is(err, unix.EAGAIN) && !errors.Is(err, context.DeadlineExceeded):
		return err
	}
	who := "its process, which cannot be seen from here,"
	if pid, err := c.PID(context.WithoutCancel(ctx)); err == nil && pid != 0 {
		who = fmt.Sprintf("process %d", pid)
	}
	return fmt.Errorf("%w at %s: %s %w", ErrUnreachable, c.socket, who, ErrSilent)
}

// PID returns the process that listens on the socket, as the kernel knows it, whether it answers or not; 0 if it cannot be seen from here
// (another pid namespace).
func (c *Client) PID(ctx context.Context) (int, error) {
	conn, err := c.dial(ctx)
	if errors.Is(err, unix.EAGAIN) {
		// It has not answered for so long that no connection can be made any more: a health check every ten seconds needs half a day for that.
		return holderOf(c.socket), nil
	}
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	return listenerOf(conn)
}

// holderOf looks for the process that has the socket on which somebody listens at a path, as ss(8) does: 0 if it cannot be seen.
func holderOf(socket string) int {
	table, err := os.ReadFile("/proc/net/unix")
	if err != nil {
		return 0
	}
	link := ""
	for line := range strings.Lines(string(table)) {
		// Num RefCount Protocol Flags Type St Inode Path; __SO_ACCEPTCON is the flag of who listens.
		if f := strings.Fields(line); len(f) == 8 && f[3] == "00010000" && f[7] == socket {
			link = "socket:[" + f[6] + "]"
		}
	}
	if link == "" {
		return 0
	}
	fds, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, fd := range fds {
		if to, err := os.Readlink(fd); err == nil && to == link {
			pid, _ := strconv.Atoi(strings.Split(fd, "/")[2])
			return pid
		}
	}
	return 0
}

// Kill ends the process that listens on the socket, whose Alive has failed, and returns when it has ended. It gets SIGTERM, and SIGKILL if it
// has not ended by the end of grace: a process that is stopped or stuck takes no other. What it had changed on the machine stays.
func (c *Client) Kill(ctx context.Context, grace time.Duration) error {
	process, err := c.process(ctx)
	if err != nil {
		return err
	}
	if process == nil {
		return errors.New("its process cannot be seen from here")
	}
	defer process.Close()
	raw, err := process.SyscallConn()
	if err != nil {
		return err
	}
	for _, step := range []struct {
		signal   unix.Signal
		patience time.Duration
	}{{unix.SIGTERM, grace}, {unix.SIGKILL, killPatience}} {
		var sent error
		if err := raw.Control(func(fd uintptr) { sent = unix.PidfdSendSignal(int(fd), step.signal, nil, 0) }); err != nil {
			return err
		}
		if errors.Is(sent, unix.ESRCH) {
			return nil
		}
		if sent != nil {
			return sent
		}
		if err = waitExited(ctx, process, step.patience); err == nil || ctx.Err() != nil {
			return err
		}
	}
	return err
}
