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

// runners returns the ways to run a command through the proxy. The daemon of the second captures nothing by itself.
func runners(l *lab.Lab, s *lab.Server) map[string]func(*testing.T) (*lab.Mprox, []string) {
	return map[string]func(*testing.T) (*lab.Mprox, []string){
		"alone": func(t *testing.T) (*lab.Mprox, []string) {
			t.Helper()
			return l.Mprox(t), []string{"run", "--proxy", s.URL(), "--"}
		},
		"daemon, context": func(t *testing.T) (*lab.Mprox, []string) {
			t.Helper()
			m := l.Mprox(t)
			m.UpConfig(fmt.Sprintf(`{ "upstreams": { "p": { "url": %q } }, "contexts": { "work": { "mode": "cgroup", "default": "p" } } }`, s.URL()))
			return m, []string{"run", "--context", "work", "--"}
		},
		"daemon, proxy": func(t *testing.T) (*lab.Mprox, []string) {
			t.Helper()
			m := l.Mprox(t)
			m.UpConfig(`{ "contexts": { "work": { "mode": "cgroup", "default": "reject" } } }`)
			return m, []string{"run", "--proxy", s.URL(), "--"}
		},
	}
}

// TestRunTree shows that a command and all its descendants go through the proxy, and nothing else on the machine does.
func TestRunTree(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, true)
	for name, start := range runners(l, s) {
		t.Run(name, func(t *testing.T) {
			m, run := start(t)
			for what, script := range map[string]string{
				"command":           `exec curl -sS -m 10 URL`,
				"child":             `curl -sS -m 10 URL; true`,
				"double fork":       `(setsid sh -c 'curl -sS -m 10 URL > OUT.new; mv OUT.new OUT' &) ; while [ ! -e OUT ]; do :; done; cat OUT`,
				"by another parent": `setsid --fork setsid --fork sh -c 'curl -sS -m 10 URL > OUT.new; mv OUT.new OUT'; while [ ! -e OUT ]; do :; done; cat OUT`,
			} {
				for _, v6 := range []bool{false, true} {
					out := filepath.Join(t.TempDir(), "out")
					script := strings.NewReplacer("URL", "'"+originURL(v6, "/")+"'", "OUT", out).Replace(script)
					r := m.CLI(append(slices.Clone(run), "sh", "-c", script)...)
					if r.Code != 0 || !fromProxy(r.Stdout) {
						t.Errorf("%s, v6 %v: %v", what, v6, r)
					}
				}
			}
			// At the same time, somebody else is direct.
			p := lab.Start(t, "run", m.Command(append(slices.Clone(run), "sleep", "30")...))
			lab.Eventually(t, 10*time.Second, "sleep runs", func() bool { return p.Exited() || hasChild(p.PID(), "sleep") })
			if out := mustCurl(t, l, originURL(false, "/")); !strings.Contains(out, lab.ClientV4.String()) {
				t.Errorf("outside of run: %q", out)
			}
			if out := mustCurl(t, l, originURL(true, "/")); !strings.Contains(out, lab.ClientV6.String()) {
				t.Errorf("outside of run: %q", out)
			}
		})
	}
}

// fromProxy reports whether the origin's greeting names the proxy host as its client.
func fromProxy(greeting string) bool {
	return strings.Contains(greeting, "hello "+lab.ExitV4.String()+":") || strings.Contains(greeting, "hello ["+lab.ExitV6.String()+"]:")
}

// hasChild reports whether a process has a descendant of that name.
func hasChild(pid int, name string) bool { return childState(pid, name) != "" }

// childState is the state of a process's descendant of that name, a letter as in ps(1), or "" when there is none.
func childState(pid int, name string) string {
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, f := range tasks {
		b, _ := os.ReadFile(f)
		for c := range strings.FieldsSeq(string(b)) {
			stat, _ := os.ReadFile("/proc/" + c + "/stat")
			if _, after, ok := strings.Cut(string(stat), "("+name+") "); ok {
				return after[:1]
			}
			var child int
			_, _ = fmt.Sscan(c, &child)
			if s := childState(child, name); s != "" {
				return s
			}
		}
	}
	return ""
}

func TestRunExitStatus(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, false)
	m := l.Mprox(t)
	notExecutable := l.File("data", "no program")
	for _, c := range []struct {
		name string
		args []string
		want int
	}{
		{"0", []string{"--proxy", s.URL(), "--", "true"}, 0},
		{"3", []string{"--proxy", s.URL(), "--", "sh", "-c", "exit 3"}, 3},
		{"125 of the command", []string{"--proxy", s.URL(), "--", "sh", "-c", "exit 125"}, 125},
		{"signal", []string{"--proxy", s.URL(), "--", "sh", "-c", "kill -KILL $$"}, 128 + 9},
		{"not found", []string{"--proxy", s.URL(), "--", "/nonexistent/program"}, 127},
		{"not found in PATH", []string{"--proxy", s.URL(), "--", "no-such-program"}, 127},
		{"not executable", []string{"--proxy", s.URL(), "--", notExecutable}, 126},
		{"bad proxy", []string{"--proxy", "gopher://x", "--", "true"}, 125},
		{"no command", []string{"--proxy", s.URL()}, 125},
		{"unknown flag", []string{"--no-such-flag", "--", "true"}, 125},
	} {
		if r := m.CLI(append([]string{"run"}, c.args...)...); r.Code != c.want {
			t.Errorf("%s: want %d, got %v", c.name, c.want, r)
		}
	}
	// Standard input and output are the command's own.
	cmd := m.Command("run", "--proxy", s.URL(), "--", "sha256sum")
	cmd.Stdin = lab.DataReader(3_000_000)
	if r := m.Exec(cmd); !strings.HasPrefix(r.Stdout, lab.Checksum(3_000_000)) {
		t.Errorf("through standard input: %v", r)
	}
	// The environment too.
	cmd = m.Command("run", "--proxy", s.URL(), "--", "sh", "-c", "echo $LAB_VALUE")
	cmd.Env = append(os.Environ(), "LAB_VALUE=kept")
	if r := m.Exec(cmd); r.Stdout != "kept\n" {
		t.Errorf("environment: %v", r)
	}
}

func TestRunSignals(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, false)
	m := l.Mprox(t)
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGQUIT} {
		p := lab.Start(t, "run", m.Command("run", "--proxy", s.URL(), "--", "sh", "-c",
			`for s in TERM INT HUP USR1 USR2 QUIT; do trap "echo got $s; exit 40" $s; done; echo ready; while :; do sleep 0.05; done`))
		lab.Eventually(t, 10*time.Second, "the command is ready", func() bool { return strings.Contains(p.Log.String(), "ready") })
		p.Signal(sig)
		if code := p.Wait(5 * time.Second); code != 40 {
			t.Errorf("%v: exit status %d, want 40: %s", sig, code, p.Log)
		}
	}
}

// TestRunTerminal drives an interactive shell whose jobs are `mprox run`: Ctrl-C, Ctrl-Z and fg, the size of the window.
func TestRunTerminal(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, false)
	m := l.Mprox(t)
	run := strings.Join(m.Args("run", "--proxy", "'"+s.URL()+"'", "--"), " ")
	cmd := l.Client.Command("bash", "--norc", "--noprofile", "-i")
	cmd.Env = append(os.Environ(), "PS1=prompt$ ", "TERM=dumb")
	term := lab.StartTerminal(t, cmd)
	term.Resize(33, 77)
	term.Expect(t, "prompt$")
	term.Type(run + " sh -c 'echo is$((1+1)); stty size; test -t 0 && echo tty$((3+4))'\n")
	term.Expect(t, "is2\n33 77\ntty7\n")

	term.Type(run + ` sh -c 'trap "stty size; echo resized-$((5+5))" WINCH; trap "echo int-$((6+6)); exit 9" INT; echo waiting-$((7+7)); while :; do sleep 0.05; done'` + "\n")
	term.Expect(t, "waiting-14")
	term.Resize(20, 60)
	term.Expect(t, "20 60\nresized-10")
	term.Type("\x03")
	term.Expect(t, "int-12")
	term.Type("echo status-$?\n")
	term.Expect(t, "status-9")

	term.Type(run + " cat\n")
	// A line typed while the shell still owns the terminal would be the shell's.
	lab.Eventually(t, 10*time.Second, "cat reads", func() bool { return childState(term.PID(), "cat") == "S" })
	term.Type("first line\n")
	term.Expect(t, "first line\nfirst line\n")
	term.Type("\x1a")
	term.Expect(t, "Stopped")
	term.Type("jobs; echo job-$((8+8))\n")
	term.Expect(t, "job-16")
	term.Type("fg\n")
	lab.Eventually(t, 10*time.Second, "cat reads again", func() bool { return childState(term.PID(), "cat") == "S" })
	term.Type("second line\n")
	term.Expect(t, "second line\nsecond line\n")
	term.Type("\x04")
	term.Type("echo end-$((9+9))\n")
	term.Expect(t, "end-18")
	// Ctrl-C on a command that does not catch it: the shell sees 130.
	term.Type(run + " sleep 100\n")
	lab.Eventually(t, 10*time.Second, "sleep runs", func() bool { return hasChild(term.PID(), "sleep") })
	term.Type("\x03")
	term.Type("echo code-$?\n")
	term.Expect(t, "code-130")
}

// TestRunTwoProxies runs two commands through two proxies at the same time; the origin tells them apart by the exit address.
func TestRunTwoProxies(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	a := l.DanteVia(t, 1080, false, lab.ExitV4.String())
	b := l.DanteVia(t, 1081, true, lab.Exit2V4.String())
	m := l.Mprox(t)
	script := "for i in 1 2 3 4 5 6 7 8 9 10; do curl -sS -m 10 " + originURL(false, "/") + "; done"
	pa := lab.Start(t, "run a", m.Command("run", "--proxy", a.URL(), "--", "sh", "-c", script))
	pb := lab.Start(t, "run b", m.Command("run", "--proxy", b.URL(), "--", "sh", "-c", script))
	for p, exit := range map[*lab.Proc]string{pa: lab.ExitV4.String(), pb: lab.Exit2V4.String()} {
		if code := p.Wait(30 * time.Second); code != 0 {
			t.Errorf("exit status %d: %s", code, p.Log)
		}
		if n := strings.Count(p.Log.String(), "hello "+exit+":"); n != 10 {
			t.Errorf("%d of 10 requests by %s:\n%s", n, exit, p.Log)
		}
	}
}

// TestRunKilled kills `mprox run` with SIGKILL: its device is gone within 100 ms and a surviving child is blocked, not freed.
func TestRunKilled(t *testing.T) {
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, false)
	before := l.Snapshot(t)
	m := l.Mprox(t)
	exe, err := lab.HelperCommand("probe")
	if err != nil {
		t.Fatal(err)
	}
	trap := lab.NewTrap(t, l.Client, lab.LoopbackResolvers()...)
	cp := l.Capture(t)
	gate := filepath.Join(l.Dir, "gate")
	script := `echo ready; trap "" HUP TERM INT; while [ ! -e ` + gate + ` ]; do sleep 0.02; done; ` + strings.Join(exe, " ") + `; curl -sS -m 2 ` + originURL(false, "/") + `; echo finished`
	// A file, not a pipe: it must outlive mprox.
	logFile := l.File("survivor.log", "")
	f, err := os.OpenFile(logFile, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	output := func() string {
		b, _ := os.ReadFile(logFile)
		return string(b)
	}
	cmd := m.Command("run", "--proxy", s.URL(), "--", "setsid", "sh", "-c", script)
	cmd.Stdout, cmd.Stderr = f, f
	p := lab.Start(t, "run", cmd)
	lab.Eventually(t, 10*time.Second, "the command is ready", func() bool { return strings.Contains(output(), "ready") })
	tunsBefore := len(l.Snapshot(t)["link"])
	p.Signal(syscall.SIGKILL)
	killed := time.Now()
	lab.Eventually(t, 5*time.Second, "the device is gone", func() bool { return tunCount(l) == 0 })
	if d := time.Since(killed); d > 100*time.Millisecond {
		t.Errorf("the device was there for %v after kill -9 (%d links)", d, tunsBefore)
	}
	trap.Reset()
	cp.Reset()
	if err := os.WriteFile(gate, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	lab.Eventually(t, 20*time.Second, "the surviving child has tried", func() bool { return strings.Contains(output(), "finished") })
	if strings.Contains(output(), "hello") {
		t.Errorf("the surviving child reached the origin:\n%s", output())
	}
	lab.Allow{Upstreams: addrPorts(s), UDP: true, Direct: lab.LANPrefixes}.Check(t, cp.Packets())
	trap.Check(t)
	// The others are free.
	if out := mustCurl(t, l, originURL(false, "/")); !strings.Contains(out, lab.ClientV4.String()) {
		t.Errorf("outside: %q", out)
	}
	if r := m.CLI("cleanup"); r.Code != 0 {
		t.Errorf("cleanup: %v", r)
	}
	var diff string
	if !lab.Poll(3*time.Second, func() bool { diff = before.Diff(l.Snapshot(t)); return diff == "" }) {
		t.Errorf("left behind:\n%s", diff)
	}
}

// tunCount counts the TUN devices of the client.
func tunCount(l *lab.Lab) int {
	n := 0
	_ = l.Client.Do(func() error {
		devs, err := os.ReadFile("/proc/thread-self/net/dev")
		for line := range strings.Lines(string(devs)) {
			name, _, ok := strings.Cut(strings.TrimSpace(line), ":")
			if ok && name != "lo" && name != "eth0" {
				n++
			}
		}
		return err
	})
	return n
}

// TestRunLeak runs every probe inside `mprox run`, and records the uplink: only the proxy is reached, whoever else may leak or not.
func TestRunLeak(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, false)
	trap := lab.NewTrap(t, l.Client, lab.LoopbackResolvers()...)
	exe, err := lab.HelperCommand("probe")
	if err != nil {
		t.Fatal(err)
	}
	for name, start := range runners(l, s) {
		t.Run(name, func(t *testing.T) {
			m, run := start(t)
			cp := l.Capture(t)
			r := m.CLI(append(slices.Clone(run), exe...)...)
			if r.Code != 0 {
				t.Errorf("%v", r)
			}
			if !strings.Contains(r.Stdout, "tcp4 plain") || !strings.Contains(r.Stdout, "tcp6 plain") || !strings.Contains(r.Stdout, "udp4 plain") {
				t.Errorf("not carried: %v", r)
			}
			upstreamOnly(s).Check(t, cp.Packets())
			trap.Check(t)
		})
	}
}
