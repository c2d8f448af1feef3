// SPDX-License-Identifier: GPL-3.0-or-later

package process

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// All lists the processes that live now, by PID. Those that begin meanwhile may be missing.
func All() ([]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	out := make([]int, 0, len(entries))
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil {
			out = append(out, pid)
		}
	}
	return out, nil
}

// Holders returns the processes that have one of the sockets open, by inode: each process with the inodes it holds. It reads all of /proc
// (milliseconds with hundreds of processes); processes that may not be looked into are left out.
func Holders(ctx context.Context, inodes map[uint32]bool) (map[int][]uint32, error) {
	pids, err := All()
	if err != nil {
		return nil, err
	}
	out := map[int][]uint32{}
	for _, pid := range pids {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		for _, inode := range SocketsOf(pid) {
			if inodes[inode] {
				out[pid] = append(out[pid], inode)
			}
		}
	}
	return out, nil
}

// Dir is where /proc shows what a process executes, has open and sees: its own directory, or, when its first thread has ended before the
// others, that of another one.
func Dir(pid int) string {
	dir := fmt.Sprintf("/proc/%d", pid)
	if _, err := os.Readlink(dir + "/exe"); !errors.Is(err, os.ErrNotExist) {
		return dir
	}
	threads, _ := os.ReadDir(dir + "/task") // none when it has ended
	for _, t := range threads {
		task := dir + "/task/" + t.Name()
		if _, err := os.Readlink(task + "/exe"); err == nil {
			return task
		}
	}
	return dir
}

// SocketsOf returns the inodes of the sockets that a process has open.
func SocketsOf(pid int) []uint32 {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	fds, err := os.ReadDir(dir)
	if len(fds) == 0 {
		dir = Dir(pid) + "/fd"
		fds, err = os.ReadDir(dir)
	}
	if err != nil {
		return nil
	}
	var out []uint32
	for _, fd := range fds {
		target, err := os.Readlink(filepath.Join(dir, fd.Name()))
		if err != nil {
			continue
		}
		if inode, ok := parseSocketLink(target); ok {
			out = append(out, inode)
		}
	}
	return out
}

// ErrKernel is the error for a thread of the kernel, which no program executes.
var ErrKernel = errors.New("it is a thread of the kernel")

// Lives returns os.ErrNotExist when there is no such process, or nothing is left of it but what its parent has not asked for, and ErrKernel for a thread of the
// kernel. A process whose first thread has ended lives as long as any other does.
func Lives(pid int) error {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return os.ErrNotExist
	}
	zombie, kernel, err := parseState(string(b))
	switch {
	case err != nil:
		return err
	case kernel:
		return ErrKernel
	case !zombie:
		return nil
	}
	if threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid)); err != nil || len(threads) < 2 {
		return os.ErrNotExist
	}
	return nil
}

// parseState reads the state and the flags of /proc/PID/stat, fields 3 and 9.
func parseState(s string) (zombie, kernel bool, err error) {
	const kthread = 0x00200000 // PF_KTHREAD, include/linux/sched.h
	f := strings.Fields(s[strings.LastIndexByte(s, ')')+1:])
	if len(f) < 7 {
		return false, false, fmt.Errorf("stat: %d fields", len(f)+2)
	}
	flags, err := strconv.ParseUint(f[6], 10, 32)
	if err != nil {
		return false, false, fmt.Errorf("stat: flags: %w", err)
	}
	return f[0] == "Z" || f[0] == "X", flags&kthread != 0, nil
}

// parseSocketLink reads `socket:[12345]`.
func parseSocketLink(target string) (uint32, bool) {
	s, ok := strings.CutPrefix(target, "socket:[")
	if !ok {
		return 0, false
	}
	s, ok = strings.CutSuffix(s, "]")
	n, err := strconv.ParseUint(s, 10, 32)
	return uint32(n), ok && err == nil
}

// Name returns the command name of a process, "" when it is gone.
func Name(pid int) string {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	return strings.TrimSpace(string(b))
}

// Stat returns the parent and the start time (in ticks since boot) of a process: with the start time a PID is unique until a reboot.
func Stat(pid int) (parent int, start uint64, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, 0, err
	}
	return parseStat(string(b))
}

// parseStat reads /proc/PID/stat. The name, in parentheses, may itself hold parentheses and spaces: the last one counts (proc(5)).
func parseStat(s string) (parent int, start uint64, err error) {
	i := strings.LastIndexByte(s, ')')
	if i < 0 {
		return 0, 0, fmt.Errorf("stat: no command name")
	}
	f := strings.Fields(s[i+1:]) // from field 3, the state
	if len(f) < 20 {
		return 0, 0, fmt.Errorf("stat: %d fields", len(f)+2)
	}
	if parent, err = strconv.Atoi(f[1]); err != nil {
		return 0, 0, fmt.Errorf("stat: parent: %w", err)
	}
	if start, err = strconv.ParseUint(f[19], 10, 64); err != nil {
		return 0, 0, fmt.Errorf("stat: start time: %w", err)
	}
	return parent, start, nil
}

// Tree returns pid and all its descendants that live now.
func Tree(pid int) ([]int, error) {
	all, err := All()
	if err != nil {
		return nil, err
	}
	children := map[int][]int{}
	for _, p := range all {
		if parent, _, err := Stat(p); err == nil {
			children[parent] = append(children[parent], p)
		}
	}
	out := []int{pid}
	for i := 0; i < len(out); i++ {
		out = append(out, children[out[i]]...)
	}
	return out, nil
}

// Cgroup returns the cgroup v2 of a process as /proc shows it.
func Cgroup(pid int) (string, error) {
	name := "self"
	if pid != 0 {
		name = strconv.Itoa(pid)
	}
	b, err := os.ReadFile("/proc/" + name + "/cgroup")
	if err != nil {
		return "", err
	}
	if path, ok := parseCgroup(string(b)); ok {
		return path, nil
	}
	return "", fmt.Errorf("process %s is in no cgroup v2: %w", name, os.ErrNotExist)
}

// parseCgroup reads the line of the unified hierarchy, `0::/path` (cgroups(7)).
func parseCgroup(s string) (string, bool) {
	for line := range strings.Lines(s) {
		if path, ok := strings.CutPrefix(line, "0::"); ok {
			path = strings.TrimSuffix(strings.TrimSuffix(path, "\n"), " (deleted)")
			return path, strings.HasPrefix(path, "/")
		}
	}
	return "", false
}

// Cgroup2Mount finds where cgroup v2 is mounted for this process, and which cgroup the mount's root is. In the hybrid layout that is not
// /sys/fs/cgroup.
func Cgroup2Mount() (mount, root string, err error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "", "", err
	}
	if mount, root, ok := parseMountinfo(string(b)); ok {
		return mount, root, nil
	}
	return "", "", fmt.Errorf("no cgroup2 mount: %w", os.ErrNotExist)
}

// parseMountinfo finds the first cgroup2 mount (proc(5): id parent dev root mountpoint options [fields] - type source options).
func parseMountinfo(s string) (mount, root string, ok bool) {
	for line := range strings.Lines(s) {
		head, tail, found := strings.Cut(line, " - ")
		if !found || !strings.HasPrefix(tail, "cgroup2 ") {
			continue
		}
		if f := strings.Fields(head); len(f) >= 6 {
			return Unescape(f[4]), Unescape(f[3]), true
		}
	}
	return "", "", false
}

// Unescape undoes the octal escapes of mountinfo: space, tab, newline, backslash.
func Unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
