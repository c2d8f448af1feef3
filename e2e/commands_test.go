// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mutex-proxy/mutex/control/client"
	"github.com/mutex-proxy/mutex/e2e/lab"
)

// TestStatusAndFlows compares what the commands print with the interface: every field is there, those of later versions empty.
func TestStatusAndFlows(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, true)
	m := l.Mprox(t)
	m.UpConfig(globalConfig(s, `"dns": { "mode": "fakeip" },`))
	c := dialOrigin(t, l, lab.OriginV4, lab.PortHold)
	_, _ = io.WriteString(c, "hello\n")
	_, _ = io.ReadFull(c, make([]byte, 6))

	wantFields(t, m, []string{"status", "-o", "json"}, "", "version pid uptime_seconds config contexts upstreams guard dns")
	wantFields(t, m, []string{"status", "-o", "json"}, "config", "path sha256 generation loaded_at")
	wantFields(t, m, []string{"status", "-o", "json"}, "contexts",
		"name mode enabled lease tun default flows_active flows_total bytes_up bytes_down packets_dropped")
	wantFields(t, m, []string{"status", "-o", "json"}, "upstreams", "name url up latency_seconds active total errors udp ipv6 remote_dns bind")
	wantFields(t, m, []string{"status", "-o", "json"}, "guard", "active dropped_packets")
	wantFields(t, m, []string{"status", "-o", "json"}, "dns", "queries cache_hits blocked failures")
	flowFields := "id context network src dst host host_source protocol confidence app rule upstream state handshake start duration_seconds " +
		"bytes_up bytes_down packets_up packets_down connect_seconds error path path_reason"
	wantFields(t, m, []string{"flows", "-o", "json"}, "", flowFields)
	wantFields(t, m, []string{"flows", "-o", "json"}, "app", "pid uid gid exe cgroup method")
	wantFields(t, m, []string{"contexts", "-o", "json"}, "", "name mode")
	wantFields(t, m, []string{"upstreams", "-o", "json"}, "", "name url")

	flows := m.Flows()
	if len(flows) != 1 || flows[0].State != "established" || flows[0].Dst != "198.51.100.80:9008" || flows[0].BytesUp != 6 || flows[0].BytesDown != 6 ||
		flows[0].Upstream != "p" || flows[0].Network != "tcp" {
		t.Errorf("flows: %+v", flows)
	}
	wantApp(t, m, os.Getpid(), 6)
	for _, args := range [][]string{{"status"}, {"flows"}, {"contexts"}, {"upstreams"}} {
		r := m.CLI(args...)
		if r.Code != 0 || r.Stdout == "" || json.Valid([]byte(r.Stdout)) || strings.Contains(r.Stdout, lab.Password) {
			t.Errorf("%v: want a table, got %v", args, r)
		}
	}
	if r := m.CLI("healthcheck"); r.Code != 0 {
		t.Errorf("healthcheck: %v", r)
	}
	if r := m.CLI("flows", "kill", fmt.Sprint(flows[0].ID)); r.Code != 0 {
		t.Errorf("flows kill: %v", r)
	}
	_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := c.Read(make([]byte, 1)); err == nil || isTimeout(err) {
		t.Errorf("a killed flow still lives: %v", err)
	}
	// The log has one line for the flow, at its end.
	lab.Eventually(t, 5*time.Second, "the log has a line of the flow", func() bool { return strings.Count(m.Log.String(), "198.51.100.80:9008") == 1 })
}

// wantApp checks that mprox apps shows a process with one flow and as many bytes each way.
func wantApp(t *testing.T, m *lab.Mprox, pid int, bytes uint64) {
	t.Helper()
	var apps []client.AppUsage
	r := m.CLI("apps", "-o", "json")
	if err := json.Unmarshal([]byte(r.Stdout), &apps); err != nil {
		t.Error(err, r)
	}
	if !slices.ContainsFunc(apps, func(a client.AppUsage) bool {
		return a.App.PID == pid && a.App.Method == "tcx" && a.Flows == 1 && a.BytesUp == bytes && a.BytesDown == bytes
	}) {
		t.Errorf("apps: %+v, want process %d, found by its first packet, with one flow", apps, pid)
	}
}

// wantFields runs a command and compares the keys of the object at path (of an array, its first element) with the wanted ones.
func wantFields(t *testing.T, m *lab.Mprox, args []string, path, want string) {
	t.Helper()
	r := m.CLI(args...)
	var v any
	if err := json.Unmarshal([]byte(r.Stdout), &v); err != nil || r.Code != 0 {
		t.Errorf("%v: %v: %v", args, err, r)
		return
	}
	first := func(v any) any {
		if a, ok := v.([]any); ok && len(a) > 0 {
			return a[0]
		}
		return v
	}
	v = first(v)
	if path != "" {
		o, _ := v.(map[string]any)
		v = first(o[path])
	}
	o, ok := v.(map[string]any)
	if !ok {
		t.Errorf("%v %s: not an object: %v", args, path, v)
		return
	}
	for f := range strings.FieldsSeq(want) {
		if _, ok := o[f]; !ok {
			t.Errorf("%v %s: no field %q", args, path, f)
		}
	}
	for f := range o {
		if len(strings.Fields(want)) > 3 && !slices.Contains(strings.Fields(want), f) {
			t.Errorf("%v %s: unknown field %q", args, path, f)
		}
	}
}

// TestHealthcheck shows that a daemon that is stopped, or dead, or whose device is gone, is not healthy, within two seconds.
func TestHealthcheck(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, false)
	m := l.Mprox(t)
	m.Up("--proxy", s.URL())
	check := func(what string, healthy bool) {
		t.Helper()
		within(t, 3*time.Second, "healthcheck", func() {
			if r := m.CLI("healthcheck"); (r.Code == 0) != healthy {
				t.Errorf("%s: %v", what, r)
			}
		})
	}
	check("running", true)
	m.Signal(syscall.SIGSTOP)
	check("stopped", false)
	m.Signal(syscall.SIGCONT)
	check("continued", true)
	m.Kill()
	check("dead", false)
}

// TestMetrics reads /metrics inside the client's namespace: names, no addresses in labels.
func TestMetrics(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, false)
	m := l.Mprox(t)
	m.UpConfig(fmt.Sprintf(`{ "http": { "listen": "127.0.0.1:9464" }, "upstreams": { "p": { "url": %q } },
  "contexts": { "default": { "mode": "global", "default": "p", "dns": { "mode": "fakeip" } } } }`, s.URL()))
	mustCurl(t, l, originURL(false, "/bytes/1000"))
	dig(t, l, "@127.0.0.53", "a.example.test")
	_, _ = l.Client.Dial("tcp", netip.AddrPortFrom(lab.OriginV4, lab.PortClosed).String(), 5*time.Second)
	var out string
	lab.Eventually(t, 5*time.Second, "the flow is counted", func() bool {
		out = mustCurl(t, l, "http://127.0.0.1:9464/metrics")
		return strings.Contains(out, "mprox_flows_total{")
	})
	for _, name := range []string{
		"mprox_build_info", "mprox_flows_total", "mprox_flows_active", "mprox_bytes_total", "mprox_packets_total", "mprox_connect_seconds_bucket",
		"mprox_attribution_total{method=\"tcx\",result=\"found\"}", "mprox_attribution_seconds_count",
		"mprox_upstream_up", "mprox_dns_queries_total", "mprox_config_last_reload_successful", "go_goroutines", "process_open_fds",
	} {
		if !strings.Contains(out, "\n"+name) {
			t.Errorf("no metric %s", name)
		}
	}
	if bad := regexp.MustCompile(`(?m)^mprox_.*(198\.51|203\.0|example\.test|2001:db8).*$`).FindString(out); bad != "" {
		t.Errorf("an address or a name in a label: %s", bad)
	}
	for _, p := range []string{"/livez", "/readyz"} {
		mustCurl(t, l, "-f", "http://127.0.0.1:9464"+p)
	}
}

// TestServe runs `mprox serve` as the upstream of `mprox up`, and curl through it directly, by both of its protocols.
func TestServe(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	l.Unbound(t)
	pw := l.File("serve.passwd", lab.Password+"\n")
	for name, user := range map[string][]string{"open": nil, "password": {"--user", lab.User, "--password-file", pw}} {
		t.Run(name, func(t *testing.T) {
			at := netip.AddrPortFrom(lab.ProxyV4, 1085)
			p := lab.Start(t, "mprox serve", l.Proxy.Command(append([]string{l.PublicBinary(t), "serve", "--listen", at.String()}, user...)...))
			lab.Eventually(t, 10*time.Second, "mprox serve listens", func() bool {
				c, err := l.Proxy.Dial("tcp", at.String(), time.Second)
				if err == nil {
					c.Close()
				}
				return err == nil
			})
			s := &lab.Server{Proc: p, Name: "serve", Scheme: "socks5h", Addr: at, UDP: true, IPv6: true}
			if user != nil {
				s.Pass = lab.Password
			}
			for _, scheme := range []string{"socks5h", "socks5", "http"} {
				for _, u := range []string{originURL(false, "/bytes/1000000"), originURL(true, "/bytes/1000000"), "http://www.example.test/bytes/1000000"} {
					if scheme == "socks5" && strings.Contains(u, "example") {
						continue // curl itself would resolve
					}
					if out := mustCurl(t, l, "-p", "-x", s.URLAs(scheme), u); len(out) != 1_000_000 {
						t.Errorf("%s %s: %d bytes", scheme, u, len(out))
					}
				}
			}
			if r := curl(t, l, "-p", "-x", s.URL(), originURL(false, ":9099/")); r.Code == 0 {
				t.Errorf("a closed port through serve: %v", r)
			}
			if user != nil {
				wrong := *s
				wrong.Pass = "wrong"
				for _, scheme := range []string{"socks5h", "http"} {
					if r := curl(t, l, "-p", "-x", wrong.URLAs(scheme), originURL(false, "/")); r.Code == 0 {
						t.Errorf("%s with a wrong password: %v", scheme, r)
					}
				}
			}
			m := l.Mprox(t)
			m.Up("--proxy", s.URL())
			checkProxied(t, l)
			for _, a := range []netip.Addr{lab.OriginV4, lab.OriginV6} {
				got, _, err := exchangeUDP(udpSocket(t, l, a), netip.AddrPortFrom(a, lab.PortEcho), lab.Block(40000))
				if err != nil || len(got) != 40000 {
					t.Errorf("UDP %v: %d bytes, %v", a, len(got), err)
				}
			}
			m.Stop()
			p.Stop()
		})
	}
}
