// SPDX-License-Identifier: GPL-3.0-or-later

package lab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// netnsDir is where ip(8) keeps named namespaces.
const netnsDir = "/run/netns"

// namePrefix begins the name of every namespace of these tests; the pid of the test process follows.
const namePrefix = "mpx"

// labSeq numbers the labs of this process.
var labSeq atomic.Int64

// NS is one network namespace together with a mount namespace in which some files are replaced. /sys stays the machine's own, so that
// cgroups are visible (as with `nsenter --net`, unlike `ip netns exec`).
type NS struct {
	Name   string
	holder *exec.Cmd // keeps the mount namespace
	file   *os.File  // the network namespace, for setns
}

// Mounts says what is different in a namespace's view of the file system.
type Mounts struct {
	Files map[string]string // path → content that is seen there
	Tmpfs []string          // empty directories of its own
}

// newNS makes a namespace with loopback up, the tests' sysctls and the given mounts. The caller must close it.
func newNS(name, dir string, m Mounts) (*NS, error) {
	if err := run("ip", "netns", "add", name); err != nil {
		return nil, err
	}
	n := &NS{Name: name}
	f, err := os.Open(n.Path())
	if err != nil {
		return n, err
	}
	n.file = f
	if err := n.Sysctl(map[string]string{
		"net/ipv4/conf/all/rp_filter":                     "0",
		"net/ipv4/conf/default/rp_filter":                 "0",
		"net/ipv6/conf/all/accept_dad":                    "0", // addresses are usable at once
		"net/ipv6/conf/default/accept_dad":                "0",
		"net/ipv6/conf/default/router_solicitation_delay": "0", // also delays the first use of an address
		"net/ipv6/conf/all/disable_ipv6":                  "0",
		"net/ipv6/conf/default/disable_ipv6":              "0",
		"net/ipv6/conf/default/accept_ra":                 "0",
		"net/ipv6/conf/default/autoconf":                  "0",
		"net/ipv6/conf/all/router_solicitations":          "0",
		"net/ipv6/conf/default/router_solicitations":      "0",
		"net/ipv4/ping_group_range":                       "0 2147483647",
	}); err != nil {
		return n, err
	}
	// The machine's bbr makes figures on veth meaningless. A namespace may only choose among the algorithms the machine allows to all.
	if n.Sysctl(map[string]string{"net/ipv4/tcp_congestion_control": "cubic"}) != nil {
		if err := n.Sysctl(map[string]string{"net/ipv4/tcp_congestion_control": "reno"}); err != nil {
			return n, err
		}
	}
	if err := run("ip", "-n", name, "link", "set", "lo", "up"); err != nil {
		return n, err
	}
	return n, n.hold(dir, m)
}

// hold starts the process that keeps the mount namespace, and returns when the mounts are in place.
func (n *NS) hold(dir string, m Mounts) error {
	var script strings.Builder
	script.WriteString("set -e\n")
	for _, d := range m.Tmpfs {
		script.WriteString("mount -t tmpfs tmpfs " + d + "\n")
	}
	i := 0
	for path, content := range m.Files {
		i++
		src := filepath.Join(dir, fmt.Sprintf("%s-file%d", n.Name, i))
		if err := os.WriteFile(src, []byte(content), 0o644); err != nil {
			return err
		}
		script.WriteString("mount --bind " + src + " " + path + "\n")
	}
	script.WriteString("echo ready\nexec sleep infinity\n")
	cmd := exec.Command("nsenter", "--net="+n.Path(), "--", "unshare", "--mount", "--propagation", "private", "sh", "-c", script.String())
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	n.holder = cmd
	if line, _ := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
		err := cmd.Wait()
		n.holder = nil
		return fmt.Errorf("mounts of %s: %w: %s", n.Name, err, strings.TrimSpace(stderr.String()))
	}
	return nil
}

// Path is the file of the network namespace.
func (n *NS) Path() string { return filepath.Join(netnsDir, n.Name) }

// inode is the number by which the kernel names the network namespace.
func (n *NS) inode() string {
	var st unix.Stat_t
	if err := unix.Fstat(int(n.file.Fd()), &st); err != nil {
		return n.Name
	}
	return strconv.FormatUint(st.Ino, 10)
}

// close ends every process in the namespace and removes it.
func (n *NS) close() error {
	killIn(n.Name)
	if n.holder != nil {
		_ = n.holder.Wait()
	}
	if n.file != nil {
		n.file.Close()
	}
	return run("ip", "netns", "del", n.Name)
}

// killIn ends what runs in a namespace of the tests, until nothing is left. The test process itself never counts.
func killIn(name string) {
	Poll(5*time.Second, func() bool {
		out, err := exec.Command("ip", "netns", "pids", name).Output()
		if err != nil {
			return true
		}
		left := false
		for f := range strings.FieldsSeq(string(out)) {
			pid, err := strconv.Atoi(f)
			if err != nil || pid <= 1 || pid == os.Getpid() {
				continue
			}
			if isZombie(pid) {
				continue
			}
			left = true
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		return !left
	})
}

// isZombie reports whether a process has exited but not been waited for.
func isZombie(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return true
	}
	i := strings.LastIndexByte(string(b), ')')
	return i > 0 && strings.HasPrefix(string(b[i+1:]), " Z")
}

// Do runs fn on a thread that is in the namespace. Sockets that fn opens, and processes that it starts, stay there.
func (n *NS) Do(fn func() error) error {
	errc := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		back, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			errc <- err
			return
		}
		defer back.Close()
		if err := unix.Setns(int(n.file.Fd()), unix.CLONE_NEWNET); err != nil {
			errc <- fmt.Errorf("setns %s: %w", n.Name, err)
			return
		}
		err = fn()
		if unix.Setns(int(back.Fd()), unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread() // else the thread ends with the goroutine
		}
		errc <- err
	}()
	return <-errc
}

// Sysctl writes values below /proc/sys as the namespace sees them.
func (n *NS) Sysctl(values map[string]string) error {
	return n.Do(func() error {
		var errs []error
		for k, v := range values {
			errs = append(errs, os.WriteFile("/proc/sys/"+k, []byte(v), 0o644))
		}
		return errors.Join(errs...)
	})
}

// IP runs ip(8) in the namespace, one command a line, and fails the test if one fails.
func (n *NS) IP(t *testing.T, lines ...string) {
	t.Helper()
	if err := n.ip(lines...); err != nil {
		t.Fatal(err)
	}
}

func (n *NS) ip(lines ...string) error {
	cmd := exec.Command("ip", "-n", n.Name, "-batch", "-")
	cmd.Stdin = strings.NewReader(strings.Join(lines, "\n") + "\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("ip -n %s: %w: %s", n.Name, err, out)
	}
	return nil
}

// Command returns a command that will run in the namespace, not yet started. It runs under its own name and pid: nsenter replaces itself.
func (n *NS) Command(args ...string) *exec.Cmd {
	pre := []string{"--net=" + n.Path(), fmt.Sprintf("--mount=/proc/%d/ns/mnt", n.holder.Process.Pid), "--"}
	return exec.Command("nsenter", append(pre, args...)...)
}

// Output runs a command in the namespace and returns what it printed on standard output; err carries standard error.
func (n *NS) Output(ctx context.Context, args ...string) (string, error) {
	cmd := n.Command(args...)
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return "", err
	}
	stop := context.AfterFunc(ctx, func() { _ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) })
	defer stop()
	if err := cmd.Wait(); err != nil {
		return stdout.String(), fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), nil
}

// Run runs a command in the namespace and fails the test at once when it fails.
func (n *NS) Run(t *testing.T, args ...string) {
	t.Helper()
	if _, err := n.Output(t.Context(), args...); err != nil {
		t.Fatal(err)
	}
}

// Dial opens a connection from the namespace; addr must be a literal address.
func (n *NS) Dial(network, addr string, timeout time.Duration) (net.Conn, error) {
	var c net.Conn
	err := n.Do(func() (err error) {
		c, err = (&net.Dialer{Timeout: timeout}).Dial(network, addr)
		return err
	})
	return c, err
}

// DialFrom is Dial from one of the namespace's addresses.
func (n *NS) DialFrom(network string, from netip.Addr, addr string, timeout time.Duration) (net.Conn, error) {
	var local net.Addr = &net.TCPAddr{IP: from.AsSlice()}
	if strings.HasPrefix(network, "udp") {
		local = &net.UDPAddr{IP: from.AsSlice()}
	}
	var c net.Conn
	err := n.Do(func() (err error) {
		c, err = (&net.Dialer{Timeout: timeout, LocalAddr: local}).Dial(network, addr)
		return err
	})
	return c, err
}

// DialControl is Dial with a hook on the socket before it connects.
func (n *NS) DialControl(network, addr string, timeout time.Duration, control func(fd int) error) (net.Conn, error) {
	var c net.Conn
	err := n.Do(func() (err error) {
		d := net.Dialer{Timeout: timeout, Control: func(_, _ string, rc syscall.RawConn) error {
			var cerr error
			if err := rc.Control(func(fd uintptr) { cerr = control(int(fd)) }); err != nil {
				return err
			}
			return cerr
		}}
		c, err = d.Dial(network, addr)
		return err
	})
	return c, err
}

// Listen opens a TCP listener in the namespace.
func (n *NS) Listen(network, addr string) (net.Listener, error) {
	var l net.Listener
	err := n.Do(func() (err error) {
		l, err = net.Listen(network, addr)
		return err
	})
	return l, err
}

// ListenUDP opens a UDP socket in the namespace.
func (n *NS) ListenUDP(network, addr string) (*net.UDPConn, error) {
	var c *net.UDPConn
	err := n.Do(func() error {
		pc, err := net.ListenPacket(network, addr)
		if err == nil {
			c = pc.(*net.UDPConn)
		}
		return err
	})
	return c, err
}

// run executes a command on the machine and returns its output as the error text.
func run(args ...string) error {
	if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, out)
	}
	return nil
}

// sweep removes the namespaces of test processes that no longer live.
func sweep() {
	entries, err := os.ReadDir(netnsDir)
	if err != nil {
		return
	}
	for _, e := range entries {
		rest, ok := strings.CutPrefix(e.Name(), namePrefix)
		if !ok {
			continue
		}
		num, _, ok := strings.Cut(rest, "-")
		pid, err := strconv.Atoi(num)
		if !ok || err != nil || pid == os.Getpid() || syscall.Kill(pid, 0) == nil {
			continue
		}
		killIn(e.Name())
		_ = run("ip", "netns", "del", e.Name())
	}
}
