// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/policy/process"
)

// ErrSameNetns is the error for a process that is in the namespace of the Host itself.
var ErrSameNetns = errors.New("it is in the daemon's own network namespace")

// ContainerHost is a Host in the network namespace of another process, which it keeps from vanishing until it is closed.
type ContainerHost struct {
	*LinuxHost
	process *os.File // pidfd
}

// Container opens the network namespace of a process. It takes CAP_SYS_ADMIN. ErrSameNetns, ErrPrivilege; os.ErrNotExist when there is no such process.
func (h *LinuxHost) Container(pid int) (*ContainerHost, error) {
	// First the process, then its namespace: a process that ends in between cannot be taken for another.
	fd, err := unix.PidfdOpen(pid, unix.O_NONBLOCK)
	if err != nil {
		return nil, noProcess(pid, err)
	}
	c := &ContainerHost{process: os.NewFile(uintptr(fd), "pidfd")}
	ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", pid))
	if err != nil {
		closeQuietly(c.process)
		return nil, noProcess(pid, err)
	}
	defer ns.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(ns.Fd()), &st); err != nil {
		closeQuietly(c.process)
		return nil, err
	}
	if st.Ino == h.id.Inode {
		closeQuietly(c.process)
		return nil, fmt.Errorf("process %d: %w", pid, ErrSameNetns)
	}
	if c.LinuxHost, err = hostIn(ns); err != nil {
		closeQuietly(c.process)
		return nil, fmt.Errorf("network namespace of process %d: %w", pid, err)
	}
	return c, nil
}

func noProcess(pid int, err error) error {
	if errors.Is(err, unix.ESRCH) || errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("process %d: %w", pid, os.ErrNotExist)
	}
	if errors.Is(err, os.ErrPermission) {
		return fmt.Errorf("%w: CAP_SYS_PTRACE to look into process %d: %w", ErrPrivilege, pid, err)
	}
	return fmt.Errorf("process %d: %w", pid, err)
}

// hostIn makes a Host of a namespace.
func hostIn(ns *os.File) (h *LinuxHost, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		if err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			err = fmt.Errorf("%w: CAP_SYS_ADMIN to enter it: %w", ErrPrivilege, err)
			return
		}
		h, err = NewLinuxHost()
	}()
	<-done
	return h, err
}

// Inside runs f on a thread that is in the Host's namespace: for devices and sockets that are to be there.
func (h *LinuxHost) Inside(f func() error) error { return h.inside(f) }

// Ended returns when the process that the namespace was opened by has ended, or with ctx's error.
func (c *ContainerHost) Ended(ctx context.Context) error {
	return ended(ctx, c.process)
}

// Wait returns when no process is left in the namespace, or with ctx's error.
func (c *ContainerHost) Wait(ctx context.Context) error {
	if err := c.Ended(ctx); err != nil {
		return err
	}
	for {
		pid, err := anyoneIn(c.id.Inode)
		if err != nil || pid == 0 {
			return err
		}
		// A runtime's thread may have been seen there by chance, in the middle of its work: not for long.
		for at := c.id.Inode; err == nil && at == c.id.Inode; at, err = NetnsOf(pid) {
			look, cancel := context.WithTimeout(ctx, netnsLook)
			_ = WaitProcess(look, pid)
			cancel()
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
		}
	}
}

// netnsLook is how long a process is taken to stay in a network namespace where it has been seen.
const netnsLook = time.Second

// ended returns when the process of a pidfd has ended.
func ended(ctx context.Context, pidfd *os.File) error {
	rc, err := pidfd.SyscallConn()
	if err != nil {
		return err
	}
	if err := pidfd.SetReadDeadline(time.Time{}); err != nil {
		return fmt.Errorf("pidfd: %w", err)
	}
	defer context.AfterFunc(ctx, func() { _ = pidfd.SetReadDeadline(time.Unix(1, 0)) })()
	err = rc.Read(func(fd uintptr) bool {
		n, perr := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		return n > 0 || perr != nil && !errors.Is(perr, unix.EINTR)
	})
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// WaitProcess returns when a process has ended, or with ctx's error.
func WaitProcess(ctx context.Context, pid int) error {
	fd, err := unix.PidfdOpen(pid, unix.O_NONBLOCK)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return noProcess(pid, err)
	}
	f := os.NewFile(uintptr(fd), "pidfd")
	defer f.Close()
	return ended(ctx, f)
}

// DockerNames reports whether Docker's resolver, which knows the other containers, listens on 127.0.0.11 in the namespace.
func (c *ContainerHost) DockerNames() (found bool) {
	_ = c.inside(func() error { // no resolver is no error
		b, err := os.ReadFile("/proc/thread-self/net/udp")
		addr := binary.NativeEndian.Uint32([]byte{127, 0, 0, 11})
		found = strings.Contains(string(b), fmt.Sprintf(" %08X:", addr))
		return err
	})
	return found
}

// anyoneIn returns a process that is in a network namespace; 0 = nobody is.
func anyoneIn(inode uint64) (int, error) {
	pids, err := process.All()
	if err != nil {
		return 0, err
	}
	for _, pid := range pids {
		if n, err := NetnsOf(pid); err == nil && n == inode && pid != os.Getpid() {
			return pid, nil
		}
	}
	return 0, nil
}

// NetnsOf returns the inode of a process's network namespace.
func NetnsOf(pid int) (uint64, error) {
	st, err := os.Stat(fmt.Sprintf("/proc/%d/ns/net", pid))
	if err != nil {
		return 0, err
	}
	return st.Sys().(*syscall.Stat_t).Ino, nil
}

// Close also ends Wait.
func (c *ContainerHost) Close() error {
	return errors.Join(c.process.Close(), c.LinuxHost.Close())
}

// containerInfix stands between an instance's name and the inode of the namespace in the names of its containers.
const containerInfix = "-container-"

// ContainerInstance is the instance by which the one of a socket captures another network namespace: with a journal of its own beside it.
func ContainerInstance(socket string, ns Netns) Instance {
	return InstanceFor(fmt.Sprintf("%s%s%d.sock", strings.TrimSuffix(socket, ".sock"), containerInfix, ns.Inode))
}

// ContainersOf finds the journals of the containers that an instance captures, or has left closed.
func ContainersOf(socket string) []Instance {
	names, err := filepath.Glob(globQuote(strings.TrimSuffix(socket, ".sock")) + containerInfix + "*.state.json")
	if err != nil {
		return nil // cannot be: the pattern is quoted
	}
	var out []Instance
	for _, n := range names {
		out = append(out, InstanceFor(strings.TrimSuffix(n, ".state.json")+".sock"))
	}
	return out
}

func globQuote(s string) string {
	return strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`).Replace(s)
}

// HostFor returns the Host that an instance's journal is about: that of the calling thread's namespace, or of the container's, while a process
// is in it. A journal whose namespace has gone is removed: there is nothing left of what it stands for; os.ErrNotExist then.
func HostFor(in Instance) (Host, error) {
	h, err := NewLinuxHost()
	if err != nil || !strings.Contains(filepath.Base(in.Socket), containerInfix) {
		return h, err
	}
	j, err := readJournal(in.Journal)
	if err != nil || j.Netns == h.Netns() {
		return h, nil //nolint:nilerr // Cleanup says what is wrong with it
	}
	pid, err := anyoneIn(j.Netns.Inode)
	if err != nil {
		return nil, errors.Join(err, h.Close())
	}
	if pid == 0 {
		return nil, errors.Join(os.ErrNotExist, os.Remove(in.Journal), h.Close())
	}
	c, err := h.Container(pid)
	if err := errors.Join(err, h.Close()); err != nil {
		return nil, err
	}
	return c, nil
}
