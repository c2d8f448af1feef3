// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"context"
	"errors"
	"fmt"
	"path"
	"reflect"
	"strings"

	"go.uber.org/zap"
)

// Marking says by what the sockets of selected processes are told apart.
type Marking string

// The ways of marking.
const (
	MarkingAuto Marking = "auto" // BPF, or nftables where the kernel refuses that
	MarkingBPF  Marking = "bpf"  // BPF, or an error
	MarkingNFT  Marking = "nft"  // nftables alone
)

// journalBPF is where the programs are pinned, and what the bits of the processes they follow stand for.
type journalBPF struct {
	Dir       string   `json:"dir"`
	Selectors []string `json:"selectors,omitempty"`
}

// ownPins reports whether a directory can be one of ours.
func ownPins(dir string) bool {
	return path.IsAbs(dir) && path.Clean(dir) == dir && strings.HasPrefix(path.Base(dir), bpfPinPrefix)
}

// bpfPinPrefix starts the name of every directory of pins, so that a journal cannot make us remove anything else.
const bpfPinPrefix = "mprox-"

// bpfInForceLocked reports whether the plan may count on BPF.
func (m *Manager) bpfInForceLocked(spec Spec) bool {
	return spec.wantsBPF() && m.cfg.Marking != MarkingNFT && m.bpfErr == nil && m.base.Features.Cgroup2
}

// applyBPFLocked attaches what the plan decides by BPF, or removes what is attached in vain. refused: the kernel does not take it, and
// nftables has to do.
func (m *Manager) applyBPFLocked(plan *Plan, repair bool) (refused bool, err error) {
	if plan.Select == nil {
		m.selected = nil
		return false, m.removeBPFLocked()
	}
	if m.later = !repair && m.onlyOwnersLocked(plan.Select); m.later {
		m.wake()
		return false, nil
	}
	old := m.journal.BPF
	dir, err := m.host.BPFDir(m.spec.Instance.tableName())
	if err == nil {
		err = m.attachBPFLocked(dir, plan.Select, repair)
	}
	switch {
	case err == nil:
		return false, nil
	case m.selected != nil && len(m.selected.Rules) > 0 || errors.Is(err, ErrConflict) || m.cfg.Marking == MarkingBPF:
		return false, fmt.Errorf("bpf: %w", err)
	}
	m.bpfErr, m.selected = err, nil
	m.log.Warn("the kernel refuses BPF programs: selected processes are told apart by nftables", zap.Error(err))
	if old != nil {
		m.journal.BPF = old
	}
	return true, m.removeBPFLocked()
}

// onlyOwnersLocked reports whether a selection decides nothing that is not in force: it only writes down whose sockets are whose. Attaching takes
// 10 to 30 ms, of waiting mostly, which are not passed on to the first connection of a daemon or a context: it is done by Settle, or with the next
// repair. A socket made before is known by other means, as one older than the daemon is.
func (m *Manager) onlyOwnersLocked(sel *Selection) bool {
	switch {
	case m.cfg.Marking == MarkingBPF: // whose refusal is an error of this call
		return false
	case m.selected != nil:
		return m.selected.same(sel)
	}
	return len(sel.Rules) == 0 && m.journal.BPF == nil
}

// Settle does what Apply has left for later, because nothing that passes needs it.
func (m *Manager) Settle(ctx context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed || !m.prepared {
		return ErrClosed
	}
	if !m.later {
		return nil
	}
	return m.convergeLocked(ctx, m.spec, true)
}

func (m *Manager) attachBPFLocked(dir string, sel *Selection, repair bool) error {
	var old []string
	if m.journal.BPF != nil {
		old = m.journal.BPF.Selectors
	}
	if m.journal.BPF == nil {
		m.journal.BPF = &journalBPF{Dir: dir}
		if err := m.journal.write(m.spec.Instance.Journal); err != nil {
			return err
		}
	}
	n, err := m.host.ApplyBPF(dir, sel, old)
	if err != nil {
		return err
	}
	if repair && n > 0 {
		m.restored["bpf"] += uint64(n)
	}
	m.selected = sel
	if want := (journalBPF{Dir: dir, Selectors: sel.keys()}); !reflect.DeepEqual(*m.journal.BPF, want) {
		m.journal.BPF = &want
		return m.journal.write(m.spec.Instance.Journal)
	}
	return nil
}

func (m *Manager) removeBPFLocked() error {
	if m.journal.BPF == nil {
		return nil
	}
	if err := m.host.RemoveBPF(m.journal.BPF.Dir); err != nil {
		return err
	}
	m.journal.BPF = nil
	return m.journal.write(m.spec.Instance.Journal)
}

// syncBPF repairs what others have detached, lets the programs know of files and cgroups that only user space can match, and says so when a map is
// full.
func (m *Manager) syncBPF() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed || m.selected == nil || m.journal.BPF == nil {
		return
	}
	if err := m.attachBPFLocked(m.journal.BPF.Dir, m.selected, true); err != nil {
		m.warnLocked("bpf", "selection not repaired", zap.Error(err))
		return
	}
	delete(m.warned, "bpf")
	s, err := m.host.SelectState()
	switch {
	case err != nil:
	case s.Full:
		m.warnLocked("bpf full", "more processes or cgroups are selected than the BPF maps hold: those that may be selected and are not known "+
			"are denied sockets, until there is room", zap.Uint64("denied", s.Denied))
	case m.warned["bpf full"]:
		delete(m.warned, "bpf full")
		m.log.Info("all selected processes and cgroups are known again", zap.Uint64("denied", s.Denied))
	}
}

// keys say what the bits that follow processes stand for, by position; "" = nothing that lasts.
func (s *Selection) keys() []string {
	out := make([]string, len(s.Selectors))
	for i, sel := range s.Selectors {
		out[i] = sel.byProcess()
	}
	return out
}

// markingLocked fills in how selected processes are told apart.
func (m *Manager) markingLocked(s *Stats) {
	switch {
	case m.closed || !(Spec{Contexts: m.spec.Contexts}).wantsBPF():
	case m.selected != nil:
		s.Marking = MarkingBPF
		s.Select, _ = m.host.SelectState() // zero when it cannot be read
	case m.bpfErr != nil:
		s.Marking, s.MarkingWhy = MarkingNFT, m.bpfErr.Error()
	case m.cfg.Marking == MarkingNFT:
		s.Marking, s.MarkingWhy = MarkingNFT, "configured (kernel.marking)"
	default:
		s.Marking, s.MarkingWhy = MarkingNFT, "no writable cgroup v2"
	}
}
