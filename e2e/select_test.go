// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mutex-proxy/mutex/e2e/lab"
)

// as runs curl as a user in the client's namespace.
func as(t *testing.T, l *lab.Lab, uid int, args ...string) lab.Result {
	t.Helper()
	id := fmt.Sprint(uid)
	return lab.Exec(t, l.Client.Command(append([]string{
		"setpriv", "--reuid", id, "--regid", id, "--clear-groups", "curl", "-sS", "-m", "10",
	}, args...)...))
}

// TestSelectUser shows that a selected user goes through the proxy, by address and by name, that nobody else does, that a reload moves the
// line, and that the selected are blocked when the daemon has been killed.
func TestSelectUser(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, true)
	l.Unbound(t)
	before := l.Snapshot(t)
	m := l.Mprox(t)
	config := func(uid int) string {
		return fmt.Sprintf(`{ "upstreams": { "p": { "url": %q } }, "contexts": { "work": { "mode": "process", "select": { "uid": %d }, "default": "p" } } }`, s.URL(), uid)
	}
	m.UpConfig(config(4001))
	check := func(in, out int) {
		t.Helper()
		for _, v6 := range []bool{false, true} {
			if r := as(t, l, in, originURL(v6, "/")); r.Code != 0 || !fromProxy(r.Stdout) {
				t.Errorf("user %d, v6 %v: %v", in, v6, r)
			}
			for _, uid := range []int{0, out} {
				if r := as(t, l, uid, originURL(v6, "/")); r.Code != 0 || fromProxy(r.Stdout) {
					t.Errorf("user %d, v6 %v: %v", uid, v6, r)
				}
			}
		}
		if r := as(t, l, in, "http://www.example.test/"); r.Code != 0 || !fromProxy(r.Stdout) {
			t.Errorf("user %d, by name: %v", in, r)
		}
	}
	check(4001, 4002)
	m.WriteConfig(config(4002))
	if err := m.Post("/v1/reload"); err != nil {
		t.Fatal(err)
	}
	check(4002, 4001)
	m.Signal(syscall.SIGKILL)
	m.Wait(5 * time.Second)
	if r := as(t, l, 4002, "-m", "2", originURL(false, "/")); r.Code == 0 {
		t.Errorf("killed: %v", r)
	}
	if r := as(t, l, 4001, originURL(false, "/")); r.Code != 0 || fromProxy(r.Stdout) {
		t.Errorf("killed, user 4001: %v", r)
	}
	if r := m.CLI("down"); r.Code != 0 {
		t.Error(r)
	}
	if diff := before.Diff(l.Snapshot(t)); diff != "" {
		t.Errorf("not as before:\n%s", diff)
	}
}

// TestExcludeUser shows that a global context leaves out whom it excludes, and nobody else.
func TestExcludeUser(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, true)
	m := l.Mprox(t)
	m.UpConfig(globalConfig(s, `"exclude": [ { "uid": 4001 }, { "user": "nobody" } ],`))
	for uid, proxied := range map[int]bool{0: true, 4001: false, 4002: true, 65534: false} {
		for _, v6 := range []bool{false, true} {
			if r := as(t, l, uid, originURL(v6, "/")); r.Code != 0 || fromProxy(r.Stdout) != proxied || !strings.Contains(r.Stdout, "hello ") {
				t.Errorf("user %d, v6 %v: want proxied %v, got %v", uid, v6, proxied, r)
			}
		}
	}
}

// host is a machine behind the client, which is its router.
type host struct {
	l   *lab.Lab
	pid int
}

func newHost(t *testing.T, l *lab.Lab, dev, net4, net6 string) host {
	t.Helper()
	p := lab.Start(t, "host", exec.Command("unshare", "-n", "sleep", "1000"))
	h := host{l: l, pid: p.PID()}
	own, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	lab.Eventually(t, 5*time.Second, "a namespace", func() bool {
		ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", h.pid))
		return err == nil && ns != own
	})
	l.Client.Run(t, "ip", "link", "add", dev, "type", "veth", "peer", "name", "e0", "netns", fmt.Sprint(h.pid))
	l.Client.Run(t, "sh", "-ec", fmt.Sprintf("ip link set %[1]s up; ip addr add %[2]s.1/24 dev %[1]s; ip addr add %[3]s::1/64 dev %[1]s nodad", dev, net4, net6))
	if r := h.run(t, "sh", "-ec", fmt.Sprintf("ip link set lo up; ip link set e0 up; ip addr add %[1]s.2/24 dev e0; ip addr add %[2]s::2/64 dev e0 nodad; "+
		"ip route add default via %[1]s.1; ip -6 route add default via %[2]s::1", net4, net6)); r.Code != 0 {
		t.Fatal(r)
	}
	return h
}

func (h host) run(t *testing.T, args ...string) lab.Result {
	t.Helper()
	return lab.Exec(t, exec.Command("nsenter", append([]string{"--net", "-t", fmt.Sprint(h.pid)}, args...)...))
}

// TestGateway puts two hosts behind the client: what they send goes through the proxy, DNS too, and nothing once the daemon is dead.
func TestGateway(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, true)
	hosts := []host{newHost(t, l, "g1", "192.168.50", "fd50"), newHost(t, l, "g2", "192.168.60", "fd60")}
	before := l.Snapshot(t)
	cp := l.Capture(t)
	m := l.Mprox(t)
	m.UpConfig(fmt.Sprintf(`{ "upstreams": { "p": { "url": %q } }, "contexts": { "lan": { "mode": "gateway", "default": "p",
		"select": [ { "interface": "g1" }, { "source_cidr": ["192.168.60.0/24", "fd60::/64"] } ] } } }`, s.URL()))
	during := l.Snapshot(t)["sysctl"]
	for _, line := range before["sysctl"] { // of devices that are not ours nothing but forwarding is changed, by which the kernel changes what it makes of redirects
		if !slices.Contains(during, line) && !strings.Contains(line, "forward") && !strings.Contains(line, "accept_redirects") {
			t.Errorf("changed: %s", line)
		}
	}
	for i, h := range hosts {
		for _, v6 := range []bool{false, true} {
			if r := h.run(t, "curl", "-sS", "-m", "10", originURL(v6, "/")); r.Code != 0 || !fromProxy(r.Stdout) {
				t.Errorf("host %d, v6 %v: %v", i, v6, r)
			}
		}
		own4, own6 := []string{"192.168.50.1", "192.168.60.1"}[i], []string{"fd50::1", "fd60::1"}[i]
		for _, server := range []string{lab.LANV4.String(), own4, own6} { // the last two are the gateway itself
			for _, how := range []string{"+notcp", "+tcp"} {
				if r := h.run(t, "dig", "+short", "+tries=1", how, "@"+server, "www.example.test"); !strings.HasPrefix(r.Stdout, "198.1") {
					t.Errorf("host %d, DNS %s by %s: %v", i, how, server, r)
				}
			}
		}
		if r := h.run(t, "ping", "-c", "1", "-W", "3", lab.OriginV4.String()); r.Code != 0 {
			t.Errorf("host %d, ping through the gateway: %v", i, r)
		}
		if r := h.run(t, "ping", "-c", "1", "-W", "3", own4); r.Code != 0 {
			t.Errorf("host %d, ping the gateway: %v", i, r)
		}
		udp := fmt.Sprintf("import socket; s=socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(3); s.sendto(b'hi', (%q, %d)); print(s.recv(9))", lab.OriginV4, lab.PortEcho)
		if r := h.run(t, "python3", "-c", udp); !strings.Contains(r.Stdout, "b'hi'") {
			t.Errorf("host %d, UDP: %v", i, r)
		}
	}
	// The way to one of them gets narrower than its own device: segments fit it all the same, in both directions.
	l.Client.Run(t, "sh", "-ec", "ip link set g1 mtu 1300")
	mss := `import socket,sys
for a, most in ((%q, 1260), (%q, 1240)):
    s = socket.create_connection((a, 80), 5)
    if s.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG) > most: sys.exit("%%s: %%d" %% (a, s.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)))
    s.sendall(b"GET /bytes/2000000 HTTP/1.0\r\n\r\n"); s.settimeout(10); n = 0
    while b := s.recv(65536): n += len(b)
    if n < 2000000: sys.exit("%%s: %%d bytes" %% (a, n))`
	if r := hosts[0].run(t, "python3", "-c", fmt.Sprintf(mss, lab.OriginV4.String(), lab.OriginV6.String())); r.Code != 0 {
		t.Errorf("segments: %v", r)
	}
	if out := mustCurl(t, l, originURL(false, "/")); fromProxy(out) {
		t.Errorf("the gateway itself is captured: %q", out)
	}
	// Who makes sockets on this machine is written down only while a context captures any.
	pinned := func() bool { // beside what a namespace of the same number, long gone, may have left
		return slices.ContainsFunc(l.Snapshot(t)["bpf"], func(path string) bool { return !slices.Contains(before["bpf"], path) })
	}
	if pinned() {
		t.Error("owners are written down for a gateway alone")
	}
	must(t, m, "contexts", "add", "mine", "--default", "p", "--mode", "cgroup")
	lab.Eventually(t, 5*time.Second, "owners are written down", pinned)
	must(t, m, "contexts", "rm", "mine")
	lab.Eventually(t, 5*time.Second, "they are no longer", func() bool { return !pinned() })
	cp.Reset()
	m.Signal(syscall.SIGKILL)
	m.Wait(5 * time.Second)
	trap := lab.NewTrap(t, l.Client, netipAddrPort("192.168.50.1:53"))
	if r := hosts[0].run(t, "dig", "+short", "+tries=1", "+timeout=1", "@192.168.50.1", "www.example.test"); r.Code == 0 || len(trap.Names()) > 0 {
		t.Errorf("killed, DNS to the gateway: %v, %v", r, trap.Names())
	}
	for i, h := range hosts {
		if r := h.run(t, "curl", "-sS", "-m", "2", originURL(false, "/")); r.Code == 0 {
			t.Errorf("host %d, killed: %v", i, r)
		}
	}
	upstreamOnly(s).Check(t, cp.Packets())
	if r := m.CLI("down"); r.Code != 0 {
		t.Error(r)
	}
	l.Client.Run(t, "ip", "link", "set", "g1", "mtu", "1500")
	if d := before.Diff(l.Snapshot(t)); d != "" {
		t.Errorf("not as before:\n%s", d)
	}
}
