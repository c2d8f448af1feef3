// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/signal"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/config"
	"github.com/mutex-proxy/mutex/dialers"
	"github.com/mutex-proxy/mutex/dialers/server"
)

const resolvConf = "/etc/resolv.conf"

// serveFlags are the flags of `serve`.
type serveFlags struct {
	listen       string
	user         string
	passwordFile string
	allow, deny  []string
	connections  int
	handshake    time.Duration
	idle         time.Duration
	readable     bool // others may read the password file
}

func newServeCommand(g *globals) *cobra.Command {
	var f serveFlags
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Run a proxy server: SOCKS and HTTP CONNECT on one port",
		Long: `Runs a proxy server in the foreground: SOCKS4, SOCKS4a, SOCKS5 (CONNECT, BIND, UDP ASSOCIATE) and HTTP CONNECT on one port, told apart by the first
byte. It needs no privilege and no daemon. With --password-file everybody must authenticate (HTTP: Basic or Digest; SOCKS4 cannot);
without, everybody who reaches the port may use it. The file has a line USER:PASSWORD for each user (lines that begin with # do not count), or,
with --user, that user's password as its first line. Others must not be able to write it, and should not be able to read it.

Loopback and link-local destinations are denied, by name too: they would lead to services that trust this machine. --allow and --deny take an
address, a prefix, or one of any, loopback, link-local, private; the longest prefix decides, and deny where both are of the same length.
Names are resolved here, and the address is looked at that is then connected or sent to.

A client that has not finished its request within --handshake-timeout is disconnected; when there are --max-connections, the one that has been
longest in its handshake makes room for the next.

Ctrl-C or SIGTERM stops it.`,
		Example: examples("mprox serve", "mprox serve --listen 0.0.0.0:1080 --user alice --password-file /etc/mprox/serve.pass",
			"mprox serve --listen [::]:1080 --password-file /etc/mprox/users", "mprox serve --deny any --allow 203.0.113.0/24", "mprox serve --allow loopback"),
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			addr, cfg, err := f.check()
			if err != nil {
				return err
			}
			if cfg.Log, err = g.logger(config.Log{Level: "info", Format: "text"}); err != nil {
				return err
			}
			if f.readable {
				cfg.Log.Warn("everyone on this machine may read the passwords: run chmod 600", zap.String("file", f.passwordFile))
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), unix.SIGINT, unix.SIGTERM)
			defer stop()
			return serveProxy(ctx, addr, cfg)
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&f.listen, "listen", "127.0.0.1:1080", "`address` and port to listen on")
	fl.StringVar(&f.user, "user", "", "`name` that callers must give, with the password in --password-file")
	fl.StringVar(&f.passwordFile, "password-file", "", "`file` of users, one USER:PASSWORD a line; with --user: of the password")
	fl.StringArrayVar(&f.allow, "allow", nil, "`destination` that may be reached; repeatable")
	fl.StringArrayVar(&f.deny, "deny", nil, "`destination` that may not be reached; repeatable")
	fl.IntVar(&f.connections, "max-connections", 4096, "most connections at a time")
	fl.DurationVar(&f.handshake, "handshake-timeout", 10*time.Second, "`time` that a client has for its whole request")
	fl.DurationVar(&f.idle, "idle-timeout", 2*time.Hour, "`time` after which a connection without a byte either way is ended")
	return cmd
}

// check returns what the flags mean. No users is nil: nobody needs to authenticate.
func (f *serveFlags) check() (addr netip.AddrPort, cfg server.Config, err error) {
	listen := f.listen
	if strings.HasPrefix(listen, ":") {
		listen = "[::]" + listen // every address of both families
	}
	if addr, err = netip.ParseAddrPort(listen); err != nil {
		return addr, cfg, usageError("--listen %q is not ADDRESS:PORT, such as 127.0.0.1:1080", f.listen)
	}
	if cfg.Allow, err = server.Destinations(f.allow, f.deny); err != nil {
		return addr, cfg, usageError("--allow, --deny: %w", err)
	}
	if f.connections <= 0 || f.handshake <= 0 || f.idle <= 0 {
		return addr, cfg, usageError("--max-connections, --handshake-timeout and --idle-timeout are positive")
	}
	cfg.MaxConns, cfg.HandshakeTimeout, cfg.IdleTimeout = f.connections, f.handshake, f.idle
	switch {
	case f.passwordFile != "":
		if cfg.Users, f.readable, err = readUsers(f.passwordFile, f.user); err != nil {
			return addr, cfg, usageError("%w", err)
		}
	case f.user != "":
		return addr, cfg, usageError("--user needs --password-file")
	}
	return addr, cfg, nil
}

// newNet is the network of a command without a daemon: names are resolved by the machine's own nameservers.
func newNet(log *zap.Logger) *dialers.Net {
	nameservers, err := dialers.ReadNameservers(resolvConf)
	if err != nil {
		log.Warn("names will not be resolved", zap.Error(err))
	}
	return dialers.NewNet(dialers.NetConfig{Nameservers: nameservers, Log: log})
}

// serveProxy serves until ctx ends.
func serveProxy(ctx context.Context, addr netip.AddrPort, cfg server.Config) error {
	log := cfg.Log
	n := newNet(log)
	cfg.Net = n
	s, err := server.New(cfg)
	if err != nil {
		return err
	}
	l, err := n.ListenTCP(ctx, addr)
	if errors.Is(err, unix.EADDRINUSE) {
		return exitError{exitConflict, fmt.Errorf("%s is in use: choose another with --listen", addr)}
	}
	if err != nil {
		return err
	}
	if cfg.Users == nil && !addr.Addr().IsLoopback() {
		log.Warn("anyone who reaches this port may use it: give --password-file", zap.Stringer("listen", addr))
	}
	log.Info("serving", zap.Stringer("listen", l.Addr()))
	return errors.Join(s.Serve(ctx, net.Listener(l)), s.Close())
}
