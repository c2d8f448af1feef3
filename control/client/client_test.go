// SPDX-License-Identifier: GPL-3.0-or-later

package client_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/mutex-proxy/mutex/control"
	"github.com/mutex-proxy/mutex/control/client"
	"github.com/mutex-proxy/mutex/control/controltest"
)

// asDaemon makes this test binary a daemon on the socket it names, in a process of its own.
const asDaemon = "CLIENT_TEST_DAEMON"

func TestMain(m *testing.M) {
	if socket := os.Getenv(asDaemon); socket != "" {
		os.Exit(runDaemon(socket))
	}
	goleak.VerifyTestMain(m)
}

func runDaemon(socket string) int {
	fake := controltest.New()
	stop := make(chan struct{})
	fake.OnStop = func() { close(stop) }
	server := control.NewServer(control.Config{Socket: socket, Backend: fake})
	if err := server.Start(); err != nil {
		return 1
	}
	fmt.Println("ready")
	<-stop
	// The socket goes first, the process a moment later, as with a daemon that still has the kernel to put back.
	_ = server.Close()
	_, _ = io.ReadAll(os.Stdin)
	return 0
}

func TestShutdownWaitsForTheProcess(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "m.sock")
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), asDaemon+"="+socket)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(stdout, make([]byte, 6)); err != nil {
		t.Fatal(err)
	}
	c := client.New(socket)
	defer c.Close()
	// The daemon cannot end before stdin does: a wait that ends before is no wait.
	short, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if err := c.Shutdown(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v though the daemon's process lives", err)
	}
	stdin.Close()
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	if err := c.Shutdown(t.Context()); !errors.Is(err, client.ErrUnreachable) {
		t.Errorf("got %v", err)
	}
}

func TestShutdownReturnsWithTheProcess(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "m.sock")
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), asDaemon+"="+socket)
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil { // stdin is empty: it ends at once
		t.Fatal(err)
	}
	if _, err := io.ReadFull(stdout, make([]byte, 6)); err != nil {
		t.Fatal(err)
	}
	c := client.New(socket)
	defer c.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := c.Shutdown(ctx); err != nil {
		t.Error(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
}

// answering serves one fixed answer to every connection.
func answering(t *testing.T, answer string) *client.Client {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "m.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = conn.Read(make([]byte, 4096))
			_, _ = io.WriteString(conn, answer)
			conn.Close()
		}
	}()
	c := client.New(socket)
	t.Cleanup(func() {
		c.Close()
		l.Close()
		<-done
	})
	return c
}

func TestOddAnswers(t *testing.T) {
	const ok = "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"
	for name, tc := range map[string]struct {
		answer string
		check  func(error) bool
	}{
		"closed":           {"", func(err error) bool { return errors.Is(err, client.ErrUnreachable) }},
		"not HTTP":         {"SSH-2.0-x\r\n", func(err error) bool { return err != nil }},
		"not JSON":         {ok + "<html>", func(err error) bool { return err != nil }},
		"wrong type":       {ok + "[]", func(err error) bool { return err != nil }},
		"error, not ours":  {"HTTP/1.1 502 Bad Gateway\r\nConnection: close\r\n\r\n<html>", func(err error) bool { return client.Code(err) == client.CodeInternal }},
		"error, empty":     {"HTTP/1.1 500 x\r\nConnection: close\r\n\r\n{}", func(err error) bool { return client.Code(err) == client.CodeInternal }},
		"error of the API": {"HTTP/1.1 403 x\r\nConnection: close\r\n\r\n{\"error\":{\"code\":\"forbidden\",\"message\":\"no\",\"path\":\"\"}}", func(err error) bool { return client.Code(err) == client.CodeForbidden }},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := answering(t, tc.answer).Status(t.Context()); !tc.check(err) {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestOddStreamsAndLeases(t *testing.T) {
	const ok = "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"
	for name, body := range map[string]string{"not JSON": "data: {\n\n", "endless line": "data: " + strings.Repeat("x", 2<<20)} {
		var got error
		for _, err := range answering(t, ok+body).WatchFlows(t.Context()) {
			got = err
		}
		if got == nil {
			t.Errorf("stream, %s: no error", name)
		}
		if _, err := answering(t, ok+body).Lease(t.Context(), client.LeaseRequest{Context: "c"}); err == nil {
			t.Errorf("lease, %s: no error", name)
		}
	}
	n := 0
	for _, err := range answering(t, ok+": hello\n\nevent: event\ndata: {\"kind\":\"x\"}\n\n").Events(t.Context()) {
		if err != nil {
			t.Error(err)
		}
		n++
	}
	if n != 1 {
		t.Errorf("%d events, want 1", n)
	}
}

func TestUnreachableSaysWhy(t *testing.T) {
	dir := t.TempDir()
	refused := filepath.Join(dir, "dead.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: refused, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	for socket, want := range map[string]string{filepath.Join(dir, "none"): "there is no such socket", refused: "nothing listens on it"} {
		_, err := client.New(socket).Status(t.Context())
		if !errors.Is(err, client.ErrUnreachable) || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), socket) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := client.New(refused).Status(cancelled); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want what ended the context", err)
	}
}

func TestLeaseContextBoundsTheAskingOnly(t *testing.T) {
	_, socket, stop := daemon()
	defer stop()
	c := client.New(socket)
	defer c.Close()
	ctx, cancel := context.WithCancel(t.Context())
	l, err := c.Lease(ctx, client.LeaseRequest{Context: "default"})
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if _, err := c.Status(t.Context()); err != nil { // a round trip: time enough for a mistake
		t.Error(err)
	}
	select {
	case <-l.Done():
		t.Error("the lease has ended with the context it was asked in")
	default:
	}
	if err := errors.Join(l.Close(), l.Close()); err != nil {
		t.Error(err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.Lease(ended, client.LeaseRequest{Context: "default"}); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

// TestEveryCallHasAnExample keeps the promise of the package.
func TestEveryCallHasAnExample(t *testing.T) {
	var source []byte
	for _, file := range []string{"example_test.go", "example_contexts_test.go"} {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		source = append(source, text...)
	}
	for m := range reflect.TypeFor[*client.Client]().Methods() {
		if m.Name != "Close" && m.Name != "Socket" && !bytes.Contains(source, []byte("func ExampleClient_"+m.Name+"()")) {
			t.Errorf("%s has no example", m.Name)
		}
	}
}
