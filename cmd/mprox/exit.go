// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/mutex-proxy/mutex/config"
	"github.com/mutex-proxy/mutex/control"
	"github.com/mutex-proxy/mutex/control/client"
	"github.com/mutex-proxy/mutex/policy"
	"github.com/mutex-proxy/mutex/tun"
)

// The exit codes. They are an interface: scripts and service managers rely on them.
const (
	exitOK          = 0
	exitFailed      = 1
	exitUsage       = 2
	exitConfig      = 3
	exitPrivilege   = 4 // or a kernel feature
	exitUnreachable = 5
	exitConflict    = 6
	exitCheck       = 7
)

// exitError is an error that knows its exit code.
type exitError struct {
	code int
	err  error
}

func (e exitError) Error() string { return e.err.Error() }
func (e exitError) Unwrap() error { return e.err }

// usageError is a command line that cannot be meant.
func usageError(format string, args ...any) error {
	return exitError{exitUsage, fmt.Errorf(format, args...)}
}

// exitCode is the one place where errors become exit codes.
func exitCode(err error) int {
	if e, ok := errors.AsType[exitError](err); ok {
		return e.code
	}
	if es, ok := errors.AsType[config.Errors](err); ok && len(es) > 0 && strings.HasPrefix(es[0].Path, "--") {
		return exitUsage // the configuration was the command line
	}
	switch {
	case isAny[config.Errors](err), isAny[*config.Error](err):
		return exitConfig
	case errors.Is(err, policy.ErrPrivilege), errors.Is(err, policy.ErrFeature), errors.Is(err, tun.ErrNoDevice), errors.Is(err, tun.ErrNoPermission):
		return exitPrivilege
	case errors.Is(err, client.ErrUnreachable):
		return exitUnreachable
	case errors.Is(err, policy.ErrConflict), errors.Is(err, control.ErrConflict), errors.Is(err, tun.ErrBusy):
		return exitConflict
	}
	switch client.Code(err) {
	case client.CodeConfigInvalid:
		return exitConfig
	case client.CodeForbidden, client.CodePrivilege:
		return exitPrivilege
	case client.CodeConflict:
		return exitConflict
	case client.CodeBadRequest:
		return exitUsage
	}
	return exitFailed
}

func isAny[E error](err error) bool {
	_, ok := errors.AsType[E](err)
	return ok
}

// report writes an error to stderr: one line that says what to do next, save for a configuration, of which it is one line each mistake,
// beginning with FILE:LINE:COLUMN as editors and scripts expect.
func report(w io.Writer, cmd *cobra.Command, err error, code int, usage bool) {
	lines := strings.Split(strings.TrimSpace(err.Error()), "\n")
	es, _ := errors.AsType[config.Errors](err)
	if code == exitConfig && (len(lines) > 1 || len(es) > 0 && es[0].Line > 0) {
		for _, line := range lines {
			fmt.Fprintln(w, printable(line))
		}
		return
	}
	msg := strings.Join(lines, "; ")
	if hint := nextStep(cmd, err, code, usage); hint != "" {
		msg += "; " + hint
	}
	fmt.Fprintln(w, "mprox:", printable(msg))
}

// nextStep says what to do about an error whose own text does not.
func nextStep(cmd *cobra.Command, err error, code int, usage bool) string {
	switch {
	case usage, code == exitUsage:
		return fmt.Sprintf("see %s --help", cmd.CommandPath())
	case errors.Is(err, client.ErrSilent):
		if cmd.Name() == "down" {
			return "" // it says itself why it could not help
		}
		return `kill it, and undo what it has changed, with "mprox down"`
	case code == exitUnreachable && errors.Is(err, os.ErrPermission):
		return "run it as root"
	case code == exitUnreachable:
		return `start it with "mprox up", or name another with --socket`
	case client.Code(err) == client.CodeForbidden:
		return "run it with sudo, or join the group"
	case errors.Is(err, context.DeadlineExceeded):
		return `the daemon does not answer: see its log, or stop it with "mprox down"`
	}
	return ""
}
