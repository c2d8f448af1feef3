// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/policy/process"
)

// cgroupDir is the directory of a cgroup: below wherever cgroup v2 is mounted, which may show only a part of the tree.
func cgroupDir(p string) (string, error) {
	mount, root, err := process.Cgroup2Mount()
	if err != nil {
		return "", fmt.Errorf("%w: cgroup v2: mount it (mount -t cgroup2 none /sys/fs/cgroup/unified): %w", ErrFeature, err)
	}
	if root != "/" {
		rest, ok := strings.CutPrefix(p, root)
		if !ok {
			return "", fmt.Errorf("%w: cgroup %s is outside of the cgroup2 mount, which shows %s only", ErrFeature, p, root)
		}
		p = rest
	}
	return filepath.Join(mount, filepath.FromSlash(p)), nil
}

// rootCgroup is the directory of the root of all cgroups, where programs see every process. ErrFeature where it is not mounted.
func rootCgroup() (string, error) {
	mount, root, err := process.Cgroup2Mount()
	if err != nil || root != "/" {
		return "", errors.Join(fmt.Errorf("%w: the root of cgroup v2 is not mounted here", ErrFeature), err)
	}
	return mount, nil
}

// cgroupRef reads the id that nftables compares with.
func cgroupRef(p string) (CgroupRef, error) {
	dir, err := cgroupDir(p)
	if err != nil {
		return CgroupRef{}, err
	}
	h, _, err := unix.NameToHandleAt(unix.AT_FDCWD, dir, 0)
	if err != nil {
		return CgroupRef{}, fmt.Errorf("cgroup %s: %w", p, err)
	}
	if h.Size() != 8 {
		return CgroupRef{}, fmt.Errorf("cgroup %s: handle of %d bytes", p, h.Size())
	}
	p = path.Clean(p)
	return CgroupRef{Path: p, ID: binary.NativeEndian.Uint64(h.Bytes()), Level: strings.Count(strings.TrimSuffix(p, "/"), "/")}, nil
}

// Cgroup implements Host.
func (h *LinuxHost) Cgroup(pid int) (string, error) { return process.Cgroup(pid) }

// MakeCgroup implements Host.
func (h *LinuxHost) MakeCgroup(p string) (CgroupRef, error) {
	dir, err := cgroupDir(p)
	if err != nil {
		return CgroupRef{}, err
	}
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		if errors.Is(err, unix.EROFS) || errors.Is(err, unix.EACCES) {
			return CgroupRef{}, fmt.Errorf("%w: writable cgroup v2 (in a container: mount /sys/fs/cgroup read-write): %w", ErrFeature, err)
		}
		return CgroupRef{}, err
	}
	return cgroupRef(p)
}

// RemoveCgroup implements Host.
func (h *LinuxHost) RemoveCgroup(p string) error {
	dir, err := cgroupDir(p)
	if err != nil {
		return err
	}
	if err := unix.Rmdir(dir); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove cgroup %s: %w", p, err)
	}
	return nil
}

// CgroupProcs implements Host: the cgroup's own processes and those of all cgroups below.
func (h *LinuxHost) CgroupProcs(p string) ([]int, error) {
	dir, err := cgroupDir(p)
	if err != nil {
		return nil, err
	}
	var pids []int
	err = filepath.WalkDir(dir, func(name string, e os.DirEntry, err error) error {
		if err != nil || !e.IsDir() {
			if errors.Is(err, os.ErrNotExist) {
				return nil // gone meanwhile
			}
			return err
		}
		b, err := os.ReadFile(filepath.Join(name, "cgroup.procs"))
		if err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ENODEV) {
			return err
		}
		for f := range strings.FieldsSeq(string(b)) {
			if pid, err := strconv.Atoi(f); err == nil && pid > 0 { // 0: a process of a pid namespace that is not ours to see
				pids = append(pids, pid)
			}
		}
		return nil
	})
	return pids, err
}

// ProcessTree implements Host.
func (h *LinuxHost) ProcessTree(_ context.Context, pid int) (uint64, []int, error) {
	_, start, err := process.Stat(pid)
	if err != nil {
		return 0, nil, err
	}
	pids, err := process.Tree(pid)
	return start, pids, err
}

// maxUnitDirs bounds the search for units. A machine with more slices and services than that must name their cgroups.
const maxUnitDirs = 20000

// FindCgroups implements Host.
func (h *LinuxHost) FindCgroups(names []string) (map[string][]CgroupRef, error) {
	mount, root, err := process.Cgroup2Mount()
	if err != nil {
		return nil, fmt.Errorf("%w: cgroup v2: %w", ErrFeature, err)
	}
	paths, units := map[string][]string{}, false
	for _, n := range names {
		if strings.HasPrefix(n, "/") {
			paths[n] = []string{path.Clean(n)}
		} else {
			units = true
		}
	}
	if units {
		if err := findUnits(mount, names, paths); err != nil {
			return nil, err
		}
	}
	out := map[string][]CgroupRef{}
	for _, n := range names {
		for _, p := range paths[n] {
			ref, err := cgroupRef(path.Join(root, p))
			switch {
			case err == nil:
				out[n] = append(out[n], ref)
			case !errors.Is(err, os.ErrNotExist):
				return nil, err
			}
		}
	}
	return out, nil
}

// findUnits looks for directories with the units' names inside the slices. What is below a unit belongs to it, so the search does not go on
// there for that name.
func findUnits(mount string, names []string, paths map[string][]string) error {
	dirs := 0
	return filepath.WalkDir(mount, func(name string, e os.DirEntry, err error) error {
		if err != nil {
			if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENODEV) {
				return nil // gone meanwhile
			}
			return err
		}
		if !e.IsDir() || name == mount {
			return nil
		}
		rel := "/" + strings.TrimPrefix(strings.TrimPrefix(name, mount), "/")
		if dirs++; dirs > maxUnitDirs {
			return fmt.Errorf("%w: more than %d cgroups to search for units: select by cgroup", ErrConflict, maxUnitDirs)
		}
		if path.Dir(rel) == "/" && !strings.HasSuffix(rel, ".slice") {
			return filepath.SkipDir
		}
		for _, n := range names {
			if strings.HasPrefix(n, "/") {
				continue
			}
			under := slices.ContainsFunc(paths[n], func(p string) bool { return strings.HasPrefix(rel, p+"/") })
			if ok, _ := path.Match(unitName(n), path.Base(rel)); ok && !under { // the pattern has been checked
				paths[n] = append(paths[n], rel)
			}
		}
		return nil
	})
}

// MoveProcess implements Host. A process that is gone is no error.
func (h *LinuxHost) MoveProcess(pid int, p string) error {
	dir, err := cgroupDir(p)
	if err != nil {
		return err
	}
	err = os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0)
	if err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("move process %d to cgroup %s: %w", pid, p, err)
	}
	return nil
}

// MarkCgroup implements Host.
func (h *LinuxHost) MarkCgroup(p string, value, mask uint32) error {
	fd, err := h.OpenCgroup(p)
	if err != nil {
		return err
	}
	defer closeFD(fd)
	return attachSockMark(fd, value, mask, h.id.Cookie)
}

// OpenCgroup implements Host.
func (h *LinuxHost) OpenCgroup(p string) (int, error) {
	dir, err := cgroupDir(p)
	if err != nil {
		return -1, err
	}
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open cgroup %s: %w", p, err)
	}
	return fd, nil
}

// WaitCgroupEmpty implements Host, by inotify on cgroup.events (cgroup-v2.rst, "Un-populated notification").
func (h *LinuxHost) WaitCgroupEmpty(ctx context.Context, p string) error {
	dir, err := cgroupDir(p)
	if err != nil {
		return err
	}
	events := filepath.Join(dir, "cgroup.events")
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return fmt.Errorf("inotify: %w", err)
	}
	f := os.NewFile(uintptr(fd), "inotify")
	defer f.Close()
	defer context.AfterFunc(ctx, func() { f.Close() })()
	if _, err := unix.InotifyAddWatch(fd, events, unix.IN_MODIFY|unix.IN_DELETE_SELF); err != nil {
		if errors.Is(err, unix.ENOENT) {
			return nil
		}
		return fmt.Errorf("watch cgroup %s: %w", p, err)
	}
	buf := make([]byte, 4096)
	for {
		b, err := os.ReadFile(events)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENODEV) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("cgroup %s: %w", p, err)
		}
		if !populated(string(b)) {
			return nil
		}
		if _, err := f.Read(buf); err != nil {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			return fmt.Errorf("watch cgroup %s: %w", p, err)
		}
	}
}

// populated reads cgroup.events. What it cannot read counts as populated: marks and guard then stay.
func populated(s string) bool {
	for line := range strings.Lines(s) {
		if strings.TrimSpace(line) == "populated 0" {
			return false
		}
	}
	return true
}
