// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/policy/process"
)

// bpfState is what a Host keeps of the programs. The pins keep them attached when the daemon dies.
type bpfState struct {
	dir    string
	sel    *Selection
	bits   *selectionBits
	maps   *bpfMaps
	hooks  map[string]link.Link // of cgroups, by hookKind.name
	traces map[string]link.Link // by the pin's name
	flows  map[int]link.Link    // of TUN devices, by index. Not pinned: the devices are the daemon's
	noTCX  bool                 // the kernel has none
	gen    int
	off    offsets
	ident  *identifier
	starts map[int]uint64 // of the processes that selectors name; 0 = was not there
}

// bpffs finds where the BPF file system is mounted, and mounts it where it belongs if it is nowhere.
func bpffs() (string, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(b)) {
		head, tail, _ := strings.Cut(line, " - ")
		if f := strings.Fields(head); strings.HasPrefix(tail, "bpf ") && len(f) >= 5 {
			return process.Unescape(f[4]), nil
		}
	}
	const usual = "/sys/fs/bpf"
	if err := unix.Mount("bpf", usual, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
		return "", fmt.Errorf("%w: mount bpffs at %s: %w", ErrFeature, usual, err)
	}
	return usual, nil
}

// BPFDir implements Host.
func (h *LinuxHost) BPFDir(instance string) (string, error) {
	root, err := bpffs()
	if err != nil {
		return "", err
	}
	return filepath.Join(root, fmt.Sprintf("%s%d-%d-%s", bpfPinPrefix, h.id.Inode, h.id.Cookie, instance)), nil
}

// ApplyBPF implements Host.
func (h *LinuxHost) ApplyBPF(dir string, sel *Selection, old []string) (restored int, err error) {
	h.bpfMu.Lock()
	defer h.bpfMu.Unlock()
	if h.id.Cookie == 0 {
		return 0, fmt.Errorf("%w: network namespaces without cookies (kernel 5.14)", ErrFeature)
	}
	if s := h.bpf; s != nil {
		old = s.keys()
		if s.dir == dir && s.sel.same(sel) {
			if restored, err = s.check(); err != nil {
				return restored, err
			}
			if restored == 0 {
				if same, err := h.syncLocked(s); err != nil {
					return 0, err
				} else if same {
					s.sel = sel
					return 0, h.followFlowsLocked(s, sel.Devices)
				}
			}
		}
	}
	n, err := h.replaceLocked(dir, sel, old)
	if err != nil {
		return 0, err
	}
	h.bpf = n
	err = h.followFlowsLocked(n, sel.Devices)
	h.publishOwnersLocked()
	return restored, err
}

// keys are what the bits of the tasks in the map mean.
func (s *bpfState) keys() []string { return s.sel.keys() }

// check reports how many of the links others have detached, or unpinned.
func (s *bpfState) check() (lost int, err error) {
	for name, l := range s.hooks {
		info, err := l.Info()
		if err != nil {
			return lost, fmt.Errorf("bpf link %s: %w", name, err)
		}
		if cg := info.Cgroup(); cg != nil && cg.CgroupId == 0 { // detached by force
			closeQuietly(l)
			delete(s.hooks, name)
			_ = os.Remove(filepath.Join(s.dir, name)) // of a link that does nothing any more
			lost++
		} else if _, err := os.Lstat(filepath.Join(s.dir, name)); err != nil {
			lost++
		}
	}
	for name := range s.traces {
		if _, err := os.Lstat(filepath.Join(s.dir, name)); err != nil {
			lost++
		}
	}
	return lost, nil
}

// prepare makes what all sets of programs need, once.
func (h *LinuxHost) prepareBPF() (*bpfState, error) {
	if old := h.bpf; old != nil {
		return &bpfState{off: old.off, ident: old.ident, starts: old.starts, gen: old.gen + 1, hooks: old.hooks, flows: old.flows, noTCX: old.noTCX}, nil
	}
	off, err := loadOffsets(defaultLockDir)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrFeature, err)
	}
	ident, err := newIdentifier(off)
	if err != nil {
		return nil, err
	}
	if err := ident.check(); err != nil {
		closeQuietly(ident)
		return nil, err
	}
	return &bpfState{off: off, ident: ident, starts: map[int]uint64{}, hooks: map[string]link.Link{}, flows: map[int]link.Link{}}, nil
}

// replaceLocked loads a new set of programs beside the old one, fills its maps, and swaps: at no moment is a hook without a program. When it
// fails, the old set is as it was.
func (h *LinuxHost) replaceLocked(dir string, sel *Selection, old []string) (_ *bpfState, err error) {
	s, err := h.prepareBPF()
	if err != nil {
		return nil, err
	}
	first := h.bpf == nil
	s.dir, s.sel, s.bits, s.traces = dir, sel, newBits(sel), map[string]link.Link{}
	defer func() {
		if err == nil {
			return
		}
		for name, l := range s.traces {
			_ = os.Remove(filepath.Join(dir, name))
			closeQuietly(l)
		}
		if s.maps != nil {
			closeQuietly(s.maps)
		}
		if first {
			for _, l := range s.hooks {
				closeQuietly(l)
			}
			closeQuietly(s.ident)
		}
	}()
	var prev *bpfMaps
	if h.bpf != nil {
		prev = h.bpf.maps
	}
	if s.maps, err = newMaps(s.bits.n, sel.TaskLimit, sel.Owners, prev); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("bpf pins: %w", err)
	}
	if err := h.fill(s); err != nil {
		return nil, err
	}
	programs, err := s.load(h.id.Cookie)
	if err != nil {
		return nil, err
	}
	defer func() {
		for _, p := range programs {
			closeQuietly(p)
		}
	}()
	if err := s.attachTraces(); err != nil {
		return nil, err
	}
	if err := h.seed(s, old); err != nil {
		return nil, err
	}
	if err := s.attachHooks(programs); err != nil {
		return nil, err
	}
	if err := h.seedOwners(s); err != nil {
		return nil, err
	}
	if prev := h.bpf; prev != nil {
		for _, l := range prev.traces {
			closeQuietly(l)
		}
		closeQuietly(prev.maps)
	}
	return s, s.tidy()
}

// load loads the programs of the hooks.
func (s *bpfState) load(cookie uint64) (map[string]*ebpf.Program, error) {
	out := map[string]*ebpf.Program{}
	add := func(name string, spec *ebpf.ProgramSpec) error {
		p, err := ebpf.NewProgram(spec)
		if err != nil {
			for _, q := range out {
				closeQuietly(q)
			}
			if errors.Is(err, unix.EPERM) {
				return fmt.Errorf("%w: CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN to load BPF programs: %w", ErrPrivilege, err)
			}
			return fmt.Errorf("bpf program %s: %w", name, err)
		}
		out[name] = p
		return nil
	}
	for _, k := range hookKinds() {
		if err := add(k.name, s.bits.decision(k, s.maps, s.off, cookie)); err != nil {
			return nil, err
		}
	}
	if s.bits.owners {
		if err := add(releaseHook, releaseProgram(s.maps, cookie)); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// releaseHook is the name of the program that forgets owners.
const releaseHook = "release"

func (s *bpfState) attachTraces() error {
	// A crashed daemon may have had this one's PID, and its programs still do their work.
	for taken := true; taken; {
		left, err := filepath.Glob(filepath.Join(s.dir, fmt.Sprintf("%d-%d-*", os.Getpid(), s.gen)))
		if err != nil {
			return err
		}
		if taken = len(left) > 0; taken {
			s.gen++
		}
	}
	for _, k := range s.bits.traces() {
		p, err := ebpf.NewProgram(s.bits.trace(k, s.maps, s.off))
		if err != nil {
			return fmt.Errorf("bpf program %s: %w", k.name, err)
		}
		l, err := link.AttachRawTracepoint(link.RawTracepointOptions{Name: k.name, Program: p})
		closeQuietly(p)
		if err != nil {
			return fmt.Errorf("bpf tracepoint %s: %w", k.name, err)
		}
		name := fmt.Sprintf("%d-%d-%s", os.Getpid(), s.gen, k.name)
		s.traces[name] = l
		if err := l.Pin(filepath.Join(s.dir, name)); err != nil {
			return fmt.Errorf("pin bpf tracepoint %s: %w", k.name, err)
		}
	}
	return nil
}

// attachHooks swaps the programs of hooks that are attached, by us or by a daemon before us, and attaches the others to the root of all
// cgroups.
func (s *bpfState) attachHooks(programs map[string]*ebpf.Program) error {
	root, err := rootCgroup()
	if err != nil {
		return err
	}
	kinds := append(hookKinds(), hookKind{releaseHook, ebpf.CGroupSock, ebpf.AttachCgroupInetSockRelease})
	for _, k := range kinds {
		p := programs[k.name]
		pin := filepath.Join(s.dir, k.name)
		if p == nil {
			continue
		}
		if l := s.hooks[k.name]; l != nil {
			if err := l.Update(p); err != nil {
				return fmt.Errorf("replace bpf program %s: %w", k.name, err)
			}
			if _, err := os.Lstat(pin); err != nil {
				if err := errors.Join(l.Unpin(), l.Pin(pin)); err != nil {
					return fmt.Errorf("pin bpf program %s: %w", k.name, err)
				}
			}
			continue
		}
		if l, err := link.LoadPinnedLink(pin, nil); err == nil {
			if l.Update(p) == nil {
				s.hooks[k.name] = l
				continue
			}
			closeQuietly(l)
		}
		l, err := link.AttachCgroup(link.CgroupOptions{Path: root, Program: p, Attach: k.attach})
		if err != nil {
			return fmt.Errorf("attach bpf program %s: %w", k.name, err)
		}
		_ = os.Remove(pin) // one that cannot be updated: this one stands beside it already
		if err := l.Pin(pin); err != nil {
			closeQuietly(l)
			return fmt.Errorf("pin bpf program %s: %w", k.name, err)
		}
		s.hooks[k.name] = l
	}
	return nil
}

// tidy pins the maps that the next daemon asks, and removes pins of sets before this one.
func (s *bpfState) tidy() error {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		_, hook := s.hooks[e.Name()]
		_, trace := s.traces[e.Name()]
		if hook && (e.Name() != releaseHook || s.bits.owners) || trace {
			continue
		}
		if l := s.hooks[e.Name()]; l != nil {
			closeQuietly(l)
			delete(s.hooks, e.Name())
		}
		if err := os.Remove(filepath.Join(s.dir, e.Name())); err != nil {
			return fmt.Errorf("bpf pins: %w", err)
		}
	}
	if err := errors.Join(s.maps.tasks.Pin(filepath.Join(s.dir, pinnedTasks)), s.maps.state.Pin(filepath.Join(s.dir, pinnedState))); err != nil {
		return fmt.Errorf("pin bpf map: %w", err)
	}
	return nil
}

// The pins of the map of tasks, and of what did not fit into it.
const (
	pinnedTasks = "tasks"
	pinnedState = "state"
)

// closeBPF closes the descriptors. What is pinned stays.
func (h *LinuxHost) closeBPF() {
	h.bpfMu.Lock()
	defer h.bpfMu.Unlock()
	s := h.bpf
	if s == nil {
		return
	}
	for _, l := range s.hooks {
		closeQuietly(l)
	}
	for _, l := range s.traces {
		closeQuietly(l)
	}
	for _, l := range s.flows {
		closeQuietly(l)
	}
	closeQuietly(s.maps)
	closeQuietly(s.ident)
	h.bpf = nil
	h.publishOwnersLocked()
}

// RemoveBPF implements Host.
func (h *LinuxHost) RemoveBPF(dir string) error {
	if !ownPins(dir) {
		return fmt.Errorf("bpf pins %q are not ours", dir)
	}
	h.closeBPF()
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("bpf pins: %w", err)
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil || fs.Type != unix.BPF_FS_MAGIC {
		return errors.Join(fmt.Errorf("%s is not on bpffs", dir), err)
	}
	var errs error
	for _, e := range entries {
		errs = errors.Join(errs, os.Remove(filepath.Join(dir, e.Name())))
	}
	return errors.Join(errs, os.Remove(dir))
}

// SelectState implements Host.
func (h *LinuxHost) SelectState() (SelectState, error) {
	h.bpfMu.Lock()
	defer h.bpfMu.Unlock()
	if h.bpf == nil {
		return SelectState{}, nil
	}
	w, err := stateWords(h.bpf.maps.state)
	if err != nil {
		return SelectState{}, err
	}
	return SelectState{Attached: slices.Sorted(maps.Keys(h.bpf.hooks)), Full: w[stateTasks/8] != 0 && w[stateTasksEnd/8] == 0 || w[stateGroups/8] != 0, Denied: w[stateTasksDenied/8] + w[stateGroupsDenied/8]}, nil
}
