// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

// process is a program that was started.
type process struct {
	cmd  *exec.Cmd
	log  *os.File
	done chan struct{}
}

// spawn starts a program in a namespace; its output goes to a file that is shown when it fails.
func (l *lab) spawn(ns string, env []string, args ...string) (*process, error) {
	log, err := os.CreateTemp(l.dir, "log")
	if err != nil {
		return nil, err
	}
	cmd := inNS(ns, args...)
	cmd.Env = append(os.Environ(), env...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		_ = log.Close()
		return nil, err
	}
	p := &process{cmd: cmd, log: log, done: make(chan struct{})}
	go func() {
		defer close(p.done)
		_ = cmd.Wait()
	}()
	return p, nil
}

var errEnded = errors.New("ended at once")

// spawnReady starts a program and waits until it is ready.
func (l *lab) spawnReady(ns string, env []string, ready func() bool, args ...string) (*process, error) {
	p, err := l.spawn(ns, env, args...)
	if err != nil {
		return nil, err
	}
	ended := false
	err = until(startTimeout, args[0]+" is ready", func() bool {
		select {
		case <-p.done:
			ended = true
			return true
		default:
			return ready()
		}
	})
	if ended {
		err = errEnded
	}
	if err != nil {
		p.stop()
		b, _ := os.ReadFile(p.log.Name())
		return nil, fmt.Errorf("%s: %w\n%s", strings.Join(args, " "), err, b)
	}
	return p, nil
}

func (p *process) pid() int { return p.cmd.Process.Pid }

// stop ends the program and its children, kindly at first.
func (p *process) stop() {
	if p == nil {
		return
	}
	_ = syscall.Kill(-p.pid(), syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(10 * time.Second):
		_ = syscall.Kill(-p.pid(), syscall.SIGKILL)
		<-p.done
	}
	_ = p.log.Close()
}
