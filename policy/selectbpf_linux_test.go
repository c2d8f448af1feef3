// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// copySelf is another file with this program in it.
func copySelf(t *testing.T, to string) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return copyFile(t, self, to)
}

func copyFile(t *testing.T, from, to string) string {
	t.Helper()
	b, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to+".new", b, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(to+".new", to); err != nil { // as package managers do
		t.Fatal(err)
	}
	return to
}

// must gives a helper an order.
func (h *helper) must(format string, args ...any) {
	h.t.Helper()
	if s := h.do(format, args...); s != "ok" {
		h.t.Fatalf("%s: %s", fmt.Sprintf(format, args...), s)
	}
}

const contextMark = "0x50000000"

func (h *helper) wantMark(want string) {
	h.t.Helper()
	if got := h.do("mark"); got != want {
		h.t.Errorf("a new socket has the mark %s, want %s", got, want)
	}
}

// TestSelectExe: by file and by directory and name: upgraded, linked, bind-mounted, by pattern; not a copy elsewhere; with or without what it
// starts; and what is started when the daemon is dead.
func TestSelectExe(t *testing.T) {
	l := newLab(t)
	l.marking = MarkingBPF
	dir := t.TempDir()
	app, link := copySelf(t, filepath.Join(dir, "app")), filepath.Join(dir, "link")
	plugin := copySelf(t, filepath.Join(dir, "plug-one.bin"))
	alone := copySelf(t, filepath.Join(dir, "alone"))
	other := copySelf(t, filepath.Join(t.TempDir(), "app"))
	if err := os.Link(app, link); err != nil {
		t.Fatal(err)
	}
	before, _ := l.selected(func(c *ContextSpec) {
		c.Select = []Selector{{Exes: []string{app}}, {Exes: []string{filepath.Join(dir, "plug-*.bin")}}, {Exes: []string{alone}, Scope: ScopeCurrent}}
	})
	out := l.outside()
	h := l.spawnExe(app, out)
	l.mustBeCaptured(h)
	l.mustBeFree(l.spawnExe(other, out))
	l.spawnExe(link, out).wantMark(contextMark)
	l.spawnExe(plugin, out).wantMark(contextMark)
	late := copySelf(t, filepath.Join(dir, "plug-two.bin"))
	l.spawnExe(late, out).wantMark(contextMark)
	l.spawnExe(copySelf(t, filepath.Join(dir, "plug-three.txt")), out).wantMark("0x0")

	copySelf(t, app) // an upgrade: another inode
	l.spawnExe(app, out).wantMark(contextMark)
	h.wantMark(contextMark) // what ran before runs on

	h.must("orphan %s", other)
	l.mustBeCaptured(h)
	one := l.spawnExe(alone, out)
	one.wantMark(contextMark)
	one.must("orphan %s", other)
	one.wantMark("0x0")

	l.die()
	l.mustBeBlocked(h)
	l.mustBeBlocked(l.spawnExe(app, out))
	l.mustBeFree(l.spawnExe(other, out))
	l.cleanup()
	if after := l.state(); after != before {
		t.Errorf("not as before:\n%s\n\nwas:\n%s", after, before)
	}
	h.wantMark("0x0")
	l.mustBeNoPins()
}

// mustBeNoPins checks that nothing of this namespace is left on bpffs.
func (l *lab) mustBeNoPins() {
	l.t.Helper()
	dir, err := l.host.BPFDir("x")
	if err != nil {
		l.t.Fatal(err)
	}
	left, err := filepath.Glob(strings.TrimSuffix(dir, "x") + "*")
	if err != nil || len(left) > 0 {
		l.t.Errorf("left: %v, %v", left, err)
	}
}

// TestSelectTree: orphans of orphans, made before the start, after it, and while the daemon is dead; the next daemon knows them all.
func TestSelectTree(t *testing.T) {
	l := newLab(t)
	l.marking = MarkingBPF
	l.start()
	out := l.outside()
	root, other := l.spawn(out), l.spawn(out)
	spec := l.spec(ModeProcess)
	spec.Contexts[0].Select = []Selector{{PIDs: []int{root.cmd.Process.Pid}}}
	l.enforce(&spec)
	root.wantMark(contextMark)
	for range 3 {
		root.must("orphan")
		root.wantMark(contextMark)
	}
	l.mustBeCaptured(root)
	other.wantMark("0x0")

	// Another selection, another set of programs: who is followed is followed on.
	spec.Contexts[0].Select = append([]Selector{{UIDs: []uint32{4001}}}, spec.Contexts[0].Select...)
	if err := l.m.Apply(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	root.wantMark(contextMark)
	l.as(out, 4001, 100).wantMark(contextMark)

	dir := l.dir
	l.die()
	root.must("orphan")
	l.mustBeBlocked(root)
	l.start()
	if l.dir != dir {
		t.Fatal("another instance")
	}
	spec.Contexts[0].TUN = ""
	if err := l.m.Prepare(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	root.wantMark(contextMark)
	spec.Contexts[0].Select = spec.Contexts[0].Select[:1]
	if err := l.m.Apply(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	root.wantMark("0x0")
}

// TestSelectScope: the process alone, its session, its process group.
func TestSelectScope(t *testing.T) {
	for _, scope := range []Scope{ScopeCurrent, ScopeSession, ScopeGroup} {
		t.Run(scope.String(), func(t *testing.T) {
			l := newLab(t)
			l.marking = MarkingBPF
			l.start()
			out := l.outside()
			root := l.spawn(out)
			root.must("orphan") // the leader of a session and of a group of its own
			pid, err := l.host.CgroupProcs(fmt.Sprintf("/test-%d-%d", os.Getpid(), l.host.Netns().Inode))
			if err != nil {
				t.Fatal(err)
			}
			pid = slices.DeleteFunc(pid, func(p int) bool { return p == root.cmd.Process.Pid })
			if len(pid) != 1 {
				t.Fatalf("processes %v", pid)
			}
			spec := l.spec(ModeProcess)
			spec.Contexts[0].Select = []Selector{{PIDs: pid, Scope: scope}}
			if err := l.m.Prepare(t.Context(), spec); err != nil {
				t.Fatal(err)
			}
			root.wantMark(contextMark)
			root.must("child")
			want := contextMark
			if scope == ScopeCurrent {
				want = "0x0"
			}
			root.wantMark(want)
			root.must("orphan")
			root.wantMark("0x0")
		})
	}
}

// TestSelectOldSocket: an unconnected UDP socket that is older than the start loses one datagram, and is captured.
func TestSelectOldSocket(t *testing.T) {
	l := newLab(t)
	l.marking = MarkingBPF
	l.start()
	out := l.outside()
	h := l.as(out, 4001, 100)
	h.must("open")
	spec := l.spec(ModeProcess)
	spec.Contexts[0].Select = []Selector{{UIDs: []uint32{4001}}}
	l.enforce(&spec)
	if s := h.do("again %s 7001", remote4); !strings.Contains(s, "not permitted") {
		t.Errorf("the first datagram: %s", s)
	}
	h.must("again %s 7002", remote4)
	l.tunSeen.await(t, "> 198.51.100.1:7002")
	if l.farSeen.has(":700") {
		t.Errorf("leaked: %v", l.farSeen.list())
	}
}

// TestSelectNamespace: a process of another network namespace is left alone, whoever it is.
func TestSelectNamespace(t *testing.T) {
	l := newLab(t)
	l.marking = MarkingBPF
	l.selected(func(c *ContextSpec) { c.Select = []Selector{{UIDs: []uint32{4001}}} })
	out := l.outside()
	l.inFar(func() { l.as(out, 4001, 100).wantMark("0x0") })
	l.as(out, 4001, 100).wantMark(contextMark)
}

// TestSelectFull: who does not fit into the map is denied sockets; nobody who was there before is, and it is said. When there is room again, new
// processes are told apart again, without a restart; orphans that nobody can place stay denied, also for the next set of programs.
func TestSelectFull(t *testing.T) {
	l := newLab(t)
	l.marking = MarkingBPF
	l.start()
	out := l.outside()
	older := l.spawn(out)
	spec := l.spec(ModeProcess)
	spec.TaskLimit = 8 // the daemon, the shell, six more
	// A shell that is selected starts more than fit; each tries to send, and again when it is told to end.
	sh := exec.Command("/bin/bash", "-c", "read go; "+
		`for i in {1..10}; do (echo x > /dev/udp/198.51.100.1/7100; read y; echo x > /dev/udp/198.51.100.1/7101) <&0 & done; wait`)
	in, err := sh.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	var errs strings.Builder
	sh.Stderr = &errs
	if err := sh.Start(); err != nil {
		t.Fatal(err)
	}
	spec.Contexts[0].Select = []Selector{{PIDs: []int{sh.Process.Pid}}}
	if err := l.m.Prepare(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	if _, err := in.Write([]byte("go\n")); err != nil {
		t.Fatal(err)
	}
	state := func() SelectState {
		t.Helper()
		s, err := l.host.SelectState()
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	l.await("all have tried", func() bool { return state().Full && state().Denied >= 4 })
	older.wantMark("0x0")
	if s := l.m.Stats(); !s.Select.Full || s.Marking != MarkingBPF {
		t.Errorf("status: %+v", s)
	}
	while := l.spawn(out) // began when the map was full
	if got := while.do("mark"); !strings.Contains(got, "not permitted") {
		t.Errorf("nobody knows who this is, and its socket has the mark %s", got)
	}

	// The parent goes without a word, and six of the ten end.
	if err := sh.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if _, err := in.Write([]byte(strings.Repeat("\n", 6))); err != nil {
		t.Fatal(err)
	}
	l.await("there is room", func() bool { return !state().Full })
	l.spawn(out).wantMark("0x0")
	while.do("mark")
	spec.Contexts[0].Select = append(spec.Contexts[0].Select, Selector{UIDs: []uint32{4001}})
	if err := l.m.Apply(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	l.spawn(out).wantMark("0x0")
	l.as(out, 4001, 100).wantMark(contextMark)
	denied := state().Denied
	in.Close() // the other four
	_ = sh.Wait()
	t.Logf("%d denied, then %d; %s", denied, state().Denied, errs.String())
	if l.farSeen.has(":710") {
		t.Errorf("leaked: %v\n%s", l.farSeen.list(), errs.String())
	}
}

// TestSelectRepaired: links that others detach, and pins that they remove, are back within a second, and counted.
func TestSelectRepaired(t *testing.T) {
	l := newLab(t)
	l.marking = MarkingBPF
	l.selected(func(c *ContextSpec) { c.Select = []Selector{{UIDs: []uint32{4001}}} })
	h := l.as(l.outside(), 4001, 100)
	dir, err := l.host.BPFDir("mprox")
	if err != nil {
		t.Fatal(err)
	}
	pinned, err := link.LoadPinnedLink(filepath.Join(dir, "create"), nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := pinned.Detach(); err != nil {
		t.Fatal(err)
	}
	pinned.Close()
	l.await("attached again", func() bool { return h.do("mark") == contextMark })
	if n := l.m.Stats().Restored["bpf"]; n == 0 {
		t.Error("not counted")
	}
	if err := os.Remove(filepath.Join(dir, "connect4")); err != nil {
		t.Fatal(err)
	}
	l.await("pinned again", func() bool { _, err := os.Lstat(filepath.Join(dir, "connect4")); return err == nil })
}

// TestSelectRace: short-lived processes, each its own race between fork, exec and the first packet: by executable and by parent. Not one
// packet leaves by the uplink. POLICY_RACE=10000 is the long form.
func TestSelectRace(t *testing.T) {
	n := 300
	if s := os.Getenv("POLICY_RACE"); s != "" {
		var err error
		if n, err = strconv.Atoi(s); err != nil {
			t.Fatal(err)
		}
	}
	bash, err := filepath.EvalSymlinks("/bin/bash")
	if err != nil {
		t.Fatal(err)
	}
	l := newLab(t)
	l.marking = MarkingBPF
	racer := copyFile(t, bash, filepath.Join(t.TempDir(), "racer"))
	l.start()
	spec := l.spec(ModeProcess)
	driver := exec.CommandContext(context.Background(), "/bin/bash", "-c",
		fmt.Sprintf(`read go; for ((i = 0; i < %d; i++)); do (echo x > /dev/udp/198.51.100.1/7200) & (( i %% 20 )) || wait; done; wait`, n))
	in, err := driver.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	driver.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	if err := driver.Start(); err != nil {
		t.Fatal(err)
	}
	spec.Contexts[0].Select = []Selector{{Exes: []string{racer}}, {PIDs: []int{driver.Process.Pid}}}
	l.enforce(&spec)
	if _, err := in.Write([]byte("go\n")); err != nil {
		t.Fatal(err)
	}
	l.sh(fmt.Sprintf(`i=0; while [ $i -lt %d ]; do %s -c 'echo x > /dev/udp/198.51.100.1/7300'; i=$((i+1)); done`, n, racer))
	if err := driver.Wait(); err != nil {
		t.Fatal(err)
	}
	count := func(port string) (c int) {
		for _, p := range l.tunSeen.list() {
			if strings.HasSuffix(p, "> 198.51.100.1:"+port) {
				c++
			}
		}
		return c
	}
	l.await("packets", func() bool { return count("7200") == n && count("7300") == n })
	for _, port := range []string{":7200", ":7300"} {
		if l.farSeen.has(port) {
			t.Errorf("unselected packets left: %v", l.farSeen.list())
		}
	}
}
