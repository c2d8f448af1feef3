// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mutex-proxy/mutex/e2e/lab"
)

// machine lists what a demo could leave on the machine: namespaces, links, mounts, cgroups, files of its own.
func machine(t *testing.T) []string {
	t.Helper()
	var out []string
	for _, args := range [][]string{
		{"ip", "-o", "link"},
		{"ip", "rule"},
		{"ip", "-6", "rule"},
		{"nft", "-s", "list", "ruleset"},
		{"findmnt", "-rno", "TARGET"},
		{"sh", "-c", "ls -d /run/mprox* /tmp/mprox* 2>/dev/null; find /sys/fs/cgroup -type d -name '*mprox*'; ls /run/netns 2>/dev/null"},
	} {
		b, _ := exec.Command(args[0], args[1:]...).Output()
		for line := range strings.Lines(string(b)) {
			// What this process's own labs make and remove meanwhile is not the demo's.
			if !strings.Contains(line, "mpx") && !strings.Contains(line, "mprox-e2e") {
				out = append(out, strings.TrimSpace(line))
			}
		}
	}
	return out
}

// TestDemo runs the demo as a user does, looks at what it says, and at what it leaves. It is not parallel: it compares the machine.
func TestDemo(t *testing.T) {
	lab.RequireRoot(t)
	lab.Binary(t)
	before := machine(t)
	var r lab.Result
	within(t, 30*time.Second, "the demo", func() { r = lab.Local(t, "demo") })
	t.Logf("%s", r.Stdout)
	if r.Code != 0 {
		t.Fatalf("demo: %v", r)
	}
	low := strings.ToLower(r.Stdout)
	for _, want := range []string{"refused", "guard", "bit/s", "socks", "established"} {
		if !strings.Contains(low, want) {
			t.Errorf("the demo does not show %q", want)
		}
	}
	checkMachine(t, before)
}

// TestDemoInterrupted ends the demo by Ctrl-C at several moments.
func TestDemoInterrupted(t *testing.T) {
	lab.RequireRoot(t)
	bin := lab.Binary(t)
	before := machine(t)
	for _, after := range []time.Duration{100 * time.Millisecond, 500 * time.Millisecond, 2 * time.Second, 5 * time.Second} {
		p := lab.Start(t, "mprox demo", exec.Command(bin, "demo"))
		lab.Poll(after, p.Exited)
		_ = syscall.Kill(-p.PID(), syscall.SIGINT) // as the terminal does: to the whole group
		if code := p.Wait(10 * time.Second); code < 0 {
			t.Errorf("the demo does not end on Ctrl-C after %v", after)
			p.Kill()
		}
		checkMachine(t, before)
	}
}

func checkMachine(t *testing.T, before []string) {
	t.Helper()
	var left []string
	if !lab.Poll(5*time.Second, func() bool {
		left = nil
		for _, line := range machine(t) {
			if !slices.Contains(before, line) {
				left = append(left, line)
			}
		}
		return len(left) == 0
	}) {
		t.Errorf("the demo left:\n%s", strings.Join(left, "\n"))
	}
}

// TestDemoWithoutRoot says what is missing.
func TestDemoWithoutRoot(t *testing.T) {
	lab.RequireRoot(t)
	l := lab.New(t, lab.Options{})
	bin := l.PublicBinary(t)
	cmd := exec.Command(bin, "demo")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}, Setpgid: true}
	cmd.Dir = os.TempDir()
	if r := lab.Exec(t, cmd); r.Code != 4 || lines(r.Stderr) != 1 {
		t.Errorf("want exit 4 and one line, got %v", r)
	}
}
