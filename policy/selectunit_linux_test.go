// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// briefly makes a cgroup, has a process begin its life in it and send a datagram as the first thing it does, and removes it again.
func (l *lab) briefly(p string, port int) {
	l.t.Helper()
	if _, err := l.host.MakeCgroup(p); err != nil {
		l.t.Fatal(err)
	}
	fd, err := l.host.OpenCgroup(p)
	if err != nil {
		l.t.Fatal(err)
	}
	defer unix.Close(fd)
	l.inside()
	cmd := exec.CommandContext(l.t.Context(), "/bin/bash", "-c", fmt.Sprintf("echo x > /dev/udp/%s/%d", remote4, port))
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: fd}
	if out, err := cmd.CombinedOutput(); err != nil {
		l.t.Errorf("%s: %v: %s", p, err, out)
	}
	l.await("cgroup is empty", func() bool { return l.host.RemoveCgroup(p) == nil })
}

// TestSelectFirstPacket: of a unit that is started while the daemon runs, and of one that is started again, and again, the very first packet
// is captured: by its name, by a pattern of any kind, by its slice, by its path. Those beside it are direct from the first packet on.
func TestSelectFirstPacket(t *testing.T) {
	slice := fmt.Sprintf("/mproxfirst%d.slice", os.Getpid())
	long := strings.Repeat("n", maxName-10) + ".service"
	tests := []struct {
		name     string
		sel      Selector
		in, free []string
	}{
		{"name", Selector{Units: []string{"web-1", long}}, []string{"web-1.service", long}, []string{"web-2.service"}},
		{"one star", Selector{Units: []string{"web-*.service"}}, []string{"web-1.service", "web-.service"}, []string{"web-1.scope", "xweb-1.service"}},
		{"question mark", Selector{Units: []string{"web-?.service"}}, []string{"web-1.service"}, []string{"web-12.service"}},
		{"class and stars", Selector{Units: []string{"w[a-e]b-*-*.service"}}, []string{"web-1-2.service", "wab--.service"}, []string{"wxb-1-2.service", "web-1.service"}},
		{"slice", Selector{Units: []string{path.Base(slice)}}, []string{"web-1.service", "a.scope"}, nil},
		{"path", Selector{Cgroups: []string{slice + "/web-1.service"}}, []string{"web-1.service"}, []string{"web-2.service"}},
	}
	const rounds = 5
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			l := newLab(t)
			l.marking = MarkingBPF
			l.selected(func(c *ContextSpec) { c.Select = []Selector{tt.sel} })
			l.cgroup(slice)
			for range rounds {
				for _, name := range tt.in {
					l.briefly(slice+"/"+name, 7500)
				}
				for _, name := range tt.free {
					l.briefly(slice+"/"+name, 7600)
				}
			}
			count := func(s *seen, port string) (n int) {
				for _, p := range s.list() {
					if strings.HasSuffix(p, "> 198.51.100.1:"+port) {
						n++
					}
				}
				return n
			}
			l.await("all packets", func() bool {
				return count(l.tunSeen, "7500") == rounds*len(tt.in) && count(l.farSeen, "7600") == rounds*len(tt.free)
			})
			if l.farSeen.has(":7500") || l.tunSeen.has(":7600") {
				t.Errorf("leaked: %v; captured: %v", l.farSeen.list(), l.tunSeen.list())
			}
		})
	}
}

// TestSelectLimits: as many selectors and patterns as there may be are loaded, and one more is refused.
func TestSelectLimits(t *testing.T) {
	l := newLab(t)
	l.marking = MarkingBPF
	l.start()
	spec := l.spec(ModeProcess)
	dir := t.TempDir()
	c := &spec.Contexts[0]
	for i := range maxGlobs {
		c.Select = append(c.Select, Selector{Units: []string{fmt.Sprintf("limit-%d-*-%s.service", i, strings.Repeat("?", 40))}},
			Selector{Exes: []string{fmt.Sprintf("%s/limit-%d-*-[ab]%s", dir, i, strings.Repeat("?", 40))}})
	}
	for i := len(c.Select); i < maxSelectors-MaxContexts-1; i++ {
		c.Select = append(c.Select, Selector{UIDs: []uint32{uint32(100000 + i)}, GIDs: []uint32{7}, PIDs: []int{os.Getpid()}, Scope: Scope(i % 4)})
	}
	if err := l.m.Prepare(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	out := l.outside()
	app := copySelf(t, fmt.Sprintf("%s/limit-%d-x-b%s", dir, maxGlobs-1, strings.Repeat("y", 40)))
	l.spawnExe(app, out).wantMark(contextMark)
	for _, more := range []Selector{{UIDs: []uint32{1}}, {Units: []string{"x-*"}}, {Exes: []string{dir + "/x*"}}} {
		next := spec
		next.Contexts = slices.Clone(spec.Contexts)
		if next.Contexts[0].Select = append(slices.Clone(c.Select), more); len(more.UIDs) == 0 {
			next.Contexts[0].Select = slices.Delete(next.Contexts[0].Select, 2*maxGlobs, 2*maxGlobs+1)
		}
		if err := l.m.Apply(t.Context(), next); !errors.Is(err, ErrConflict) {
			t.Errorf("%s: %v", more, err)
		}
	}
	l.spawnExe(app, out).wantMark(contextMark)
}
