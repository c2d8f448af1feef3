// SPDX-License-Identifier: GPL-3.0-or-later

package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

var (
	buildOnce sync.Once
	buildBin  string
	buildErr  error
)

// Binary returns the program under test: $MPROX_BIN, or one built now.
func Binary(t *testing.T) string {
	t.Helper()
	if bin := os.Getenv("MPROX_BIN"); bin != "" {
		return bin
	}
	buildOnce.Do(func() {
		buildBin = filepath.Join(os.TempDir(), fmt.Sprintf("mprox-e2e-%d", os.Getpid()))
		cmd := exec.Command("go", "build", "-trimpath", "-o", buildBin, "github.com/mutex-proxy/mutex/cmd/mprox")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			buildErr = fmt.Errorf("build mprox: %w: %s", err, out)
		}
	})
	if buildErr != nil {
		t.Fatal(buildErr)
	}
	return buildBin
}

// RemoveBinary removes what Binary built. TestMain calls it last.
func RemoveBinary() {
	if buildBin != "" {
		_ = os.Remove(buildBin)
	}
}

// Mprox is one instance of the program in the client's namespace: a socket, a state directory, and at most one daemon at a time.
type Mprox struct {
	*Proc  // the daemon, after Up or Start
	Socket string
	State  string
	Env    []string
	lab    *Lab
	t      *testing.T
	bin    string
}

var mproxSeq atomic.Int64

// Mprox returns an instance that nothing has been started of yet. What it leaves in the kernel goes with the namespace; what it leaves
// elsewhere is removed by `cleanup` at the end.
func (l *Lab) Mprox(t *testing.T) *Mprox {
	t.Helper()
	dir := filepath.Join(l.Dir, fmt.Sprintf("m%d", mproxSeq.Add(1)))
	if err := errors.Join(os.MkdirAll(dir, 0o755), os.MkdirAll(filepath.Join(dir, "lib"), 0o755)); err != nil {
		t.Fatal(err)
	}
	m := &Mprox{Socket: filepath.Join(dir, "s.sock"), State: filepath.Join(dir, "lib"), lab: l, t: t, bin: Binary(t)}
	t.Cleanup(func() {
		if m.Proc != nil {
			m.Stop()
		}
		m.CLI("cleanup")
	})
	return m
}

// Args returns a command line of the instance.
func (m *Mprox) Args(args ...string) []string {
	pre := []string{m.bin, "--socket", m.Socket, "--state-dir", m.State}
	return append(pre, args...)
}

// Command returns a command line of the instance in the client's namespace, not yet started.
func (m *Mprox) Command(args ...string) *exec.Cmd {
	return m.command(m.Args(args...)...)
}

func (m *Mprox) command(args ...string) *exec.Cmd {
	cmd := m.lab.Client.Command(withoutRepair(args)...)
	if m.Env != nil {
		cmd.Env = append(os.Environ(), m.Env...)
	}
	return cmd
}

// Result is what a command printed, and its exit status (128 + signal).
type Result struct {
	Stdout, Stderr string
	Code           int
}

// String shows the result in a test's message.
func (r Result) String() string {
	return fmt.Sprintf("exit %d\nstdout: %s\nstderr: %s", r.Code, r.Stdout, r.Stderr)
}

// CLI runs a command of the instance to its end, at most a minute.
func (m *Mprox) CLI(args ...string) Result {
	return m.Exec(m.Command(args...))
}

// Exec runs a prepared command to its end, at most a minute.
func (m *Mprox) Exec(cmd *exec.Cmd) Result {
	return Exec(m.t, cmd)
}

// Exec runs a prepared command to its end, at most a minute.
func Exec(t *testing.T, cmd *exec.Cmd) Result {
	t.Helper()
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	p, err := start(cmd.Args[0], cmd)
	if err != nil {
		t.Fatal(err)
	}
	code := p.Wait(time.Minute)
	if code < 0 {
		_ = syscall.Kill(-p.PID(), syscall.SIGKILL)
		p.Kill()
		t.Errorf("%v did not end within a minute", cmd.Args)
	}
	return Result{stdout.String(), stderr.String(), code}
}

// Start runs `mprox up ARGS` and does not wait for it to be ready.
func (m *Mprox) Start(args ...string) {
	m.t.Helper()
	m.StartCommand(m.Command(append([]string{"up"}, args...)...))
}

// StartCommand runs a prepared command as the instance's daemon.
func (m *Mprox) StartCommand(cmd *exec.Cmd) {
	m.t.Helper()
	p, err := start("mprox up", cmd)
	if err != nil {
		m.t.Fatal(err)
	}
	m.Proc = p
	m.t.Cleanup(func() {
		p.Stop()
		if m.t.Failed() {
			m.t.Logf("output of mprox (pid %d):\n%s", p.PID(), tail(p.Log.String(), 6000))
		}
	})
}

// Up runs `mprox up ARGS` and waits until it is ready.
func (m *Mprox) Up(args ...string) {
	m.t.Helper()
	m.Start(args...)
	m.WaitReady()
}

// UpConfig writes a configuration file and runs `mprox up -c` on it.
func (m *Mprox) UpConfig(config string) {
	m.t.Helper()
	m.WriteConfig(config)
	m.Up("-c", m.ConfigPath())
}

// ConfigPath is where WriteConfig writes.
func (m *Mprox) ConfigPath() string { return filepath.Join(filepath.Dir(m.Socket), "config.json") }

// WriteConfig replaces the instance's configuration file.
func (m *Mprox) WriteConfig(config string) {
	m.t.Helper()
	tmp := m.ConfigPath() + ".new"
	if err := errors.Join(os.WriteFile(tmp, []byte(config), 0o600), os.Rename(tmp, m.ConfigPath())); err != nil {
		m.t.Fatal(err)
	}
}

// WaitReady waits until the daemon answers on its socket and has a context.
func (m *Mprox) WaitReady() {
	m.t.Helper()
	Eventually(m.t, 20*time.Second, "mprox up is ready", func() bool {
		if m.Exited() {
			m.t.Fatalf("mprox up ended with %d:\n%s", m.Wait(0), m.Log)
		}
		return m.Ready()
	})
}

// Ready reports whether a daemon answers on the socket.
func (m *Mprox) Ready() bool {
	var s Status
	return m.Get("/v1/status", &s) == nil && len(s.Contexts) > 0 && (s.Contexts[0].TUN != "" || s.Contexts[0].Mode == "disabled")
}

// Status is `mprox status -o json` as far as the tests look at it.
type Status struct {
	Version   string
	PID       int
	Contexts  []ContextStatus
	Upstreams []UpstreamStatus
	Guard     struct {
		Active         bool
		DroppedPackets uint64 `json:"dropped_packets"`
	}
	DNS struct {
		Queries, Blocked, Failures uint64
		CacheHits                  uint64 `json:"cache_hits"`
	}
}

// ContextStatus is one context of Status.
type ContextStatus struct {
	Name, Mode, TUN, Default string
	Enabled, Lease           bool
	FlowsActive              int    `json:"flows_active"`
	FlowsTotal               uint64 `json:"flows_total"`
	BytesUp                  uint64 `json:"bytes_up"`
	BytesDown                uint64 `json:"bytes_down"`
	PacketsDropped           uint64 `json:"packets_dropped"`
}

// UpstreamStatus is one upstream of Status.
type UpstreamStatus struct {
	Name, URL, UDP string
	Up             bool
	Errors         uint64
}

// Flow is one element of `mprox flows -o json`.
type Flow struct {
	ID         uint64
	Context    string
	Network    string
	Src, Dst   string
	Host       string
	HostSource string `json:"host_source"`
	Rule       string
	Upstream   string
	State      string
	Handshake  string
	BytesUp    uint64 `json:"bytes_up"`
	BytesDown  uint64 `json:"bytes_down"`
	Error      string
	Path       string
	PathReason string `json:"path_reason"`
}

// Get asks the control socket, as the root user of the tests.
func (m *Mprox) Get(path string, into any) error {
	return m.request(http.MethodGet, path, into)
}

// Post sends an empty request to the control socket.
func (m *Mprox) Post(path string) error { return m.request(http.MethodPost, path, nil) }

func (m *Mprox) request(method, path string, into any) error {
	tr := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", m.Socket)
	}}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, "http://mprox"+path, nil)
	if err != nil {
		return err
	}
	resp, err := tr.RoundTrip(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode >= 300 {
		return fmt.Errorf("%s: %s: %s", path, resp.Status, b)
	}
	if into == nil {
		return nil
	}
	return json.Unmarshal(b, into)
}

// Status returns the daemon's status and fails the test when there is none.
func (m *Mprox) Status() Status {
	m.t.Helper()
	var s Status
	if err := m.Get("/v1/status", &s); err != nil {
		m.t.Fatal(err)
	}
	return s
}

// Flows returns the daemon's flows.
func (m *Mprox) Flows() []Flow {
	m.t.Helper()
	var f []Flow
	if err := m.Get("/v1/flows", &f); err != nil {
		m.t.Fatal(err)
	}
	return f
}

// RSS is the resident memory of the daemon in bytes.
func (m *Mprox) RSS() int64 {
	m.t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", m.PID()))
	if err != nil {
		m.t.Fatal(err)
	}
	var size, rss int64
	if _, err := fmt.Sscan(string(b), &size, &rss); err != nil {
		m.t.Fatal(err)
	}
	return rss * int64(os.Getpagesize())
}

// PublicBinary returns a copy of the program that any user may execute.
func (l *Lab) PublicBinary(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile(Binary(t))
	if err != nil {
		t.Fatal(err)
	}
	p := filepath.Join(l.Dir, "mprox")
	if err := os.WriteFile(p, b, 0o755); err != nil {
		t.Fatal(err)
	}
	return p
}

// Local runs the program to its end outside of any lab, for what needs neither root nor a network.
func Local(t *testing.T, args ...string) Result {
	t.Helper()
	return Exec(t, exec.Command(Binary(t), args...))
}
