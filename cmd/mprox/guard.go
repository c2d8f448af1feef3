// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"errors"
	"fmt"
	"io"
	"os/signal"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/cmd/mprox/daemon"
	"github.com/mutex-proxy/mutex/config"
	"github.com/mutex-proxy/mutex/policy"
)

func newGuardCommand(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "guard",
		Short: "Look at and change, without a daemon, what keeps captured traffic in",
		Long: `The guard is the kernel state that keeps captured traffic from leaving unproxied when the daemon is dead. These commands need no daemon: status
shows what is closed, off opens it (as "mprox cleanup" does, but fails while the daemon lives), on closes it as the configuration says, before
any daemon has started: an early-boot unit for that is in packaging/systemd.`,
		Example: examples("mprox guard status", "sudo mprox guard off", "sudo mprox guard on -c /etc/mprox/config.json"),
		Args:    cobra.NoArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	watch := &cobra.Command{
		Use: daemon.WatchArg, Short: "Wait for the end of the daemon, and open what on_crash: open is about", Hidden: true, Args: cobra.NoArgs,
		Example: examples("mprox guard watch < PIPE"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			// A service manager ends what is left of a service: this must still do its work, which takes milliseconds.
			signal.Ignore(unix.SIGTERM, unix.SIGINT, unix.SIGHUP)
			return daemon.Watch(cmd.Context(), cmd.InOrStdin(), policy.InstanceFor(g.socketPath()))
		},
	}
	cmd.AddCommand(newGuardStatusCommand(g), newGuardOffCommand(g), newGuardOnCommand(g), watch)
	return cmd
}

// guardStatus is `mprox guard status -o json`.
type guardStatus struct {
	Active         bool           `json:"active"`
	Owner          string         `json:"owner"` // "" = no daemon lives
	Contexts       []guardContext `json:"contexts"`
	Tables         []string       `json:"tables"`
	Rules          int            `json:"rules"`
	Routes         int            `json:"routes"`
	DroppedPackets uint64         `json:"dropped_packets"`
}

type guardContext struct {
	Name    string `json:"name"`
	Mode    string `json:"mode"`
	Slot    int    `json:"slot"`
	OnCrash string `json:"on_crash"`
}

func newGuardStatusCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use: "status", Short: "Show what is closed, and whether a daemon lives", Args: cobra.NoArgs,
		Example: examples("mprox guard status", "mprox guard status -o json"),
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			host, err := policy.NewLinuxHost()
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, host.Close()) }()
			s, err := policy.Guard(cmd.Context(), policy.Config{Host: host}, policy.InstanceFor(g.socketPath()))
			if err != nil {
				return err
			}
			out := guardStatus{
				Active: s.Active(), Owner: s.Owner, Contexts: []guardContext{}, Tables: append([]string{}, s.Tables...), Rules: s.Rules, Routes: s.Routes,
				DroppedPackets: s.Dropped,
			}
			for _, c := range s.Contexts {
				gc := guardContext{Name: c.Name, Mode: c.Mode.String(), Slot: c.Slot, OnCrash: "block"}
				if c.Open {
					gc.OnCrash = "open"
				}
				out.Contexts = append(out.Contexts, gc)
			}
			switch g.output {
			case "json":
				return writeJSON(cmd.OutOrStdout(), out)
			case "csv":
				return writeCSV(cmd.OutOrStdout(), out.Contexts)
			}
			return writeGuard(cmd.OutOrStdout(), out, s.Other)
		},
	}
}

func writeGuard(w io.Writer, s guardStatus, other string) error {
	owner := "no daemon lives"
	if s.Owner != "" {
		owner = s.Owner
	}
	active := "not active"
	if s.Active {
		active = "active"
	}
	fmt.Fprintf(w, "guard   %s (%s)\n", active, printable(owner))
	if other != "" {
		fmt.Fprintf(w, "note    %s\n", printable(other))
	}
	fmt.Fprintf(w, "kernel  %d ip rules, %d routes, nftables %v, %d packets kept in\n", s.Rules, s.Routes, s.Tables, s.DroppedPackets)
	if len(s.Contexts) == 0 {
		return nil
	}
	fmt.Fprintln(w)
	t := &table{head: []string{"CONTEXT", "MODE", "SLOT", "ON CRASH"}}
	for _, c := range s.Contexts {
		t.add(text(c.Name), text(c.Mode), number(uint64(c.Slot)), text(c.OnCrash))
	}
	return t.write(w)
}

func newGuardOffCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use: "off", Short: "Open what a dead daemon has left closed", Args: cobra.NoArgs,
		Example: examples("sudo mprox guard off"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			for _, in := range append([]policy.Instance{policy.InstanceFor(g.socketPath())}, policy.ContainersOf(g.socketPath())...) {
				r, err := g.cleanup(cmd.Context(), in)
				if err != nil {
					return err
				}
				if r.Skipped != "" {
					if err := silentHolder(cmd.Context(), in.Socket); err != nil {
						return err
					}
					return fmt.Errorf("%w: %s", policy.ErrConflict, r.Skipped)
				}
				printReport(cmd.OutOrStdout(), in, r)
			}
			return nil
		},
	}
}

func newGuardOnCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use: "on", Short: "Close what the configuration captures, before any daemon runs", Args: cobra.NoArgs,
		Example: examples("sudo mprox guard on -c /etc/mprox/config.json"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := config.Load(g.config, "", daemon.Check)
			if err != nil {
				return err
			}
			log, err := g.logger(cfg.Log)
			if err != nil {
				return err
			}
			return daemon.Close(cmd.Context(), daemon.Options{Config: cfg, Socket: g.socketOf(cfg), Version: version, Log: log})
		},
	}
}
