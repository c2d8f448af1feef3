// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"bytes"
	"context"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/cobra"
	"go.uber.org/goleak"

	"github.com/mutex-proxy/mutex/config"
	"github.com/mutex-proxy/mutex/control"
	"github.com/mutex-proxy/mutex/control/client"
	"github.com/mutex-proxy/mutex/control/controltest"
	"github.com/mutex-proxy/mutex/policy"
	"github.com/mutex-proxy/mutex/tun"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// result is what a command line came to.
type result struct {
	code           int
	stdout, stderr string
}

// mprox runs one command line in this process.
func mprox(t *testing.T, args ...string) result {
	t.Helper()
	return mproxWith(t, newGlobals(), args...)
}

func mproxWith(t *testing.T, g *globals, args ...string) result {
	t.Helper()
	var out, errs bytes.Buffer
	code := execute(g, args, &out, &errs)
	return result{code, out.String(), errs.String()}
}

// fakeDaemon serves a fake backend on a real socket until the test ends.
func fakeDaemon(t *testing.T) (*controltest.Fake, string) {
	t.Helper()
	fake := controltest.New()
	socket := filepath.Join(t.TempDir(), "m.sock")
	s := control.NewServer(control.Config{Socket: socket, Backend: fake, Now: controltest.Epoch})
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return fake, socket
}

// golden compares with testdata/golden; MPROX_UPDATE_GOLDEN=1 writes it anew.
func golden(t *testing.T, file, got string) {
	t.Helper()
	path := filepath.Join("testdata", "golden", file)
	if os.Getenv("MPROX_UPDATE_GOLDEN") != "" {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("differs from %s; if that is meant, run the test with MPROX_UPDATE_GOLDEN=1 (-want +got):\n%s", path, diff)
	}
}

// everyCommand calls f for each command a user sees.
func everyCommand(cmd *cobra.Command, f func(*cobra.Command)) {
	if cmd.Hidden || cmd.Name() == "help" {
		return
	}
	f(cmd)
	for _, c := range cmd.Commands() {
		everyCommand(c, f)
	}
}

func TestHelp(t *testing.T) {
	everyCommand(newRootCommand(newGlobals()), func(cmd *cobra.Command) {
		words := strings.Fields(cmd.CommandPath())[1:]
		t.Run(cmd.CommandPath(), func(t *testing.T) {
			if cmd.Example == "" || cmd.Short == "" {
				t.Error("no example, or no description")
			}
			r := mprox(t, append(words, "--help")...)
			if r.code != 0 || r.stderr != "" {
				t.Errorf("got %+v", r)
			}
			golden(t, filepath.Join("help", strings.Join(append([]string{"mprox"}, words...), "-")+".txt"), r.stdout)
		})
	})
}

func TestOutput(t *testing.T) {
	for _, command := range []string{"status", "flows", "contexts", "upstreams", "stats", "healthcheck", "explain tcp example.com:443", "dns query example.com"} {
		for _, format := range []string{"table", "json", "csv"} {
			name := strings.ReplaceAll(strings.Split(command, " ")[0], " ", "-") + "." + strings.Replace(format, "table", "txt", 1)
			t.Run(name, func(t *testing.T) {
				fake, socket := fakeDaemon(t)
				if command == "dns query example.com" {
					fake.ExchangeFunc = answerA
				}
				r := mprox(t, append(strings.Fields(command), "--socket", socket, "-o", format)...)
				if r.code != 0 || r.stderr != "" {
					t.Fatalf("got %+v", r)
				}
				switch format {
				case "json":
					if !json.Valid([]byte(r.stdout)) {
						t.Error("not JSON")
					}
				case "csv":
					if _, err := csv.NewReader(strings.NewReader(r.stdout)).ReadAll(); err != nil {
						t.Error(err)
					}
				}
				if strings.HasPrefix(command, "dns") && format == "json" {
					return // it tells how long it took
				}
				golden(t, filepath.Join("output", name), r.stdout)
			})
		}
	}
}

func TestStatusWithNothingToTell(t *testing.T) {
	fake, socket := fakeDaemon(t)
	fake.StatusValue = control.Status{Version: "v1", PID: 1, Config: control.ConfigStatus{LoadedAt: controltest.Epoch()}}
	fake.FlowList = nil
	golden(t, "output/status-empty.txt", mprox(t, "status", "--socket", socket).stdout)
	if r := mprox(t, "flows", "--socket", socket, "-o", "json"); r.stdout != "[]\n" {
		t.Errorf("got %q", r.stdout)
	}
	if r := mprox(t, "flows", "--socket", socket); strings.Count(r.stdout, "\n") != 1 {
		t.Errorf("got %q, want the head of the table", r.stdout)
	}
}

func TestWatch(t *testing.T) {
	live := client.Flow{
		ID: 1, Context: "default", Network: "tcp", Src: "192.0.2.7:40000", Dst: "198.18.0.5:443", Host: "example.com", Upstream: "paris",
		Rule: "default", State: "established", Start: controltest.Epoch(),
	}
	closed := live
	closed.State, closed.BytesUp, closed.BytesDown, closed.DurationSeconds, closed.Error = "closed", 517, 4096, 1.5, "reset\x1b[2J"
	flows := func(yield func(client.Flow, error) bool) {
		_ = yield(live, nil) && yield(closed, nil) && yield(client.Flow{}, context.Canceled)
	}
	var out bytes.Buffer
	if err := printFlows(&out, flows, false); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{" established #1 default tcp 192.0.2.7:40000 > example.com:443 via paris (default)\n", "up 517 B down 4.0 KiB in 1.5s: reset\\u001b[2J\n"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q lacks %q", out.String(), want)
		}
	}
	out.Reset()
	if err := printFlows(&out, flows, true); err != nil {
		t.Fatal(err)
	}
	if lines := strings.Split(strings.TrimSpace(out.String()), "\n"); len(lines) != 2 || !json.Valid([]byte(lines[0])) || !json.Valid([]byte(lines[1])) {
		t.Errorf("not two JSON lines: %q", out.String())
	}
	failed := errors.New("broken")
	if err := printFlows(&out, func(yield func(client.Flow, error) bool) { yield(client.Flow{}, failed) }, true); !errors.Is(err, failed) {
		t.Errorf("got %v", err)
	}
}

func TestFlowsKill(t *testing.T) {
	fake, socket := fakeDaemon(t)
	r := mprox(t, "flows", "kill", "1", "99", "--socket", socket)
	if r.code != exitFailed || r.stderr != "mprox: there is no live flow 99\n" || !slices.Equal(fake.Killed(), []uint64{1}) {
		t.Errorf("got %+v, killed %v", r, fake.Killed())
	}
}

func TestUpstreams(t *testing.T) {
	fake, socket := fakeDaemon(t)
	r := mprox(t, "upstreams", "test", "paris", "--socket", socket)
	if r.code != 0 || r.stderr != "" {
		t.Errorf("got %+v", r)
	}
	golden(t, "output/upstreams-test.txt", r.stdout)
	r = mprox(t, "upstreams", "test", "berlin", "--target", "192.0.2.1:80", "-o", "json", "--socket", socket)
	if r.code != exitFailed || !json.Valid([]byte(r.stdout)) || !strings.Contains(r.stderr, "berlin has failed: no connection to ") {
		t.Errorf("got %+v", r)
	}
	if r := mprox(t, "upstreams", "test", "paris", "--target", "a", "--socket", socket); r.code != exitUsage {
		t.Errorf("got %+v", r)
	}
	for word, want := range map[string]string{"drain": "draining", "disable": "disabled", "enable": "enabled"} {
		if r := mprox(t, "upstreams", word, "paris", "--socket", socket); r.code != 0 || fake.StatusValue.Upstreams[1].State != want {
			t.Errorf("%s: %+v", word, r)
		}
		if r := mprox(t, "upstreams", word, "none", "--socket", socket); r.code != exitFailed {
			t.Errorf("%s: %+v", word, r)
		}
	}
}

func TestHealthcheck(t *testing.T) {
	fake, socket := fakeDaemon(t)
	fake.Checks = append(fake.Checks, control.Check{Name: "device:default", Message: "the device is gone: restart mprox"})
	r := mprox(t, "healthcheck", "--socket", socket)
	if r.code != exitCheck || r.stderr != "mprox: not healthy: device:default: the device is gone: restart mprox\n" {
		t.Errorf("got %+v", r)
	}
	fake.Checks = nil
	if r := mprox(t, "healthcheck", "--socket", socket); r.code != exitCheck {
		t.Errorf("without a check: %+v", r)
	}
}

func TestReload(t *testing.T) {
	fake, socket := fakeDaemon(t)
	if r := mprox(t, "reload", "--socket", socket); r.code != 0 || r.stdout+r.stderr != "" || fake.Reloads() != 1 {
		t.Errorf("got %+v", r)
	}
	fake.ReloadErr = config.Errors{{File: "c.json", Line: 3, Column: 9, Path: "$.a", Msg: "one"}, {File: "c.json", Line: 4, Column: 2, Path: "$.b", Msg: "two"}}
	if r := mprox(t, "reload", "--socket", socket); r.code != exitConfig || !strings.Contains(r.stderr, "c.json:4:2: $.b: two\n") {
		t.Errorf("got %+v", r)
	}
}

func TestDownStopsTheDaemon(t *testing.T) {
	fake := controltest.New()
	socket := filepath.Join(t.TempDir(), "m.sock")
	s := control.NewServer(control.Config{Socket: socket, Backend: fake})
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	closed := make(chan error, 1)
	fake.OnStop = func() { go func() { closed <- s.Close() }() }
	g := newGlobals()
	g.cleanup = func(context.Context, policy.Instance) (policy.Report, error) {
		t.Error("a daemon that was there is cleaned up after")
		return policy.Report{}, nil
	}
	if r := mproxWith(t, g, "down", "--socket", socket); r.code != 0 {
		t.Errorf("got %+v", r)
	}
	if err := <-closed; err != nil {
		t.Error(err)
	}
}

func TestDownWithoutDaemonCleansUp(t *testing.T) {
	for _, command := range []string{"down", "cleanup"} {
		dir := t.TempDir()
		for _, name := range []string{"run-77.state.json", "run-78.sock", "other.state.json"} {
			if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		var seen []string
		g := newGlobals()
		g.cleanup = func(_ context.Context, in policy.Instance) (policy.Report, error) {
			seen = append(seen, filepath.Base(in.Socket)+" "+filepath.Base(in.Journal))
			if in.Run {
				return policy.Report{Skipped: "its owner lives"}, nil
			}
			return policy.Report{Removed: []string{"rule 8000"}}, nil
		}
		r := mproxWith(t, g, command, "--socket", filepath.Join(dir, "mprox.sock"))
		if r.code != 0 || !strings.Contains(r.stdout, "removed rule 8000\n") || !strings.Contains(r.stdout, "run-77.sock: nothing done: its owner lives\n") {
			t.Errorf("%s: got %+v", command, r)
		}
		if want := []string{"mprox.sock state.json", "run-77.sock run-77.state.json", "run-78.sock run-78.state.json"}; !slices.Equal(seen, want) {
			t.Errorf("%s: cleaned up after %q, want %q", command, seen, want)
		}
	}
}

func TestCleanupRemovesADeadSocket(t *testing.T) {
	dir := t.TempDir()
	dead := deadSocket(t, filepath.Join(dir, "mprox.sock"))
	g := newGlobals()
	g.cleanup = func(context.Context, policy.Instance) (policy.Report, error) { return policy.Report{}, nil }
	if r := mproxWith(t, g, "cleanup", "--socket", dead); r.code != 0 {
		t.Errorf("got %+v", r)
	}
	if _, err := os.Lstat(dead); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the dead socket stays: %v", err)
	}
	_, live := fakeDaemon(t)
	if r := mproxWith(t, g, "cleanup", "--socket", live); r.code != 0 {
		t.Errorf("got %+v", r)
	}
	if _, err := os.Lstat(live); err != nil {
		t.Errorf("the socket of a living daemon is gone: %v", err)
	}
}

// A value that a flag does not take is told in the user's words.
func TestFlagErrors(t *testing.T) {
	for _, tc := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"contexts", "--of", "nosuch"}, exitUsage, `mprox: invalid argument "nosuch" for "--of" flag: invalid syntax; see mprox contexts --help`},
		{[]string{"serve", "--max-connections", "99999999999999999999"}, exitUsage, `for "--max-connections" flag: value out of range;`},
		{[]string{"serve", "--max-connections", "0"}, exitUsage, "--idle-timeout are positive"},
		{[]string{"serve", "--idle-timeout", "0s"}, exitUsage, "--idle-timeout are positive"},
		{[]string{"upstreams", "test", "paris", "--target", ":80"}, exitUsage, `--target ":80" is not HOST:PORT`},
		{[]string{"upstreams", "test", "paris", "--target", "a:70000"}, exitUsage, `--target "a:70000" is not HOST:PORT`},
		{[]string{"upstreams", "test", "paris", "--target", "a:0"}, exitUsage, `--target "a:0" is not HOST:PORT`},
		{[]string{"run", "--bogus", "--", "true"}, exitRunFailed, "mprox: unknown flag: --bogus; see mprox run --help"},
	} {
		if r := mprox(t, tc.args...); r.code != tc.code || !strings.Contains(r.stderr, tc.want) || strings.Contains(r.stderr, "strconv") {
			t.Errorf("%v: %+v", tc.args, r)
		}
	}
}

func TestExitCodes(t *testing.T) {
	for _, tc := range []struct {
		err  error
		want int
	}{
		{errors.New("x"), exitFailed},
		{usageError("x"), exitUsage},
		{fmt.Errorf("a: %w", exitError{exitRunFailed, client.ErrUnreachable}), exitRunFailed},
		{config.Errors{{Msg: "x"}}, exitConfig},
		{config.Errors{{Path: "--proxy", Msg: "x"}}, exitUsage},
		{fmt.Errorf("a: %w", &config.Error{Msg: "x"}), exitConfig},
		{fmt.Errorf("a: %w", policy.ErrPrivilege), exitPrivilege},
		{fmt.Errorf("a: %w", policy.ErrFeature), exitPrivilege},
		{fmt.Errorf("a: %w", tun.ErrNoDevice), exitPrivilege},
		{fmt.Errorf("a: %w", tun.ErrNoPermission), exitPrivilege},
		{fmt.Errorf("a: %w", tun.ErrBusy), exitConflict},
		{fmt.Errorf("a: %w", policy.ErrConflict), exitConflict},
		{fmt.Errorf("a: %w", control.ErrConflict), exitConflict},
		{fmt.Errorf("a: %w", client.ErrUnreachable), exitUnreachable},
		{&client.Error{Code: client.CodeConfigInvalid}, exitConfig},
		{&client.Error{Code: client.CodeForbidden}, exitPrivilege},
		{&client.Error{Code: client.CodePrivilege}, exitPrivilege},
		{&client.Error{Code: client.CodeConflict}, exitConflict},
		{&client.Error{Code: client.CodeBadRequest}, exitUsage},
		{&client.Error{Code: client.CodeNotFound}, exitFailed},
	} {
		if got := exitCode(tc.err); got != tc.want {
			t.Errorf("%T %v: got %d, want %d", tc.err, tc.err, got, tc.want)
		}
	}
}

func TestWrongUsage(t *testing.T) {
	absent := filepath.Join(t.TempDir(), "no.sock")
	for _, tc := range []struct {
		args string
		want int
	}{
		{"no-such-command", 2},
		{"flows no-such-command", 2},
		{"status extra", 2},
		{"status --no-such-flag", 2},
		{"status -o xml", 2},
		{"status --log-level loud", 2},
		{"stats --format xml", 2},
		{"flows kill", 2},
		{"flows kill 0", 2},
		{"flows --watch -o csv", 2},
		{"explain tcp", 2},
		{"explain icmp h:1", 2},
		{"completion tcsh", 2},
		{"man", 2},
		{"init --template none", 2},
		{"fmt -w -", 2},
		{"serve --listen nowhere", 2},
		{"serve --user u", 2},
		{"serve --password-file f", 2},
		{"serve --user u --password-file /nonexistent", 2},
		{"dns query", 2},
		{"up extra", 2},
		{"up --proxy gopher://x", 2},
		{"run", 125},
		{"run --no-such-flag -- true", 125},
		{"run -- true", 125},
		{"--no-such-flag run -- true", 2},
		{"--socket " + absent + " status", 5},
		{"--socket " + absent + " flows", 5},
		{"--socket " + absent + " flows --watch", 5},
		{"--socket " + absent + " flows kill 1", 5},
		{"--socket " + absent + " contexts", 5},
		{"--socket " + absent + " upstreams", 5},
		{"--socket " + absent + " stats", 5},
		{"--socket " + absent + " reload", 5},
		{"--socket " + absent + " healthcheck", 5},
		{"--socket " + absent + " explain tcp h:1", 5},
		{"--socket " + absent + " dns query h", 5},
		{"check /nonexistent/config.json", 3},
		{"fmt /nonexistent/config.json", 3},
	} {
		r := mprox(t, strings.Fields(tc.args)...)
		if r.code != tc.want || r.stdout != "" || strings.Count(r.stderr, "\n") != 1 {
			t.Errorf("mprox %s: got %+v, want exit %d and one line on stderr", tc.args, r, tc.want)
		}
	}
}

func TestHostileNamesAreMadePrintable(t *testing.T) {
	fake, socket := fakeDaemon(t)
	fake.FlowList[1].Dst.Host = "a\x1b]0;pwned\x07\n.example\u202e"
	r := mprox(t, "flows", "--socket", socket)
	if !strings.Contains(r.stdout, `a\u001b]0;pwned\u0007\u000a.example\u202e:443`) || strings.ContainsAny(r.stdout, "\x1b\x07\u202e") {
		t.Errorf("got %q", r.stdout)
	}
}

func TestSizesAndSpans(t *testing.T) {
	for n, want := range map[uint64]string{0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 1 << 20: "1.0 MiB", 1<<20 - 1: "1.0 MiB", 1 << 40: "1.0 TiB", 1 << 63: "8192.0 PiB"} {
		if got := size(n); got != want {
			t.Errorf("size(%d) = %q, want %q", n, got, want)
		}
	}
	for s, want := range map[float64]string{0: "0ms", 0.00034: "0.3ms", 0.0213: "21ms", 1.5: "1.5s", 90: "1m30s", 3725: "1h2m", 93784: "1d2h"} {
		if got := span(s); got != want {
			t.Errorf("span(%v) = %q, want %q", s, got, want)
		}
	}
}
