// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestSelectLeaderless: a process whose first thread has ended is whom it was, before the start and after it, by PID and by executable; so is
// what it starts, and so it is for the next daemon.
func TestSelectLeaderless(t *testing.T) {
	for _, by := range []string{"pid", "exe"} {
		t.Run(by, func(t *testing.T) {
			l := newLab(t)
			l.marking = MarkingBPF
			app := copySelf(t, filepath.Join(t.TempDir(), "app"))
			l.start()
			out := l.outside()
			older, later, other := l.spawnExe(app, out), l.spawnExe(app, out), l.spawn(out)
			older.must("leaderless")
			spec := l.spec(ModeProcess)
			sel := map[string]Selector{"pid": {PIDs: []int{older.cmd.Process.Pid, later.cmd.Process.Pid}}, "exe": {Exes: []string{app}}}
			spec.Contexts[0].Select = []Selector{sel[by]}
			l.enforce(&spec)
			later.must("leaderless")
			for _, h := range []*helper{older, later} {
				h.wantMark(contextMark)
			}
			other.wantMark("0x0")
			older.must("orphan") // which a thread forks that is not the first, and there is no first
			l.mustBeCaptured(older)
			l.die()
			l.mustBeBlocked(older)
			l.mustBeBlocked(later)
			l.start()
			spec.Contexts[0].TUN = ""
			if err := l.m.Prepare(t.Context(), spec); err != nil {
				t.Fatal(err)
			}
			older.wantMark(contextMark)
			later.wantMark(contextMark)
		})
	}
}

// TestSelectOlder: what was started before is selected by its executable too, with its descendants, or without; as a replaced file that only
// its processes still have; and with the same name elsewhere it is not.
func TestSelectOlder(t *testing.T) {
	l := newLab(t)
	l.marking = MarkingBPF
	dir := t.TempDir()
	app, glob := copySelf(t, filepath.Join(dir, "app")), copySelf(t, filepath.Join(dir, "glob-1"))
	shell, alone := copyFile(t, "/bin/sh", filepath.Join(dir, "shell")), copyFile(t, "/bin/sh", filepath.Join(dir, "alone"))
	other := copySelf(t, filepath.Join(t.TempDir(), "app"))
	l.start()
	out := l.outside()
	plain, globbed, elsewhere := l.spawnExe(app, out), l.spawnExe(glob, out), l.spawnExe(other, out)
	underShell := func(shell string) *helper { // the shell lives as long as its child
		t.Helper()
		h := l.spawnExe(shell, out, "-c", `"$0"; true`, other)
		h.wantMark("0x0") // it has begun
		return h
	}
	child, lone := underShell(shell), underShell(alone)
	orphan := underShell(shell)
	orphan.must("orphan")
	l.await("the shell above the orphan has ended", func() bool {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", orphan.cmd.Process.Pid))
		return err != nil || strings.Contains(string(stat), ") Z ")
	})
	copySelf(t, app) // the file of plain has no name any more
	spec := l.spec(ModeProcess)
	spec.Contexts[0].Select = []Selector{{Exes: []string{app, shell}}, {Exes: []string{alone}, Scope: ScopeCurrent}, {Exes: []string{filepath.Join(dir, "glob-*")}}}
	l.enforce(&spec)
	plain.wantMark(contextMark)
	globbed.wantMark(contextMark)
	elsewhere.wantMark("0x0")
	child.wantMark(contextMark)
	lone.wantMark("0x0")
	orphan.wantMark("0x0") // whose parents had ended, nobody knows any more
	l.mustBeCaptured(plain)
}

// TestSelectMounts: a file is the same by a bind mount, and elsewhere's directory does not count; on an overlay it is the file that the overlay
// shows, before it is changed there and after; below the overlay it is another one. In a mount namespace of its own.
func TestSelectMounts(t *testing.T) {
	requireRoot(t)
	if os.Getenv("POLICY_TEST_MOUNTS") == "" {
		cmd := exec.CommandContext(t.Context(), "unshare", "--mount", "--propagation", "private", os.Args[0], "-test.run=^TestSelectMounts$", "-test.v")
		cmd.Env = append(os.Environ(), "POLICY_TEST_MOUNTS=1")
		out, err := cmd.CombinedOutput()
		if t.Logf("%s", out); err != nil {
			t.Fatal(err)
		}
		return
	}
	l := newLab(t)
	l.marking = MarkingBPF
	dir := t.TempDir()
	for _, d := range []string{"lower", "upper", "work", "merged", "bound"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	app := copySelf(t, filepath.Join(dir, "app"))
	lower := copySelf(t, filepath.Join(dir, "lower", "over"))
	l.sh(fmt.Sprintf(`cd %s; touch bound/name; mount --bind app bound/name; mount -t tmpfs none work; mkdir work/upper work/work
		mount -t overlay -o lowerdir=lower,upperdir=work/upper,workdir=work/work none merged`, dir))
	t.Cleanup(func() { l.sh("cd " + dir + "; umount bound/name; umount merged; umount work") })
	over := filepath.Join(dir, "merged", "over")
	l.selected(func(c *ContextSpec) { c.Select = []Selector{{Exes: []string{app}}, {Exes: []string{over}}} })
	out := l.outside()
	l.spawnExe(app, out).wantMark(contextMark)
	l.spawnExe(filepath.Join(dir, "bound", "name"), out).wantMark(contextMark)
	l.spawnExe(copyFile(t, app, filepath.Join(dir, "bound", "copy")), out).wantMark("0x0")
	l.spawnExe(over, out).wantMark(contextMark)
	l.spawnExe(lower, out).wantMark("0x0")
	l.sh("chmod 700 " + over) // copied up
	l.spawnExe(over, out).wantMark(contextMark)
	copySelf(t, over) // upgraded
	l.spawnExe(over, out).wantMark(contextMark)
	// By a bind mount that only another mount namespace has.
	l.spawnExe("unshare", out, "--mount", "sh", "-ec", `mount --bind "$0" "$1"; exec "$1"`, app, filepath.Join(dir, "bound", "copy")).wantMark(contextMark)
}
