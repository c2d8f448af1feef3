// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/policy/process"
)

// Bounds of what is put into nftables sets: more is not an ordinary host, and what is left out is blocked, not leaked.
const (
	maxInbound = 65536
	maxClients = 65536 // all ports there are
)

// Sockets implements Host.
func (h *LinuxHost) Sockets(ctx context.Context) (Sockets, error) {
	tcp, err := h.diag.Dump(unix.IPPROTO_TCP, process.AllStates)
	if err != nil {
		return Sockets{}, err
	}
	if err := context.Cause(ctx); err != nil {
		return Sockets{}, err
	}
	udp, err := h.diag.Dump(unix.IPPROTO_UDP, process.AllStates)
	if err != nil {
		return Sockets{}, err
	}
	from, to := 32768, 60999 // the kernel's defaults
	if s, err := h.Sysctl("net/ipv4/ip_local_port_range"); err == nil {
		_, _ = fmt.Sscan(s, &from, &to)
	}
	return Sockets{Inbound: inboundOf(tcp), Clients: clientsOf(udp, uint16(from), uint16(to))}, nil
}

// inboundOf picks the connections that came in: their local port is one that is listened on.
func inboundOf(tcp []process.Socket) []Tuple {
	listening := map[uint16]bool{}
	for _, s := range tcp {
		if s.State == process.StateListen {
			listening[s.Local.Port()] = true
		}
	}
	var out []Tuple
	for _, s := range tcp {
		if s.State != process.StateListen && s.State != process.StateClose && listening[s.Local.Port()] &&
			!s.Remote.Addr().IsLoopback() && s.Remote.Port() != 0 && len(out) < maxInbound {
			out = append(out, Tuple{Local: s.Local, Remote: s.Remote})
		}
	}
	return out
}

// clientsOf picks the ports of UDP sockets that have not been bound to be found: connected ones, and those on a port of the ephemeral range.
// A socket of the kernel's own (WireGuard, VXLAN: inode 0) is a server wherever it is.
func clientsOf(udp []process.Socket, from, to uint16) []uint16 {
	servers, clients := map[uint16]bool{}, map[uint16]bool{}
	for _, s := range udp {
		port := s.Local.Port()
		switch {
		case port == 0:
		case s.Remote.Port() != 0, s.Inode != 0 && port >= from && port <= to:
			clients[port] = true
		default:
			servers[port] = true
		}
	}
	var out []uint16
	for port := range clients {
		if !servers[port] && len(out) < maxClients {
			out = append(out, port)
		}
	}
	slices.Sort(out)
	return out
}

// DestroySockets implements Host.
func (h *LinuxHost) DestroySockets(values []uint32, mask uint32) error {
	socks, err := h.diag.Dump(unix.IPPROTO_TCP, process.AllStates&^(1<<process.StateListen))
	if err != nil {
		return err
	}
	var errs error
	for _, s := range doomed(socks, values, mask) {
		errs = errors.Join(errs, h.diag.Destroy(s))
	}
	return errs
}

// doomed are the sockets that DestroySockets means.
func doomed(socks []process.Socket, values []uint32, mask uint32) []process.Socket {
	adopted := AccelMark(mask)
	ends := map[Tuple]bool{}
	for _, s := range socks {
		if s.Mark&mask == adopted {
			ends[Tuple{Local: s.Local, Remote: s.Remote}] = true
		}
	}
	var out []process.Socket
	for _, s := range socks {
		orphan := s.Mark&mask == adopted && !ends[Tuple{Local: s.Remote, Remote: s.Local}]
		if orphan || slices.Contains(values, s.Mark&mask) {
			out = append(out, s)
		}
	}
	return out
}

// Listener implements Host.
func (h *LinuxHost) Listener(ctx context.Context, addr netip.AddrPort) ([]Process, error) {
	tcp, err := h.diag.Dump(unix.IPPROTO_TCP, process.AllStates)
	if err != nil {
		return nil, err
	}
	listeners, all := map[uint32]bool{}, map[uint32]Tuple{}
	for _, s := range tcp {
		if s.State == process.StateListen {
			if s.Local.Port() == addr.Port() && (s.Local.Addr() == addr.Addr() || s.Local.Addr().IsUnspecified()) {
				listeners[s.Inode] = true
			}
		} else if !s.Remote.Addr().IsLoopback() {
			all[s.Inode] = Tuple{Local: s.Local, Remote: s.Remote}
		}
	}
	holders, err := process.Holders(ctx, listeners)
	if err != nil {
		return nil, err
	}
	var out []Process
	for pid := range holders {
		if pid == os.Getpid() {
			out = append(out, Process{PID: pid}) // its children are nobody's upstream
			continue
		}
		tree, err := process.Tree(pid)
		if err != nil {
			return nil, err
		}
		for _, p := range tree {
			cg, err := process.Cgroup(p)
			if err != nil {
				continue // gone, or no cgroup v2: Manager then finds none to exclude
			}
			proc := Process{PID: p, Name: process.Name(p), Cgroup: cg}
			for _, inode := range process.SocketsOf(p) {
				if t, ok := all[inode]; ok {
					proc.Flows = append(proc.Flows, t)
				}
			}
			out = append(out, proc)
		}
	}
	slices.SortFunc(out, func(a, b Process) int { return a.PID - b.PID })
	return slices.CompactFunc(out, func(a, b Process) bool { return a.PID == b.PID }), nil
}
