// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// brief begins a connection, or sends a datagram, and closes the socket at once, with a reset.
func brief(network string, dst netip.Addr) string {
	sa, typ := sockaddr(dst, 7400), unix.SOCK_STREAM
	if strings.HasPrefix(network, "udp") {
		typ = unix.SOCK_DGRAM
	}
	fd, err := unix.Socket(domain(dst), typ|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return err.Error()
	}
	defer unix.Close(fd)
	from := connected(fd, sa)
	if typ == unix.SOCK_DGRAM {
		err = unix.Send(fd, []byte("x"), 0)
	} else {
		err = unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	}
	if err != nil {
		return err.Error()
	}
	return from
}

// used connects a socket, or sends a datagram by it, and says where from.
func used(fd int, how string, dst netip.Addr) string {
	sa := sockaddr(dst, 7400)
	if how == "connect" {
		return connected(fd, sa)
	}
	if err := unix.Sendto(fd, []byte("x"), 0, sa); err != nil {
		return err.Error()
	}
	return boundTo(fd)
}

// receiveFD takes a descriptor that another process has passed.
func receiveFD(c *net.UnixConn) (int, error) {
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := c.ReadMsgUnix(make([]byte, 1), oob)
	if err != nil {
		return 0, err
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(msgs) != 1 {
		return 0, errors.Join(err, errors.New("no descriptor"))
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		return 0, errors.Join(err, errors.New("no descriptor"))
	}
	return fds[0], nil
}

// pass gives a socket of this process to a helper.
func (h *helper) pass(typ int) {
	h.t.Helper()
	fd, err := unix.Socket(unix.AF_INET, typ|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		h.t.Fatal(err)
	}
	defer unix.Close(fd)
	name := fmt.Sprintf("@policy-%d-%d", h.cmd.Process.Pid, typ)
	h.must("receive %s", name)
	c, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		h.t.Fatal(err)
	}
	defer unix.Close(c)
	if err := unix.Sendmsg(c, []byte("x"), unix.UnixRights(fd), &unix.SockaddrUnix{Name: name}, 0); err != nil {
		h.t.Fatal(err)
	}
	h.must("received")
}

// flowsLab is a lab whose flows' owners are written down.
func flowsLab(t *testing.T) (*lab, *Owners) {
	t.Helper()
	l, o, _ := ownersLab(t)
	spec := l.spec(ModeGlobal)
	spec.Owners = true
	l.enforce(&spec)
	return l, o
}

// wantFlow looks the owner of a flow up when its first packet is in the TUN device.
func (l *lab) wantFlow(o *Owners, name, from string, dst netip.Addr, want Owner) {
	l.t.Helper()
	src, err := netip.ParseAddrPort(from)
	if err != nil {
		l.t.Errorf("%s: %s", name, from)
		return
	}
	to := netip.AddrPortFrom(dst, 7400)
	l.tunSeen.await(l.t, fmt.Sprintf(":%d > %s:7400", src.Port(), dst))
	proto := uint8(unix.IPPROTO_TCP)
	if strings.HasPrefix(name, "udp") {
		proto = unix.IPPROTO_UDP
	}
	if src.Addr().IsUnspecified() { // of a socket that is not bound to an address
		src = netip.AddrPortFrom(map[bool]netip.Addr{true: client4, false: client6}[dst.Is4()], src.Port())
	}
	if got, err := o.Lookup(proto, src, to); err != nil || got != want {
		l.t.Errorf("%s: %+v, %v; want %+v", name, got, err, want)
	}
}

// TestOwnerOfFlow: whose a flow is, by its first packet: TCP and UDP, IPv4, IPv6 and mapped, also when the socket is closed already, has been
// inherited, or passed on.
func TestOwnerOfFlow(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	l, o := flowsLab(t)
	out := l.outside()
	h := l.as(out, 4001, 4100)
	cgroup, err := l.host.Cgroup(h.cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	want := Owner{PID: h.cmd.Process.Pid, UID: 4001, GID: 4100, Exe: exe, Cgroup: cgroup, Method: OwnerTCX}
	for _, k := range []struct {
		network string
		to      netip.Addr
	}{{"tcp4", remote4}, {"tcp6", remote6}, {"tcpm", remote4}} {
		l.wantFlow(o, k.network, h.do("dial %s %s", k.network, k.to), k.to, want)
	}
	for _, k := range []struct {
		network string
		to      netip.Addr
	}{{"tcp4", remote4}, {"tcp6", remote6}, {"udp4", remote4}, {"udp6", remote6}} {
		l.wantFlow(o, k.network+", closed", h.do("brief %s %s", k.network, k.to), k.to, want)
	}
	for how, typ := range map[string]int{"connect": unix.SOCK_STREAM, "send": unix.SOCK_DGRAM} {
		name := map[string]string{"connect": "tcp4", "send": "udp4"}[how]
		h.pass(typ)
		l.wantFlow(o, name+", passed on", h.do("fd 0 %s %s", how, remote4), remote4, want)
	}

	h.must("open")
	before := h.cmd.Process.Pid
	h.must("orphan")
	pids, err := l.host.CgroupProcs(cgroup)
	if err != nil {
		t.Fatal(err)
	}
	pids = slices.DeleteFunc(pids, func(p int) bool { return p == before })
	if len(pids) != 1 {
		t.Fatalf("processes %v", pids)
	}
	want.PID = pids[0]
	l.wantFlow(o, "udp4, inherited", h.do("fd 3 send %s", remote4), remote4, want)
	h.stop()
	l.await("the process is gone", func() bool { list, err := l.host.CgroupProcs(cgroup); return err == nil && len(list) == 0 })
}

// TestOwnerOfEnded: of a process that is gone with all its sockets, the last packet still tells the owner; ten seconds later it does not.
func TestOwnerOfEnded(t *testing.T) {
	l, o := flowsLab(t)
	h := l.as(l.outside(), 4001, 4100)
	pid := h.cmd.Process.Pid
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	src := netip.MustParseAddrPort(h.do("brief udp4 %s", remote4))
	dst := netip.AddrPortFrom(remote4, 7400)
	if w, err := o.Lookup(unix.IPPROTO_UDP, src, dst); err != nil || w.Exe != exe { // the path, while it lives
		t.Error(w, err)
	}
	h.stop()
	w, err := o.Lookup(unix.IPPROTO_UDP, src, dst)
	if err != nil || w.PID != pid || w.UID != 4001 || w.Exe != exe || w.Method != OwnerTCX {
		t.Errorf("%+v, %v", w, err)
	}
	key := flowKey(unix.IPPROTO_UDP, src, dst)
	b, err := l.host.bpf.maps.flows.LookupBytes(key[:])
	if err != nil {
		t.Fatal(err)
	}
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		t.Fatal(err)
	}
	if _, ok := parseFlow(b, now.Nano()); !ok {
		t.Error("too old at once")
	}
	if _, ok := parseFlow(b, now.Nano()+int64(flowOwnerTime)); ok {
		t.Error("counts for ever")
	}
}

// TestOwnerDevices: a device that comes later, a new set of programs and a program that somebody has detached: flows are followed again.
func TestOwnerDevices(t *testing.T) {
	l, o := flowsLab(t)
	h := l.as(l.outside(), 4001, 4100)
	follow := func(what string) {
		t.Helper()
		l.await(what, func() bool {
			src, err := netip.ParseAddrPort(h.do("brief udp4 %s", remote4))
			if err != nil {
				return false
			}
			w, err := o.Lookup(unix.IPPROTO_UDP, src, netip.AddrPortFrom(remote4, 7400))
			return err == nil && w.Method == OwnerTCX && w.UID == 4001
		})
	}
	follow("the first set")
	spec := l.m.spec
	spec.Contexts = slices.Clone(spec.Contexts)
	spec.Contexts[0].Exclude = []Selector{{UIDs: []uint32{4009}}}
	if err := l.m.Apply(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	follow("another set")
	l.host.bpfMu.Lock()
	for _, x := range l.host.bpf.flows {
		if err := x.Detach(); err != nil {
			t.Error(err)
		}
	}
	l.host.bpfMu.Unlock()
	follow("detached")
}
