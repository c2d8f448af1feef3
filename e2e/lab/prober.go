// SPDX-License-Identifier: GPL-3.0-or-later

package lab

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Prober is a process in the client's namespace that tries to send past the proxy whenever it is told to, in all ways known to us: with new
// sockets, and with those that it has kept.
type Prober struct {
	*Proc
	t   *testing.T
	in  io.Writer
	out *bufio.Reader
}

// Prober starts one by a command line of the test's; it ends with the test.
func (l *Lab) Prober(t *testing.T, command func(args ...string) *exec.Cmd) *Prober {
	t.Helper()
	args, err := HelperCommand("prober")
	if err != nil {
		t.Fatal(err)
	}
	cmd := command(args...)
	r, w := io.Pipe()
	cmd.Stdout = w
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	p := &Prober{t: t, in: in, out: bufio.NewReader(r)}
	p.Proc = Start(t, "prober", cmd)
	go func() { <-p.Done(); w.Close() }()
	t.Cleanup(func() { _ = in.Close() }) // which ends it, also when it is a child of a child
	return p
}

// do gives an order and returns the answer.
func (p *Prober) do(order string) string {
	p.t.Helper()
	if _, err := fmt.Fprintln(p.in, order); err != nil {
		p.t.Fatalf("prober: %v", err)
	}
	line, err := p.out.ReadString('\n')
	if err != nil {
		p.t.Fatalf("prober: %s: %v", order, err)
	}
	return strings.TrimSpace(line)
}

// Open opens sockets of each kind, sends by them, and keeps them. It returns how many there are.
func (p *Prober) Open() (n int) {
	p.t.Helper()
	_, _ = fmt.Sscan(p.do("open"), &n)
	return n
}

// Probe tries every way with new sockets, those of AF_PACKET too if packet. It returns the names of the ways that were answered.
func (p *Prober) Probe(packet bool) []string {
	p.t.Helper()
	order := "probe"
	if packet {
		order = "probe packet"
	}
	if line := p.do(order); line != "" {
		return strings.Split(line, ";")
	}
	return nil
}

// Send sends by each socket that is kept.
func (p *Prober) Send() {
	p.t.Helper()
	p.do("send")
}

// Flood starts a Flood in the process, or ends it.
func (p *Prober) Flood(on bool) {
	p.t.Helper()
	p.do(map[bool]string{true: "flood", false: "calm"}[on])
}

// Mark sets the mark of every socket that the process has, as another process may do, one that has nothing to do with it. It returns how many
// it was.
func (p *Prober) Mark(mark int) (n int) {
	p.t.Helper()
	var pid int
	_, _ = fmt.Sscan(p.do("pid"), &pid)
	target, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		p.t.Fatal(err)
	}
	defer unix.Close(target)
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		p.t.Fatal(err)
	}
	for _, e := range entries {
		to, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", pid, e.Name()))
		if err != nil || !strings.HasPrefix(to, "socket:") {
			continue
		}
		var theirs int
		_, _ = fmt.Sscan(e.Name(), &theirs)
		fd, err := unix.PidfdGetfd(target, theirs, 0)
		if err != nil {
			p.t.Fatal(err)
		}
		if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, mark) == nil {
			n++
		}
		unix.Close(fd)
	}
	return n
}

// keptSocket is one that the process has kept, and what it sends by it.
type keptSocket struct {
	fd      int
	to      unix.Sockaddr // nil = it is connected
	payload []byte
}

func (s keptSocket) send() {
	if s.to == nil {
		_, _ = unix.SendmsgN(s.fd, s.payload, nil, nil, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT)
		return
	}
	_ = unix.Sendto(s.fd, s.payload, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT, s.to)
}

// prober obeys the orders of a Prober, a line each, until there are no more.
func prober() {
	var kept []keptSocket
	var flood *Flood
	for sc := bufio.NewScanner(os.Stdin); sc.Scan(); {
		answer := ""
		switch sc.Text() {
		case "pid":
			answer = fmt.Sprint(os.Getpid())
		case "open":
			more, err := keep()
			if err != nil {
				fmt.Fprintln(os.Stderr, err)
			}
			kept = append(kept, more...)
			answer = fmt.Sprint(len(kept))
		case "send":
			for range 2 { // what has lost a datagram to get its mark has another
				for _, s := range kept {
					s.send()
				}
			}
		case "probe":
			answer = strings.Join(RunProbes(SocketProbes()), ";")
		case "probe packet":
			answer = strings.Join(RunProbes(Probes()), ";")
		case "flood":
			flood = startFlood(func(f func() error) error { return f() })
		case "calm":
			flood.Stop()
		}
		fmt.Println(answer)
	}
}

// keep opens a socket of each kind that may have been there before the capture, and uses it once.
func keep() (out []keptSocket, err error) {
	add := func(fd int, e error, to unix.Sockaddr, payload []byte) {
		if e != nil {
			err = errors.Join(err, e)
			return
		}
		s := keptSocket{fd, to, payload}
		s.send()
		out = append(out, s)
	}
	for _, dst := range []netip.Addr{OriginV4, OriginV6} {
		af, sa := sockaddr(dst, probePort)
		_, portless := sockaddr(dst, 0)
		for _, control := range []func(int) error{nil, bindToDevice} {
			for _, connected := range []bool{false, true} {
				fd, e := unix.Socket(af, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
				if e == nil && control != nil {
					e = control(fd)
				}
				to := sa
				if e == nil && connected {
					to, e = nil, unix.Connect(fd, sa)
				}
				add(fd, e, to, []byte("kept"))
			}
			fd, e := unix.Socket(af, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if e == nil && control != nil {
				e = control(fd)
			}
			if e == nil {
				tv := unix.NsecToTimeval(probeTimeout.Nanoseconds())
				_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv)
				_ = unix.Connect(fd, sa) // one that hangs in the air will do as well
			}
			add(fd, e, nil, []byte("kept"))
		}
		icmp, echo := unix.IPPROTO_ICMP, []byte{8, 0, 0xf7, 0xfd, 0, 1, 0, 1}
		if dst.Is6() {
			icmp, echo = unix.IPPROTO_ICMPV6, []byte{128, 0, 0, 0, 0, 1, 0, 1}
		}
		for _, typ := range []int{unix.SOCK_DGRAM, unix.SOCK_RAW} {
			fd, e := unix.Socket(af, typ|unix.SOCK_CLOEXEC, icmp)
			add(fd, e, portless, echo)
		}
		fd, e := unix.Socket(af, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 132)
		add(fd, e, portless, []byte("kept"))
		fd, e = headerSocket(dst)
		add(fd, e, portless, datagram(clientOf(dst), dst, probePort))
	}
	return out, err
}
