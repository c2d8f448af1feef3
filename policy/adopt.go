// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"

	"go.uber.org/zap"
)

// loadJournalLocked starts the journal, from the one a crashed instance left if there is one.
func (m *Manager) loadJournalLocked(spec Spec) (adopted bool, err error) {
	m.journal = newJournal(spec, m.host.Netns())
	old, err := readJournal(spec.Instance.Journal)
	switch {
	case errors.Is(err, os.ErrNotExist):
		// Left-overs without a journal are found by our protocol number, and swapped like any others.
	case err != nil:
		m.log.Error("the journal of the last run cannot be read: settings it changed are not restored", zap.Error(err))
	case old.Netns != m.host.Netns():
		m.log.Info("the journal is of another network namespace or another boot: nothing of it is here")
	default:
		adopted = true
		if err := m.adoptLocked(old, spec); err != nil {
			return true, err
		}
	}
	return adopted, m.journal.write(spec.Instance.Journal)
}

// adoptLocked takes over what a crashed instance has left: its settings' old values, its cgroups, and the contexts whose processes live.
func (m *Manager) adoptLocked(old journal, spec Spec) error {
	if old.TableBase != spec.TableBase || old.RulePriority != spec.RulePriority || old.Mask != spec.Mask {
		return fmt.Errorf("%w: a crashed mprox left its state under other kernel.* settings: run `mprox cleanup` first", ErrConflict)
	}
	m.journal.Sysctls, m.journal.Cgroups, m.journal.Moved = maps.Clone(old.Sysctls), old.Cgroups, old.Moved
	m.journal.BPF = old.BPF
	// Conntrack has been watching since: what it does not know now is no server's connection.
	m.base.Sockets, m.journal.Sockets, m.observed = old.Sockets, old.Sockets, len(old.Contexts) > 0
	m.journal.Contexts = old.Contexts
	for _, c := range old.Contexts {
		if c.Mode == ModeGlobal || !m.populated(c.Cgroups) {
			continue
		}
		if i := slices.IndexFunc(spec.Contexts, inSlot(c.Slot)); i >= 0 {
			if spec.Contexts[i].Mode == ModeGlobal {
				return fmt.Errorf("%w: processes of %q that survived a crash hold slot %d: end them, or run `mprox cleanup`", ErrConflict, c.Name, c.Slot)
			}
		} else if ok, err := m.locks.slot(c.Slot); err != nil || !ok {
			return errors.Join(err, fmt.Errorf("%w: slot %d is in use", ErrConflict, c.Slot))
		}
		m.slots[c.Slot] = true // if there is a context that has the slot now, it captures them
		name, _, _ := strings.Cut(c.Name, " (crashed")
		m.ghosts = append(m.ghosts, ContextSpec{Name: fmt.Sprintf("%s (crashed, slot %d)", name, c.Slot), Slot: c.Slot, Mode: c.Mode, Cgroups: c.Cgroups})
	}
	m.ghosts = Spec{Contexts: m.ghosts}.withDefaults().Contexts
	return nil
}

// withGhosts adds the contexts whose processes have outlived them, or their cgroups to the context that has got their slot: the mark of a socket
// could be changed by its process, that of a cgroup cannot.
func (m *Manager) withGhosts(contexts []ContextSpec) []ContextSpec {
	out := slices.Clone(contexts)
	for _, g := range m.ghosts {
		i := slices.IndexFunc(out, inSlot(g.Slot))
		if i < 0 {
			out = append(out, g)
			continue
		}
		out[i].Cgroups = slices.Concat(out[i].Cgroups, g.Cgroups)
	}
	return out
}

func inSlot(slot int) func(ContextSpec) bool {
	return func(c ContextSpec) bool { return c.Slot == slot }
}

func (m *Manager) populated(refs []CgroupRef) bool {
	return slices.ContainsFunc(refs, func(r CgroupRef) bool {
		pids, err := m.host.CgroupProcs(r.Path)
		return err != nil && !errors.Is(err, os.ErrNotExist) || len(pids) > 0
	})
}

// dropGhostsLocked forgets the contexts whose last process has gone.
func (m *Manager) dropGhostsLocked() {
	m.ghosts = slices.DeleteFunc(m.ghosts, func(c ContextSpec) bool {
		if m.populated(c.Cgroups) {
			return false
		}
		for _, r := range c.Cgroups {
			m.removeCgroupLocked(r.Path)
		}
		return true
	})
}
