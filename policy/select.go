// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"errors"
	"fmt"
	"net/netip"
	"path"
	"reflect"
	"slices"
	"strings"
)

// Selector says whose sockets belong to a context, or are left out of it. All that is given must match; a list matches if one member does.
type Selector struct {
	// UIDs and GIDs are the effective ones of whoever has made the socket: a process that changes its user later keeps its old sockets where
	// they were. Supplementary groups do not count.
	UIDs []uint32
	GIDs []uint32
	// Cgroups are paths below the cgroup2 mount, with everything below them. One that is not there is looked for again.
	Cgroups []string
	// Units are names of systemd units, with wildcards (* ? [a-z]); without a suffix a service is meant. They are directories below a slice,
	// so systemd itself need not run.
	Units []string
	// PIDs are processes with all their descendants, those included that are started later: they are moved into a cgroup of ours, below the
	// one they are in, and back at the end. Sockets that they have already stay as they are.
	PIDs []int
	// Exes are paths of executables, with wildcards: by file, and by directory and name, as they are when a program is started. Only BPF can tell.
	Exes []string
	// Scope says who belongs to PIDs and Exes. With nftables alone it is always the tree.
	Scope Scope
	// Interfaces and Sources select hosts, in ModeGateway only: by the device that their packets arrive on and by where they come from.
	Interfaces []string
	Sources    []netip.Prefix
}

// maxSelectRules bounds what the selectors of all contexts together may expand to: one rule for each combination of cgroup, unit, user and
// group. Each packet sent passes the rules of the contexts before its own.
const maxSelectRules = 4096

func (s Selector) validate() error {
	if len(s.UIDs)+len(s.GIDs)+len(s.Cgroups)+len(s.Units)+len(s.PIDs)+len(s.Exes)+len(s.Interfaces)+len(s.Sources) == 0 {
		return errors.New("a selector without any condition")
	}
	for _, c := range s.Cgroups {
		if !strings.HasPrefix(c, "/") {
			return fmt.Errorf("cgroup %q does not start with /", c)
		}
	}
	for _, pid := range s.PIDs {
		if pid <= 1 {
			return fmt.Errorf("pid %d: all processes descend from it: that is mode global", pid)
		}
	}
	for _, u := range s.Units {
		if err := CheckUnit(u); err != nil {
			return err
		}
	}
	for _, e := range s.Exes {
		if err := CheckExe(e); err != nil {
			return err
		}
	}
	if len(s.Exes) > 0 && s.Scope > ScopeCurrent {
		return fmt.Errorf("scope %s goes with pid, not with exe", s.Scope)
	}
	return nil
}

// CheckExe reports what is wrong with the path of an executable, or the pattern of one.
func CheckExe(p string) error {
	if _, err := path.Match(p, ""); err != nil || !path.IsAbs(p) || path.Clean(p) != p || p == "/" {
		return fmt.Errorf("%q is not the absolute path of an executable, nor a pattern of one", p)
	}
	return nil
}

// CheckUnit reports what is wrong with the name of a unit, or the pattern of one.
func CheckUnit(u string) error {
	if _, err := path.Match(u, ""); err != nil || u == "" || strings.Contains(u, "/") {
		return fmt.Errorf("%q is not the name of a systemd unit, nor a pattern of one", u)
	}
	return nil
}

// unitName is the unit that a name stands for: as with systemctl, nginx is nginx.service.
func unitName(u string) string {
	for _, suffix := range []string{".service", ".slice", ".scope", ".socket", ".mount", ".swap", "*"} {
		if strings.HasSuffix(u, suffix) {
			return u
		}
	}
	return u + ".service"
}

// names are what Host.FindCgroups shall look for.
func (s Selector) names() []string { return slices.Concat(s.Cgroups, s.Units) }

// rules are the combinations of which one must match. found is what the names of cgroups and units stand for at the moment; a selector whose
// cgroups are not there matches nobody.
func (s Selector) rules(found map[string][]CgroupRef) [][]nfStmt {
	if s.kernelOnly() {
		return nil
	}
	out := [][]nfStmt{nil}
	out = product(out, len(s.Cgroups) > 0, cgroupStmts(s.Cgroups, found))
	out = product(out, len(s.Units) > 0, cgroupStmts(s.Units, found))
	var uids, gids []nfStmt
	var pids []string
	for _, pid := range s.PIDs {
		pids = append(pids, pidName(pid))
	}
	out = product(out, len(pids) > 0, cgroupStmts(pids, found))
	for _, id := range s.UIDs {
		uids = append(uids, stUID{uid: id})
	}
	for _, id := range s.GIDs {
		gids = append(gids, stGID{id})
	}
	return product(product(out, len(s.UIDs) > 0, uids), len(s.GIDs) > 0, gids)
}

// product combines each of the matches with each of the alternatives, if there is such a condition at all. It stops behind the bound, which
// the caller reports.
func product(matches [][]nfStmt, given bool, alternatives []nfStmt) [][]nfStmt {
	if !given {
		return matches
	}
	var out [][]nfStmt
	for _, m := range matches {
		for _, a := range alternatives {
			if len(out) > maxSelectRules {
				return out
			}
			out = append(out, append(slices.Clone(m), a))
		}
	}
	return out
}

func cgroupStmts(names []string, found map[string][]CgroupRef) []nfStmt {
	var refs []CgroupRef
	for _, n := range names {
		refs = append(refs, found[n]...)
	}
	slices.SortFunc(refs, func(a, b CgroupRef) int { return strings.Compare(a.Path, b.Path) })
	var out []nfStmt
	for _, r := range slices.Compact(refs) {
		out = append(out, stCgroup{r})
	}
	return out
}

// wide reports whether sockets of anybody's may be captured: the daemon's own, those of loopback upstreams and servers' connections must
// then be told apart.
func (s Spec) wide() bool {
	return slices.ContainsFunc(s.Contexts, func(c ContextSpec) bool {
		return c.Mode == ModeGlobal || c.Mode != ModeDisabled && c.Mode != ModeGateway && len(c.Select) > 0
	})
}

// cgroupNames are the cgroups and units that the contexts name, each once.
func (s Spec) cgroupNames() []string {
	var out []string
	for _, c := range s.Contexts {
		for _, sel := range slices.Concat(c.Select, c.Exclude) {
			out = append(out, sel.names()...)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// checkSelect refuses more combinations than are sensible.
func checkSelect(s Spec, snap Snapshot) error {
	n, bits := 0, 0
	for _, c := range s.Contexts {
		for _, sel := range slices.Concat(c.Select, c.Exclude) {
			if bits++; bits > maxSelectors-MaxContexts-1 {
				return fmt.Errorf("%w: more than %d selectors", ErrConflict, maxSelectors-MaxContexts-1)
			}
			if sel.kernelOnly() && !snap.Features.BPF {
				return fmt.Errorf("%w: context %q: to select by exe, or by pid with scope %s: BPF programs on the root of cgroup v2, with kernel types (CONFIG_BPF_SYSCALL, "+
					"CONFIG_CGROUP_BPF, CONFIG_DEBUG_INFO_BTF)", ErrFeature, c.Name, sel.Scope)
			}
			if snap.Features.BPF && !c.Strict && c.Mode != ModeGateway {
				continue
			}
			if n += max(len(sel.rules(snap.Cgroups)), len(sel.hostRules())); n > maxSelectRules {
				return fmt.Errorf("%w: the selectors up to context %q expand to more than %d combinations of cgroups, units, users and groups: "+
					"name a slice above them", ErrConflict, c.Name, maxSelectRules)
			}
		}
	}
	return nil
}

// selection adds the chains that give the sockets of selected processes the marks of their contexts, and the jumps to them. Contexts come in
// order: the first that selects a socket has it. Whoever is excluded from one goes on to the next.
func (g *guard) selection(out *nfChain) {
	for _, c := range g.contexts {
		if c.Mode == ModeGlobal || c.Mode == ModeGateway || len(c.Select) == 0 {
			continue
		}
		ctx := ContextMark(g.spec.Mask, c.Slot)
		if g.snap.Features.BPF {
			// BPF has marked the socket, and so the first look-up was right already.
			out.rules = append(out.rules, rule(g.mark(false, ctx), g.take(ctx)))
			if !c.Strict || slices.ContainsFunc(c.Exclude, func(s Selector) bool { return s.kernelOnly() || len(s.PIDs) > 0 }) {
				continue
			}
		}
		chain := nfChain{name: setName("select", c)}
		for _, sel := range c.Exclude {
			for _, m := range sel.rules(g.snap.Cgroups) {
				chain.rules = append(chain.rules, append(m, ret()))
			}
		}
		for _, sel := range c.Select {
			for _, m := range sel.rules(g.snap.Cgroups) {
				chain.rules = append(chain.rules, append(m, g.take(ctx)))
			}
		}
		g.chain(chain)
		out.rules = append(out.rules, rule(jump(chain.name)))
	}
}

// exclusion leaves those alone whom the global context excludes.
func (g *guard) exclusion(out *nfChain) {
	bypass := BypassMark(g.spec.Mask)
	for _, c := range g.contexts {
		if c.Mode != ModeGlobal {
			continue
		}
		if g.snap.Features.BPF && slices.ContainsFunc(c.Exclude, func(s Selector) bool { return s.kernelOnly() || len(s.PIDs) > 0 }) {
			// Whom only BPF can tell. Whoever has CAP_NET_ADMIN or CAP_NET_RAW could set that mark, too.
			out.rules = append(out.rules, rule(g.mark(false, ExcludedMark(g.spec.Mask)), g.take(bypass)))
		}
		for _, sel := range c.Exclude {
			for _, m := range sel.rules(g.snap.Cgroups) {
				out.rules = append(out.rules, append(m, g.take(bypass)))
			}
		}
	}
}

// findCgroupsLocked looks for the cgroups that the selectors name.
func (m *Manager) findCgroupsLocked(spec Spec) (map[string][]CgroupRef, error) {
	names := spec.cgroupNames()
	if len(names) == 0 {
		return nil, nil
	}
	if f := m.base.Features; !f.Cgroup2 || !f.NFTSocket && !m.bpfInForceLocked(spec) {
		return nil, fmt.Errorf("%w: to select by cgroup or unit: a writable cgroup v2 and nftables `socket cgroupv2` (CONFIG_NFT_SOCKET, kernel 5.13)", ErrFeature)
	}
	return m.host.FindCgroups(names)
}

// cgroupsMoved reports whether cgroups that the selectors name have been made or removed since the last plan.
func (m *Manager) cgroupsMoved() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed || len(m.spec.cgroupNames()) == 0 {
		return false
	}
	found, err := m.findCgroupsLocked(m.spec)
	return err != nil || !reflect.DeepEqual(found, m.found)
}
