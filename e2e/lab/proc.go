// SPDX-License-Identifier: GPL-3.0-or-later

package lab

import (
	"errors"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// maxLog is how much output of one process is kept, in bytes; of more, the beginning is dropped.
const maxLog = 1 << 20

// Log is the bounded output of a process. It is safe for concurrent use.
type Log struct {
	mu  sync.Mutex
	buf []byte
}

// Write appends to the log.
func (l *Log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.buf = append(l.buf, p...)
	if over := len(l.buf) - maxLog; over > 0 {
		l.buf = append(l.buf[:0], l.buf[over:]...)
	}
	return len(p), nil
}

// String returns what was written.
func (l *Log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return string(l.buf)
}

// Proc is a running program of the lab.
type Proc struct {
	Name string
	Cmd  *exec.Cmd
	Log  *Log // standard output and error, unless the caller set them elsewhere
	done chan struct{}
	err  error // valid after done
}

// Start runs a command in its own process group. When the test fails, the end of its output is logged.
func Start(t *testing.T, name string, cmd *exec.Cmd) *Proc {
	t.Helper()
	p, err := start(name, cmd)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	t.Cleanup(func() {
		p.Stop()
		if t.Failed() {
			t.Logf("output of %s:\n%s", name, tail(p.Log.String(), 6000))
		}
	})
	return p
}

func start(name string, cmd *exec.Cmd) (*Proc, error) {
	p := &Proc{Name: name, Cmd: cmd, Log: &Log{}, done: make(chan struct{})}
	if cmd.Stdout == nil {
		cmd.Stdout = p.Log
	}
	if cmd.Stderr == nil {
		cmd.Stderr = p.Log
	}
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	}
	// A child that outlives the program must not keep Wait from returning.
	cmd.WaitDelay = time.Second
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		p.err = cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

// PID is the process id.
func (p *Proc) PID() int { return p.Cmd.Process.Pid }

// Signal sends a signal to the process alone.
func (p *Proc) Signal(s syscall.Signal) { _ = syscall.Kill(p.PID(), s) }

// Done is closed when the process has ended and been waited for.
func (p *Proc) Done() <-chan struct{} { return p.done }

// Exited reports whether the process has ended.
func (p *Proc) Exited() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// Wait returns the exit status (128 + signal, as a shell says it) or -1 when the process is still there after d.
func (p *Proc) Wait(d time.Duration) int {
	tm := time.NewTimer(d)
	defer tm.Stop()
	select {
	case <-p.done:
	case <-tm.C:
		if !p.Exited() {
			return -1
		}
	}
	return exitCode(p.Cmd, p.err)
}

// Kill ends the process with SIGKILL and waits for it.
func (p *Proc) Kill() {
	p.Signal(syscall.SIGKILL)
	<-p.done
}

// Stop ends the process, kindly first.
func (p *Proc) Stop() {
	if p.Exited() {
		return
	}
	p.Signal(syscall.SIGTERM)
	if p.Wait(5*time.Second) < 0 {
		_ = syscall.Kill(-p.PID(), syscall.SIGKILL)
		p.Kill()
	}
}

// exitCode turns the result of Wait into a shell's exit status.
func exitCode(cmd *exec.Cmd, err error) int {
	var ee *exec.ExitError
	if err != nil && !errors.As(err, &ee) && !errors.Is(err, exec.ErrWaitDelay) {
		return -1
	}
	ws, ok := cmd.ProcessState.Sys().(syscall.WaitStatus)
	if !ok {
		return -1
	}
	if ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return ws.ExitStatus()
}

func tail(s string, n int) string {
	if len(s) <= n {
		return s
	}
	s = s[len(s)-n:]
	if i := strings.IndexByte(s, '\n'); i >= 0 {
		s = s[i+1:]
	}
	return "…\n" + s
}
