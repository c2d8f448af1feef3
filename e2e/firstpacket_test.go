// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/mutex-proxy/mutex/e2e/lab"
)

// TestContainerFirstPacket: containers that are selected by name send from their first instruction on, in both families, on networks that are there and on
// those that are made later, started again and made anew: nothing of it ever leaves but through the proxy. Others, published ports and the host
// are not held up for long. With the daemon dead nobody can tell who a container is that is started then: it is closed.
func TestContainerFirstPacket(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, true)
	d := l.Docker(t)
	d.ImageOf(t, "app", "curl", "sleep", "sh", "cat")
	l.Client.Run(t, "sh", "-ec", "ip link add br-lan type bridge; ip link set br-lan up; ip addr add 192.168.50.9/24 dev br-lan") // somebody else's
	m := l.Mprox(t)
	m.Env = []string{"DOCKER_HOST=" + d.Host()}
	m.UpConfig(fmt.Sprintf(`{ "upstreams": { "p": { "url": %q } }, "contexts": { "c": { "mode": "process", "default": "p", "select": { "container": "later" } } } }`, s.URL()))
	run := func(name, network string, more ...string) {
		t.Helper()
		curl := "curl -sS -m 20" // once: whoever connects while the capture is being set up waits for it
		script := fmt.Sprintf("%s %s >/4 & %s %s >/6 & wait; sleep 1000", curl, originURL(false, "/"), curl, originURL(true, "/"))
		d.Must(t, nil, append(append([]string{"docker", "run", "-d", "--name", name, "--network", network}, more...), "app", "sh", "-c", script)...)
	}
	got := func(name, file string) string { return d.Run(t, "docker", "exec", name, "cat", file).Stdout }
	proxied := func(what string) {
		t.Helper()
		for _, file := range []string{"/4", "/6"} {
			if !lab.Poll(15*time.Second, func() bool { return fromProxy(got("later", file)) }) {
				t.Errorf("%s: %s is %q\n%s\n%s", what, file, got("later", file), d.Run(t, "docker", "logs", "later").Stderr, m.Log)
			}
		}
	}
	cp := l.Capture(t)
	d.Must(t, nil, "docker", "network", "create", "--ipv6", "--subnet", "2001:db8:5::/64", "n")
	for i := range 3 {
		run("later", []string{"n", "n", "bridge"}[i])
		if i < 2 {
			proxied(fmt.Sprintf("run %d", i))
		}
		d.Must(t, nil, "docker", "restart", "-t", "0", "later")
		if i < 2 {
			proxied(fmt.Sprintf("restarted %d", i))
		}
		d.Must(t, nil, "docker", "rm", "-f", "later")
	}
	d.Must(t, nil, "docker", "create", "--name", "later", "--network", "n", "app", "curl", "-sS", "-m", "3", originURL(false, "/"))
	d.Must(t, nil, "docker", "start", "later")
	d.Must(t, nil, "docker", "wait", "later")
	d.Must(t, nil, "docker", "rm", "later")
	run("later", "n")
	d.Must(t, nil, "docker", "network", "create", "made-later")
	d.Must(t, nil, "docker", "network", "connect", "made-later", "later")
	proxied("with another network")
	upstreamOnly(s).Check(t, cp.Packets())

	// Somebody else, on a network that nobody has looked at yet.
	d.Must(t, nil, "docker", "network", "create", "others")
	began := time.Now()
	run("other", "others", "-p", "8080:8080")
	lab.Eventually(t, 10*time.Second, "another container is let through", func() bool { return got("other", "/4") != "" })
	if took := time.Since(began); fromProxy(got("other", "/4")) || took > 5*time.Second {
		t.Errorf("another container: %q, after %s", got("other", "/4"), took)
	}
	hosts := func(when string) {
		t.Helper()
		if r := lab.Exec(t, l.Client.Command("curl", "-sS", "-m", "4", originURL(false, "/"))); r.Code != 0 || fromProxy(r.Stdout) {
			t.Errorf("%s, the host: %v", when, r)
		}
		if r := inContainer(t, d, "other", originURL(false, "/")); r.Code != 0 || fromProxy(r.Stdout) {
			t.Errorf("%s, the other: %v", when, r)
		}
	}
	hosts("alive")

	cp.Reset()
	m.Kill()
	run("stranger", "others")
	if r := inContainer(t, d, "stranger", originURL(false, "/")); r.Code == 0 {
		t.Errorf("started while the daemon is dead: %v", r)
	}
	upstreamOnly(s).Check(t, cp.Packets())
	hosts("dead")
	h := newHost(t, l, "g1", "192.168.51", "fd51")
	port := func(bridge, own, to string) lab.Result {
		l.Client.Run(t, "ip", "link", "set", "g1", "master", bridge)
		return h.run(t, "sh", "-c", "ip addr add "+own+"/24 dev e0; ping -c 1 -W 2 "+to)
	}
	if r := port("br-lan", "192.168.50.2", "192.168.50.9"); r.Code != 0 {
		t.Errorf("a new port on a bridge of somebody else: %v", r)
	}
	if r := port("docker0", "172.30.0.77", "172.30.0.1"); r.Code == 0 {
		t.Errorf("an unknown port on Docker's bridge: %v", r)
	}
	m.Up("-c", m.ConfigPath())
	lab.Eventually(t, 5*time.Second, "let through by the next daemon", func() bool {
		r := inContainer(t, d, "stranger", originURL(false, "/"))
		return r.Code == 0 && !fromProxy(r.Stdout)
	})
	hosts("started again")
	must(t, m, "down")
	if out := lab.Exec(t, l.Client.Command("nft", "list", "tables")).Stdout; strings.Contains(out, "mprox") {
		t.Errorf("left behind: %s", out)
	}
}
