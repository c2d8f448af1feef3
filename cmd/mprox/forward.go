// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os/signal"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/cmd/mprox/daemon"
	"github.com/mutex-proxy/mutex/config"
	"github.com/mutex-proxy/mutex/dialers"
	"github.com/mutex-proxy/mutex/flow"
)

const (
	// forwardBind is how long an upstream may take to say where it listens.
	forwardBind = 15 * time.Second
	// forwardConns bounds the connections handed over at a time: with so many open, the upstream is not asked for more.
	forwardConns = 256
	// forwardPause and forwardPauseMax are the first and the longest wait after an upstream has failed.
	forwardPause    = 500 * time.Millisecond
	forwardPauseMax = 30 * time.Second
)

// forwarder asks an upstream for one connection after the other and hands them to a local address.
type forwarder struct {
	upstream dialers.Binder
	peer     flow.Addr      // what BIND is asked for
	local    netip.AddrPort // who gets the connections
	net      *dialers.Net
	log      *zap.Logger
	say      func(netip.AddrPort) error // tells where the upstream listens, when that changes
}

func newForwardCommand(g *globals) *cobra.Command {
	var upstream, bind string
	cmd := &cobra.Command{
		Use:   "forward --upstream URL|NAME --bind [HOST]:PORT LOCAL:PORT",
		Short: "Let others connect to a local service through an upstream (SOCKS BIND)",
		Long: `Asks a SOCKS upstream to accept one connection after another (BIND) and hands each to LOCAL:PORT on this machine, until Ctrl-C. Each address
that the upstream listens at is printed as a line "listening ADDRESS:PORT"; with -o json as {"listening":"ADDRESS:PORT"}.

--bind is what the upstream is asked for. HOST is who may connect; without it, or as 0.0.0.0, everybody whom the upstream lets. PORT is the port to
listen on, 0 for any; most servers take it as a wish, and some choose a new one for each connection. A BIND is for one connection:
between two of them nobody listens for a moment.

--upstream is a proxy URL, or the name of an upstream in the configuration. It needs no privilege and no daemon.`,
		Example: examples("mprox forward --upstream socks5://203.0.113.10:1080 --bind :8022 127.0.0.1:22",
			"mprox forward -c /etc/mprox/config.json --upstream paris --bind 198.51.100.7:0 127.0.0.1:8080"),
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			log, err := g.logger(config.Log{Level: "info", Format: "text"})
			if err != nil {
				return err
			}
			f := &forwarder{net: newNet(log), log: log, say: g.listening(cmd.OutOrStdout())}
			if err := f.configure(g, upstream, bind, args[0]); err != nil {
				return err
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), unix.SIGINT, unix.SIGTERM)
			defer stop()
			return f.run(ctx)
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&upstream, "upstream", "", "`URL` of a SOCKS upstream, or its name in the configuration")
	fl.StringVar(&bind, "bind", ":0", "`[HOST]:PORT` to ask for: who may connect, and the port to listen on")
	_ = cmd.MarkFlagRequired("upstream")
	return cmd
}

// listening returns what prints where an upstream listens.
func (g *globals) listening(w io.Writer) func(netip.AddrPort) error {
	return func(a netip.AddrPort) error {
		if g.output == "json" {
			return json.NewEncoder(w).Encode(map[string]netip.AddrPort{"listening": a})
		}
		_, err := fmt.Fprintf(w, "listening %s\n", a)
		return err
	}
}

// configure reads the command line.
func (f *forwarder) configure(g *globals, upstream, bind, local string) error {
	if strings.HasPrefix(bind, ":") {
		bind = "0.0.0.0" + bind
	}
	var err error
	if f.peer, err = dialers.ParseAddr(bind); err != nil {
		return usageError("--bind %q is not [HOST]:PORT, such as :8022", bind)
	}
	if strings.HasPrefix(local, ":") || strings.HasPrefix(local, "localhost:") {
		local = "127.0.0.1" + local[strings.IndexByte(local, ':'):]
	}
	if f.local, err = netip.ParseAddrPort(local); err != nil || f.local.Port() == 0 {
		return usageError("%q is not ADDRESS:PORT of a local service, such as 127.0.0.1:8080", local)
	}
	d, err := f.dialer(g, upstream)
	if err != nil {
		return err
	}
	var ok bool
	if f.upstream, ok = d.(dialers.Binder); !ok {
		return usageError("--upstream %s cannot accept connections: it must be one SOCKS server, not a pool and not an HTTP proxy", d.Name())
	}
	return nil
}

// dialer returns the upstream of a URL, or of a name in the configuration.
func (f *forwarder) dialer(g *globals, upstream string) (flow.Dialer, error) {
	if !strings.Contains(upstream, "://") {
		cfg, err := config.Load(g.config, "", daemon.Check)
		if err != nil {
			return nil, err
		}
		d, err := daemon.Upstream(cfg, upstream, f.net)
		if err != nil {
			return nil, usageError("--upstream: %w", err)
		}
		return d, nil
	}
	spec, err := dialers.ParseURL(upstream)
	if err == nil {
		err = spec.ReadSecrets()
	}
	if err != nil {
		return nil, usageError("--upstream: %w", err)
	}
	d, err := dialers.New("upstream", spec, f.net)
	if err != nil {
		return nil, usageError("--upstream: %w", err)
	}
	return d, nil
}

// run forwards until ctx ends. An upstream that refuses the first time is an error; later it is asked again, after ever longer pauses.
func (f *forwarder) run(ctx context.Context) error {
	var conns sync.WaitGroup
	defer conns.Wait()
	places := make(chan struct{}, forwardConns)
	var last netip.AddrPort
	pause := forwardPause
	for ctx.Err() == nil {
		select {
		case places <- struct{}{}:
		case <-ctx.Done():
			return nil
		}
		c, from, err := f.next(ctx, &last)
		if err == nil {
			pause = forwardPause
			conns.Go(func() {
				defer func() { <-places }()
				f.hand(ctx, c, from)
			})
			continue
		}
		<-places
		switch {
		case ctx.Err() != nil:
			return nil
		case !last.IsValid(), errors.Is(err, errors.ErrUnsupported):
			return err
		}
		f.log.Warn("the upstream does not accept connections", zap.Error(err), zap.Duration("again", pause))
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
		pause = min(2*pause, forwardPauseMax)
	}
	return nil
}

// next waits for one connection.
func (f *forwarder) next(ctx context.Context, last *netip.AddrPort) (flow.Conn, netip.AddrPort, error) {
	asking, cancel := context.WithTimeout(ctx, forwardBind)
	b, err := f.upstream.Bind(asking, f.peer)
	cancel()
	if err != nil {
		return nil, netip.AddrPort{}, err
	}
	if b.Addr() != *last {
		*last = b.Addr()
		if err := f.say(*last); err != nil {
			_ = b.Close()
			return nil, netip.AddrPort{}, err
		}
	}
	return b.Accept(ctx)
}

// hand relays one connection to the local address.
func (f *forwarder) hand(ctx context.Context, c flow.Conn, from netip.AddrPort) {
	log := f.log.With(zap.Stringer("from", from), zap.Stringer("to", f.local))
	dialing, cancel := context.WithTimeout(ctx, forwardBind)
	local, err := f.net.DialTCP(dialing, f.local)
	cancel()
	if err != nil {
		c.Abort() // refused here is refused there, as far as a connection that stands can say so
		log.Warn("connection not handed over", zap.Error(err))
		return
	}
	begin := time.Now()
	err = join(ctx, c, local)
	log.Info("connection ended", zap.Duration("time", time.Since(begin)), zap.Error(err))
}

// join relays between two connections until both directions have ended, and closes them. What breaks one breaks the other; ctx ends both.
func join(ctx context.Context, a, b flow.Conn) error {
	var once sync.Once
	var cause error
	abort := func(err error) {
		once.Do(func() {
			cause = err
			a.Abort()
			b.Abort()
		})
	}
	stop := context.AfterFunc(ctx, func() { abort(context.Cause(ctx)) })
	defer stop()
	half := func(dst, src flow.Conn) {
		if _, err := io.Copy(dst, src); err != nil {
			abort(err)
		} else if err := dst.CloseWrite(); err != nil {
			abort(err)
		}
	}
	var back sync.WaitGroup
	back.Go(func() { half(a, b) })
	half(b, a)
	back.Wait()
	once.Do(func() {
		_ = a.Close()
		_ = b.Close()
	})
	return cause
}
