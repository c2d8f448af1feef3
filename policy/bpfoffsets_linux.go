// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf/btf"
)

// maxOffset bounds what an offset may be: no structure of the kernel that is read here is larger. A damaged cache cannot make a program read
// far away.
const maxOffset = 1 << 16

// maxOffsetsFile bounds the cache that is read.
const maxOffsetsFile = 1 << 14

// offsets is where the kernel that runs keeps what the programs read, by "struct.member", in bytes. They differ from build to build.
type offsets map[string]int32

// offsetsWanted are the members that the programs read; "a|b" is the first of them that is there.
func offsetsWanted() map[string][]string {
	return map[string][]string{
		"task_struct":         {"tgid", "mm", "cred", "files", "signal", "group_leader", "start_boottime|real_start_time"},
		"cred":                {"euid", "egid"},
		"signal_struct":       {"live", "pids"},
		"pid":                 {"numbers"},
		"upid":                {"nr"},
		"mm_struct":           {"exe_file"},
		"files_struct":        {"fdt"},
		"fdtable":             {"fd"},
		"file":                {"f_inode", "f_path"},
		"path":                {"dentry"},
		"inode":               {"i_ino", "i_sb"},
		"super_block":         {"s_dev"},
		"dentry":              {"d_parent", "d_name", "d_inode"},
		"qstr":                {"name"},
		"cgroup":              {"self", "kn", "root"},
		"cgroup_subsys_state": {"parent"},
		"cgroup_root":         {"hierarchy_id"},
		"kernfs_node":         {"id", "name"},
	}
}

// wantedNames lists the keys that a complete set has.
func wantedNames() []string {
	var out []string
	for typ, members := range offsetsWanted() {
		for _, m := range members {
			name, _, _ := strings.Cut(m, "|")
			out = append(out, typ+"."+name)
		}
	}
	slices.Sort(out)
	return out
}

// valid reports whether nothing is missing and nothing is absurd.
func (o offsets) valid() bool {
	for _, name := range wantedNames() {
		if off, ok := o[name]; !ok || off < 0 || off > maxOffset {
			return false
		}
	}
	return true
}

// loadOffsets returns the offsets of the running kernel: from the cache in dir if it is of this very build, else from the kernel's BTF, which
// takes a few tens of milliseconds and some memory, so the cache is written for the next start.
func loadOffsets(dir string) (offsets, error) {
	id, err := kernelBuild()
	if err != nil {
		return nil, err
	}
	file := filepath.Join(dir, "kernel-"+id+".json")
	if o, err := readOffsets(file); err == nil {
		return o, nil
	}
	o, err := resolveOffsets()
	if err != nil {
		return nil, err
	}
	if b, err := json.Marshal(o); err == nil {
		// Only a start that is slower comes from not writing it.
		_ = writeFile(file, b)
	}
	return o, nil
}

func readOffsets(file string) (offsets, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxOffsetsFile))
	if err != nil {
		return nil, err
	}
	return parseOffsets(b)
}

func parseOffsets(b []byte) (offsets, error) {
	var o offsets
	if err := json.Unmarshal(b, &o); err != nil {
		return nil, err
	}
	if !o.valid() {
		return nil, errors.New("offsets are incomplete")
	}
	return o, nil
}

// writeFile replaces a file of root's in one step.
func writeFile(file string, b []byte) error {
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(file), filepath.Base(file)+".*")
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), file)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}

// kernelBuild names the running kernel's build: a hash of its ELF notes, which hold the build id, and of its version.
func kernelBuild() (string, error) {
	notes, err := os.ReadFile("/sys/kernel/notes")
	if err != nil {
		return "", fmt.Errorf("kernel build id: %w", err)
	}
	version, err := os.ReadFile("/proc/version")
	if err != nil {
		return "", fmt.Errorf("kernel version: %w", err)
	}
	sum := sha256.Sum256(bytes.Join([][]byte{notes, version}, []byte{0}))
	return hex.EncodeToString(sum[:10]), nil
}

// resolveOffsets reads the kernel's own description of its types.
func resolveOffsets() (offsets, error) {
	spec, err := btf.LoadSpec("/sys/kernel/btf/vmlinux") // not LoadKernelSpec, which keeps the megabytes that are needed once
	if err != nil {
		return nil, fmt.Errorf("kernel types (CONFIG_DEBUG_INFO_BTF): %w", err)
	}
	out := offsets{}
	for typ, members := range offsetsWanted() {
		var s *btf.Struct
		if err := spec.TypeByName(typ, &s); err != nil {
			return nil, fmt.Errorf("kernel type %s: %w", typ, err)
		}
		for _, m := range members {
			alternatives := strings.Split(m, "|")
			found := false
			for _, name := range alternatives {
				if off, ok := memberOffset(s.Members, name, 0); ok {
					out[typ+"."+alternatives[0]], found = off, true
					break
				}
			}
			if !found {
				return nil, fmt.Errorf("kernel type %s has no member %s", typ, m)
			}
		}
	}
	if !out.valid() {
		return nil, errors.New("kernel types: offsets out of bounds")
	}
	return out, nil
}

// memberOffset looks for a member, also inside anonymous structures and unions.
func memberOffset(members []btf.Member, name string, base uint32) (int32, bool) {
	for _, m := range members {
		at := base + m.Offset.Bytes()
		if m.Name == name {
			return int32(at), true
		}
		if m.Name != "" {
			continue
		}
		var inner []btf.Member
		switch t := btf.UnderlyingType(m.Type).(type) {
		case *btf.Struct:
			inner = t.Members
		case *btf.Union:
			inner = t.Members
		}
		if off, ok := memberOffset(inner, name, at); ok {
			return off, true
		}
	}
	return 0, false
}
