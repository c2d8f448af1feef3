// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mutex-proxy/mutex/e2e/lab"
)

// checkProxied fetches from the origin over both families and fails the test unless it was the proxy that came.
func checkProxied(t *testing.T, l *lab.Lab) {
	t.Helper()
	l.Origin.Forget()
	for _, v6 := range []bool{false, true} {
		if out := mustCurl(t, l, originURL(v6, "/bytes/1000")); len(out) != 1000 {
			t.Errorf("v6 %v: got %d bytes", v6, len(out))
		}
	}
	if bad := l.Origin.AllFrom(lab.ExitV4, lab.ExitV6); len(bad) > 0 {
		t.Errorf("reached the origin without the proxy: %v", bad)
	}
}

func TestUpOneLiner(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, true)
	before := l.Snapshot(t)
	m := l.Mprox(t)
	m.Up("--proxy", s.URL())
	checkProxied(t, l)

	st := m.Status()
	if len(st.Contexts) != 1 || st.Contexts[0].Mode != "global" || !st.Contexts[0].Enabled {
		t.Errorf("contexts: %+v", st.Contexts)
	}
	if got := len(l.Snapshot(t)["link"]) - len(before["link"]); got != 1 {
		t.Errorf("%d more links, want one TUN", got)
	}
	// The secret is in no list of processes, no log, no answer.
	cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", m.PID()))
	for where, text := range map[string]string{
		"the process list": string(cmdline), "the log": m.Log.String(),
		"status": m.CLI("status", "-o", "json").Stdout, "upstreams": m.CLI("upstreams", "-o", "json").Stdout,
	} {
		for _, secret := range []string{lab.Password, "p%40ss%3Aw%2Frd%231"} {
			if strings.Contains(text, secret) {
				t.Errorf("%s shows the password", where)
			}
		}
	}
	if r := m.CLI("down"); r.Code != 0 {
		t.Errorf("down: %v", r)
	}
	if code := m.Wait(10 * time.Second); code != 0 {
		t.Errorf("up ended with %d after down", code)
	}
	if d := before.Diff(l.Snapshot(t)); d != "" {
		t.Errorf("left behind:\n%s", d)
	}
}

func TestUpConfigFile(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, true)
	m := l.Mprox(t)
	m.Env = []string{"LAB_PASSWORD=" + lab.Password}
	m.UpConfig(fmt.Sprintf(`{
  // comments and trailing commas are fine
  "upstreams": { "one": { "url": "socks5h://%s", "auth": { "username": %q, "password": "${LAB_PASSWORD}" } } },
  "contexts": { "default": { "mode": "global", "default": "one", "tun": { "name": "lab0", "mtu": 1400 },
    "rules": [ { "ip_cidr": "198.51.100.80/32", "port": 443, "upstream": "reject" }, ], "dns": { "mode": "fakeip" }, } },
}`, s.Addr, lab.User))
	checkProxied(t, l)
	out, err := l.Client.Output(t.Context(), "ip", "link", "show", "lab0")
	if err != nil || !strings.Contains(out, "mtu 1400") {
		t.Errorf("lab0: %s %v", out, err)
	}
	if _, err := l.Client.Dial("tcp", "198.51.100.80:443", 5*time.Second); !isRefused(err) {
		t.Errorf("rule reject: %v", err)
	}
	names := []string{}
	for _, u := range m.Status().Upstreams {
		names = append(names, u.Name)
	}
	if !slices.Contains(names, "one") {
		t.Errorf("upstreams: %v", names)
	}
}

// TestUpstreamWithoutIPv6 shows that what the upstream cannot do is refused at once, and not let past it.
func TestUpstreamWithoutIPv6(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.DanteVia(t, 1080, false, lab.ExitV4.String())
	m := l.Mprox(t)
	cp := l.Capture(t)
	m.Up("--proxy", s.URL())
	cp.Reset()
	within(t, 3*time.Second, "the refusal", func() {
		if c, err := l.Client.Dial("tcp", fmt.Sprintf("[%s]:80", lab.OriginV6), 10*time.Second); err == nil {
			c.Close()
			t.Error("connected over an upstream that has no IPv6")
		}
	})
	if out := mustCurl(t, l, originURL(false, "/bytes/10")); len(out) != 10 {
		t.Errorf("v4: %q", out)
	}
	upstreamOnly(s).Check(t, cp.Packets())
}

// TestInboundStaysDirect shows that a machine that is reached from outside stays reachable: ssh sessions older and younger than the
// capture, and a UDP server on the wildcard address, whose replies must come from the address that was asked.
func TestInboundStaysDirect(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, false)
	sshTo := append(l.SSHD(t, l.Client, netipAddrPort("0.0.0.0:22")), "root@"+lab.ClientV4.String())
	// From the origin, which is no direct destination.
	older := startCat(t, l, sshTo)
	older.check(t, "before up")
	for _, network := range []string{"udp4", "udp6"} {
		c, err := l.Client.ListenUDP(network, ":5555")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		go func() {
			buf := make([]byte, 2048)
			for {
				n, from, err := c.ReadFromUDPAddrPort(buf)
				if err != nil {
					return
				}
				_, _ = c.WriteToUDPAddrPort(buf[:n], from)
			}
		}()
	}
	m := l.Mprox(t)
	m.Up("--proxy", s.URL())
	older.check(t, "an older session after up")
	younger := startCat(t, l, sshTo)
	younger.check(t, "a younger session")
	for _, a := range []string{"192.168.77.2:5555", "[2001:db8:1::2]:5555"} {
		// A connected socket takes replies only from the address it asked.
		c, err := l.OriginNS.Dial("udp", a, time.Second)
		if err != nil {
			t.Fatal(err)
		}
		_ = c.SetDeadline(time.Now().Add(3 * time.Second))
		_, _ = c.Write([]byte("hello"))
		buf := make([]byte, 16)
		if n, err := c.Read(buf); err != nil || string(buf[:n]) != "hello" {
			t.Errorf("wildcard UDP server at %s: %q %v", a, buf[:n], err)
		}
		c.Close()
	}
	checkProxied(t, l)
	older.check(t, "an older session at the end")
	// A crash of the daemon must not lock the administrator out.
	m.Kill()
	older.check(t, "an older session after kill -9")
	younger.check(t, "a younger session after kill -9")
	startCat(t, l, sshTo).check(t, "a new session after kill -9")
}

// cat is an ssh session that echoes lines.
type cat struct {
	*lab.Proc
	in  *os.File
	out *lab.Log
	n   int
}

func startCat(t *testing.T, l *lab.Lab, sshTo []string) *cat {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	c := &cat{in: w, out: &lab.Log{}}
	cmd := l.OriginNS.Command(append(slices.Clone(sshTo), "cat")...)
	cmd.Stdin, cmd.Stdout = r, c.out
	c.Proc = lab.Start(t, "ssh", cmd)
	r.Close()
	t.Cleanup(func() { w.Close() })
	return c
}

func (c *cat) check(t *testing.T, when string) {
	t.Helper()
	c.n++
	line := fmt.Sprintf("line %d\n", c.n)
	_, _ = c.in.WriteString(line)
	if !lab.Poll(8*time.Second, func() bool { return strings.HasSuffix(c.out.String(), line) }) {
		t.Errorf("ssh session, %s: got %q", when, c.out)
	}
}

// TestStopUndoesEverything ends the daemon in each way and compares the kernel's state, with rules, routes and tables of others present.
func TestStopUndoesEverything(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, false)
	l.Client.IP(t, "rule add pref 100 from 10.9.9.9 lookup 77", "route add 10.8.0.0/16 via 192.168.77.1 table 77",
		"rule add pref 9000 fwmark 0x1/0xff lookup 77", "route add 10.7.0.0/16 via 192.168.77.1")
	if _, err := l.Client.Output(t.Context(), "nft", "add table inet foreign; add chain inet foreign out { type filter hook output priority 0; }; add rule inet foreign out meta mark 0x1 counter"); err != nil {
		t.Fatal(err)
	}
	before := l.Snapshot(t)
	m := l.Mprox(t)
	for _, stop := range []struct {
		name string
		do   func()
	}{
		{"SIGINT", func() { m.Signal(syscall.SIGINT) }},
		{"SIGTERM", func() { m.Signal(syscall.SIGTERM) }},
		{"down", func() {
			if r := m.CLI("down"); r.Code != 0 {
				t.Errorf("down: %v", r)
			}
		}},
	} {
		m.Up("--proxy", s.URL())
		checkProxied(t, l)
		during := l.Snapshot(t)
		for _, k := range []string{"rule4", "rule6", "route4", "route6", "nft"} {
			for _, line := range before[k] {
				if !slices.Contains(during[k], line) {
					t.Errorf("%s of others changed: %q is gone", k, line)
				}
			}
		}
		stop.do()
		if code := m.Wait(10 * time.Second); code != 0 {
			t.Errorf("%s: exit status %d\n%s", stop.name, code, m.Log)
		}
		if d := before.Diff(l.Snapshot(t)); d != "" {
			t.Errorf("%s left behind:\n%s", stop.name, d)
		}
		if out := mustCurl(t, l, originURL(false, "/")); !strings.Contains(out, lab.ClientV4.String()) {
			t.Errorf("after %s: %q", stop.name, out)
		}
	}
}

// TestStopBlocks shows that with on_stop: block the guard holds after an orderly stop, until cleanup.
func TestStopBlocks(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, false)
	before := l.Snapshot(t)
	trap := lab.NewTrap(t, l.Client, lab.LoopbackResolvers()...)
	cp := l.Capture(t)
	m := l.Mprox(t)
	m.UpConfig(globalConfig(s, `"on_stop": "block",`))
	m.Signal(syscall.SIGTERM)
	if code := m.Wait(10 * time.Second); code != 0 {
		t.Errorf("exit status %d", code)
	}
	cp.Reset()
	if answered := l.Client.Probe(lab.Probes()); len(answered) > 0 {
		t.Errorf("answered after the stop: %v", answered)
	}
	upstreamOnly(s).Check(t, cp.Packets())
	trap.Check(t)
	if r := m.CLI("cleanup"); r.Code != 0 {
		t.Errorf("cleanup: %v", r)
	}
	if d := before.Diff(l.Snapshot(t)); d != "" {
		t.Errorf("cleanup left:\n%s", d)
	}
}

func TestSecondDaemonConflicts(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, false)
	m := l.Mprox(t)
	m.Up("--proxy", s.URL())
	for name, r := range map[string]lab.Result{
		"same socket":  m.CLI("up", "--proxy", s.URL()),
		"other socket": l.Mprox(t).CLI("up", "--proxy", s.URL()),
	} {
		if r.Code != 6 || lines(r.Stderr) != 1 {
			t.Errorf("%s: want exit 6 and one line, got %v", name, r)
		}
	}
	checkProxied(t, l)
}

// TestUpMissing shows exit status 4 and one line that names what is missing.
func TestUpMissing(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, false)
	before := l.Snapshot(t)
	for _, c := range []struct {
		name string
		pre  []string
		want string
	}{
		{"privilege", []string{"setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"}, "NET_ADMIN"},
		{"tun", []string{"unshare", "-m", "sh", "-c", `mount -t tmpfs none /dev/net && exec "$0" "$@"`}, "/dev/net/tun"},
		{"nftables", noNetfilter(t, l), "nf"},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := l.Mprox(t)
			if err := os.Chmod(filepath.Dir(m.Socket), 0o777); err != nil {
				t.Fatal(err)
			}
			bin := l.PublicBinary(t)
			args := m.Args("up", "--proxy", s.URL())
			args[0] = bin
			r := m.Exec(l.Client.Command(append(slices.Clone(c.pre), args...)...))
			if r.Code != 4 || lines(r.Stderr) != 1 || !strings.Contains(r.Stderr, c.want) {
				t.Errorf("want exit 4 and one line that names %s, got %v", c.want, r)
			}
			if d := before.Diff(l.Snapshot(t)); d != "" {
				t.Errorf("left behind:\n%s", d)
			}
		})
	}
}

// noNetfilter returns a command that runs another one without netfilter's netlink protocol: a seccomp filter, made by python3, that
// answers socket(AF_NETLINK, …, NETLINK_NETFILTER) as a kernel without the module does.
func noNetfilter(t *testing.T, l *lab.Lab) []string {
	t.Helper()
	return []string{"/usr/bin/python3", l.File("nonetfilter.py", noNetfilterScript)}
}

func lines(s string) int { return strings.Count(strings.TrimSpace(s), "\n") + 1 }

func isRefused(err error) bool { return isErrno(err, syscall.ECONNREFUSED) }

// globalConfig is a configuration with one upstream "p" and one context in global mode, with more keys of the context.
func globalConfig(s *lab.Server, more string) string {
	return fmt.Sprintf(`{ "upstreams": { "p": { "url": %q } }, "contexts": { "default": { "mode": "global", %s "default": "p" } } }`, s.URL(), more)
}

// upstreamOnly allows traffic to the upstream and to the private LAN.
func upstreamOnly(s *lab.Server) lab.Allow {
	return lab.Allow{Upstreams: addrPorts(s), UDP: s.UDP, Direct: lab.LANPrefixes}
}
