// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"context"
	"errors"
	"os"

	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/policy/process"
)

// ResetSockets implements Host. Listening sockets are never touched, nor this process's own.
func (h *LinuxHost) ResetSockets(ctx context.Context, e Existing) (int, error) {
	owned, err := h.inodes(ctx, &e)
	if err != nil {
		return 0, err
	}
	n := 0
	var errs error
	for _, proto := range []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
		states := uint32(process.AllStates &^ (1 << process.StateListen))
		socks, err := h.diag.Dump(proto, states)
		if err != nil {
			return n, err
		}
		listening, err := h.listening(proto)
		if err != nil {
			return n, err
		}
		for _, s := range socks {
			if s.Inode == 0 || owned[s.Inode] == e.All || !e.meant(s.Local, s.Remote, s.Mark) || listening[s.Local.Port()] {
				continue
			}
			if err := h.diag.Destroy(s); err != nil && !errors.Is(err, os.ErrNotExist) {
				errs = errors.Join(errs, err)
				continue
			}
			n++
		}
	}
	return n, errs
}

// listening are the ports that connections come in on. UDP has no such state: its sockets are told apart by whether they are connected.
func (h *LinuxHost) listening(proto uint8) (map[uint16]bool, error) {
	if proto != unix.IPPROTO_TCP {
		return nil, nil
	}
	socks, err := h.diag.Dump(proto, 1<<process.StateListen)
	if err != nil {
		return nil, err
	}
	out := make(map[uint16]bool, len(socks))
	for _, s := range socks {
		out[s.Local.Port()] = true
	}
	return out, nil
}

// inodes are the sockets of those whom e means; when it means all, of those whom it leaves alone.
func (h *LinuxHost) inodes(ctx context.Context, e *Existing) (map[uint32]bool, error) {
	out := map[uint32]bool{}
	pids, err := process.All()
	if err != nil {
		return nil, err
	}
	self := os.Getpid()
	for _, pid := range pids {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		who, err := h.Process(pid)
		if err != nil {
			continue // it has ended, and its sockets with it
		}
		in, _ := anyOf(e.Who, who, e.Found)
		out2, _ := anyOf(e.Not, who, e.Found)
		if e.All && (pid == self || out2) || !e.All && pid != self && in && !out2 {
			for _, inode := range process.SocketsOf(pid) {
				out[inode] = true
			}
		}
	}
	return out, nil
}
