// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mutex-proxy/mutex/e2e/lab"
)

// TestOffloadLimits: what ends flows ends adopted ones: kill, a reload that blocks them, a full table, the end of the daemon.
func TestOffloadLimits(t *testing.T) {
	for _, offload := range []string{"auto", "off"} {
		t.Run("offload "+offload, func(t *testing.T) {
			t.Parallel()
			w := newWire(t, offload, lab.Options{})
			ends := func(what string, app, far net.Conn) {
				t.Helper()
				for name, c := range map[string]net.Conn{"application": app, "origin": far} {
					_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
					if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil || isTimeout(err) {
						t.Errorf("%s: the %s's connection: %d, %v", what, name, n, err)
					}
				}
			}
			app, far := w.open(t, lab.OriginV4)
			w.check(t, app, far)
			must(t, w.m, "flows", "kill", fmt.Sprint(w.flow(t, app).ID))
			ends("killed", app, far)

			app, far = w.open(t, lab.OriginV6)
			w.check(t, app, far)
			stays := dialOrigin(t, w.Lab, lab.OriginV4, lab.PortEcho)
			config := fmt.Sprintf(`{ "upstreams": { "p": { "url": %q } }, "contexts": { "default": { "mode": "global", "default": "p", "limits": { "flows": 16 },
  "offload": %q, "dns": { "mode": "off" }, "rules": [ { "port": %d, "upstream": "reject" } ] } } }`, w.s.URL(), offload, portTest)
			w.m.WriteConfig(config)
			if err := w.m.Post("/v1/reload"); err != nil {
				t.Fatal(err)
			}
			ends("blocked by a reload", app, far)
			if err := echoWord(stays, "hello"); err != nil {
				t.Errorf("a flow that no rule blocks: %v", err)
			}
			// The application may have the answer before the daemon has written down when it came.
			lab.Eventually(t, lab.Patience, "the answer is counted", func() bool { return w.flow(t, stays).BytesDown == 5 })

			conns := []net.Conn{stays}
			for range 16 {
				c := dialOrigin(t, w.Lab, lab.OriginV4, lab.PortEcho)
				if err := echoWord(c, "hello"); err != nil {
					t.Fatal(err)
				}
				conns = append(conns, c)
			}
			_ = stays.SetReadDeadline(time.Now().Add(5 * time.Second))
			if _, err := stays.Read(make([]byte, 1)); err == nil || isTimeout(err) {
				t.Errorf("the longest idle flow of a full table: %v", err)
			}
			// The flow that made room has given its place back before it has ended.
			lab.Eventually(t, lab.Patience, "16 flows", func() bool { return w.m.Status().Contexts[0].FlowsActive == 16 })
			if status := w.m.Status().Contexts[0]; status.FlowsActive != 16 || status.FlowsTotal < 19 {
				t.Errorf("%+v", status)
			}
			if kernel, netstack, _ := paths(w.m); w.path == "kernel" && kernel != 16 || w.path == "netstack" && netstack != 16 {
				t.Errorf("%d in the kernel, %d in netstack", kernel, netstack)
			}
			w.m.Stop()
			for _, c := range conns[1:] {
				_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
				if _, err := c.Read(make([]byte, 1)); err == nil || isTimeout(err) {
					t.Errorf("after the daemon's end: %v", err)
				}
			}
		})
	}
}

// pathsLogged counts the flows of a context that have ended, by the way that their bytes took.
func pathsLogged(log, context string) (kernel, netstack int) {
	for line := range strings.Lines(log) {
		switch {
		case !strings.Contains(line, fmt.Sprintf(`flow {"context": %q`, context)):
		case strings.Contains(line, `"path": "kernel"`):
			kernel++
		default:
			netstack++
		}
	}
	return kernel, netstack
}

// TestOffloadModes: flows are adopted however they are captured, in several contexts at once, beside flows that cannot be.
func TestOffloadModes(t *testing.T) {
	for _, marking := range []string{"auto", "nft"} {
		t.Run("marking "+marking, func(t *testing.T) {
			t.Parallel()
			l := lab.New(t, lab.Options{})
			pki := l.PKI(t)
			s, tls := l.Dante(t, 1080, true), l.Stunnel(t, 1443, pki)
			m := l.Mprox(t)
			m.UpConfig(fmt.Sprintf(`{ "kernel": { "marking": %q }, "upstreams": { "p": { "url": %q }, "tls": { "url": %q } }, "contexts": {
  "one": { "mode": "process", "default": "p", "select": { "uid": 4001 }, "dns": { "mode": "off" } },
  "two": { "mode": "process", "default": "p", "select": { "uid": 4002 }, "dns": { "mode": "off" }, "rules": [ { "ip_cidr": "2001:db8:3::/64", "upstream": "tls" } ] },
  "work": { "mode": "cgroup", "default": "p", "dns": { "mode": "off" } },
  "rest": { "mode": "global", "default": "p", "dns": { "mode": "off" } } } }`, marking, s.URL(), tls.URL()))
			const n = 2_000_000
			fetch := func(context string, run func(url string) lab.Result) {
				t.Helper()
				var wg sync.WaitGroup
				for range 3 {
					for _, v6 := range []bool{false, true} {
						wg.Go(func() {
							if r := run(originURL(v6, fmt.Sprintf("/bytes/%d", n))); r.Code != 0 || len(r.Stdout) != n {
								t.Errorf("%s, v6 %v: exit %d, %d bytes: %s", context, v6, r.Code, len(r.Stdout), r.Stderr)
							}
						})
					}
				}
				wg.Wait()
			}
			var all sync.WaitGroup
			for context, run := range map[string]func(url string) lab.Result{
				"one": func(url string) lab.Result { return as(t, l, 4001, url) },
				"two": func(url string) lab.Result { return as(t, l, 4002, url) },
				"work": func(url string) lab.Result {
					return m.CLI("run", "--context", "work", "--", "curl", "-sS", "-m", "10", url)
				},
				"rest": func(url string) lab.Result { return curl(t, l, url) },
			} {
				all.Go(func() { fetch(context, run) })
			}
			all.Wait()
			for context, want := range map[string][2]int{"one": {6, 0}, "two": {3, 3}, "work": {6, 0}, "rest": {6, 0}} {
				if !lab.CanAdopt() {
					want = [2]int{0, 6}
				}
				var got [2]int
				if !lab.Poll(lab.Patience, func() bool { got[0], got[1] = pathsLogged(m.Log.String(), context); return got == want }) {
					t.Errorf("context %s: %d flows in the kernel, %d in netstack; want %d, %d", context, got[0], got[1], want[0], want[1])
				}
			}
			if t.Failed() {
				t.Logf("open: %+v", m.Flows())
			}
			m.Stop()
			// A context that `run` makes for itself.
			lease := l.Mprox(t)
			lease.UpConfig(`{ "contexts": { "none": { "mode": "cgroup", "default": "reject" } } }`)
			r := lease.CLI("run", "--proxy", s.URL(), "--", "curl", "-sS", "-m", "10", originURL(false, "/bytes/10"))
			if r.Code != 0 || !lab.Poll(lab.Patience, func() bool { return strings.Contains(lease.Log.String(), `"path": "kernel"`) == lab.CanAdopt() }) {
				t.Errorf("run: %v", r)
			}
		})
	}
}

// TestOffloadAlone: where no daemon runs, `mprox run` is its own engine, and adopts flows too.
func TestOffloadAlone(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Microsocks(t, 1082)
	script := fmt.Sprintf("curl -sS -m 10 %s && curl -sS -m 10 %s", originURL(false, "/bytes/10"), originURL(true, "/bytes/10"))
	r := l.Mprox(t).CLI("--log-level", "info", "run", "--proxy", s.URL(), "--", "sh", "-c", script)
	want := 2
	if !lab.CanAdopt() {
		want = 0
	}
	if got := strings.Count(r.Stderr, `"path": "kernel"`); r.Code != 0 || got != want || strings.Count(r.Stderr, `"path": `) != 2 {
		t.Errorf("%d flows in the kernel, want %d: %v", got, want, r)
	}
}

// TestOffloadSidecar: with the configuration for a sidecar, and no other capability than a sidecar has, flows are adopted: all of them where ports below
// 1024 need no privilege, as in Docker's containers, else those to ports above. The others say why.
func TestOffloadSidecar(t *testing.T) {
	t.Parallel()
	w := &wire{Lab: lab.New(t, lab.Options{})}
	w.s, w.m = w.Serve(t, 1083), w.Mprox(t)
	template := w.m.CLI("init", "--template", "sidecar")
	if template.Code != 0 {
		t.Fatal(template)
	}
	w.m.WriteConfig(strings.Replace(template.Stdout, "socks5h://203.0.113.10:1080", w.s.URL(), 1))
	w.m.StartCommand(w.Client.Command(append([]string{"setpriv", "--bounding-set", "-all,+net_admin"}, w.m.Args("up", "-c", w.m.ConfigPath())...)...))
	w.m.WaitReady()
	for _, first := range []string{"0", "1024"} {
		if err := w.Client.Sysctl(map[string]string{"net/ipv4/ip_unprivileged_port_start": first}); err != nil {
			t.Fatal(err)
		}
		for fam, a := range ways() {
			c := dialOrigin(t, w.Lab, a, lab.PortEcho)
			if err := echoWord(c, "hello"); err != nil {
				t.Error(err)
			}
			path, why := "kernel", ""
			switch {
			case !lab.CanAdopt():
				path, why = "netstack", "repair: operation not permitted"
			case first == "1024":
				path, why = "netstack", "bind: permission denied"
			}
			if f := w.flow(t, c); f.Path != path || f.PathReason != why {
				t.Errorf("%s, ports below %s need a privilege: path %q, because %q; want %q, %q", fam, first, f.Path, f.PathReason, path, why)
			}
		}
	}
	c := dialOrigin(t, w.Lab, lab.OriginV4, lab.PortSum) // above 1024
	defer c.Close()
	if f := w.flow(t, c); lab.CanAdopt() && f.Path != "kernel" {
		t.Errorf("a port above 1024: path %q, because %q", f.Path, f.PathReason)
	}
}
