// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"strings"

	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/config"
	"github.com/mutex-proxy/mutex/dialers"
	"github.com/mutex-proxy/mutex/dialers/server"
)

const (
	resolvConf = "/etc/resolv.conf"
	// maxPassword is what SOCKS5 can carry (RFC 1929).
	maxPassword = 255
)

// serveFlags are the flags of `serve`.
type serveFlags struct {
	listen       string
	user         string
	passwordFile string
	allow, deny  []string
}

func newServeCommand(g *globals) *cobra.Command {
	var f serveFlags
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Run a proxy server: SOCKS and HTTP CONNECT on one port",
		Long: `Runs a proxy server in the foreground: SOCKS4, SOCKS4a, SOCKS5 (CONNECT, BIND, UDP ASSOCIATE) and HTTP CONNECT on one port, told apart by the first
byte. It needs no privilege and no daemon. With --user everybody must authenticate (HTTP: Basic or Digest; SOCKS4 cannot); without,
everybody who reaches the port may use it.

Loopback and link-local destinations are denied, by name too: they would lead to services that trust this machine. --allow and --deny take an
address, a prefix, or one of any, loopback, link-local, private; the longest prefix decides, and deny where both are of the same length.

Ctrl-C or SIGTERM stops it.`,
		Example: examples("mprox serve", "mprox serve --listen 0.0.0.0:1080 --user alice --password-file /etc/mprox/serve.pass",
			"mprox serve --deny any --allow 203.0.113.0/24", "mprox serve --allow loopback"),
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			addr, cfg, err := f.check()
			if err != nil {
				return err
			}
			if cfg.Log, err = g.logger(config.Log{Level: "info", Format: "text"}); err != nil {
				return err
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), unix.SIGINT, unix.SIGTERM)
			defer stop()
			return serveProxy(ctx, addr, cfg)
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&f.listen, "listen", "127.0.0.1:1080", "`address` and port to listen on")
	fl.StringVar(&f.user, "user", "", "`name` that callers must give")
	fl.StringVar(&f.passwordFile, "password-file", "", "`file` whose first line is the password that callers must give")
	fl.StringArrayVar(&f.allow, "allow", nil, "`destination` that may be reached; repeatable")
	fl.StringArrayVar(&f.deny, "deny", nil, "`destination` that may not be reached; repeatable")
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
	if (f.user == "") != (f.passwordFile == "") {
		return addr, cfg, usageError("--user and --password-file go together")
	}
	if f.user == "" {
		return addr, cfg, nil
	}
	if len(f.user) > maxPassword || strings.Contains(f.user, ":") {
		return addr, cfg, usageError("--user has at most %d bytes and no colon", maxPassword)
	}
	data, err := os.ReadFile(f.passwordFile)
	if err != nil {
		return addr, cfg, usageError("--password-file: %w", err)
	}
	password, _, _ := strings.Cut(string(data), "\n")
	password = strings.TrimSuffix(password, "\r")
	if password == "" || len(password) > maxPassword {
		return addr, cfg, usageError("--password-file %s: the first line must have 1 to %d bytes", f.passwordFile, maxPassword)
	}
	cfg.Users = map[string]string{f.user: password}
	return addr, cfg, nil
}

// serveProxy serves until ctx ends.
func serveProxy(ctx context.Context, addr netip.AddrPort, cfg server.Config) error {
	log := cfg.Log
	nameservers, err := dialers.ReadNameservers(resolvConf)
	if err != nil {
		log.Warn("names will not be resolved", zap.Error(err))
	}
	n := dialers.NewNet(dialers.NetConfig{Nameservers: nameservers, Log: log})
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
		log.Warn("anyone who reaches this port may use it: give --user and --password-file", zap.Stringer("listen", addr))
	}
	log.Info("serving", zap.Stringer("listen", l.Addr()))
	return errors.Join(s.Serve(ctx, net.Listener(l)), s.Close())
}
