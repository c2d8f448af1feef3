// SPDX-License-Identifier: GPL-3.0-or-later

package server

import (
	"errors"
	"io"
	"runtime"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/dialers/dialertest"
	"github.com/mutex-proxy/mutex/flow"
)

func TestReset(t *testing.T) {
	_, at := start(t, Config{})
	reset := make(chan struct{})
	got := make(chan error, 10)
	origin := dialertest.Start(t, func(c *dialertest.Conv) error {
		first := make([]byte, 1)
		if _, err := io.ReadFull(c, first); err != nil {
			return err
		}
		if first[0] == 'o' { // the origin resets
			<-reset
			return dialertest.Reset()(c)
		}
		_, err := io.Copy(io.Discard, c) // the client does
		got <- err
		return err
	})
	for _, raw := range upstreams(at, "") {
		c, err := dialer(t, raw).Dial(t.Context(), flow.AddrFrom(origin.Addr))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(c, "c"); err != nil {
			t.Fatal(err)
		}
		// The byte must be through before the reset overtakes it.
		waitUnsent(t, c)
		c.Abort()
		if err := <-got; err != nil && !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("%s: the origin saw %v", raw, err)
		} else if err == nil {
			t.Errorf("%s: the origin saw an end of file for a reset", raw)
		}
	}
	c, err := dialer(t, upstreams(at, "")[0]).Dial(t.Context(), flow.AddrFrom(origin.Addr))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.WriteString(c, "o"); err != nil {
		t.Fatal(err)
	}
	close(reset)
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the client saw %v", err)
	}
}

// TestResetAfterFIN: a side that has said all it had to say, and is then reset, takes the other with it, although nothing moves.
func TestResetAfterFIN(t *testing.T) {
	s, at := start(t, Config{})
	step := make(chan struct{})
	origin := dialertest.Start(t, func(c *dialertest.Conv) error {
		first := make([]byte, 1)
		if _, err := io.ReadFull(c, first); err != nil {
			return err
		}
		if first[0] == 'o' { // the origin is the first to end, and resets
			if err := c.CloseWrite(); err != nil {
				return err
			}
			<-step
			return dialertest.Reset()(c)
		}
		_, err := io.Copy(io.Discard, c)
		step <- struct{}{}
		<-step // silent and open, until the server has ended the connection
		return err
	})
	for _, raw := range upstreams(at, "") {
		for _, who := range []string{"c", "o"} {
			c, err := dialer(t, raw).Dial(t.Context(), flow.AddrFrom(origin.Addr))
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.WriteString(c, who); err != nil {
				t.Fatal(err)
			}
			if who == "c" {
				_ = c.CloseWrite()
				<-step
				c.Abort()
			} else {
				if _, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
					t.Fatal(err)
				}
				step <- struct{}{}
			}
			for deadline := time.Now().Add(5 * time.Second); s.Active() > 0; runtime.Gosched() {
				if time.Now().After(deadline) {
					t.Fatalf("%s: reset by %q, and still open", raw, who)
				}
			}
			if who == "c" {
				step <- struct{}{}
			}
			_ = c.Close()
		}
	}
}

// waitUnsent waits until the peer has acknowledged everything.
func waitUnsent(t *testing.T, c flow.Conn) {
	t.Helper()
	raw, err := c.(syscall.Conn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	for n := 1; n > 0; {
		if cerr := raw.Control(func(fd uintptr) { n, err = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) }); cerr != nil || err != nil {
			t.Fatal(cerr, err)
		}
	}
}
