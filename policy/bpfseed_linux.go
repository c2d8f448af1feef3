// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"reflect"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/policy/process"
)

// maxGlobs bounds the patterns that the programs match, of units and of executables each. For each cgroup made, or program started, all are tried,
// and the verifier takes no more than 8192 jumps in a row, of which each pattern has one a byte of the name.
const maxGlobs = 48

// addGlob adds a pattern for a selector to a list.
func addGlob(list []globBits, dir fileID, pattern string, n, bit int) ([]globBits, error) {
	if len(list) == maxGlobs {
		return nil, fmt.Errorf("%w: more than %d patterns of units, or of executables and their directories", ErrConflict, maxGlobs)
	}
	g, err := newGlob(pattern)
	if err != nil {
		return nil, err
	}
	b := globBits{dir: dir, glob: g, bits: make([]uint64, n)}
	setBit(b.bits, bit)
	return append(list, b), nil
}

// maxSeedRounds bounds how often all processes are looked at again, each time because the last look has found somebody new.
const maxSeedRounds = 16

// words reads a value of a map.
func words(b []byte) []uint64 {
	out := make([]uint64, len(b)/8)
	for i := range out {
		out[i] = binary.NativeEndian.Uint64(b[8*i:])
	}
	return out
}

func bytesOf(w []uint64) []byte {
	out := make([]byte, 0, 8*len(w))
	for _, x := range w {
		out = binary.NativeEndian.AppendUint64(out, x)
	}
	return out
}

// bitTable collects bits by key, to be written to a map.
type bitTable map[string][]uint64

func (t bitTable) set(key []byte, n, bit int) {
	w := t[string(key)]
	if w == nil {
		w = make([]uint64, n)
		t[string(key)] = w
	}
	setBit(w, bit)
}

func (t bitTable) write(m *ebpf.Map) error {
	for k, w := range t {
		if err := m.Update([]byte(k), bytesOf(w), ebpf.UpdateAny); err != nil {
			if errors.Is(err, unix.E2BIG) {
				return fmt.Errorf("%w: more is selected than the bpf map %s holds", ErrConflict, m)
			}
			return fmt.Errorf("bpf map %s: %w", m, err)
		}
	}
	return nil
}

func key32(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }
func key64(v uint64) []byte { return binary.NativeEndian.AppendUint64(nil, v) }

func (f fileID) key() []byte {
	return binary.NativeEndian.AppendUint64(binary.NativeEndian.AppendUint64(nil, f.Dev), f.Inode)
}

// padded is a NUL-terminated name in size bytes; ok is false if it does not fit.
func padded(s string, size int) ([]byte, bool) {
	if len(s) >= size {
		return nil, false
	}
	return append([]byte(s), make([]byte, size-len(s))...), true
}

// fill writes what selectors say about users, groups, names and files. Nothing is attached yet.
func (h *LinuxHost) fill(s *bpfState) error {
	n := s.bits.n
	uids, gids, paths, units, sessions, groups := bitTable{}, bitTable{}, bitTable{}, bitTable{}, bitTable{}, bitTable{}
	for i, sel := range s.sel.Selectors {
		for _, u := range sel.UIDs {
			uids.set(key32(u), n, i)
		}
		for _, g := range sel.GIDs {
			gids.set(key32(g), n, i)
		}
		for _, p := range sel.Cgroups {
			if k, ok := padded(path.Clean(p), maxCgroupPath); ok {
				paths.set(k, n, i)
			}
		}
		for _, u := range sel.Units {
			if name := unitName(u); !exactName(name) {
				var err error
				if s.bits.unitGlobs, err = addGlob(s.bits.unitGlobs, fileID{}, name, n, i); err != nil {
					return err
				}
			} else if k, ok := padded(name, maxName); ok {
				units.set(k, n, i)
			}
		}
		for _, pid := range sel.PIDs {
			if !s.present(pid) {
				continue
			}
			switch sel.Scope {
			case ScopeSession:
				if _, sid := sessionOf(pid); sid != 0 {
					sessions.set(key32(uint32(sid)), n, i)
				}
			case ScopeGroup:
				if group, _ := sessionOf(pid); group != 0 {
					groups.set(key32(uint32(group)), n, i)
				}
			}
		}
	}
	if err := errors.Join(uids.write(s.maps.uids), gids.write(s.maps.gids), paths.write(s.maps.paths), units.write(s.maps.units),
		sessions.write(s.maps.sessions), groups.write(s.maps.groups)); err != nil {
		return err
	}
	globs, err := s.executables()
	if err != nil {
		return err
	}
	s.bits.exeGlobs = globs
	return s.maps.writeGlobs(s.bits)
}

// present reports whether a process is the one that a selector has meant since it was there first.
func (s *bpfState) present(pid int) bool {
	_, start, err := process.Stat(pid)
	if err != nil {
		start = 0
	}
	first, known := s.starts[pid]
	if !known {
		s.starts[pid], first = start, start
	}
	return start != 0 && first == start
}

func sessionOf(pid int) (group, session int) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, 0
	}
	return groupAndSession(string(b))
}

// executables writes the files that selectors name, by inode and by directory and name, and returns the patterns. A file that was meant once
// stays, whatever it is called later.
func (s *bpfState) executables() ([]globBits, error) {
	if !s.bits.exe.used {
		return nil, nil
	}
	n := s.bits.n
	files, names := bitTable{}, bitTable{}
	var out []globBits
	for i, sel := range s.sel.Selectors {
		for _, pattern := range sel.Exes {
			for _, p := range expand(pattern) {
				if id, err := s.ident.file(p); err == nil {
					files.set(id.key(), n, i)
				}
			}
			for _, p := range slices.Concat(expandDir(pattern), resolved(pattern)) {
				dir, err := s.ident.file(path.Dir(p))
				if err != nil {
					continue // a directory that is not there yet
				}
				if name := path.Base(p); !exactName(name) {
					if out, err = addGlob(out, dir, name, n, i); err != nil {
						return nil, err
					}
				} else if k, ok := padded(name, maxName); ok {
					names.set(append(dir.key(), k...), n, i)
				}
			}
		}
	}
	return out, errors.Join(files.write(s.maps.files), names.write(s.maps.names))
}

// expand lists the files that a pattern of paths means now.
func expand(pattern string) []string {
	list, err := filepath.Glob(pattern)
	if err != nil {
		return nil // patterns have been checked
	}
	return list[:min(len(list), maxFiles)]
}

// seed writes what exists already: cgroups, and processes. The tracepoints are attached, so that nothing new is missed meanwhile.
func (h *LinuxHost) seed(s *bpfState, old []string) error {
	if err := h.seedCgroups(s); err != nil {
		return err
	}
	self := make([]uint64, 1+2*s.bits.n)
	self[0] = taskSelf
	if err := s.maps.tasks.Update(uint32(os.Getpid()), bytesOf(self), ebpf.UpdateAny); err != nil {
		return fmt.Errorf("bpf map tasks: %w", err)
	}
	if !s.bits.pid.used && !s.bits.exe.used {
		return nil
	}
	if err := errors.Join(s.inheritFull(), s.inherit(old)); err != nil {
		return err
	}
	for range maxSeedRounds {
		changed, err := s.seedTasks()
		if err != nil || !changed {
			return err
		}
	}
	return nil
}

// seedCgroups walks the selected cgroups, twice: what is made during the first walk is below what the programs know by the second.
func (h *LinuxHost) seedCgroups(s *bpfState) error {
	if !s.bits.cgroup.used {
		return nil
	}
	var names []string
	for _, sel := range s.sel.Selectors {
		names = append(names, sel.names()...)
	}
	for range 2 {
		found, err := h.FindCgroups(names)
		if err != nil {
			return err
		}
		table := bitTable{}
		for i, sel := range s.sel.Selectors {
			for _, name := range sel.names() {
				for _, ref := range found[name] {
					if err := walkCgroups(ref.Path, func(id uint64) { table.set(key64(id), s.bits.n, i) }); err != nil {
						return err
					}
				}
			}
		}
		for k := range table {
			if b, err := s.maps.cgroups.LookupBytes([]byte(k)); err == nil && b != nil {
				for i, w := range words(b) { // what the program has put there
					table[k][i] |= w
				}
			}
		}
		if err := table.write(s.maps.cgroups); err != nil {
			return err
		}
	}
	return nil
}

func walkCgroups(p string, add func(id uint64)) error {
	dir, err := cgroupDir(p)
	if err != nil {
		return err
	}
	return filepath.WalkDir(dir, func(name string, e fs.DirEntry, err error) error {
		if err != nil {
			if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENODEV) {
				return nil
			}
			return err
		}
		if e.IsDir() {
			if h, _, err := unix.NameToHandleAt(unix.AT_FDCWD, name, 0); err == nil && h.Size() == 8 {
				add(binary.NativeEndian.Uint64(h.Bytes()))
			}
		}
		return nil
	})
}

// inherit takes over whom the programs before have followed: whose parents are gone, nobody else knows. old says what their bits mean. They
// still run, so that two equal passes have seen everybody.
func (s *bpfState) inherit(old []string) error {
	prev, err := ebpf.LoadPinnedMap(filepath.Join(s.dir, pinnedTasks), nil)
	if err != nil {
		return nil //nolint:nilerr // there was no set before this one
	}
	defer closeQuietly(prev)
	now := map[string][]int{}
	for i, k := range s.sel.keys() {
		if k != "" {
			now[k] = append(now[k], i)
		}
	}
	n := s.bits.n
	last := map[uint32]string{}
	for range maxSeedRounds {
		this := map[uint32]string{}
		var pid uint32
		var value []byte
		iter := prev.Iterate()
		for iter.Next(&pid, &value) {
			w := words(value)
			half := (len(w) - 1) / 2
			out := make([]uint64, 1+2*n)
			out[0] = w[0] & taskDenied
			for i, key := range old {
				for _, bit := range now[key] {
					if i/64 < half && w[1+i/64]>>(i%64)&1 != 0 {
						setBit(out[1:1+n], bit)
					}
					if i/64 < half && w[1+half+i/64]>>(i%64)&1 != 0 {
						setBit(out[1+n:], bit)
					}
				}
			}
			if slices.Max(out) == 0 || pid == uint32(os.Getpid()) {
				continue
			}
			this[pid] = string(bytesOf(out))
		}
		for pid, v := range this {
			if last[pid] != v {
				if err := s.mergeTask(int(pid), words([]byte(v))); err != nil {
					return err
				}
			}
		}
		if maps.Equal(this, last) {
			return nil
		}
		last = this
	}
	return nil
}

// mergeTask adds bits to a process's entry.
func (s *bpfState) mergeTask(pid int, bits []uint64) error {
	_, start, err := process.Stat(pid)
	if err != nil {
		return nil //nolint:nilerr // it has ended
	}
	value := slices.Clone(bits)
	if b, err := s.maps.tasks.LookupBytes(uint32(pid)); err == nil && b != nil {
		for i, w := range words(b) {
			value[i] |= w
		}
	}
	if err := s.maps.tasks.Update(uint32(pid), bytesOf(value), ebpf.UpdateAny); err != nil {
		if errors.Is(err, unix.E2BIG) {
			return fmt.Errorf("%w: more processes are selected than the bpf map of tasks holds (%d)", ErrConflict, s.maps.tasks.MaxEntries())
		}
		return fmt.Errorf("bpf map tasks: %w", err)
	}
	if _, again, err := process.Stat(pid); err != nil || again != start {
		_ = s.maps.tasks.Delete(uint32(pid)) // it has ended meanwhile, and nobody else deletes it
	}
	return nil
}

// seedTasks looks at all processes once, and reports whether somebody was found whom the programs do not know.
func (s *bpfState) seedTasks() (changed bool, err error) {
	all, err := process.All()
	if err != nil {
		return false, err
	}
	parents, bits := map[int]int{}, map[int][]uint64{}
	var pids []int
	for _, pid := range all {
		if pid == os.Getpid() {
			continue
		}
		parent, _, err := process.Stat(pid)
		if err != nil {
			continue
		}
		pids = append(pids, pid)
		parents[pid], bits[pid] = parent, s.direct(pid)
	}
	for _, pid := range pids {
		want := slices.Clone(bits[pid])
		for at, depth := parents[pid], 0; at > 1 && depth < maxLineage; at, depth = parents[at], depth+1 {
			s.inheritFrom(want, bits[at])
		}
		if slices.Max(want) == 0 {
			continue
		}
		have := make([]uint64, len(want))
		if b, err := s.maps.tasks.LookupBytes(uint32(pid)); err == nil && b != nil {
			have = words(b)
		}
		missing := false
		for i := range want {
			missing = missing || want[i]&^have[i] != 0
		}
		if missing {
			changed = true
			if err := s.mergeTask(pid, want); err != nil {
				return false, err
			}
		}
	}
	return changed, nil
}

func (s *bpfState) inheritFrom(to, from []uint64) {
	if from == nil {
		return
	}
	n := s.bits.n
	for i := range n {
		to[1+i] |= from[1+i] & s.bits.treePID[i]
		to[1+n+i] |= from[1+n+i] & s.bits.treeExe[i]
	}
}

// direct are the bits of a process by itself: its PID and its executable.
func (s *bpfState) direct(pid int) []uint64 {
	n := s.bits.n
	out := make([]uint64, 1+2*n)
	for i, sel := range s.sel.Selectors {
		if slices.Contains(sel.PIDs, pid) && (sel.Scope == ScopeTree || sel.Scope == ScopeCurrent) && s.present(pid) {
			setBit(out[1:1+n], i)
		}
	}
	if !s.bits.exe.used {
		return out
	}
	or := func(w []uint64) {
		for i := range min(n, len(w)) {
			out[1+n+i] |= w[i]
		}
	}
	proc := process.Dir(pid)
	exe := proc + "/exe"
	id, err := s.ident.file(exe)
	if err != nil {
		return out
	}
	if b, err := s.maps.files.LookupBytes(id.key()); err == nil {
		or(words(b))
	}
	real, err := os.Readlink(exe)
	if err != nil {
		return out
	}
	real = strings.TrimSuffix(real, " (deleted)")
	dir, err := s.ident.file(proc + "/root" + path.Dir(real))
	if err != nil {
		return out
	}
	base := path.Base(real)
	if k, ok := padded(base, maxName); ok {
		if b, err := s.maps.names.LookupBytes(append(dir.key(), k...)); err == nil {
			or(words(b))
		}
	}
	for _, g := range s.bits.exeGlobs {
		if g.dir == dir && g.glob.match(base) {
			or(g.bits)
		}
	}
	return out
}

// syncLocked writes what has come up since: cgroups and files that only user space can match. It reports whether the programs still fit.
func (h *LinuxHost) syncLocked(s *bpfState) (same bool, err error) {
	if err := errors.Join(h.recoverCgroups(s), s.recoverTasks()); err != nil {
		return false, err
	}
	globs, err := s.executables()
	return reflect.DeepEqual(globs, s.bits.exeGlobs), err
}
