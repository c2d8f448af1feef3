// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path"
	"slices"
	"strings"

	"go.uber.org/zap"
)

// maxTreeRounds bounds how often the descendants of a selected process are listed again: each round catches what was forked in the last one,
// by a process that had not been moved then.
const maxTreeRounds = 16

// pidGroup is the cgroup of ours that a selected process and its descendants are in.
type pidGroup struct {
	ref   CgroupRef
	start uint64 // with the PID it names one process until the next boot
	moved bool
}

func pidName(pid int) string { return fmt.Sprintf("pid %d", pid) }

// pids are the processes that the contexts name, each once.
func (s Spec) pids() []int {
	var out []int
	for _, c := range s.Contexts {
		for _, sel := range slices.Concat(c.Select, c.Exclude) {
			out = append(out, sel.PIDs...)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// pidCgroupsLocked makes the cgroups of selected processes and adds them to found. Nobody is moved yet: the rules come first. A process that
// is not there selects nobody, now and later: its PID may be somebody else's then.
func (m *Manager) pidCgroupsLocked(ctx context.Context, spec Spec, found map[string][]CgroupRef) (map[string][]CgroupRef, error) {
	pids := spec.pids()
	if len(pids) == 0 {
		return found, nil
	}
	if f := m.base.Features; !f.Cgroup2 || !f.NFTSocket {
		return nil, fmt.Errorf("%w: to select by pid: a writable cgroup v2 and nftables `socket cgroupv2` (CONFIG_NFT_SOCKET, kernel 5.13)", ErrFeature)
	}
	out := maps.Clone(found)
	if out == nil {
		out = map[string][]CgroupRef{}
	}
	for _, pid := range pids {
		g, err := m.pidCgroupLocked(ctx, pid)
		if err != nil {
			return nil, err
		}
		if g != nil {
			out[pidName(pid)] = []CgroupRef{g.ref}
		}
	}
	return out, nil
}

func (m *Manager) pidCgroupLocked(ctx context.Context, pid int) (*pidGroup, error) {
	if g, ok := m.pids[pid]; ok {
		return g, nil
	}
	start, _, err := m.host.ProcessTree(ctx, pid)
	var own string
	if err == nil {
		own, err = m.host.Cgroup(pid)
	}
	if errors.Is(err, os.ErrNotExist) || err == nil && pid == os.Getpid() {
		m.warnLocked(pidName(pid), "no such process: nobody is selected by this pid", zap.Int("pid", pid))
		m.pids[pid] = nil
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("process %d: %w", pid, err)
	}
	for strings.HasPrefix(path.Base(own), cgroupPrefix) { // where a crashed instance has put it
		own = path.Dir(own)
	}
	ref, err := m.makeCgroupLocked(own, fmt.Sprintf("select-%d", pid))
	if err != nil {
		return nil, err
	}
	g := &pidGroup{ref: ref, start: start}
	m.pids[pid] = g
	return g, nil
}

// movePIDsLocked moves selected processes, with their descendants, into their cgroups, and those back that are selected no more.
func (m *Manager) movePIDsLocked(ctx context.Context, spec Spec) error {
	var wanted []int
	if m.selected == nil {
		wanted = spec.pids()
	}
	for pid, g := range m.pids {
		switch {
		case !slices.Contains(wanted, pid):
			if g != nil {
				m.releaseLocked(g.ref.Path)
			}
			delete(m.pids, pid)
		case g != nil && !g.moved:
			if err := m.moveTreeLocked(ctx, pid, g); err != nil {
				return err
			}
			g.moved = true
		}
	}
	return nil
}

func (m *Manager) moveTreeLocked(ctx context.Context, pid int, g *pidGroup) error {
	for range maxTreeRounds {
		start, tree, err := m.host.ProcessTree(ctx, pid)
		if errors.Is(err, os.ErrNotExist) || err == nil && start != g.start {
			return nil // it has ended meanwhile
		}
		if err != nil {
			return err
		}
		moved := false
		for _, p := range tree {
			at, err := m.host.Cgroup(p)
			if err != nil || at == g.ref.Path || p == os.Getpid() || strings.HasPrefix(path.Base(at), cgroupPrefix) {
				continue // gone, there already, or in another cgroup of ours
			}
			if err := m.moveLocked(p, at, g.ref.Path); err != nil {
				return err
			}
			moved = true
		}
		if !moved {
			return nil
		}
	}
	return fmt.Errorf("%w: process %d starts others faster than they can be moved to a cgroup: stop it first (kill -STOP)", ErrConflict, pid)
}

// releaseLocked puts the processes in a cgroup of ours back where they were, or into its parent, and removes it.
func (m *Manager) releaseLocked(p string) {
	t := teardown{host: m.host, log: m.log, journal: journal{Cgroups: []string{p}}}
	t.journal.Moved = slices.DeleteFunc(slices.Clone(m.journal.Moved), func(x movedProcess) bool { return x.To != p })
	t.cgroups()
	if err := errors.Join(t.errs...); err != nil {
		m.log.Warn("cgroup stays", zap.Error(err)) // in the journal, for the end
		return
	}
	m.journal.Moved = slices.DeleteFunc(m.journal.Moved, func(x movedProcess) bool { return x.To == p })
	m.journal.Cgroups = slices.DeleteFunc(m.journal.Cgroups, func(x string) bool { return x == p })
	if err := m.journal.write(m.spec.Instance.Journal); err != nil {
		m.log.Warn("journal", zap.Error(err))
	}
}
