// SPDX-License-Identifier: GPL-3.0-or-later

package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/policy"
)

const (
	// WatchArg is the command that Watch is behind: `mprox guard watch`.
	WatchArg = "watch"
	// farewell is what a daemon that ends in order tells its watcher.
	farewell = "bye\n"
	// watcherPause is the time between the end of a watcher that somebody has killed and the next.
	watcherPause = time.Second
	// watcherPatience bounds the wait for a dismissed watcher.
	watcherPatience = 5 * time.Second
)

// watcher is a process that outlives the daemon, for contexts with on_crash: open. It reads a pipe whose other end the daemon holds: the kernel
// closes it when the daemon is killed, and not when it hangs. The zero value is ready.
type watcher struct {
	mu      sync.Mutex // guards what follows
	in      io.WriteCloser
	pid     int
	gone    bool // dismissed
	running sync.WaitGroup
}

// want starts the process if a context needs it and it does not run.
func (w *watcher) want(d *Daemon) {
	cfg, _ := d.current()
	needed := false
	for _, c := range cfg.Contexts {
		needed = needed || c.OnCrash == "open" && c.Mode != "disabled"
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if !needed || w.in != nil || w.gone {
		return
	}
	// Not os.Executable: after an upgrade there is another program under that name, or none.
	cmd := exec.CommandContext(context.WithoutCancel(d.life), "/proc/self/exe", "guard", WatchArg, "--socket", d.opt.Socket)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		d.log.Error("no watcher: should the daemon be killed, everything stays blocked in spite of on_crash: open", zap.Error(err))
		return
	}
	w.in, w.pid = in, cmd.Process.Pid
	w.running.Go(func() {
		err := cmd.Wait()
		w.mu.Lock()
		w.in, w.pid = nil, 0
		gone := w.gone
		w.mu.Unlock()
		if gone {
			return
		}
		d.log.Warn("the watcher has ended; it is started again", zap.Error(err))
		select {
		case <-time.After(watcherPause):
			w.want(d)
		case <-d.life.Done():
		}
	})
}

// Own reports whether a process is a child of the daemon's own making.
func (d *Daemon) Own(pid int) bool {
	d.watcher.mu.Lock()
	defer d.watcher.mu.Unlock()
	return pid == d.watcher.pid
}

// dismiss ends the process, and waits for it.
func (w *watcher) dismiss() error {
	w.mu.Lock()
	in := w.in
	w.gone = true
	w.mu.Unlock()
	if in != nil {
		_, err := io.WriteString(in, farewell)
		if err = errors.Join(err, in.Close()); err != nil && !errors.Is(err, os.ErrClosed) && !errors.Is(err, syscall.EPIPE) {
			return fmt.Errorf("watcher: %w", err)
		}
	}
	w.running.Wait()
	return nil
}

// Watch is the watcher: it returns when the daemon has said farewell, or, when the daemon is gone without it, after having let go what
// on_crash: open is about.
func Watch(ctx context.Context, daemon io.Reader, in policy.Instance) error {
	parent, perr := unix.PidfdOpen(os.Getppid(), 0)
	said, err := io.ReadAll(io.LimitReader(daemon, int64(len(farewell))))
	if err != nil || string(said) == farewell {
		return err
	}
	if perr == nil {
		// The pipe is closed before the locks are let go: the process must be at its end. If it was so at the start, its PID was somebody else's.
		_, _ = unix.Poll([]unix.PollFd{{Fd: int32(parent), Events: unix.POLLIN}}, int(watcherPatience.Milliseconds()))
		_ = unix.Close(parent)
	}
	var errs []error
	for _, in := range append([]policy.Instance{in}, policy.ContainersOf(in.Socket)...) {
		host, err := policy.HostFor(in)
		if err == nil {
			err = errors.Join(policy.OpenAfterCrash(ctx, policy.Config{Host: host}, in), host.Close())
		}
		if !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// Close makes the kernel as a daemon with this configuration would before it opens a device: everything captured is blocked, until a daemon
// starts or `mprox guard off`.
func Close(ctx context.Context, opt Options) error {
	d := New(opt)
	defer d.stop()
	var err error
	if d.host, err = policy.NewLinuxHost(); err != nil {
		return err
	}
	d.manager = policy.NewManager(policy.Config{Host: d.host, Log: d.log})
	spec, err := d.closedSpec()
	if err == nil {
		err = d.manager.Prepare(ctx, spec)
	}
	if err == nil {
		err = d.manager.Close(ctx, policy.StopBlock)
	}
	return errors.Join(err, d.host.Close())
}

// closedSpec is spec without a single object behind it.
func (d *Daemon) closedSpec() (policy.Spec, error) {
	spec := d.spec()
	for slot, name := range enabled(d.cfg) {
		c := liveContext{name: name, slot: slot, cfg: d.cfg.Contexts[name]}
		var err error
		if c.who, err = buildSelection(d.cfg, name); err != nil {
			return spec, err
		}
		spec.Contexts = append(spec.Contexts, c.spec())
	}
	return spec, nil
}
