// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/mutex-proxy/mutex/policy/process"
)

// maxLineage bounds the walk to the first process: nobody nests deeper, and /proc may change meanwhile.
const maxLineage = 1024

// Process implements Host.
func (h *LinuxHost) Process(pid int) (ProcessFacts, error) {
	dir := fmt.Sprintf("/proc/%d", pid)
	status, err := os.ReadFile(dir + "/status")
	if err != nil {
		return ProcessFacts{}, err
	}
	p := ProcessFacts{PID: pid, Name: process.Name(pid)}
	p.UID, p.GID = effective(string(status))
	if exe, err := os.Readlink(process.Dir(pid) + "/exe"); err == nil {
		p.Exe = strings.TrimSuffix(exe, " (deleted)")
	}
	p.Cgroup, _ = process.Cgroup(pid) // without cgroup v2 there is none
	if stat, err := os.ReadFile(dir + "/stat"); err == nil {
		p.Group, p.Session = groupAndSession(string(stat))
	}
	for at := pid; at > 0 && len(p.Lineage) < maxLineage; {
		p.Lineage = append(p.Lineage, at)
		exe, _ := os.Readlink(process.Dir(at) + "/exe") // "" when it may not be read
		p.Exes = append(p.Exes, strings.TrimSuffix(exe, " (deleted)"))
		parent, _, err := process.Stat(at)
		if err != nil {
			break
		}
		at = parent
	}
	return p, nil
}

// RunsAs implements Host.
func (h *LinuxHost) RunsAs(pid int, uid uint32) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	return err == nil && allUIDs(string(b), uid)
}

// allUIDs reads the line Uid: real, effective, saved and file system's.
func allUIDs(status string, uid uint32) bool {
	for line := range strings.Lines(status) {
		rest, ok := strings.CutPrefix(line, "Uid:")
		if !ok {
			continue
		}
		f := strings.Fields(rest)
		for _, id := range f {
			if n, err := strconv.ParseUint(id, 10, 32); err != nil || uint32(n) != uid {
				return false
			}
		}
		return len(f) == 4
	}
	return false
}

// effective reads the second number of the lines Uid and Gid (proc(5)).
func effective(status string) (uid, gid uint32) {
	for line := range strings.Lines(status) {
		key, rest, _ := strings.Cut(line, ":")
		f := strings.Fields(rest)
		if key != "Uid" && key != "Gid" || len(f) < 2 {
			continue
		}
		n, err := strconv.ParseUint(f[1], 10, 32)
		if err != nil {
			continue
		}
		if key == "Uid" {
			uid = uint32(n)
		} else {
			gid = uint32(n)
		}
	}
	return uid, gid
}

// groupAndSession reads fields 5 and 6 of /proc/PID/stat, counted behind the name in parentheses.
func groupAndSession(stat string) (group, session int) {
	f := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	if len(f) < 4 {
		return 0, 0
	}
	group, _ = strconv.Atoi(f[2])
	session, _ = strconv.Atoi(f[3])
	return group, session
}
