// SPDX-License-Identifier: GPL-3.0-or-later

package client_test

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/mutex-proxy/mutex/control/client"
)

// TestAlive asks nobody, and one who takes the connection and says nothing; and does not kill the process that asks.
func TestAlive(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	c := client.New(socket)
	defer c.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := c.Alive(ctx); !errors.Is(err, client.ErrUnreachable) || errors.Is(err, client.ErrSilent) {
		t.Errorf("nobody: %v", err)
	}
	l, err := new(net.ListenConfig).Listen(t.Context(), "unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := c.Alive(ctx); !errors.Is(err, client.ErrUnreachable) || !errors.Is(err, client.ErrSilent) {
		t.Errorf("silent: %v", err)
	}
	if err := c.Kill(t.Context(), time.Second); err == nil || !strings.Contains(err.Error(), "cannot be seen") {
		t.Errorf("kill oneself: %v", err)
	}
}
