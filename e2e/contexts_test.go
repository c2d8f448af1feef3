// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/mutex-proxy/mutex/e2e/lab"
)

// exitOf is the address that the origin sees of a user's request: the proxy's, or the client's own.
func exitOf(t *testing.T, l *lab.Lab, uid int) netip.Addr {
	t.Helper()
	r := as(t, l, uid, "-m", "3", originURL(false, "/"))
	_, rest, _ := strings.Cut(r.Stdout, "hello ")
	host, _, _ := strings.Cut(rest, ":")
	a, err := netip.ParseAddr(host)
	if err != nil {
		t.Errorf("user %d: %v", uid, r)
	}
	return a
}

// must runs a command of mprox and fails the test if it fails.
func must(t *testing.T, m *lab.Mprox, args ...string) string {
	t.Helper()
	r := m.CLI(args...)
	if r.Code != 0 {
		t.Errorf("%s: %v", strings.Join(args, " "), r)
	}
	return r.Stdout
}

// TestContextsAtRunTime adds, switches, attaches and removes contexts while the daemon runs, and shows after each step whose next connection
// goes where, that a reload changes none of it, and that the end leaves nothing behind.
func TestContextsAtRunTime(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, true)
	other := l.DanteVia(t, 1081, false, lab.Exit2V4.String())
	before := l.Snapshot(t)
	m := l.Mprox(t)
	m.UpConfig(fmt.Sprintf(`{ "upstreams": { "p": { "url": %q } }, "contexts": { "default": { "mode": "disabled", "default": "p", "select": { "uid": 4009 } } } }`, s.URL()))
	where := func(step string, want map[int]netip.Addr) {
		t.Helper()
		for uid, addr := range want {
			if got := exitOf(t, l, uid); got != addr {
				t.Errorf("%s: user %d comes from %s, want %s", step, uid, got, addr)
			}
		}
	}
	direct, one, two := lab.ClientV4, lab.ExitV4, lab.Exit2V4
	where("at the start", map[int]netip.Addr{4001: direct, 4009: direct})

	must(t, m, "contexts", "add", "work", "--default", "p", "--uid", "4001")
	must(t, m, "contexts", "add", "other", "--proxy", other.URL(), "--uid", "4002")
	where("added", map[int]netip.Addr{4001: one, 4002: two, 4003: direct})
	must(t, m, "attach", "--context", "other", "--uid", "4003", "--gid", "4003")
	where("attached", map[int]netip.Addr{4001: one, 4002: two, 4003: two, 4004: direct})
	must(t, m, "contexts", "enable", "default")
	if err := m.Post("/v1/reload"); err != nil {
		t.Error(err)
	}
	where("enabled, reloaded", map[int]netip.Addr{4001: one, 4003: two, 4009: one})
	must(t, m, "contexts", "add", "all", "--proxy", other.URL(), "--mode", "global")
	where("a global one beside them", map[int]netip.Addr{0: two, 4001: one, 4004: two})

	p := lab.Start(t, "sleeper", l.Client.Command("setpriv", "--reuid", "4001", "--regid", "4001", "--clear-groups", "sleep", "300"))
	pid := strconv.Itoa(p.PID())
	var c struct {
		Context, Reason string
		Verdicts        []struct {
			Context string
			Matched bool
		}
	}
	lab.Eventually(t, 5*time.Second, "the process is user 4001", func() bool {
		return json.Unmarshal([]byte(m.CLI("contexts", "--of", pid, "-o", "json").Stdout), &c) == nil && c.Context == "work"
	})
	if !strings.Contains(c.Reason, "uid 4001") || len(c.Verdicts) != 4 || c.Verdicts[0].Context != "default" || c.Verdicts[3].Context != "all" {
		t.Errorf("--of: %+v", c)
	}
	if out := must(t, m, "explain", "tcp", "198.51.100.80:80", "--pid", pid); !strings.Contains(out, "goes to p") || !strings.Contains(out, "context work") {
		t.Errorf("explain --pid: %s", out)
	}
	for flags, want := range map[string]string{"--uid 4001": "work", "--uid 4002": "other", "--uid 4003 --gid 4003": "other", "--uid 4003": "all", "": "all"} {
		if out := must(t, m, append([]string{"explain", "tcp", "198.51.100.80:80"}, strings.Fields(flags)...)...); !regexp.MustCompile(`(?m)^context ` + want + ` .* yes `).MatchString(out) {
			t.Errorf("explain %s: %s", flags, out)
		}
	}

	must(t, m, "contexts", "disable", "work")
	where("disabled: the global one has them", map[int]netip.Addr{4001: two})
	for name, want := range map[string]string{"work": "mprox contexts enable work", "nobody": "all, default, other, work"} {
		for _, args := range [][]string{{"run", "--context", name, "--", "true"}, {"leaktest", "--context", name}, {"explain", "tcp", "198.51.100.80:80", "--context", name}} {
			if r := m.CLI(args...); r.Code == 0 || !strings.Contains(r.Stderr, want) || strings.Count(r.Stderr, "\n") != 1 {
				t.Errorf("%v: want %q, got %v", args, want, r)
			}
		}
	}
	must(t, m, "contexts", "rm", "all")
	must(t, m, "detach", "--context", "other", "--uid", "4003", "--gid", "4003")
	where("removed, detached", map[int]netip.Addr{0: direct, 4001: direct, 4002: two, 4003: direct, 4009: one})
	if out := must(t, m, "explain", "tcp", "198.51.100.80:80", "--uid", "4001"); !strings.Contains(out, "goes directly: not captured") {
		t.Errorf("explain of nobody's: %s", out)
	}
	must(t, m, "contexts", "enable", "work")
	where("enabled again", map[int]netip.Addr{4001: one})

	for _, tt := range []struct {
		args []string
		code int
	}{
		{[]string{"contexts", "add", "work", "--default", "p"}, 6},
		{[]string{"contexts", "add", "x", "--default", "nobody"}, 3},
		{[]string{"contexts", "add", "x"}, 2},
		{[]string{"contexts", "rm", "x"}, 1},
		{[]string{"attach", "--context", "work"}, 2},
		{[]string{"attach", "--context", "work", "--pid", "4194303"}, 1},
		{[]string{"attach", "--context", "work", "--pid", "2"}, 2}, // kthreadd
		{[]string{"attach", "--context", "work", "--pid", strconv.Itoa(zombie(t))}, 1},
		{[]string{"attach", "--context", "work", "--uid", "4294967295"}, 3},
		{[]string{"attach", "--context", "work", "--cgroup", "/../.."}, 3},
		{[]string{"guard", "off"}, 6},
		{[]string{"detach", "--context", "work", "--uid", "17"}, 1},
	} {
		if r := m.CLI(tt.args...); r.Code != tt.code || strings.Count(r.Stderr, "\n") != 1 {
			t.Errorf("%v: want exit %d and one line, got %v", tt.args, tt.code, r)
		} else if said := strings.Split(r.Stderr, ": "); len(slices.Compact(said)) < strings.Count(r.Stderr, ": ")+1 {
			t.Errorf("%v says it twice: %s", tt.args, r.Stderr)
		}
	}
	must(t, m, "down")
	if diff := before.Diff(l.Snapshot(t)); diff != "" {
		t.Errorf("not as before:\n%s", diff)
	}
}

// zombie is a process that has ended, and that its parent does not ask for.
func zombie(t *testing.T) int {
	t.Helper()
	cmd := exec.Command("true")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Wait() })
	lab.Eventually(t, 5*time.Second, "a process has ended", func() bool {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", cmd.Process.Pid))
		return err == nil && strings.Contains(string(b), ") Z ")
	})
	return cmd.Process.Pid
}

// TestExistingConnections attaches a process that has a connection: it stays in a context that keeps what is there, and is ended in one that
// resets it; what came in, and others' connections, always stay.
func TestExistingConnections(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, true)
	m := l.Mprox(t)
	m.UpConfig(fmt.Sprintf(`{ "upstreams": { "p": { "url": %q } }, "contexts": {
		"keep": { "mode": "process", "default": "p" }, "reset": { "mode": "process", "default": "p", "existing": "reset" } } }`, s.URL()))
	// Prints a dot a byte that comes back; the end is an exception with its errno.
	script := fmt.Sprintf(`
import socket, time, sys
s = socket.create_connection((%q, %d)); s.settimeout(10)
print("up", flush=True)
try:
    while True:
        s.sendall(b"x"); s.recv(1); time.sleep(0.02)
except OSError as e:
    print("errno", e.errno, flush=True); time.sleep(300)
`, lab.OriginV4.String(), lab.PortEcho)
	start := func() *lab.Proc {
		p := lab.Start(t, "talker", l.Client.Command("python3", "-c", script))
		lab.Eventually(t, 10*time.Second, "a connection", func() bool { return strings.Contains(p.Log.String(), "up") })
		return p
	}
	kept, ended, bystander := start(), start(), start()
	must(t, m, "attach", "--context", "keep", "--pid", strconv.Itoa(kept.PID()))
	must(t, m, "attach", "--context", "reset", "--pid", strconv.Itoa(ended.PID()))
	lab.Eventually(t, 2*time.Second, "the connection is reset", func() bool { return strings.Contains(ended.Log.String(), "errno 103") })
	lab.Never(t, 500*time.Millisecond, "another connection ends", func() bool {
		return strings.Contains(kept.Log.String()+bystander.Log.String(), "errno")
	})
}

// TestAllContexts has as many contexts as there are marks, each of a user, and passes a flow through each; one more is refused, and the end
// leaves nothing.
func TestAllContexts(t *testing.T) {
	t.Parallel()
	const n, first = 160, 5000
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, true)
	before := l.Snapshot(t)
	m := l.Mprox(t)
	config := func(n int) string {
		var contexts []string
		for i := range n {
			contexts = append(contexts, fmt.Sprintf(`"c%d": { "mode": "process", "select": { "uid": %d }, "default": "p" }`, i, first+i))
		}
		return fmt.Sprintf(`{ "upstreams": { "p": { "url": %q } }, "contexts": { %s } }`, s.URL(), strings.Join(contexts, ", "))
	}
	m.WriteConfig(config(n + 1))
	if r := m.CLI("up", "-c", m.ConfigPath()); r.Code != 3 && r.Code != 6 || strings.Count(r.Stderr, "\n") != 1 {
		t.Errorf("161 contexts: %v", r)
	}
	started := time.Now()
	m.UpConfig(config(n))
	t.Logf("ready after %s, %d MiB", time.Since(started), m.RSS()>>20)
	// Each user in turn, without the time that a new program takes; users beside them stay direct.
	script := fmt.Sprintf(`
import os, socket
"loaded as long as this is root".encode("idna")
for uid in range(%d, %d):
    if (pid := os.fork()) == 0:
        os.setgid(uid); os.setuid(uid)
        for a in (%q, %q):
            s = socket.create_connection((a, 80), 10); s.sendall(b"GET / HTTP/1.0\r\n\r\n")
            b = b""
            while d := s.recv(4096): b += d
            print(uid, b.split(b"hello ")[1].split(b"\n")[0].decode(), flush=True)
        os._exit(0)
    os.waitpid(pid, 0)`, first, first+n+1, lab.OriginV4, lab.OriginV6)
	r := lab.Exec(t, l.Client.Command("python3", "-c", script))
	if r.Code != 0 || strings.Count(r.Stdout, "\n") != 2*(n+1) {
		t.Fatalf("%v", r)
	}
	for line := range strings.Lines(r.Stdout) {
		uid, from, _ := strings.Cut(line, " ")
		if proxied := fromProxy("hello " + from); proxied == (uid == strconv.Itoa(first+n)) {
			t.Errorf("user %s comes from %s", uid, from)
		}
	}
	for _, c := range m.Status().Contexts {
		if c.FlowsTotal != 2 {
			t.Errorf("context %s has had %d flows, want 2", c.Name, c.FlowsTotal)
		}
	}
	if len(m.Status().Contexts) != n {
		t.Errorf("%d contexts", len(m.Status().Contexts))
	}
	stopping := time.Now()
	must(t, m, "down")
	t.Logf("undone after %s", time.Since(stopping))
	if diff := before.Diff(l.Snapshot(t)); diff != "" {
		t.Errorf("not as before:\n%s", diff)
	}
}
