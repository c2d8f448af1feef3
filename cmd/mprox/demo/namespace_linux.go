// SPDX-License-Identifier: GPL-3.0-or-later

package demo

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"syscall"

	"github.com/vishvananda/netns"

	"github.com/mutex-proxy/mutex/policy"
)

var errClosed = errors.New("demo: namespace is closed")

// namespace is a network namespace without a name, and one thread that lives in it. It ends with the last process and descriptor in it, so
// that nothing is left even after SIGKILL. The thread stays for the namespace's life because the kernel sends a child its parent-death
// signal when the thread that started it ends, not when the process does.
type namespace struct {
	handle netns.NsHandle
	work   chan func()
	done   chan struct{}
	close  sync.Once
}

func newNamespace() (*namespace, error) {
	n := &namespace{work: make(chan func()), done: make(chan struct{})}
	started := make(chan error)
	go func() {
		defer close(n.done)
		runtime.LockOSThread() // never unlocked: a thread of another namespace must not be reused
		var err error
		n.handle, err = netns.New()
		started <- err
		if err != nil {
			return
		}
		for fn := range n.work {
			fn()
		}
	}()
	err := <-started
	if errors.Is(err, os.ErrPermission) {
		return nil, fmt.Errorf("%w: CAP_SYS_ADMIN, to make network namespaces: run as root (sudo mprox demo)", policy.ErrPrivilege)
	}
	if err != nil {
		return nil, fmt.Errorf("demo: new network namespace: %w", err)
	}
	return n, nil
}

// do runs fn on the namespace's thread. Sockets and processes that fn makes belong to the namespace for good.
func (n *namespace) do(fn func() error) error {
	result := make(chan error, 1)
	select {
	case n.work <- func() { result <- fn() }:
		return <-result
	case <-n.done:
		return errClosed
	}
}

// start starts cmd inside the namespace, in a process group of its own: Ctrl-C reaches the demo alone, which ends its parts in order.
func (n *namespace) start(cmd *exec.Cmd) error {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	return n.do(cmd.Start)
}

// Close ends the thread, and with it every process that start left running. Idempotent; do must not be called at the same time.
func (n *namespace) Close() {
	n.close.Do(func() {
		close(n.work)
		<-n.done
		_ = n.handle.Close()
	})
}
