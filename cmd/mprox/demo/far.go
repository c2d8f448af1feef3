// SPDX-License-Identifier: GPL-3.0-or-later

package demo

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/dialers"
	"github.com/mutex-proxy/mutex/dialers/server"
)

// Far is the far side: the origin, and the embedded proxy server in front of it, until SIGTERM. It resolves the origin's name from a hosts
// file of its own in dir.
func Far(ctx context.Context, dir string) error {
	ctx, stop := signal.NotifyContext(ctx, unix.SIGTERM)
	defer stop()
	hosts, err := writeHosts(dir)
	if err != nil {
		return err
	}
	o, err := startOrigin(ctx)
	if err != nil {
		return err
	}
	defer o.Close()
	s, err := server.New(server.Config{
		Net: dialers.NewNet(dialers.NetConfig{HostsFile: hosts}), Users: map[string]string{proxyUser: proxyPass},
	})
	if err != nil {
		return err
	}
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", proxyAddr())
	if err != nil {
		return err
	}
	return s.Serve(ctx, l)
}

func writeHosts(dir string) (string, error) {
	f, err := os.Create(filepath.Join(dir, "hosts"))
	if err != nil {
		return "", err
	}
	defer f.Close()
	_, err = fmt.Fprintf(f, "%s %s\n%s %s\n", hostOf(originV4), originName, hostOf(originV6), originName)
	return f.Name(), err
}
