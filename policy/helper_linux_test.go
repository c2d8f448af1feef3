// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// helper is a process of its own that sends what it is told.
type helper struct {
	t   *testing.T
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

// spawn starts a helper in a cgroup, given by its descriptor.
func (l *lab) spawn(cgroup int) *helper {
	l.t.Helper()
	exe, err := os.Executable()
	if err != nil {
		l.t.Fatal(err)
	}
	return l.spawnExe(exe, cgroup)
}

// spawnExe starts a copy of this program as a helper, by a command line that executes it.
func (l *lab) spawnExe(exe string, cgroup int, args ...string) *helper {
	l.t.Helper()
	var err error
	h := &helper{t: l.t, cmd: exec.Command(exe, args...)}
	h.cmd.Env = append(os.Environ(), "POLICY_TEST_HELPER=1")
	h.cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: cgroup}
	out, err := h.cmd.StdoutPipe()
	if err != nil {
		l.t.Fatal(err)
	}
	h.out = bufio.NewReader(out)
	if h.in, err = h.cmd.StdinPipe(); err != nil {
		l.t.Fatal(err)
	}
	h.cmd.Stderr = os.Stderr
	if err := h.cmd.Start(); err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(h.stop)
	return h
}

func (h *helper) stop() {
	h.in.Close()
	_ = h.cmd.Wait()
}

// do runs one command of helperMain and returns what it says.
func (h *helper) do(format string, args ...any) string {
	h.t.Helper()
	if _, err := fmt.Fprintf(h.in, format+"\n", args...); err != nil {
		h.t.Fatal(err)
	}
	line, err := h.out.ReadString('\n')
	if err != nil {
		h.t.Fatal(err)
	}
	return strings.TrimSpace(line)
}

// way is a way to send that is the helper's.
func (h *helper) way(name, want, format string, args ...any) way {
	return way{name: name, want: want, send: func(*lab) error {
		if s := h.do(format, args...); s != "ok" {
			return errors.New(s)
		}
		return nil
	}}
}

// helperMain obeys `udp|tcp|ping ADDR PORT MARK DEVICE` (0 and - for none), `keep ADDR PORT` (a TCP connection that stays), `write` (into
// it), `listen PORT`, `user UID GID` (for good), `orphan [EXE]` (a child of its own session takes over), `child [EXE]` (the same, in its own
// session), `leaderless` (its first thread ends, the others go on), `open` (a UDP socket that stays, also in who takes over, as 3), `again ADDR PORT` (through it), `mark` (that a new socket gets),
// `dial tcp4|tcp6|tcpm|udp4|udp6|udpm ADDR` (port 7400; m: mapped; says where from), `brief` (the same, and closes it), `receive PATH` and
// `received` (a socket), `fd N connect|send ADDR` (of N, or of what was received if 0; port 7400; says where from).
func helperMain() {
	runtime.LockOSThread() // the first thread of the process, while nothing else has run yet
	leaderless := make(chan struct{})
	go func() {
		obey(leaderless)
		os.Exit(0) // whether or not there is a first thread to come back to
	}()
	<-leaderless
	if unix.Gettid() == unix.Getpid() {
		_, _, _ = unix.Syscall(unix.SYS_EXIT, 0, 0, 0) // of the thread alone
	}
}

// awaitLeaderless waits until the first thread has ended.
func awaitLeaderless(deadline time.Duration) error {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(deadline); time.Now().Before(end); <-tick.C {
		if b, _ := os.ReadFile("/proc/self/stat"); strings.Contains(string(b), ") Z ") {
			return nil
		}
	}
	return errors.New("the first thread goes on")
}

// obey runs the commands. It closes leaderless when the first thread shall end.
func obey(leaderless chan struct{}) {
	var kept net.Conn
	var ls []net.Listener
	var open, got int
	var inbox *net.UnixConn
	for sc := bufio.NewScanner(os.Stdin); sc.Scan(); {
		f := strings.Fields(sc.Text())
		f = append(f, []string{"", "", "0", "0", "-"}[min(len(f), 5):]...)
		var err error
		switch f[0] {
		case "udp", "tcp", "ping":
			var port int
			var m uint32
			_, _ = fmt.Sscan(f[2], &port)
			_, _ = fmt.Sscan(f[3], &m)
			opts := []func(int) error{}
			if m != 0 {
				opts = append(opts, mark(m))
			}
			if f[4] != "-" && f[4] != "" {
				opts = append(opts, device(f[4]))
			}
			dst := netip.MustParseAddr(f[1])
			err = map[string]func(*lab) error{"udp": udp(dst, port, opts...), "tcp": tcp(dst, port, opts...), "ping": ping(dst, opts...)}[f[0]](nil)
		case "user":
			var uid, gid int
			_, _ = fmt.Sscan(f[1], &uid)
			_, _ = fmt.Sscan(f[2], &gid)
			err = errors.Join(syscall.Setgroups(nil), syscall.Setgid(gid), syscall.Setuid(uid))
		case "keep":
			kept, err = net.Dial("tcp", net.JoinHostPort(f[1], f[2]))
		case "orphan", "child":
			takeOver(f[0] == "orphan", f[1], open)
		case "leaderless":
			close(leaderless)
			err = awaitLeaderless(3 * time.Second)
		case "dial":
			err = errors.New(dialed(f[1], netip.MustParseAddr(f[2])))
		case "brief":
			err = errors.New(brief(f[1], netip.MustParseAddr(f[2])))
		case "receive":
			inbox, err = net.ListenUnixgram("unixgram", &net.UnixAddr{Name: f[1]})
		case "received":
			got, err = receiveFD(inbox)
		case "fd":
			fd := got
			if f[1] != "0" {
				_, _ = fmt.Sscan(f[1], &fd)
			}
			err = errors.New(used(fd, f[2], netip.MustParseAddr(f[3])))
		case "open":
			open, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		case "again":
			var port int
			_, _ = fmt.Sscan(f[2], &port)
			err = unix.Sendto(open, []byte("x"), 0, sockaddr(netip.MustParseAddr(f[1]), port))
		case "mark":
			err = errors.New(newMark())
		case "write":
			_, err = kept.Write([]byte("hello"))
		case "listen":
			var ln net.Listener
			ln, err = net.Listen("tcp", ":"+f[1])
			ls = append(ls, ln)
		}
		if err != nil {
			fmt.Println(err)
			continue
		}
		fmt.Println("ok")
	}
	runtime.KeepAlive(ls)
}

// takeOver starts a process that goes on in this one's place, and ends.
func takeOver(session bool, exe string, open int) {
	if exe == "" {
		exe = "/proc/self/exe"
	}
	c := exec.Command(exe)
	c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: session}
	if open != 0 {
		c.ExtraFiles = []*os.File{os.NewFile(uintptr(open), "open")}
	}
	if err := c.Start(); err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println("ok")
	os.Exit(0)
}

// newMark is the mark of a socket that nobody has touched.
func newMark() string {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err.Error()
	}
	defer unix.Close(fd)
	m, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK)
	if err != nil {
		return err.Error()
	}
	return fmt.Sprintf("%#x", uint32(m))
}

// listenFar accepts and keeps one connection, on the far side.
func (l *lab) listenFar(addr string) {
	l.t.Helper()
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		l.t.Fatal(err)
	}
	conns := make(chan net.Conn, 1)
	go func() {
		defer close(conns)
		if c, err := ln.Accept(); err == nil {
			conns <- c
		}
	}()
	l.t.Cleanup(func() {
		ln.Close()
		for c := range conns {
			c.Close()
		}
	})
}

// outside is a cgroup of the machine that has nothing to do with us.
func (l *lab) outside() int {
	l.t.Helper()
	path := fmt.Sprintf("/test-%d-%d", os.Getpid(), l.host.Netns().Inode)
	if _, err := l.host.MakeCgroup(path); err != nil {
		l.t.Fatal(err)
	}
	fd, err := l.host.OpenCgroup(path)
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() {
		unix.Close(fd)
		l.await("cgroup is empty", func() bool { return l.host.RemoveCgroup(path) == nil })
	})
	return fd
}
