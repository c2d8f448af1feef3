// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// ownersLab is a lab whose sockets are written down; the programs begin with start.
func ownersLab(t *testing.T) (l *lab, o *Owners, begin func()) {
	t.Helper()
	l = newLab(t)
	l.marking = MarkingBPF
	l.start()
	o, err := NewOwners(l.host)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { o.Close() })
	return l, o, func() {
		spec := l.spec(ModeGlobal)
		spec.Contexts[0].Mode, spec.Owners = ModeDisabled, true
		if err := l.m.Prepare(t.Context(), spec); err != nil {
			t.Fatal(err)
		}
	}
}

// dialed makes a socket that stays, connected to port 7400, and returns its address.
func dialed(network string, dst netip.Addr) string {
	typ, sa, family := unix.SOCK_STREAM, sockaddr(dst, 7400), domain(dst)
	if strings.HasPrefix(network, "udp") {
		typ = unix.SOCK_DGRAM
	}
	if strings.HasSuffix(network, "m") {
		sa, family = &unix.SockaddrInet6{Addr: dst.As16(), Port: 7400}, unix.AF_INET6
	}
	fd, err := unix.Socket(family, typ|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return err.Error()
	}
	return connected(fd, sa)
}

// connected connects a socket, or begins to, and returns its address.
func connected(fd int, sa unix.Sockaddr) string {
	if err := unix.Connect(fd, sa); err != nil && !errors.Is(err, unix.EINPROGRESS) {
		return err.Error()
	}
	return boundTo(fd)
}

// boundTo is the address of a socket.
func boundTo(fd int) string {
	a, err := unix.Getsockname(fd)
	switch a := a.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port)).String()
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(a.Addr).Unmap(), uint16(a.Port)).String()
	default:
		return fmt.Sprint(err)
	}
}

// TestOwner: TCP and UDP, IPv4, IPv6 and mapped, before and after the programs begin, passed on to another process, and without programs.
func TestOwner(t *testing.T) {
	kinds := []struct {
		network string
		to      netip.Addr
	}{{"tcp4", remote4}, {"tcp6", remote6}, {"udp4", remote4}, {"udp6", remote6}, {"tcpm", remote4}, {"udpm", remote4}}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	l, o, begin := ownersLab(t)
	l.inFar(func() {
		ln, err := net.Listen("tcp", ":7400") // the kernel answers
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ln.Close() })
	})
	h := l.as(l.outside(), 4001, 4100)
	cgroup, err := l.host.Cgroup(h.cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	want := Owner{PID: h.cmd.Process.Pid, UID: 4001, GID: 4100, Exe: exe, Cgroup: cgroup}
	dial := func(network string, to netip.Addr) netip.AddrPort {
		src, err := netip.ParseAddrPort(h.do("dial %s %s", network, to))
		if err != nil {
			t.Fatal(err)
		}
		return src
	}
	check := func(network string, src netip.AddrPort, dst netip.Addr, method string) {
		t.Helper()
		proto := uint8(unix.IPPROTO_TCP)
		if strings.HasPrefix(network, "udp") {
			proto = unix.IPPROTO_UDP
		}
		want := want
		want.Method = method
		if got, err := o.Lookup(proto, src, netip.AddrPortFrom(dst, 7400)); err != nil || got != want {
			t.Errorf("%s: %+v, %v; want %+v", network, got, err, want)
		}
	}
	if o.Fast() {
		t.Error("fast without programs")
	}
	var older []netip.AddrPort
	for _, k := range kinds {
		src := dial(k.network, k.to)
		check(k.network+" without programs", src, k.to, OwnerProc)
		older = append(older, src)
	}
	begin()
	if !o.Fast() {
		t.Fatal("no programs")
	}
	for i, k := range kinds {
		check(k.network+", older than the programs", older[i], k.to, OwnerBPF)
		check(k.network, dial(k.network, k.to), k.to, OwnerBPF)
	}
	if _, err := o.Lookup(unix.IPPROTO_TCP, netip.MustParseAddrPort("10.9.0.2:1"), netip.MustParseAddrPort("198.51.100.1:2")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no such socket: %v", err)
	}
}
