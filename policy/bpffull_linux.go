// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"errors"
	"fmt"
	"path/filepath"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// What comes after a map was full. The programs deny sockets to everybody who was started since and is not in it. Once there is room again, those are
// written down of whom it can be told that they are selected; the others of that time cannot be told from orphans of selected processes, and stay denied for as
// long as they live, with their descendants. Who is started later is known.

// stateWords reads the map of what did not fit.
func stateWords(m *ebpf.Map) ([]uint64, error) {
	b, err := m.LookupBytes(uint32(0))
	if err != nil {
		return nil, fmt.Errorf("bpf map state: %w", err)
	}
	w := words(b)
	if len(w) < stateSize/8 {
		return nil, errors.New("bpf map state is too small")
	}
	return w, nil
}

// setState writes one word, by memory: the programs write to the others meanwhile.
func (s *bpfState) setState(off int, v uint64) error {
	mem, err := s.maps.state.Memory()
	if err == nil {
		_, err = mem.WriteAt(key64(v), int64(off))
	}
	if err != nil {
		return fmt.Errorf("bpf map state: %w", err)
	}
	return nil
}

// settle writes a word of the map of what did not fit, unless another thing did not fit since before was read; then the word is as it was.
func (s *bpfState) settle(off int, v uint64, before []uint64) error {
	now, err := stateWords(s.maps.state)
	if err != nil || now[stateOverflows/8] != before[stateOverflows/8] {
		return err
	}
	if err := s.setState(off, v); err != nil {
		return err
	}
	now, err = stateWords(s.maps.state)
	if err == nil && now[stateOverflows/8] == before[stateOverflows/8] {
		return nil
	}
	return errors.Join(err, s.setState(off, before[off/8]))
}

// recoverCgroups writes down the selected cgroups. Whatever was not known is there now, or is gone.
func (h *LinuxHost) recoverCgroups(s *bpfState) error {
	before, err := stateWords(s.maps.state)
	if err != nil {
		return err
	}
	err = h.seedCgroups(s)
	if before[stateGroups/8] == 0 {
		return err
	}
	if errors.Is(err, ErrConflict) {
		return nil // it still is full
	}
	if err != nil {
		return err
	}
	return s.settle(stateGroups, 0, before)
}

// recoverTasks writes down the processes that did not fit and can be told, if there is room now, and tells the programs when that was.
func (s *bpfState) recoverTasks() error {
	before, err := stateWords(s.maps.state)
	if err != nil || before[stateTasks/8] == 0 || before[stateTasksEnd/8] != 0 {
		return err
	}
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		return err
	}
	n, iter := uint32(0), s.maps.tasks.Iterate()
	for pid, value := uint32(0), []byte(nil); iter.Next(&pid, &value); {
		n++
	}
	if err := iter.Err(); err != nil || n >= s.maps.tasks.MaxEntries() {
		return ignore(err, ebpf.ErrIterationAborted) // of a map that is busy: later
	}
	for range maxSeedRounds {
		changed, err := s.seedTasks()
		if err != nil {
			return ignore(err, ErrConflict) // it still is full
		}
		if !changed {
			return s.settle(stateTasksEnd, uint64(now.Nano()), before)
		}
	}
	return nil
}

func ignore(err, what error) error {
	if errors.Is(err, what) {
		return nil
	}
	return err
}

// inheritFull takes over from the programs before who is not known.
func (s *bpfState) inheritFull() error {
	prev, err := ebpf.LoadPinnedMap(filepath.Join(s.dir, pinnedState), nil)
	if err != nil {
		return nil //nolint:nilerr // there was no set before this one
	}
	defer closeQuietly(prev)
	w, err := stateWords(prev)
	if err != nil || w[stateTasks/8] == 0 {
		return err
	}
	return errors.Join(s.setState(stateTasks, w[stateTasks/8]), s.setState(stateTasksEnd, w[stateTasksEnd/8]))
}
