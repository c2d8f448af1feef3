// SPDX-License-Identifier: GPL-3.0-or-later

package control_test

import (
	"errors"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/mutex-proxy/mutex/control"
	"github.com/mutex-proxy/mutex/control/controltest"
)

func server(socket string) *control.Server {
	return control.NewServer(control.Config{UserLeases: 16, Socket: socket, Backend: controltest.New()})
}

func TestSocketModeAndDirectory(t *testing.T) {
	d := start(t)
	info, err := os.Stat(d.socket)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode() != fs.ModeSocket|0o666 {
		t.Errorf("mode %v, want a socket for everyone", info.Mode())
	}
}

func TestStaleSocketIsReplaced(t *testing.T) {
	path := filepath.Join(t.TempDir(), "m.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false) // as after kill -9
	l.Close()
	s := server(path)
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

func TestLiveSocketIsAConflict(t *testing.T) {
	d := start(t)
	second := server(d.socket)
	if err := second.Start(); !errors.Is(err, control.ErrConflict) || strings.Contains(err.Error(), "\n") {
		t.Errorf("got %v, want a conflict in one line", err)
	}
	second.Close()
	if _, err := d.client.Status(t.Context()); err != nil {
		t.Errorf("the first daemon is disturbed: %v", err)
	}
}

func TestAFileThatIsNoSocketIsLeftAlone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "m.sock")
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	s := server(path)
	defer s.Close()
	if err := s.Start(); !errors.Is(err, control.ErrConflict) {
		t.Errorf("got %v, want a conflict", err)
	}
	if data, err := os.ReadFile(path); err != nil || string(data) != "precious" {
		t.Errorf("the file is now %q %v", data, err)
	}
}

func TestLongPath(t *testing.T) {
	s := server("/" + strings.Repeat("x", 200))
	defer s.Close()
	if err := s.Start(); err == nil || !strings.Contains(err.Error(), "107") {
		t.Errorf("got %v", err)
	}
}

func TestHTTPListenTakenLeavesNothing(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	path := filepath.Join(t.TempDir(), "m.sock")
	s := control.NewServer(control.Config{UserLeases: 16, Socket: path, HTTPListen: l.Addr().String(), Backend: controltest.New()})
	defer s.Close()
	if err := s.Start(); !errors.Is(err, control.ErrConflict) {
		t.Errorf("got %v, want a conflict", err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket is left: %v", err)
	}
}

func TestProbes(t *testing.T) {
	d := start(t, func(c *control.Config) {
		m, err := control.NewMetrics(c.Backend.(*controltest.Fake), "v1")
		if err != nil {
			t.Fatal(err)
		}
		c.HTTPListen, c.Metrics = "127.0.0.1:0", m
	})
	get := func(path string) (int, string) {
		tr := &http.Transport{DisableKeepAlives: true}
		req, err := http.NewRequestWithContext(t.Context(), "GET", "http://"+d.server.HTTPAddr().String()+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := tr.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		data, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, string(data)
	}
	if code, body := get("/livez"); code != 200 || body != "ok\n" {
		t.Errorf("livez: %d %q", code, body)
	}
	if code, body := get("/readyz"); code != 200 || body != "[+] context:default\n[+] guard\nok\n" {
		t.Errorf("readyz: %d %q", code, body)
	}
	d.Checks = append(d.Checks, control.Check{Name: "upstream:paris", Message: "refused"})
	if code, body := get("/readyz"); code != 503 || !strings.Contains(body, "[-] upstream:paris: refused\n") {
		t.Errorf("readyz: %d %q", code, body)
	}
	d.Checks = nil
	if code, _ := get("/readyz"); code != 503 {
		t.Errorf("readyz without a check: %d, want 503", code)
	}
	if code, body := get("/metrics"); code != 200 || !strings.Contains(body, `mprox_build_info{`) || !strings.Contains(body, "go_goroutines") || !strings.Contains(body, "process_open_fds") {
		t.Errorf("metrics: %d %q", code, body)
	}
	for _, path := range []string{"/v1/status", "/", "/v1/reload"} {
		if code, _ := get(path); code != 404 {
			t.Errorf("%s over TCP: %d, want 404", path, code)
		}
	}
}
