// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/mutex-proxy/mutex/cmd/mprox/leak"
	"github.com/mutex-proxy/mutex/control/client"
	"github.com/mutex-proxy/mutex/policy"
)

// leakReport is `mprox leaktest -o json`.
type leakReport struct {
	Context string        `json:"context"` // "" = the global one, or none
	Leaks   int           `json:"leaks"`
	Ways    []leak.Result `json:"ways"`
}

func newLeaktestCommand(g *globals) *cobra.Command {
	var name string
	cmd := &cobra.Command{
		Use:   "leaktest",
		Short: "Try every way past the capture, against addresses that never leave the host",
		Long: `Makes a device of its own that a packet for its addresses (of the documentation ranges) would take if nothing captured it, tries each known way to
get there, and says what arrived: plain sockets, sockets bound to the device, forged marks, raw sockets, fragments, ICMP, DNS, AF_PACKET, in IPv4 and
IPv6. What is captured reaches the proxy as a connection to those addresses and fails there. It works with the daemon dead too: then the guard alone
must hold. With --context the test runs as a process of that context; without it what is tested is the whole host.
A proxy on this machine that connects from here itself, and not through a tunnel, reaches the device too: what it delivers counts as got through.

Exit status 7 if anything got through.`,
		Example: examples("sudo mprox leaktest", "sudo mprox leaktest --context work -o json"),
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			r, err := leaktest(cmd.Context(), g, name)
			if err != nil {
				return err
			}
			switch g.output {
			case "json":
				err = writeJSON(cmd.OutOrStdout(), r)
			case "csv":
				err = writeCSV(cmd.OutOrStdout(), r.Ways)
			default:
				err = writeLeaks(cmd.OutOrStdout(), r)
			}
			if err == nil && r.Leaks > 0 {
				return exitError{exitCheck, fmt.Errorf("%d of %d ways lead past the proxy", r.Leaks, len(r.Ways))}
			}
			return err
		},
	}
	cmd.Flags().StringVar(&name, "context", "", "`name` of the context whose process the test shall be")
	return cmd
}

func leaktest(ctx context.Context, g *globals, name string) (r leakReport, err error) {
	host, err := policy.NewLinuxHost()
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, host.Close()) }()
	socket, err := g.instance()
	if err != nil {
		return r, err
	}
	c := client.New(socket)
	defer c.Close()
	r.Context = name
	if name != "" {
		lease, err := c.Lease(ctx, client.LeaseRequest{Context: name, PID: os.Getpid()})
		if err != nil {
			return r, err
		}
		defer func() { _ = lease.Close() }() // it ends with this process anyway
	}
	st, err := c.Status(ctx)
	if err != nil && !errors.Is(err, client.ErrUnreachable) {
		return r, err
	}
	alive := err == nil
	global := slices.ContainsFunc(st.Contexts, func(s client.ContextStatus) bool { return s.Mode == "global" && s.Enabled })
	if alive && name == "" && !global {
		return r, usageError("no context captures the whole host: name one with --context")
	}
	opt := leak.Options{Mask: policy.DefaultMask, NoPacket: noPacket(alive, global)}
	if f, err := host.Features(); err == nil && alive && name == "" {
		opt.OwnMark = !f.Cgroup2 || !f.NFTSocket
	}
	before, err := host.NFTables(guardTable)
	if err != nil {
		return r, err
	}
	if opt.NoPacket == "" {
		opt.Ready = func(ctx context.Context) { awaitGuard(ctx, host, before) }
	}
	if r.Ways, err = leak.Run(ctx, opt); err != nil {
		return r, err
	}
	for _, w := range r.Ways {
		if w.Result == leak.Leaked {
			r.Leaks++
		}
	}
	return r, nil
}

// noPacket says why packet sockets are not tried. What they send belongs to no cgroup, so that only a global context is guarded against it; and it is
// guarded device by device.
func noPacket(alive, global bool) string {
	switch {
	case !alive:
		return "no daemon that could guard a new device"
	case !global:
		return "packet sockets are guarded only while a context captures the whole host"
	}
	return ""
}

// guardTable begins the names of the daemon's nftables.
const guardTable = "mprox"

// awaitGuard gives the daemon the second that it has to follow a new device.
func awaitGuard(ctx context.Context, host *policy.LinuxHost, before map[string]string) {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		now, err := host.NFTables(guardTable)
		if err != nil || now[guardTable+"-egress"] != before[guardTable+"-egress"] {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return // what is not guarded by now is a leak
		}
	}
}

func writeLeaks(w io.Writer, r leakReport) error {
	t := &table{head: []string{"WAY", "RESULT", "DETAIL"}}
	for _, x := range r.Ways {
		t.add(text(x.Way), text(x.Result), orDash(x.Detail))
	}
	return t.write(w)
}
