// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// reapOrphans is what the first process of a container owes: whoever has lost its parent becomes its child, and stays a zombie until it is waited
// for. Children of ours are left to whoever started them. It returns what ends it.
func reapOrphans(own func(pid int) bool) (stop func()) {
	if os.Getpid() != 1 {
		return func() {}
	}
	child := make(chan os.Signal, 1)
	signal.Notify(child, unix.SIGCHLD)
	over, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			reap(own)
			select {
			case <-child:
			case <-over:
				return
			}
		}
	}()
	return func() {
		signal.Stop(child)
		close(over)
		<-done
	}
}

// reap waits for every orphan that has ended.
func reap(own func(pid int) bool) {
	tasks, err := filepath.Glob("/proc/self/task/*/children")
	if err != nil {
		return
	}
	for _, file := range tasks {
		children, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		for field := range strings.FieldsSeq(string(children)) {
			pid, err := strconv.Atoi(field)
			if err != nil || own(pid) {
				continue
			}
			var ws unix.WaitStatus
			_, _ = unix.Wait4(pid, &ws, unix.WNOHANG, nil) // one that lives goes on living
		}
	}
}

func newHoldCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "hold",
		Short: "Hold a network namespace for other containers until SIGTERM",
		Long: `Does nothing but live: the first process of a container whose network namespace others join ("network_mode: service:netns"), so that restarting
mprox strands nobody. It needs no privilege.`,
		Example: examples("mprox hold"),
		Hidden:  true,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), unix.SIGINT, unix.SIGTERM)
			defer stop()
			defer reapOrphans(func(int) bool { return false })()
			<-ctx.Done()
			return nil
		},
	}
}
