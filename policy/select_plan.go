// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"fmt"
	"reflect"
	"slices"
	"strings"
)

// Scope says who belongs to a process that a selector names by PID or by executable.
type Scope uint8

// The scopes.
const (
	ScopeTree    Scope = iota // it and all its descendants
	ScopeCurrent              // it alone
	ScopeSession              // its session (setsid)
	ScopeGroup                // its process group
)

// String returns the name used in the configuration.
func (s Scope) String() string {
	return [...]string{"tree", "current", "session", "group"}[min(s, ScopeGroup)]
}

// maxSelectors bounds the selectors of all contexts together that BPF decides on: a bit each, and no program keeps more on its stack.
const maxSelectors = 1280

// Selection is what the BPF programs decide by: selectors, a bit each, and rules over them, of which the first that matches wins.
type Selection struct {
	Mask      uint32
	Selectors []Selector
	Rules     []SelectRule
	Owners    bool     // sockets' owners are written down
	TaskLimit int      // how many selected processes are followed; 0 = the default
	Devices   []string // the TUN devices on which flows' owners are written down, with Owners
}

// same reports whether the programs that decide are the same.
func (s *Selection) same(o *Selection) bool {
	a, b := *s, *o
	a.Devices, b.Devices = nil, nil
	return reflect.DeepEqual(a, b)
}

// SelectRule gives sockets of whoever one of Select matches, and none of Exclude, a mark; 0 leaves them alone.
type SelectRule struct {
	Context string
	Mark    uint32
	Exclude []int
	Select  []int
}

// ExcludedMark is the mark of sockets that BPF leaves out of the global context.
func ExcludedMark(mask uint32) uint32 { return (mask & -mask) * markExcluded }

// kernelOnly reports whether only a BPF program can tell whom the selector means.
func (s Selector) kernelOnly() bool {
	return len(s.Exes) > 0 || len(s.PIDs) > 0 && s.Scope != ScopeTree
}

// byProcess are the conditions that follow a process: what names them lives as long as the process, whatever the other selectors become.
func (s Selector) byProcess() string {
	if len(s.PIDs) == 0 && len(s.Exes) == 0 {
		return ""
	}
	return fmt.Sprintf("pid %v exe %q scope %s", s.PIDs, s.Exes, s.Scope)
}

// String lists the conditions.
func (s Selector) String() string {
	var out []string
	add := func(what string, n int, v any) {
		if n > 0 {
			out = append(out, fmt.Sprintf("%s %v", what, v))
		}
	}
	add("uid", len(s.UIDs), s.UIDs)
	add("gid", len(s.GIDs), s.GIDs)
	add("cgroup", len(s.Cgroups), s.Cgroups)
	add("unit", len(s.Units), s.Units)
	add("pid", len(s.PIDs), s.PIDs)
	add("exe", len(s.Exes), s.Exes)
	if len(s.PIDs)+len(s.Exes) > 0 {
		out = append(out, "scope "+s.Scope.String())
	}
	return strings.Join(out, ", ")
}

// selects reports whether a context chooses processes by selectors.
func (c ContextSpec) selects() bool {
	return (c.Mode == ModeProcess || c.Mode == ModeCgroup) && len(c.Select) > 0
}

// wantsBPF reports whether anything of the spec is decided by who makes a socket.
func (s Spec) wantsBPF() bool {
	return s.Owners || slices.ContainsFunc(s.Contexts, func(c ContextSpec) bool { return c.selects() || c.Mode == ModeGlobal && len(c.Exclude) > 0 })
}

// newSelection is nil when nothing is to be decided by BPF. The order is that of the guard's output chain: who is left alone; the cgroups of
// leases; selectors, by context; those whom the global context excludes.
func newSelection(s Spec, snap Snapshot) *Selection {
	if !snap.Features.BPF || !s.wantsBPF() {
		return nil
	}
	out := &Selection{Mask: s.Mask, Owners: s.Owners, TaskLimit: s.TaskLimit}
	for _, c := range s.Contexts {
		if s.Owners && c.TUN != "" && c.Mode != ModeGateway && c.Mode != ModeDisabled {
			out.Devices = append(out.Devices, c.TUN)
		}
	}
	if (Spec{Contexts: s.Contexts}).wantsBPF() {
		out.rules(s, snap)
	}
	return out
}

// rules fills in the selectors and their rules.
func (s *Selection) rules(spec Spec, snap Snapshot) {
	bits := func(list []Selector) (idx []int) {
		for _, sel := range list {
			idx = append(idx, len(s.Selectors))
			s.Selectors = append(s.Selectors, sel)
		}
		return idx
	}
	paths := func(refs []CgroupRef) (sel []Selector) {
		if len(refs) == 0 {
			return nil
		}
		sel = []Selector{{}}
		for _, r := range refs {
			sel[0].Cgroups = append(sel[0].Cgroups, r.Path)
		}
		return sel
	}
	add := func(name string, mark uint32, exclude, chosen []Selector) {
		if len(chosen) > 0 {
			s.Rules = append(s.Rules, SelectRule{Context: name, Mark: mark, Exclude: bits(exclude), Select: bits(chosen)})
		}
	}
	add("", 0, nil, paths(snap.Excluded.Cgroups))
	for _, c := range spec.Contexts {
		if c.Mode == ModeProcess || c.Mode == ModeCgroup {
			add(c.Name, ContextMark(spec.Mask, c.Slot), nil, paths(c.Cgroups))
		}
	}
	for _, c := range spec.Contexts {
		if c.selects() {
			add(c.Name, ContextMark(spec.Mask, c.Slot), c.Exclude, c.Select)
		}
	}
	for _, c := range spec.Contexts {
		if c.Mode == ModeGlobal {
			add(c.Name, ExcludedMark(spec.Mask), nil, c.Exclude)
		}
	}
}

// words is how many times 64 bits the selectors need: 1, 4 or 20, so that a change seldom changes the shape of the maps.
func (s *Selection) words() int {
	switch n := len(s.Selectors); {
	case n <= 64:
		return 1
	case n <= 256:
		return 4
	}
	return maxSelectors / 64
}

// String is the section of the plan's text.
func (s *Selection) String() string {
	if s == nil {
		return ""
	}
	var b strings.Builder
	for _, r := range s.Rules {
		for _, i := range r.Exclude {
			fmt.Fprintf(&b, "context %q not: %s\n", r.Context, s.Selectors[i])
		}
		for _, i := range r.Select {
			fmt.Fprintf(&b, "context %q: %s: mark %#x/%#x\n", r.Context, s.Selectors[i], r.Mark, s.Mask)
		}
	}
	if s.Owners {
		b.WriteString("owners of sockets\n")
	}
	for _, d := range s.Devices {
		fmt.Fprintf(&b, "owners of flows by %s\n", d)
	}
	return b.String()
}
