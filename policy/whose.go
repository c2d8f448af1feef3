// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"context"
	"fmt"
	"path"
	"slices"
	"strings"
)

// ProcessFacts is what selectors ask of a process.
type ProcessFacts struct {
	PID      int
	Name     string
	UID, GID uint32 // effective
	Exe      string // "" when it may not be read
	Cgroup   string // of cgroup v2; "" when there is none
	Lineage  []int  // the process itself, its parent, and so on
	Group    int
	Session  int
	Exes     []string // as Exe, of Lineage; "" where it may not be read
	// NoUID and NoGID are of a process that is only imagined: nobody has said what the ids are, and no selector that asks for one matches.
	NoUID, NoGID bool
}

// Verdict is what one context says about a process.
type Verdict struct {
	Context string
	Matched bool
	Reason  string
}

// Capture says which context captures a process, and what each context said, in the order in which they are asked.
type Capture struct {
	Process  ProcessFacts
	Context  string // "" = nobody: it goes directly
	Reason   string
	Verdicts []Verdict
}

// Whose works out which context the next connection of a process belongs to. os.ErrNotExist when there is no such process.
func (m *Manager) Whose(_ context.Context, pid int) (Capture, error) {
	p, err := m.host.Process(pid)
	if err != nil {
		return Capture{}, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed || !m.prepared {
		return Capture{}, ErrClosed
	}
	found, err := m.findCgroupsLocked(m.spec)
	if err != nil {
		return Capture{}, err
	}
	return whose(m.spec, p, found, m.base.Excluded.Cgroups, m.base.Daemon.Cgroup), nil
}

// WhoseImagined is Whose for a process that need not exist: what is not known of it, no selector matches.
func (m *Manager) WhoseImagined(p ProcessFacts) (Capture, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed || !m.prepared {
		return Capture{}, ErrClosed
	}
	return whose(m.spec, p, m.spec.imaginedCgroups(p.Cgroup), m.base.Excluded.Cgroups, m.base.Daemon.Cgroup), nil
}

// WhoseImagined is Manager.WhoseImagined for contexts that need not be in force. Of the spec only their names, modes and selectors count.
func WhoseImagined(s Spec, p ProcessFacts) Capture {
	return whose(s, p, s.imaginedCgroups(p.Cgroup), nil, nil)
}

// imaginedCgroups is what Host.FindCgroups would find of what the selectors name, if there were this cgroup and no other.
func (s Spec) imaginedCgroups(cgroup string) map[string][]CgroupRef {
	found := map[string][]CgroupRef{}
	for _, n := range s.cgroupNames() {
		if strings.HasPrefix(n, "/") {
			found[n] = []CgroupRef{{Path: path.Clean(n)}}
			continue
		}
		for at := cgroup; at != "" && at != "/" && at != "."; at = path.Dir(at) {
			if ok, err := path.Match(unitName(n), path.Base(at)); ok && err == nil {
				found[n] = append(found[n], CgroupRef{Path: at})
			}
		}
	}
	return found
}

// whose is Whose without the world. The order is that of the guard's output chain: who is left alone; cgroups made for leases; selectors, by
// context; the global context.
func whose(s Spec, p ProcessFacts, found map[string][]CgroupRef, excluded []CgroupRef, daemon *CgroupRef) Capture {
	out := Capture{Process: p}
	say := func(c string, matched bool, format string, args ...any) bool {
		v := Verdict{Context: c, Matched: matched, Reason: fmt.Sprintf(format, args...)}
		out.Verdicts = append(out.Verdicts, v)
		if matched && out.Context == "" && out.Reason == "" {
			out.Context, out.Reason = c, v.Reason
		}
		return matched
	}
	if daemon != nil && below(p.Cgroup, daemon.Path) {
		out.Reason = "it is the daemon itself"
		return out
	}
	for _, ref := range excluded {
		if below(p.Cgroup, ref.Path) {
			out.Reason = "it is behind an upstream on this machine"
			return out
		}
	}
	for _, c := range s.Contexts {
		for _, ref := range c.Cgroups {
			if c.Mode != ModeGlobal && below(p.Cgroup, ref.Path) {
				say(c.Name, true, "in the cgroup of a lease, %s", ref.Path)
			}
		}
	}
	for _, c := range s.Contexts {
		if c.Mode != ModeProcess && c.Mode != ModeCgroup || len(c.Select) == 0 {
			continue
		}
		if ok, why := anyOf(c.Exclude, p, found); ok {
			say(c.Name, false, "excluded: %s", why)
			continue
		}
		ok, why := anyOf(c.Select, p, found)
		say(c.Name, ok, "%s", why)
	}
	for _, c := range s.Contexts {
		if c.Mode != ModeGlobal {
			continue
		}
		if ok, why := anyOf(c.Exclude, p, found); ok {
			say(c.Name, false, "excluded: %s", why)
		} else {
			say(c.Name, true, "global: everything that no other context selects")
		}
	}
	if out.Context == "" {
		out.Reason = "no context selects it"
	}
	return out
}

// runs reports whether a process, or for the scope tree one of its parents, runs a selected executable.
func (s Selector) runs(p ProcessFacts) bool {
	exes := []string{p.Exe}
	if s.Scope == ScopeTree {
		exes = append(exes, p.Exes...)
	}
	return slices.ContainsFunc(exes, func(exe string) bool {
		return exe != "" && slices.ContainsFunc(s.Exes, func(pattern string) bool {
			ok, err := path.Match(pattern, exe)
			return ok && err == nil
		})
	})
}

// below reports whether a cgroup is another, or in it.
func below(p, root string) bool {
	return p != "" && (p == root || root == "/" || strings.HasPrefix(p, root+"/"))
}

// anyOf reports whether one of the selectors matches a process, and which, or why the last one does not.
func anyOf(list []Selector, p ProcessFacts, found map[string][]CgroupRef) (bool, string) {
	why := "nobody is selected"
	for i, s := range list {
		ok, reason := s.matches(p, found)
		if ok {
			return true, reason
		}
		why = reason
		if len(list) > 1 {
			why = fmt.Sprintf("none of %d selectors; the last: %s", i+1, reason)
		}
	}
	return false, why
}

// matches says whether all that the selector gives is true of a process, and by what, or what is not.
func (s Selector) matches(p ProcessFacts, found map[string][]CgroupRef) (bool, string) {
	var by []string
	check := func(given, ok bool, yes, no string) bool {
		if !given {
			return true
		}
		if ok {
			by = append(by, yes)
			return true
		}
		by = []string{no}
		return false
	}
	in := func(names []string) (string, bool) {
		for _, n := range names {
			for _, ref := range found[n] {
				if below(p.Cgroup, ref.Path) {
					return n, true
				}
			}
		}
		return "", false
	}
	pid := slices.IndexFunc(s.PIDs, func(want int) bool {
		switch s.Scope {
		case ScopeCurrent:
			return want == p.PID
		case ScopeSession:
			return want == p.Session
		case ScopeGroup:
			return want == p.Group
		}
		return slices.Contains(p.Lineage, want) || p.Cgroup != "" && strings.HasSuffix(path.Base(p.Cgroup), fmt.Sprintf("-select-%d", want))
	})
	cg, inCgroup := in(s.Cgroups)
	unit, inUnit := in(s.Units)
	noUID, noGID := fmt.Sprintf("uid %d is not selected", p.UID), fmt.Sprintf("gid %d is not selected", p.GID)
	if p.NoUID {
		noUID = "it depends on the uid, which is not given"
	}
	if p.NoGID {
		noGID = "it depends on the gid, which is not given"
	}
	ok := check(len(s.UIDs) > 0, !p.NoUID && slices.Contains(s.UIDs, p.UID), fmt.Sprintf("uid %d", p.UID), noUID) &&
		check(len(s.GIDs) > 0, !p.NoGID && slices.Contains(s.GIDs, p.GID), fmt.Sprintf("gid %d", p.GID), noGID) &&
		check(len(s.PIDs) > 0, pid >= 0, fmt.Sprintf("pid %v or a descendant", s.PIDs), fmt.Sprintf("not pid %v nor a descendant", s.PIDs)) &&
		check(len(s.Exes) > 0, s.runs(p), fmt.Sprintf("exe %s", p.Exe), fmt.Sprintf("exe %s is none of %s, nor is that of a parent", p.Exe, strings.Join(s.Exes, ", "))) &&
		check(len(s.Cgroups) > 0, inCgroup, "cgroup "+cg, fmt.Sprintf("cgroup %s is not below %s", p.Cgroup, strings.Join(s.Cgroups, ", "))) &&
		check(len(s.Units) > 0, inUnit, "unit "+unit, fmt.Sprintf("not in unit %s", strings.Join(s.Units, ", ")))
	if len(by) == 0 {
		return false, "selects no processes"
	}
	return ok, strings.Join(by, ", ")
}
