// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mutex-proxy/mutex/e2e/lab"
)

// inContainer runs curl in a container of the lab's dockerd.
func inContainer(t *testing.T, d *lab.Docker, name string, args ...string) lab.Result {
	t.Helper()
	return d.Run(t, append([]string{"docker", "exec", name, "curl", "-sS", "-m", "4"}, args...)...)
}

// TestAttachContainer captures containers of a real dockerd from outside, by name and by process: what they send goes through the proxy, names of
// other containers and published ports work, and a killed daemon leaves them closed.
func TestAttachContainer(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, true)
	l.Unbound(t)
	d := l.Docker(t)
	d.Image(t, "mprox")
	d.ImageOf(t, "app", "curl", "sleep", "sh", "ping")
	d.Must(t, nil, "docker", "network", "create", "n")
	run := func(name string, args ...string) {
		t.Helper()
		d.Must(t, nil, append([]string{"docker", "run", "-d", "--name", name, "--cap-add", "NET_ADMIN"}, args...)...)
	}
	run("web", "--network", "n", "-p", "8080:8080", "app", "sh", "-c", "while :; do sleep 1000; done")
	run("plain", "app", "sleep", "1000")
	m := l.Mprox(t)
	m.Env = []string{"DOCKER_HOST=" + d.Host()}
	m.UpConfig(fmt.Sprintf(`{ "upstreams": { "p": { "url": %q } }, "contexts": { "c": { "mode": "process", "default": "p" },
		"other": { "mode": "process", "default": "reject" } } }`, s.URL()))

	through := func(name, what string, want bool) {
		t.Helper()
		r := inContainer(t, d, name, originURL(false, "/"))
		if r.Code != 0 || fromProxy(r.Stdout) != want {
			t.Errorf("%s, %s: through the proxy: want %v, got %v\n%s", name, what, want, r, m.Log)
		}
	}
	through("web", "before", false)
	for name, code := range map[string]int{"nobody": 1, "../x": 3, "4194304": 1} {
		if r := m.CLI("attach", "--context", "c", "--container", name); r.Code != code || lines(r.Stderr) != 1 {
			t.Errorf("%s: %v", name, r)
		}
	}
	must(t, m, "attach", "--context", "c", "--container", "web")
	if r := m.CLI("attach", "--context", "other", "--container", "web"); r.Code != 6 || !strings.Contains(r.Stderr, "context c captures") || lines(r.Stderr) != 1 {
		t.Errorf("in two contexts: %v", r)
	}
	cp := l.Capture(t)
	through("web", "attached", true)
	through("plain", "the other", false)
	cp.Reset()
	if r := inContainer(t, d, "web", "http://www.example.test/"); r.Code != 0 || !fromProxy(r.Stdout) {
		t.Errorf("by name: %v", r)
	}
	d.Must(t, nil, "docker", "network", "connect", "n", "plain")
	if r := inContainer(t, d, "web", "http://plain:9/"); r.Code != 7 { // refused by the container itself: found, and reached directly
		t.Errorf("a container's name: %v", r)
	}
	d.Must(t, nil, "docker", "run", "-d", "--name", "server", "--network", "container:web", "mprox", "serve", "--listen", "0.0.0.0:8080")
	published := func() lab.Result {
		return lab.Exec(t, l.LAN.Command("curl", "-sS", "-m", "3", "-x", "socks5h://"+lab.ClientV4.String()+":8080", originURL(false, "/")))
	}
	lab.Eventually(t, 10*time.Second, "the published port answers, and its server goes through the proxy", func() bool { return fromProxy(published().Stdout) })
	pid := d.Must(t, nil, "docker", "inspect", "-f", "{{.State.Pid}}", "web")
	if out := must(t, m, "contexts", "--of", pid); !strings.Contains(out, "container web") {
		t.Errorf("whose: %s", out)
	}
	// Whoever is root in the container and may set marks cannot pass for the daemon.
	d.Run(t, "docker", "exec", "web", "ping", "-c", "1", "-W", "1", "-m", "1291845632", lab.OriginV4.String()) // 0x4d000000
	upstreamOnly(s).Check(t, cp.Packets())

	// By a process; and by name again after a restart and after having been made anew.
	other := d.Must(t, nil, "docker", "inspect", "-f", "{{.State.Pid}}", "plain")
	must(t, m, "attach", "--context", "c", "--container", other)
	through("plain", "by its process", true)
	must(t, m, "detach", "--context", "c", "--container", other)
	through("plain", "detached", false)
	again := func(what string) {
		t.Helper()
		lab.Eventually(t, 10*time.Second, what, func() bool {
			r := inContainer(t, d, "web", originURL(false, "/"))
			return r.Code == 0 && fromProxy(r.Stdout)
		})
	}
	d.Must(t, nil, "docker", "restart", "-t", "0", "web")
	again("captured after a restart")
	if n := len(containerJournals(t, m)); n != 4 { // each with its lock: that of web, and the one that only the server is in by now
		t.Errorf("%d files of captured containers", n)
	}
	d.Must(t, nil, "docker", "rm", "-f", "web", "server")
	lab.Eventually(t, 5*time.Second, "nothing is left of a dead container", func() bool { return len(containerJournals(t, m)) == 0 })
	run("web", "--network", "n", "app", "sleep", "1000")
	again("captured when made anew")

	// Killed: closed. Started again: it is blocked until it is attached, or cleaned up.
	cp.Reset()
	m.Kill()
	if r := inContainer(t, d, "web", originURL(false, "/")); r.Code == 0 {
		t.Errorf("killed: %v", r)
	}
	upstreamOnly(s).Check(t, cp.Packets())
	m.UpConfig(fmt.Sprintf(`{ "upstreams": { "p": { "url": %q } }, "contexts": { "c": { "mode": "process", "default": "p" } } }`, s.URL()))
	if r := inContainer(t, d, "web", originURL(false, "/")); r.Code == 0 {
		t.Errorf("started again: %v", r)
	}
	must(t, m, "attach", "--context", "c", "--container", "web")
	through("web", "attached again", true)
	m.Kill()
	must(t, m, "cleanup")
	through("web", "cleaned up", false)
	if left := containerJournals(t, m); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	pid = d.Must(t, nil, "docker", "inspect", "-f", "{{.State.Pid}}", "web")
	if out := d.Must(t, nil, "nsenter", "-t", pid, "-n", "sh", "-c", "ip rule; ip route show table all proto 77; nft list tables"); strings.Contains(out, "77") || strings.Contains(out, "mprox") {
		t.Errorf("left in the container: %s", out)
	}
}

// TestAttachPodman captures a container that Podman runs by runc, without any network of its own: the proxy is then the only way out of it.
func TestAttachPodman(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, true)
	for _, p := range []string{"podman", "runc"} {
		_, err := exec.LookPath(p)
		lab.Require(t, err == nil, p)
	}
	dir := filepath.Join(l.Dir, "p")
	podman := func(args ...string) *exec.Cmd {
		return l.Client.Command(append([]string{
			"podman", "--root", dir + "/root", "--runroot", dir + "/run", "--tmpdir", dir + "/tmp", "--storage-driver", "vfs",
			"--cgroup-manager", "cgroupfs", "--events-backend", "file", "--runtime", "runc",
		}, args...)...)
	}
	run := func(args ...string) lab.Result { return lab.Exec(t, podman(args...)) }
	t.Cleanup(func() { run("rm", "-fa") })
	must0 := func(r lab.Result) {
		t.Helper()
		if r.Code != 0 {
			t.Fatal(r)
		}
	}
	image := filepath.Join(l.Dir, "app.tar")
	must0(lab.Exec(t, l.Client.Command("bash", "-c", `for p in curl sleep; do p=$(command -v $p); echo $p; ldd $p | grep -o '/[^ ]*'; done | sort -u | tar -chf "$0" -T -`, image)))
	must0(run("import", image, "app"))
	must0(run("run", "-d", "--name", "web", "--network", "none", "--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024", "app", "/usr/bin/sleep", "1000"))
	socket := dir + "/s"
	lab.Start(t, "podman", podman("system", "service", "--time", "0", "unix://"+socket))
	lab.Eventually(t, 10*time.Second, "podman answers", func() bool { _, err := os.Stat(socket); return err == nil })
	m := l.Mprox(t)
	m.Env = []string{"DOCKER_HOST=unix://" + socket}
	m.UpConfig(fmt.Sprintf(`{ "upstreams": { "p": { "url": %q } }, "contexts": { "c": { "mode": "process", "default": "p" } } }`, s.URL()))
	get := func() lab.Result { return run("exec", "web", "/usr/bin/curl", "-sS", "-m", "4", originURL(false, "/")) }
	if r := get(); r.Code == 0 {
		t.Fatalf("it has a network: %v", r)
	}
	must(t, m, "attach", "--context", "c", "--container", "web")
	if r := get(); r.Code != 0 || !fromProxy(r.Stdout) {
		t.Errorf("attached: %v", r)
	}
	must(t, m, "detach", "--context", "c", "--container", "web")
	if r := get(); r.Code == 0 {
		t.Errorf("detached: %v", r)
	}
}

// containerJournals are the journals of captured containers.
func containerJournals(t *testing.T, m *lab.Mprox) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(filepath.Dir(m.Socket), "*-container-*"))
	if err != nil {
		t.Fatal(err)
	}
	return names
}

// TestSelectContainer selects containers in the configuration: one on a bridge and one that shares the host's network, those that run and those that are
// started later, in mode global too; excluded is one that the global context would capture.
func TestSelectContainer(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, true)
	d := l.Docker(t)
	d.ImageOf(t, "app", "curl", "sleep")
	run := func(name string, args ...string) {
		t.Helper()
		d.Must(t, nil, append(append([]string{"docker", "run", "-d", "--name", name}, args...), "app", "sleep", "1000")...)
	}
	run("bridged")
	run("hosted", "--network", "host")
	m := l.Mprox(t)
	m.Env = []string{"DOCKER_HOST=" + d.Host()}
	config := func(mode, rest string) string {
		return fmt.Sprintf(`{ "upstreams": { "p": { "url": %q } }, "contexts": { "c": { "mode": %q, "default": "p", %s } } }`, s.URL(), mode, rest)
	}
	through := func(name string, want bool) {
		t.Helper()
		if !lab.Poll(10*time.Second, func() bool {
			r := inContainer(t, d, name, originURL(false, "/"))
			return r.Code == 0 && fromProxy(r.Stdout) == want
		}) {
			t.Errorf("%s: want through the proxy: %v\n%s", name, want, m.Log)
		}
	}
	m.UpConfig(config("process", `"select": [ { "container": ["bridged", "later"] }, { "container": "hosted" } ]`))
	through("bridged", true)
	through("hosted", true)
	if r := lab.Exec(t, l.Client.Command("curl", "-sS", "-m", "4", originURL(false, "/"))); r.Code != 0 || fromProxy(r.Stdout) {
		t.Errorf("the host itself: %v", r)
	}
	run("later")
	through("later", true)
	m.WriteConfig(config("process", `"select": [ { "container": ["later"] } ]`))
	must(t, m, "reload")
	through("bridged", false)
	through("hosted", false)
	through("later", true)
	must(t, m, "down")
	through("later", false)

	m.UpConfig(config("global", `"select": [ { "container": "bridged" } ], "exclude": [ { "container": "hosted" } ]`))
	through("bridged", true)
	through("hosted", false)
	if r := lab.Exec(t, l.Client.Command("curl", "-sS", "-m", "4", originURL(false, "/"))); r.Code != 0 || !fromProxy(r.Stdout) {
		t.Errorf("the host itself, global: %v", r)
	}
	for _, bad := range []string{`"select": [ { "container": "a", "uid": 1 } ]`, `"select": [ { "container": "a/b" } ]`} {
		m.WriteConfig(config("process", bad))
		if r := m.CLI("check", "-c", m.ConfigPath()); r.Code != 3 || !strings.Contains(r.Stderr, "container") {
			t.Errorf("%s: %v", bad, r)
		}
	}
	if _, err := os.Stat(m.Socket); err != nil {
		t.Error(err)
	}
}

// TestAttachDevice: the device in another namespace is as the configuration describes it, and its flows, as those of a gateway, say why they stay
// with netstack.
func TestAttachDevice(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, true)
	inside, behind := newHost(t, l, "g1", "192.168.50", "fd50"), newHost(t, l, "g2", "192.168.60", "fd60")
	m := l.Mprox(t)
	m.UpConfig(fmt.Sprintf(`{ "upstreams": { "p": { "url": %q } }, "contexts": {
		"c": { "mode": "process", "default": "p", "tun": { "offloads": "no-header", "queues": 2, "mtu": 1400 } },
		"lan": { "mode": "gateway", "default": "p", "select": { "interface": "g2" } } } }`, s.URL()))
	inside.run(t, "ip", "link", "set", "lo", "down")
	inside.run(t, "ip", "addr", "flush", "dev", "lo")
	if r := m.CLI("attach", "--context", "c", "--container", fmt.Sprint(inside.pid)); r.Code == 0 || !strings.Contains(r.Stderr, "ip link set lo up") {
		t.Errorf("without lo: %v", r)
	}
	inside.run(t, "ip", "link", "set", "lo", "up")
	must(t, m, "attach", "--context", "c", "--container", fmt.Sprint(inside.pid))
	if r := inside.run(t, "ip", "-d", "link", "show", "mprox-c"); !strings.Contains(r.Stdout, "multi_queue") || strings.Contains(r.Stdout, "vnet_hdr on") || !strings.Contains(r.Stdout, "mtu 1400") {
		t.Errorf("the device: %v", r)
	}
	script := fmt.Sprintf("import socket, time; s = socket.create_connection((%q, %d), 10); s.sendall(b'x'); s.recv(1); time.sleep(100)", lab.OriginV4.String(), lab.PortEcho)
	for _, tt := range []struct {
		h       host
		context string
		want    string
	}{{inside, "c", "the application is in another network namespace"}, {behind, "lan", "the application is on another host"}} {
		lab.Start(t, "client", exec.Command("nsenter", "--net", "-t", fmt.Sprint(tt.h.pid), "python3", "-c", script))
		var got []lab.Flow
		lab.Eventually(t, 10*time.Second, "an established flow", func() bool {
			got = slices.DeleteFunc(m.Flows(), func(f lab.Flow) bool {
				return f.Context != tt.context || f.Network != "tcp" || f.State != "established"
			})
			return len(got) == 1
		})
		if got[0].Path != "netstack" || got[0].PathReason != tt.want {
			t.Errorf("%s: by %s, since %q", tt.context, got[0].Path, got[0].PathReason)
		}
	}
	for range 2 {
		inside.run(t, "ip", "link", "del", "mprox-c")
		lab.Eventually(t, lab.Patience, "the deleted device is back", func() bool {
			r := lab.Exec(t, exec.Command("nsenter", "--net", "-t", fmt.Sprint(inside.pid), "curl", "-sS", "-m", "1", originURL(false, "/")))
			return r.Code == 0 && fromProxy(r.Stdout) && m.CLI("healthcheck").Code == 0
		})
	}
	if n := strings.Count(m.Log.String(), "was deleted by somebody"); n != 2 {
		t.Errorf("logged %d times, want 2", n)
	}
}
