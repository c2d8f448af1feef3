// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/control/client"
	"github.com/mutex-proxy/mutex/policy"
)

const (
	// askedTwice is how long a call may take before the daemon is asked whether it lives: most need milliseconds, and so no second question.
	askedTwice = 2 * time.Second
	// signTimeout is how long a daemon may take for a sign of life. It needs a lock, a buffer and a processor for that, and nothing else.
	signTimeout = 5 * time.Second
	// termGrace is what a daemon that does not answer gets to stop in order, should only its control socket hang.
	termGrace = 2 * time.Second
)

// attended makes a call, and gives it up if the daemon turns out to be one that does not answer at all: whoever waits for what takes long, waits
// only as long as somebody works on it.
func attended(ctx context.Context, c *client.Client, call func(context.Context, *client.Client) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	watch := time.AfterFunc(askedTwice, func() {
		if err := alive(ctx, c); errors.Is(err, client.ErrSilent) {
			cancel(err)
		}
	})
	defer watch.Stop()
	err := call(ctx, c)
	if cause := context.Cause(ctx); errors.Is(cause, client.ErrSilent) {
		return cause
	}
	if errors.Is(err, unix.EAGAIN) { // no room for another connection that waits: a burst of calls, or a daemon that has hung for long
		if err := alive(ctx, c); errors.Is(err, client.ErrSilent) {
			return err
		}
	}
	return err
}

// alive is client.Alive with the patience of a command.
func alive(ctx context.Context, c *client.Client) error {
	ctx, cancel := context.WithTimeout(ctx, signTimeout)
	defer cancel()
	return c.Alive(ctx)
}

// takeDown stops the daemon. One that answers gets changeTimeout for it, and is never killed; one that does not is, and cleaned up after.
func takeDown(cmd *cobra.Command, g *globals, closed bool) error {
	socket, err := g.instance()
	if err != nil {
		return err
	}
	c := client.New(socket)
	defer c.Close()
	if err := alive(cmd.Context(), c); errors.Is(err, client.ErrSilent) {
		if closed {
			return fmt.Errorf(`%w; "mprox down" kills it and opens everything, "kill -9" leaves closed what has on_crash: block`, err)
		}
		return killSilent(cmd, g, c)
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), changeTimeout)
	defer cancel()
	pid, _ := c.PID(ctx) // 0 where there is none
	if closed {
		err = c.ShutdownClosed(ctx)
	} else {
		err = c.Shutdown(ctx)
	}
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("the daemon answers, but has not ended within %s: see its log, and wait; or %s", changeTimeout, byHand(pid))
	case closed || !errors.Is(err, client.ErrUnreachable):
		return err
	}
	return cleanupAll(cmd, g)
}

// killSilent ends a daemon that does not answer, and then does what `down` does without one.
func killSilent(cmd *cobra.Command, g *globals, c *client.Client) error {
	pid, err := c.PID(cmd.Context())
	if err == nil {
		cmd.PrintErrf("mprox: process %d does not answer: ending it, by SIGKILL if need be, and undoing what it has changed\n", pid)
		err = c.Kill(cmd.Context(), termGrace)
	}
	if err != nil {
		return fmt.Errorf("%w at %s: it %w, and cannot be ended (%w): %s", client.ErrUnreachable, c.Socket(), client.ErrSilent, err, byHand(pid))
	}
	if err := cleanupAll(cmd, g); err != nil {
		return err
	}
	// What is left now is in another network namespace, or of a daemon that has been started meanwhile, by a service manager for example.
	r, err := g.cleanup(cmd.Context(), policy.InstanceFor(c.Socket()))
	if err == nil && r.Skipped != "" {
		return fmt.Errorf("%w: process %d has been killed, but what it has changed is still there: %s", policy.ErrConflict, pid, r.Skipped)
	}
	return err
}

// byHand is what to do about a daemon that cannot be ended from here.
func byHand(pid int) string {
	if pid == 0 {
		return `end its process with "kill -9" where it can be seen, as root, then run "mprox down"`
	}
	return fmt.Sprintf(`run "kill -9 %d" as root, then "mprox down"`, pid)
}

// silentHolder looks whether who has the locks of an instance answers on its socket; the error is about one that does not.
func silentHolder(ctx context.Context, socket string) error {
	c := client.New(socket)
	defer c.Close()
	if err := alive(ctx, c); errors.Is(err, client.ErrSilent) {
		return err
	}
	return nil
}
