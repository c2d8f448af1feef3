// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mutex-proxy/mutex/e2e/lab"
)

// leaseUser runs mprox as an ordinary user against a root's daemon.
func leaseUser(l *lab.Lab, m *lab.Mprox, bin string, uid int, args ...string) *exec.Cmd {
	id := fmt.Sprint(uid)
	full := m.Args(args...)
	full[0] = bin
	return l.Client.Command(append([]string{"setpriv", "--reuid", id, "--regid", id, "--clear-groups"}, full...)...)
}

// TestUserLease shows what a user who is not root may do: lease for a process of their own, up to the configured number, without files; and
// that a set-uid program in the lease is blocked, by the lease and after its end.
func TestUserLease(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, true)
	l.Unbound(t)
	if err := os.Chmod(l.Dir, 0o755); err != nil {
		t.Fatal(err)
	}
	public := l.PublicBinary(t)
	m := l.Mprox(t)
	m.UpConfig(`{ "control": { "user_leases": 2 }, "contexts": { "work": { "mode": "cgroup", "default": "reject" } } }`)
	bin, err := exec.LookPath("curl")
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(bin)
	if err != nil {
		t.Fatal(err)
	}
	setuid := filepath.Join(l.Dir, "curl-as-root")
	if err := os.WriteFile(setuid, b, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(setuid, 0o755|os.ModeSetuid); err != nil {
		t.Fatal(err)
	}
	direct := lab.Exec(t, l.Client.Command("setpriv", "--reuid", "4001", "--regid", "4001", "--clear-groups", setuid, "-sS", "-m", "5", originURL(false, "/")))
	if direct.Code != 0 || fromProxy(direct.Stdout) {
		t.Fatalf("the set-uid program does not work at all: %v", direct)
	}
	run := []string{"run", "--proxy", s.URL(), "--"}
	for _, v6 := range []bool{false, true} {
		if r := lab.Exec(t, leaseUser(l, m, public, 4001, append(slices.Clone(run), "sh", "-c", "id -u; curl -sS -m 10 '"+originURL(v6, "/")+"'")...)); r.Code != 0 || !fromProxy(r.Stdout) || !strings.HasPrefix(r.Stdout, "4001\n") {
			t.Errorf("v6 %v: %v", v6, r)
		}
		if r := lab.Exec(t, leaseUser(l, m, public, 4001, append(slices.Clone(run), setuid, "-sS", "-m", "2", originURL(v6, "/"))...)); r.Code == 0 || r.Code == 125 || r.Stdout != "" {
			t.Errorf("a set-uid program, v6 %v: %v", v6, r)
		}
	}
	if r := lab.Exec(t, leaseUser(l, m, public, 4001, append(slices.Clone(run), "curl", "-sS", "-m", "10", "http://www.example.test/")...)); r.Code != 0 || !fromProxy(r.Stdout) {
		t.Errorf("by name: %v", r)
	}
	for what, args := range map[string][]string{
		"a context of others":     {"run", "--context", "work", "--", "true"},
		"a file":                  {"run", "--proxy", s.URL() + "?password_file=/etc/shadow", "--", "true"},
		"the daemon's own secret": {"run", "--proxy", "socks5h://${HOME}@192.0.2.1:1080", "--", "true"},
	} {
		if r := lab.Exec(t, leaseUser(l, m, public, 4001, args...)); r.Code != 125 || strings.Count(r.Stderr, "\n") != 1 {
			t.Errorf("%s: %v", what, r)
		}
	}
	// Somebody else's process.
	victim := lab.Start(t, "victim", l.Client.Command("sleep", "300"))
	post := fmt.Sprintf(`{"proxies":[%q],"pid":%d}`, s.URL(), victim.PID())
	curl := l.Client.Command("setpriv", "--reuid", "4001", "--regid", "4001", "--clear-groups", "curl", "-sS", "-m", "5", "--unix-socket", m.Socket, "-d", post, "http://m/v1/leases")
	if r := lab.Exec(t, curl); !strings.Contains(r.Stdout, `"forbidden"`) {
		t.Errorf("somebody else's process: %v", r)
	}
	lab.Eventually(t, 5*time.Second, "all leases have gone", func() bool { return len(m.Status().Contexts) == 1 })

	for range 2 {
		lab.Start(t, "held", leaseUser(l, m, public, 4001, append(slices.Clone(run), "sleep", "300")...))
	}
	lab.Eventually(t, 5*time.Second, "two leases", func() bool { return len(m.Status().Contexts) == 3 })
	if r := lab.Exec(t, leaseUser(l, m, public, 4001, append(slices.Clone(run), "true")...)); r.Code != 125 || !strings.Contains(r.Stderr, "2 are yours") {
		t.Errorf("a third lease: %v", r)
	}
	if r := lab.Exec(t, leaseUser(l, m, public, 4002, append(slices.Clone(run), "true")...)); r.Code != 0 {
		t.Errorf("another user: %v", r)
	}
}

// TestLeaseOfCaptured shows that a lease is no way around a capture: whoever a context captures may lease a proxy on another machine, and neither go directly, nor
// bypass anything, nor name what listens on this machine, whose processes would be let out. Whoever is not captured may do all of that.
func TestLeaseOfCaptured(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, true)
	if err := os.Chmod(l.Dir, 0o755); err != nil {
		t.Fatal(err)
	}
	public := l.PublicBinary(t)
	m := l.Mprox(t)
	m.UpConfig(fmt.Sprintf(`{ "upstreams": { "p": { "url": %q } }, "contexts": { "c": { "mode": "process", "default": "p", "select": { "uid": 4001 } } } }`, s.URL()))
	lab.Start(t, "local", l.Client.Command("setpriv", "--reuid", "4002", "--regid", "4002", "--clear-groups", public, "serve", "--listen", "127.0.0.1:9999"))
	lab.Eventually(t, 10*time.Second, "the proxy on this machine answers", func() bool {
		// Nothing of it leaves the machine, where it would be seen by the capture that starts now.
		return lab.Exec(t, l.Client.Command("curl", "-sS", "-m", "2", "-x", "socks5h://127.0.0.1:9999", "http://127.0.0.1:1/")).Code == 97 // refused by the proxy
	})
	lease := func(uid int, args ...string) lab.Result {
		return lab.Exec(t, leaseUser(l, m, public, uid, slices.Concat([]string{"run"}, args, []string{"--", "curl", "-sS", "-m", "5", originURL(false, "/")})...))
	}
	cp := l.Capture(t)
	for what, args := range map[string][]string{
		"direct":                 {"--proxy", "direct://"},
		"direct in a pool":       {"--proxy", s.URL(), "--proxy", "direct://"},
		"loopback":               {"--proxy", "socks5h://127.0.0.1:9999"},
		"loopback, IPv6":         {"--proxy", "socks5h://[::1]:9999"},
		"loopback, v4 mapped":    {"--proxy", "socks5h://[::ffff:127.0.0.1]:9999"},
		"loopback by name":       {"--proxy", "socks5h://localhost:9999"},
		"a bypass":               {"--proxy", s.URL(), "--bypass", "0.0.0.0/0"},
		"loopback without names": {"--proxy", "auto://127.1.2.3:9999"},
	} {
		if r := lease(4001, args...); r.Code != 125 || lines(r.Stderr) != 1 || !strings.Contains(r.Stderr, "context c captures you") {
			t.Errorf("%s: %v", what, r)
		}
	}
	if r := lease(4001, "--proxy", s.URL()); r.Code != 0 || !fromProxy(r.Stdout) {
		t.Errorf("a proxy on another machine: %v", r)
	}
	upstreamOnly(s).Check(t, cp.Packets())
	for _, args := range [][]string{{"--proxy", "direct://"}, {"--proxy", s.URL(), "--bypass", "198.51.100.0/24"}, {"--proxy", "socks5h://127.0.0.1:9999"}} {
		if r := lease(4003, args...); r.Code != 0 || fromProxy(r.Stdout) {
			t.Errorf("not captured, %v: %v", args, r)
		}
	}
}

// TestLeaseKilled kills the client of a lease with SIGKILL: device and flows are gone within 100 ms, and the process that lives on is blocked
// until it ends; then nothing is left.
func TestLeaseKilled(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, true)
	m := l.Mprox(t)
	m.UpConfig(`{ "contexts": { "work": { "mode": "cgroup", "default": "reject" } } }`)
	before := l.Snapshot(t)
	cp := l.Capture(t)
	best := time.Hour
	for range 3 {
		script := fmt.Sprintf(`exec 3<>/dev/tcp/%s/%d; echo up; read x <&3; echo "ended"; while sleep 0.05; do (exec 4<>/dev/tcp/%s/80) 2>/dev/null && echo LEAK; done`,
			lab.OriginV4, lab.PortHold, lab.OriginV4)
		p := lab.Start(t, "run", m.Command("run", "--proxy", s.URL(), "--", "bash", "-c", script))
		lab.Eventually(t, 10*time.Second, "a flow", func() bool { return strings.Contains(p.Log.String(), "up") && len(m.Flows()) == 1 })
		tun := ""
		for _, c := range m.Status().Contexts {
			if c.Lease {
				tun = c.TUN
			}
		}
		child := childPID(p.PID(), "bash")
		cp.Reset()
		began := time.Now()
		// nsenter has executed mprox in its own place.
		p.Signal(syscall.SIGKILL)
		gone := func() bool {
			return l.Client.Do(func() error { _, err := os.Stat("/proc/thread-self/net/dev_snmp6/" + tun); return err }) != nil
		}
		if !lab.Poll(5*time.Second, gone) {
			t.Fatal("the device stays")
		}
		best = min(best, time.Since(began))
		if n := len(m.Flows()); n > 0 {
			t.Errorf("%d flows are left", n)
		}
		lab.Eventually(t, 5*time.Second, "the command notices", func() bool { return strings.Contains(p.Log.String(), "ended") })
		lab.Never(t, 300*time.Millisecond, "the survivor gets out", func() bool { return strings.Contains(p.Log.String(), "LEAK") })
		upstreamOnly(s).Check(t, cp.Packets())
		if err := syscall.Kill(child, syscall.SIGKILL); err != nil {
			t.Error(err)
		}
		lab.Eventually(t, 5*time.Second, "everything is as before", func() bool { return before.Diff(l.Snapshot(t)) == "" })
	}
	t.Logf("device gone %s after SIGKILL at best", best)
	if best > 100*time.Millisecond {
		t.Errorf("device gone %s after SIGKILL at best", best)
	}
}

// childPID is the process of that name below another, 0 if there is none.
func childPID(pid int, name string) int {
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, f := range tasks {
		b, _ := os.ReadFile(f)
		for c := range strings.FieldsSeq(string(b)) {
			var child int
			_, _ = fmt.Sscan(c, &child)
			comm, _ := os.ReadFile("/proc/" + c + "/comm")
			if strings.TrimSpace(string(comm)) == name {
				return child
			}
			if p := childPID(child, name); p != 0 {
				return p
			}
		}
	}
	return 0
}
