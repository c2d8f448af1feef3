// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/mutex-proxy/mutex/e2e/lab"
)

// TestCompose brings packaging/compose.yaml up on a real dockerd: what the application sends goes through the proxy, names of containers and
// published ports work, and nothing else ever leaves, whether mprox is restarted, killed or made anew.
func TestCompose(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, true)
	l.Unbound(t)
	d := l.Docker(t)
	d.Image(t, "mprox")
	d.ImageOf(t, "app", "curl", "sleep", "sh")
	compose, err := filepath.Abs("../packaging/compose.yaml")
	if err != nil {
		t.Fatal(err)
	}
	// Beside it: another container on the same network, and a server in the application's namespace whose port is published.
	more := l.File("more.yaml", `
version: "3.8"
services:
  netns: { ports: ["8080:8080"] }
  web: { image: mprox, command: [hold] }
  server: { image: mprox, network_mode: "service:netns", depends_on: [netns], command: [serve, --listen, "0.0.0.0:8080"] }
`)
	env := []string{"MPROX_PROXY=" + s.URL(), "APP_IMAGE=app", "MPROX_INPUT_PORTS=8080", "COMPOSE_PROJECT_NAME=x"}
	dc := func(args ...string) string {
		t.Helper()
		return d.Must(t, env, append([]string{"docker-compose", "-f", compose, "-f", more}, args...)...)
	}
	dc("up", "-d")
	app := func(args ...string) lab.Result {
		t.Helper()
		return d.RunEnv(t, env, append([]string{"docker", "exec", "x_app_1", "curl", "-sS", "-m", "5"}, args...)...)
	}
	works := func(what string) {
		t.Helper()
		var r lab.Result
		if !lab.Poll(15*time.Second, func() bool { r = app(originURL(false, "/")); return r.Code == 0 }) || !fromProxy(r.Stdout) {
			t.Errorf("%s: %v\n%s", what, r, d.RunEnv(t, env, "docker", "logs", "x_mprox_1").Stderr)
		}
	}
	works("up")
	cp := l.Capture(t)
	works("by address")
	if r := app("http://www.example.test/"); r.Code != 0 || !fromProxy(r.Stdout) {
		t.Errorf("by name: %v", r)
	}
	if r := app("http://web:9/"); r.Code != 7 { // refused by the container itself: found, and reached directly
		t.Errorf("a container's name: %v", r)
	}
	published := func(url string) lab.Result {
		return lab.Exec(t, l.LAN.Command("curl", "-sS", "-m", "5", "-x", "socks5h://"+lab.ClientV4.String()+":8080", url))
	}
	if r := published(originURL(false, "/")); r.Code != 0 || !fromProxy(r.Stdout) {
		t.Errorf("the published port: %v", r)
	}
	if got := d.Must(t, env, "docker", "exec", "x_mprox_1", "/mprox", "healthcheck"); !strings.Contains(got, "guard") {
		t.Errorf("healthcheck: %s", got)
	}
	if r := d.RunEnv(t, env, "docker", "exec", "x_mprox_1", "/mprox", "leaktest"); r.Code != 0 {
		t.Errorf("leaktest: %v", r)
	}

	// The application goes on trying, all the time.
	d.Must(t, env, "docker", "exec", "-d", "x_app_1", "sh", "-c", fmt.Sprintf("while :; do curl -s -m 1 %s >/dev/null; done", originURL(false, "/")))
	dc("restart", "mprox")
	works("restarted")
	d.Must(t, env, "docker", "kill", "x_mprox_1")
	if r := app("-m", "2", originURL(false, "/")); r.Code == 0 {
		t.Errorf("killed: %v", r)
	}
	dc("up", "-d")
	works("killed, and up again")
	dc("rm", "-sf", "mprox")
	if r := app("-m", "2", originURL(false, "/")); r.Code == 0 {
		t.Errorf("removed: %v", r)
	}
	dc("up", "-d")
	works("made anew")
	upstreamOnly(s).Check(t, cp.Packets())
	began := time.Now()
	d.Must(t, env, "docker", "stop", "-t", "9", "x_mprox_1")
	if took := time.Since(began); took > 8*time.Second {
		t.Errorf("SIGTERM is not acted upon: %s", took)
	}
	if code := d.Must(t, env, "docker", "inspect", "-f", "{{.State.ExitCode}}", "x_mprox_1"); code != "0" {
		t.Errorf("stopped with %s", code)
	}
}

// TestContainerMisses shows one line with the line of compose.yaml to add, and exit 4, for each thing that a container may lack; and the
// environment, from files too.
func TestContainerMisses(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, true)
	d := l.Docker(t)
	d.Image(t, "mprox")
	run := []string{"docker", "run", "--rm", "--cap-drop", "ALL"}
	for what, tt := range map[string]struct {
		args []string
		code int
		want string
	}{
		"capability":       {[]string{"-e", "MPROX_PROXY=" + s.URL(), "mprox"}, 4, "cap_add: [NET_ADMIN]"},
		"device":           {[]string{"--cap-add", "NET_ADMIN", "-e", "MPROX_PROXY=" + s.URL(), "mprox"}, 4, "devices: [/dev/net/tun]"},
		"proxy":            {[]string{"--cap-add", "NET_ADMIN", "mprox"}, 2, "no proxy"},
		"a bad port":       {[]string{"-e", "PROXY=" + s.URL(), "-e", "MPROX_INPUT_PORTS=http", "mprox"}, 2, "MPROX_INPUT_PORTS"},
		"both":             {[]string{"-e", "MPROX_PROXY=" + s.URL(), "-e", "MPROX_PROXY_FILE=/x", "mprox"}, 2, "both given"},
		"a file not there": {[]string{"-e", "MPROX_PROXY_FILE=/x", "mprox"}, 3, "MPROX_PROXY_FILE"},
	} {
		if r := d.Run(t, append(append([]string{}, run...), tt.args...)...); r.Code != tt.code || lines(r.Stderr) != 1 || !strings.Contains(r.Stderr, tt.want) {
			t.Errorf("%s: want exit %d and one line with %q, got %v", what, tt.code, tt.want, r)
		}
	}
	secret := l.File("proxy", s.URL()+"\n")
	if err := os.Chmod(l.Dir, 0o755); err != nil {
		t.Fatal(err)
	}
	id := d.Must(t, nil, append(append([]string{}, run...), "-d", "--cap-add", "NET_ADMIN", "--device", "/dev/net/tun", "-v", secret+":/run/secrets/proxy:ro",
		"-e", "MPROX_PROXY_FILE=/run/secrets/proxy", "-e", "TUN=tun7", "-e", "MTU=1400", "mprox")...)
	lab.Eventually(t, 10*time.Second, "the daemon has the device that TUN names", func() bool {
		return strings.Contains(d.Run(t, "docker", "exec", id, "/mprox", "status", "-o", "json").Stdout, `"tun": "tun7"`)
	})
	if out := d.Must(t, nil, "docker", "exec", id, "/mprox", "upstreams", "-o", "json"); !strings.Contains(out, "***") || strings.Contains(out, "secret") {
		t.Errorf("upstreams: %s", out)
	}
}
