// SPDX-License-Identifier: GPL-3.0-or-later

package client_test

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

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

// TestAliveFull asks one who has not taken a connection for so long that no other can be made: it is silent, and its process is still found.
func TestAliveFull(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrUnix{Name: socket}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	full := false
	for range 10 {
		conn, err := new(net.Dialer).DialContext(t.Context(), "unix", socket)
		if full = errors.Is(err, unix.EAGAIN); full {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
	}
	if !full {
		t.Fatal("there is always room for another connection")
	}
	c := client.New(socket)
	defer c.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if err := c.Alive(ctx); !errors.Is(err, client.ErrSilent) {
		t.Errorf("full: %v", err)
	}
	if pid, err := c.PID(t.Context()); pid != os.Getpid() || err != nil {
		t.Errorf("pid %d, %v", pid, err)
	}
}
