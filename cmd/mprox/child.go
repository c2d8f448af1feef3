// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
	"golang.org/x/term"
)

// Exit codes of `run` that are not the command's own, as in env(1) and INTERFACE.
const (
	exitRunFailed     = 125
	exitNotExecutable = 126
	exitNotFound      = 127
)

// child is the command of `mprox run`: in our process group and on our terminal, so that the shell's job control sees one job.
type child struct {
	cmd     *exec.Cmd
	signals chan os.Signal
}

// startChild starts argv inside the cgroup (clone3 CLONE_INTO_CGROUP, so that not one instruction of it runs outside); -1 = the
// one that this process is in. The int is the exit
// code when err is not nil.
func startChild(argv []string, cgroup int) (*child, int, error) {
	path, err := exec.LookPath(argv[0])
	if err != nil && !errors.Is(err, exec.ErrDot) {
		if errors.Is(err, fs.ErrPermission) {
			return nil, exitNotExecutable, err
		}
		return nil, exitNotFound, err
	}
	cmd := exec.Command(path, argv[1:]...) //nolint:noctx // it ends when it ends: mprox never kills the user's command
	cmd.Args[0] = argv[0]
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: cgroup >= 0, CgroupFD: max(cgroup, 0)}
	c := &child{cmd: cmd, signals: make(chan os.Signal, 16)}
	// Before the start: a Ctrl-C from here on is the command's to act on, and must not end us before it. Ctrl-Z too: we stop when the
	// command has, else its stop could be seen after the shell has continued both, and stop us once more.
	signal.Notify(c.signals, unix.SIGINT, unix.SIGQUIT, unix.SIGTSTP, unix.SIGTERM, unix.SIGHUP, unix.SIGUSR1, unix.SIGUSR2)
	if err := cmd.Start(); err != nil {
		signal.Stop(c.signals)
		return nil, exitNotExecutable, err
	}
	return c, 0, nil
}

// wait passes signals on and stops and continues with the command, until it ends.
func (c *child) wait() (unix.WaitStatus, error) {
	done := make(chan struct{})
	forwarded := make(chan struct{})
	go func() {
		defer close(forwarded)
		for {
			select {
			case s := <-c.signals:
				if !fromTerminal(s) {
					_ = c.cmd.Process.Signal(s)
				}
			case <-done:
				return
			}
		}
	}()
	defer func() {
		close(done)
		<-forwarded
		signal.Stop(c.signals)
	}()
	for {
		var ws unix.WaitStatus
		_, err := unix.Wait4(c.cmd.Process.Pid, &ws, unix.WUNTRACED, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return 0, err
		case ws.Stopped():
			// The shell watches us, not the command: stop too, and when the shell continues us, continue it.
			signalSelf(unix.SIGSTOP)
			_ = unix.Kill(c.cmd.Process.Pid, unix.SIGCONT)
		default:
			return ws, nil
		}
	}
}

// fromTerminal reports whether the kernel has already sent the signal to the command too: keys of the terminal reach the whole foreground
// process group, and some programs take a second Ctrl-C as an order to quit without cleaning up.
func fromTerminal(s os.Signal) bool {
	if s != unix.SIGINT && s != unix.SIGQUIT && s != unix.SIGTSTP {
		return false
	}
	for _, f := range []*os.File{os.Stdin, os.Stdout, os.Stderr} {
		fd := int(f.Fd())
		if !term.IsTerminal(fd) {
			continue
		}
		fg, err := unix.IoctlGetInt(fd, unix.TIOCGPGRP)
		return err == nil && fg == unix.Getpgrp()
	}
	return false
}

// exitAs ends this process the way the command ended: with its status, or by its signal, so that a shell reports the same.
func exitAs(ws unix.WaitStatus) {
	if ws.Exited() {
		os.Exit(ws.ExitStatus())
	}
	s := ws.Signal()
	switch s {
	case unix.SIGHUP, unix.SIGINT, unix.SIGTERM, unix.SIGKILL, unix.SIGPIPE, unix.SIGALRM, unix.SIGUSR1, unix.SIGUSR2:
		signal.Reset(s)
		signalSelf(s)
	}
	// The rest would make the Go runtime dump its own stacks.
	os.Exit(128 + int(s))
}

// signalSelf sends a signal to this very thread: it then takes effect before the call returns. One that is sent to the process may be taken
// by another thread while this one goes on, and continues a command that was to stop.
func signalSelf(s unix.Signal) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	_ = unix.Tgkill(unix.Getpid(), unix.Gettid(), s)
}
