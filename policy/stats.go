// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import "maps"

// Stats is what status and metrics show.
type Stats struct {
	GuardActive  bool
	GuardDropped uint64            // packets
	Restored     map[string]uint64 // by object: rule, route, nft, link, sysctl, bpf
	Marking      Marking           // how selected processes are told apart; "" = none are selected
	MarkingWhy   string            // why it is not BPF
	Select       SelectState
}

// Add counts what another namespace's Manager has counted: its guard's drops and its repairs.
func (s *Stats) Add(other Stats) {
	s.GuardDropped += other.GuardDropped
	if s.Restored == nil {
		s.Restored = make(map[string]uint64)
	}
	for object, n := range other.Restored {
		s.Restored[object] += n
	}
}

// keepDroppedLocked saves the counters of tables that are about to be replaced: they start from zero.
func (m *Manager) keepDroppedLocked(tables []string) {
	m.dropped += m.droppedLocked(tables)
}

// droppedLocked is what those of the tables that stand have dropped.
func (m *Manager) droppedLocked(tables []string) (sum uint64) {
	for _, name := range tables {
		if _, ok := m.nftText[name]; !ok {
			continue
		}
		if n, err := m.host.NFCounter(name, guardCounter); err == nil {
			sum += n
		}
	}
	return sum
}

// Stats returns counters since Prepare.
func (m *Manager) Stats() Stats {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := Stats{Restored: maps.Clone(m.restored), GuardDropped: m.dropped}
	name := m.spec.Instance.tableName()
	if _, ok := m.nftText[name]; ok && !m.closed {
		s.GuardActive = true
		s.GuardDropped += m.droppedLocked(tableNames(name))
	}
	m.markingLocked(&s)
	return s
}
