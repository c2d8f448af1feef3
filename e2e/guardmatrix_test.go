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

// guardRow is one way to be captured, for TestGuardMatrix: what the daemon is told, and a process that it captures.
type guardRow struct {
	name   string
	packet bool // AF_PACKET, too: only where the whole machine is captured
	old    bool // the process was there, with its sockets, before the daemon
	config func(*lab.Server) string
	// command starts the process.
	command func(*testing.T, *lab.Lab, *lab.Mprox) func(args ...string) *exec.Cmd
}

func guardRows(t *testing.T) []guardRow {
	t.Helper()
	cgroup := fmt.Sprintf("/mprox-e2e-matrix-%d", os.Getpid())
	return []guardRow{
		{
			name: "global", packet: true, old: true,
			config: func(s *lab.Server) string { return globalConfig(s, `"existing": "reset",`) },
			command: func(_ *testing.T, l *lab.Lab, _ *lab.Mprox) func(args ...string) *exec.Cmd {
				return l.Client.Command
			},
		},
		{
			name: "process", old: true,
			config: func(s *lab.Server) string {
				return fmt.Sprintf(`{ "upstreams": { "p": { "url": %q } }, "contexts": { "work": { "mode": "process", "default": "p", "strict": true, "existing": "reset",
					"select": { "cgroup": %q } } } }`, s.URL(), cgroup)
			},
			command: func(t *testing.T, l *lab.Lab, _ *lab.Mprox) func(args ...string) *exec.Cmd {
				t.Helper()
				dir := l.MakeCgroup(t, cgroup)
				return func(args ...string) *exec.Cmd { return l.InCgroup(dir, args...) }
			},
		},
		{
			name: "run",
			config: func(s *lab.Server) string {
				return fmt.Sprintf(`{ "upstreams": { "p": { "url": %q } }, "contexts": { "work": { "mode": "cgroup", "default": "p" } } }`, s.URL())
			},
			command: func(_ *testing.T, _ *lab.Lab, m *lab.Mprox) func(args ...string) *exec.Cmd {
				return func(args ...string) *exec.Cmd {
					return m.Command(append([]string{"run", "--context", "work", "--"}, args...)...)
				}
			},
		},
	}
}

// TestGuardMatrix is the whole of what keeps captured processes in: each way past the proxy, by new sockets, by those that are older than the
// daemon, by those of living flows, and by those that a foreign process gives the bypass mark, while the daemon works, hangs, is killed with
// packets on their way, is dead, is started again, and is upgraded. For each way to be captured; nothing leaves the client but to the
// upstream.
func TestGuardMatrix(t *testing.T) {
	t.Parallel()
	for _, row := range guardRows(t) {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			guardMatrix(t, row)
		})
	}
}

func guardMatrix(t *testing.T, row guardRow) {
	t.Helper()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, true)
	trap := lab.NewTrap(t, l.Client, lab.LoopbackResolvers()...)
	cp := l.Capture(t)
	m := l.Mprox(t)
	command := row.command(t, l, m)
	var p *lab.Prober
	if row.old {
		p = l.Prober(t, command)
		if n := p.Open(); n != 20 {
			t.Fatalf("only %d sockets are older than the daemon", n)
		}
		// The same ways are open as long as nothing is captured: else their silence says nothing.
		p.Send()
		if p.Probe(row.packet); len(upstreamOnly(s).Leaks(cp.Packets())) < 100 {
			t.Errorf("nothing captured, and only %d packets leave", len(upstreamOnly(s).Leaks(cp.Packets())))
		}
	}
	m.UpConfig(row.config(s))
	if p == nil {
		p = l.Prober(t, command)
	}
	// state looks what leaves while f changes something and the process goes on sending, and after it.
	state := func(name string, works bool, f func()) {
		t.Helper()
		cp.Reset()
		trap.Reset()
		p.Flood(true)
		f()
		p.Flood(false)
		p.Send()
		for _, mark := range []int{0x4d000000, 0} {
			if n := p.Mark(mark); n < 20 {
				t.Errorf("%s: a foreign process has marked only %d sockets", name, n)
			}
			p.Send()
		}
		var answered []string
		carried := func() bool {
			answered = p.Probe(row.packet)
			return slices.Contains(answered, "tcp4 plain") && slices.Contains(answered, "udp6 plain")
		}
		got := carried()
		if works && !got { // a datagram may be lost on a machine that does other things
			got = lab.Poll(lab.Patience, carried)
		}
		if got != works {
			t.Errorf("%s: carried %v, want %v; answered: %s", name, got, works, strings.Join(answered, ", "))
		}
		if leaks := upstreamOnly(s).Leaks(cp.Packets()); len(leaks) > 0 || len(trap.Names()) > 0 {
			t.Errorf("%s: %d leaks, queries for %q", name, len(leaks), trap.Names())
			upstreamOnly(s).Check(t, cp.Packets())
		}
	}
	state("alive", true, func() { p.Open() })
	state("hung", false, func() { m.Signal(syscall.SIGSTOP) })
	state("goes on", true, func() { m.Signal(syscall.SIGCONT); awaitWorks(t, p, row) })
	state("killed", false, m.Kill)
	state("dead", false, func() { p.Open() })
	state("started again", true, func() { m.Up("-c", m.ConfigPath()) })
	state("upgraded", true, func() {
		args := m.Args("up", "-c", m.ConfigPath())
		args[0] = upgrade(t, l)
		must(t, m, "down", "--keep-closed")
		m.Wait(5 * time.Second)
		p.Open()
		m.StartCommand(l.Client.Command(args...))
		m.WaitReady()
	})
}

// awaitWorks waits until a daemon that hung has come round.
func awaitWorks(t *testing.T, p *lab.Prober, row guardRow) {
	t.Helper()
	lab.Eventually(t, 10*time.Second, "it works again", func() bool { return slices.Contains(p.Probe(row.packet), "tcp4 plain") })
}

// upgrade puts another file with the same program in the place of the running one, as a package manager does, and returns its name.
func upgrade(t *testing.T, l *lab.Lab) string {
	t.Helper()
	self, err := os.ReadFile(lab.Binary(t))
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(l.Dir, "mprox-new")
	if err := os.WriteFile(program, self, 0o755); err != nil {
		t.Fatal(err)
	}
	return program
}
