// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mutex-proxy/mutex/e2e/lab"
)

// TestReload changes the file under living flows, by the command and by SIGHUP.
func TestReload(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, false)
	m := l.Mprox(t)
	m.UpConfig(globalConfig(s, ""))
	keep := holdFlow(t, l, lab.PortHold)
	gone := holdFlow(t, l, lab.PortEcho)
	keep.check(t, "before reload")
	gone.check(t, "before reload")
	for i, reload := range []func(){
		func() {
			if r := m.CLI("reload"); r.Code != 0 {
				t.Errorf("reload: %v", r)
			}
		},
		func() { m.Signal(syscall.SIGHUP) },
	} {
		// First the echo port is blocked, then also the banner.
		blocked := []uint16{lab.PortEcho, lab.PortBanner}[:i+1]
		m.WriteConfig(globalConfig(s, fmt.Sprintf(`"rules": [ { "port": %s, "upstream": "reject" } ],`, strings.ReplaceAll(fmt.Sprint(blocked), " ", ", "))))
		reload()
		for _, port := range blocked {
			lab.Eventually(t, 10*time.Second, fmt.Sprintf("port %d is rejected", port), func() bool {
				c, err := l.Client.Dial("tcp", fmt.Sprintf("%s:%d", lab.OriginV4, port), 5*time.Second)
				if err == nil {
					c.Close()
				}
				return isRefused(err)
			})
		}
		keep.check(t, "after reload")
	}
	_ = gone.c.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := gone.r.ReadByte(); err == nil || isTimeout(err) {
		t.Errorf("a flow that the new rules block still lives: %v", err)
	}

	// A file with an error changes nothing, and neither does one that changes what is fixed at the start.
	for name, bad := range map[string]string{
		"syntax":  `{ "upstreams": `,
		"mtu":     globalConfig(s, `"tun": { "mtu": 1300 },`),
		"unknown": globalConfig(s, `"no_such_key": 1,`),
	} {
		m.WriteConfig(bad)
		if r := m.CLI("reload"); r.Code == 0 {
			t.Errorf("reload with a bad file (%s): %v", name, r)
		}
		keep.check(t, "after a refused reload")
	}
	if m.Exited() {
		t.Error("the daemon ended")
	}
}

type heldFlow struct {
	c net.Conn
	r *bufio.Reader
	n int
}

func holdFlow(t *testing.T, l *lab.Lab, port uint16) *heldFlow {
	t.Helper()
	c := dialOrigin(t, l, lab.OriginV4, port)
	return &heldFlow{c: c, r: bufio.NewReader(c)}
}

func (h *heldFlow) check(t *testing.T, when string) {
	t.Helper()
	h.n++
	_ = h.c.SetDeadline(time.Now().Add(10 * time.Second))
	fmt.Fprintf(h.c, "line %d\n", h.n)
	if line, err := h.r.ReadString('\n'); line != fmt.Sprintf("line %d\n", h.n) {
		t.Errorf("flow, %s: %q %v", when, line, err)
	}
}

// TestCheckReportsAll shows that every error of a file is reported at once, with place and path; exit 3.
func TestCheckReportsAll(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "config.json")
	const bad = `{
  "upstreams": {
    "one": { "url": "gopher://203.0.113.1:70" },
    "two": { "url": "socks5h://203.0.113.2:1080", "wieght": 3 }
  },
  "contexts": {
    "default": {
      "mode": "globl",
      "rules": [ { "ip_cidr": "300.0.0.0/8", "upstream": "two" },
                 { "port": 99999, "upstream": "nobody" } ],
      "default": "three"
    }
  }
}`
	if err := os.WriteFile(path, []byte(bad), 0o600); err != nil {
		t.Fatal(err)
	}
	r := lab.Local(t, "check", "--config", path)
	if r.Code != 3 {
		t.Errorf("exit status %d, want 3", r.Code)
	}
	for _, want := range []string{
		"config.json:3:", "config.json:4:", "config.json:8:", "config.json:9:", "config.json:10:", "config.json:11:",
		"$.upstreams.one.url", "$.upstreams.two.wieght", `weight`, "$.contexts.default.mode", "global", "$.contexts.default.rules[0].ip_cidr",
		"$.contexts.default.rules[1].port", "$.contexts.default.rules[1].upstream", "$.contexts.default.default",
	} {
		if !strings.Contains(r.Stderr+r.Stdout, want) {
			t.Errorf("check does not say %q:\n%s%s", want, r.Stdout, r.Stderr)
		}
	}
	// So does up, and it touches nothing: it needs no root to say so.
	if r := lab.Local(t, "up", "--config", path, "--socket", filepath.Join(dir, "s.sock")); r.Code != 3 {
		t.Errorf("up with a bad file: %v", r)
	}
	if r := lab.Local(t, "check", "--config", filepath.Join(dir, "absent.json")); r.Code == 0 || !strings.Contains(r.Stderr, "absent.json") {
		t.Errorf("check of a file that is not there: %v", r)
	}
}

// TestCheckRefusesAsUp shows that check says of what is not supported yet what up says, with the same exit status.
func TestCheckRefusesAsUp(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "config.json")
	for _, tt := range []struct{ context, at string }{
		{`"bypass": { "protocol": [ "bittorrent" ] }`, "$.contexts.default.bypass.protocol"},
		{`"rules": [ { "protocol": "http", "upstream": "reject" } ]`, "$.contexts.default.rules[0].protocol"},
	} {
		text := fmt.Sprintf(`{ "upstreams": { "p": { "url": "socks5://192.0.2.1:1080" } }, "contexts": { "default": { "default": "p", %s } } }`, tt.context)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		up := lab.Local(t, "up", "--config", path, "--socket", filepath.Join(dir, "s.sock"))
		check := lab.Local(t, "check", "--config", path)
		if check.Code != 3 || up.Code != 3 || check.Stderr != up.Stderr || check.Stdout != "" || !strings.Contains(check.Stderr, tt.at+": not supported yet") {
			t.Errorf("%s: check: %v\nup: %v", tt.context, check, up)
		}
	}
}

// TestInitFmtCheck shows that each template is valid, and that fmt is stable.
func TestInitFmtCheck(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for _, template := range []string{"minimal", "desktop", "server", "sidecar", "gateway"} {
		path := filepath.Join(dir, template+".json")
		if r := lab.Local(t, "init", "--template", template, "--config", path); r.Code != 0 {
			t.Errorf("init %s: %v", template, r)
			continue
		}
		if r := lab.Local(t, "check", "--config", path); r.Code != 0 {
			t.Errorf("check of template %s: %v", template, r)
		}
		if r := lab.Local(t, "fmt", "--config", path); r.Code != 0 {
			t.Errorf("fmt of template %s: %v", template, r)
		}
	}
}

// TestSecretsFileMode shows that a file with a secret that everybody may read is refused.
func TestSecretsFileMode(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "config.json")
	const c = `{ "upstreams": { "p": { "url": "socks5h://u:secret-password@203.0.113.1:1080" } }, "contexts": { "default": { "mode": "global", "default": "p" } } }`
	if err := os.WriteFile(path, []byte(c), 0o644); err != nil {
		t.Fatal(err)
	}
	r := lab.Local(t, "check", "--config", path)
	if r.Code != 3 || strings.Contains(r.Stderr+r.Stdout, "secret-password") {
		t.Errorf("world-readable: %v", r)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	if r := lab.Local(t, "check", "--config", path); r.Code != 0 {
		t.Errorf("private: %v", r)
	}
}

// TestUsage shows the exit status of wrong command lines and what needs a daemon.
func TestUsage(t *testing.T) {
	t.Parallel()
	sock := filepath.Join(t.TempDir(), "no.sock")
	for _, c := range []struct {
		args []string
		want int
	}{
		{[]string{"no-such-command"}, 2},
		{[]string{"status", "--no-such-flag"}, 2},
		{[]string{"up", "--proxy", "gopher://x"}, 2},
		{[]string{"--socket", sock, "status"}, 5},
		{[]string{"--socket", sock, "flows"}, 5},
		{[]string{"--socket", sock, "reload"}, 5},
		{[]string{"--socket", sock, "healthcheck"}, 5},
		{[]string{"version"}, 0},
		{[]string{"--help"}, 0},
		{[]string{"completion", "bash"}, 0},
		{[]string{"completion", "zsh"}, 0},
		{[]string{"completion", "fish"}, 0},
		{[]string{"schema"}, 0},
	} {
		r := lab.Local(t, c.args...)
		if r.Code != c.want {
			t.Errorf("mprox %s: want exit %d, got %v", strings.Join(c.args, " "), c.want, r)
		}
		if c.want != 0 && (lines(r.Stderr) != 1 || r.Stdout != "") {
			t.Errorf("mprox %s: want one line on standard error, got %v", strings.Join(c.args, " "), r)
		}
	}
	if r := lab.Local(t, "schema"); !json.Valid([]byte(r.Stdout)) {
		t.Errorf("schema is not JSON: %.200s", r.Stdout)
	}
}
