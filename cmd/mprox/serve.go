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
}

func newServeCommand(g *globals) *cobra.Command {
	var f serveFlags
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Run a proxy server: SOCKS5 and HTTP CONNECT on one port",
		Long: `Runs a proxy server in the foreground: SOCKS5 (CONNECT, UDP ASSOCIATE) and HTTP CONNECT on one port, told apart by the first byte. It needs
no privilege and no daemon. With --user everybody must authenticate; without, everybody who reaches the port may use it.

Ctrl-C or SIGTERM stops it.`,
		Example: examples("mprox serve", "mprox serve --listen 0.0.0.0:1080 --user alice --password-file /etc/mprox/serve.pass"),
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			addr, users, err := f.check()
			if err != nil {
				return err
			}
			log, err := g.logger(config.Log{Level: "info", Format: "text"})
			if err != nil {
				return err
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), unix.SIGINT, unix.SIGTERM)
			defer stop()
			return serveProxy(ctx, addr, users, log)
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&f.listen, "listen", "127.0.0.1:1080", "`address` and port to listen on")
	fl.StringVar(&f.user, "user", "", "`name` that callers must give")
	fl.StringVar(&f.passwordFile, "password-file", "", "`file` whose first line is the password that callers must give")
	return cmd
}

// check returns what the flags mean. No users is nil: nobody needs to authenticate.
func (f *serveFlags) check() (netip.AddrPort, map[string]string, error) {
	listen := f.listen
	if strings.HasPrefix(listen, ":") {
		listen = "[::]" + listen // every address of both families
	}
	addr, err := netip.ParseAddrPort(listen)
	if err != nil {
		return addr, nil, usageError("--listen %q is not ADDRESS:PORT, such as 127.0.0.1:1080", f.listen)
	}
	if (f.user == "") != (f.passwordFile == "") {
		return addr, nil, usageError("--user and --password-file go together")
	}
	if f.user == "" {
		return addr, nil, nil
	}
	if len(f.user) > maxPassword || strings.Contains(f.user, ":") {
		return addr, nil, usageError("--user has at most %d bytes and no colon", maxPassword)
	}
	data, err := os.ReadFile(f.passwordFile)
	if err != nil {
		return addr, nil, usageError("--password-file: %w", err)
	}
	password, _, _ := strings.Cut(string(data), "\n")
	password = strings.TrimSuffix(password, "\r")
	if password == "" || len(password) > maxPassword {
		return addr, nil, usageError("--password-file %s: the first line must have 1 to %d bytes", f.passwordFile, maxPassword)
	}
	return addr, map[string]string{f.user: password}, nil
}

// serveProxy serves until ctx ends.
func serveProxy(ctx context.Context, addr netip.AddrPort, users map[string]string, log *zap.Logger) error {
	nameservers, err := dialers.ReadNameservers(resolvConf)
	if err != nil {
		log.Warn("names will not be resolved", zap.Error(err))
	}
	n := dialers.NewNet(dialers.NetConfig{Nameservers: nameservers, Log: log})
	s, err := server.New(server.Config{Net: n, Users: users, Log: log})
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
	if users == nil && !addr.Addr().IsLoopback() {
		log.Warn("anyone who reaches this port may use it: give --user and --password-file", zap.Stringer("listen", addr))
	}
	log.Info("serving", zap.Stringer("listen", l.Addr()))
	return errors.Join(s.Serve(ctx, net.Listener(l)), s.Close())
}
