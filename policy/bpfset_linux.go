// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

// Bounds of the maps. None forgets by itself: who does not fit is blocked.
const (
	defaultTasks = 32768 // selected processes
	maxCgroups   = 16384 // selected cgroups, with those below
	maxFiles     = 16384 // executables
	maxIDs       = 65536 // users, groups, sessions
	maxRuns      = 4096  // cgroups of other instances. This one does forget: the next socket made there fills it again
)

// fileID is a file or directory as the kernel itself numbers it: what stat shows differs on some file systems.
type fileID struct{ Dev, Inode uint64 }

// bpfMaps are the maps of one set of programs. A value is a bit set of selectors, but for tasks, state and owners.
type bpfMaps struct {
	tasks, uids, gids, cgroups, paths, units, files, names, sessions, groups, state, owners, flows *ebpf.Map
	runs                                                                                           *ebpf.Map // cgroup → mark, see foreign
	globs                                                                                          *ebpf.Map // nil without patterns
}

func (m *bpfMaps) each() []**ebpf.Map {
	return []**ebpf.Map{
		&m.tasks, &m.uids, &m.gids, &m.cgroups, &m.paths, &m.units, &m.files, &m.names, &m.sessions, &m.groups, &m.state, &m.owners, &m.flows, &m.runs, &m.globs,
	}
}

func (m *bpfMaps) Close() error {
	for _, p := range m.each() {
		if *p != nil {
			closeQuietly(*p)
		}
	}
	return nil
}

// newMaps makes the maps for selectors of n words. Those of owners and of runs are taken over from a set before, if it has them: what is in them
// stays true, and those of owners are the largest.
func newMaps(n, tasks int, owners bool, prev *bpfMaps) (_ *bpfMaps, err error) {
	m := &bpfMaps{}
	defer func() {
		if err != nil {
			closeQuietly(m)
		}
	}()
	if tasks <= 0 {
		tasks = defaultTasks
	}
	ownerCount, flowCount := uint32(1), uint32(1)
	if owners {
		ownerCount, flowCount = maxOwners, maxFlowOwners
	}
	if owners && prev != nil && prev.owners.MaxEntries() == ownerCount {
		if m.owners, err = prev.owners.Clone(); err != nil {
			return nil, fmt.Errorf("bpf map owners: %w", err)
		}
		if m.flows, err = prev.flows.Clone(); err != nil {
			return nil, fmt.Errorf("bpf map flows: %w", err)
		}
	}
	if prev != nil {
		if m.runs, err = prev.runs.Clone(); err != nil {
			return nil, fmt.Errorf("bpf map runs: %w", err)
		}
	}
	bits := uint32(8 * n)
	for _, x := range []struct {
		m          **ebpf.Map
		name       string
		typ        ebpf.MapType
		key, value uint32
		entries    uint32
		flags      uint32
	}{
		{&m.tasks, "tasks", ebpf.Hash, 4, 8 + 2*bits, uint32(tasks), unix.BPF_F_NO_PREALLOC},
		{&m.uids, "uids", ebpf.Hash, 4, bits, maxIDs, unix.BPF_F_NO_PREALLOC},
		{&m.gids, "gids", ebpf.Hash, 4, bits, maxIDs, unix.BPF_F_NO_PREALLOC},
		{&m.cgroups, "cgroups", ebpf.Hash, 8, bits, maxCgroups, unix.BPF_F_NO_PREALLOC},
		{&m.paths, "paths", ebpf.Hash, maxCgroupPath, bits, maxCgroups, unix.BPF_F_NO_PREALLOC},
		{&m.units, "units", ebpf.Hash, maxName, bits, maxCgroups, unix.BPF_F_NO_PREALLOC},
		{&m.files, "files", ebpf.Hash, 16, bits, maxFiles, unix.BPF_F_NO_PREALLOC},
		{&m.names, "names", ebpf.Hash, 16 + maxName, bits, maxFiles, unix.BPF_F_NO_PREALLOC},
		{&m.sessions, "sessions", ebpf.Hash, 4, bits, maxIDs, unix.BPF_F_NO_PREALLOC},
		{&m.groups, "groups", ebpf.Hash, 4, bits, maxIDs, unix.BPF_F_NO_PREALLOC},
		{&m.state, "state", ebpf.Array, 4, stateSize, 1, unix.BPF_F_MMAPABLE},
		{&m.owners, "owners", ebpf.LRUHash, 8, sizeofOwner, ownerCount, 0},
		{&m.flows, "flows", ebpf.LRUHash, sizeofFlowKey, sizeofFlow, flowCount, 0},
		{&m.runs, "runs", ebpf.LRUHash, 8, 4, maxRuns, 0},
	} {
		if *x.m != nil {
			continue
		}
		*x.m, err = ebpf.NewMap(&ebpf.MapSpec{
			Name: "mprox_" + x.name, Type: x.typ, KeySize: x.key, ValueSize: x.value, MaxEntries: x.entries, Flags: x.flags,
		})
		if err != nil {
			return nil, fmt.Errorf("bpf map %s: %w", x.name, err)
		}
	}
	return m, nil
}

// sizeofGlob is what a program reads of a pattern: a word for each byte, the bits that stay, the state at the beginning, the end, and the
// selectors.
func sizeofGlob(words int) int { return (256 + 3 + words) * 8 }

// writeGlobs makes the map of the patterns, those of units first.
func (m *bpfMaps) writeGlobs(b *selectionBits) (err error) {
	var value []byte
	for _, g := range slices.Concat(b.unitGlobs, b.exeGlobs) {
		value = append(append(value, bytesOf(g.glob.next[:])...), bytesOf(append([]uint64{g.glob.stay, 1, g.glob.end}, g.bits...))...)
	}
	if len(value) == 0 {
		return nil
	}
	m.globs, err = ebpf.NewMap(&ebpf.MapSpec{Name: "mprox_globs", Type: ebpf.Array, KeySize: 4, ValueSize: uint32(len(value)), MaxEntries: 1})
	if err == nil {
		err = m.globs.Update(uint32(0), value, ebpf.UpdateAny)
	}
	if err != nil {
		return fmt.Errorf("bpf map globs: %w", err)
	}
	return nil
}

// identifier asks the kernel itself how it numbers a file: it runs a program in the calling thread.
type identifier struct {
	prog *ebpf.Program
	out  *ebpf.Map
}

// seenSelf is what the identifier says about this process.
type seenSelf struct {
	file, exe fileID
	tgid      uint32
	euid      uint32
}

const sizeofSelf = 40 // file and exe, device and inode each; tgid, euid

func newIdentifier(off offsets) (_ *identifier, err error) {
	i := &identifier{}
	i.out, err = ebpf.NewMap(&ebpf.MapSpec{Name: "mprox_ident", Type: ebpf.Array, KeySize: 4, ValueSize: sizeofSelf, MaxEntries: 1})
	if err != nil {
		return nil, fmt.Errorf("bpf map: %w", err)
	}
	const value = stTmp2 - sizeofSelf
	a := &assembler{off: off}
	a.emit(asm.Mov.Reg(asm.R6, asm.R1))
	a.zero(value, sizeofSelf)
	a.zero(stKey, 8)
	a.emit(asm.FnGetCurrentTask.Call(), asm.Mov.Reg(asm.R7, asm.R0), asm.FnGetCurrentPidTgid.Call(), asm.RSh.Imm(asm.R0, 32),
		asm.StoreMem(asm.RFP, value+32, asm.R0, asm.Word))
	a.follow(asm.R8, asm.R7, "task_struct.cred", stTmp)
	a.read(value+36, 4, asm.R8, off["cred.euid"])
	a.follow(asm.R8, asm.R7, "task_struct.mm", stTmp)
	a.follow(asm.R8, asm.R8, "mm_struct.exe_file", stTmp)
	a.follow(asm.R8, asm.R8, "file.f_inode", stTmp)
	a.identity(asm.R8, value+16)
	a.follow(asm.R8, asm.R7, "task_struct.files", stTmp)
	a.follow(asm.R8, asm.R8, "files_struct.fdt", stTmp)
	a.follow(asm.R8, asm.R8, "fdtable.fd", stTmp)
	a.argument(asm.R9, 0)
	a.emit(asm.LSh.Imm(asm.R9, 3), asm.Add.Reg(asm.R8, asm.R9))
	a.read(stTmp, 8, asm.R8, 0)
	a.emit(asm.LoadMem(asm.R8, asm.RFP, stTmp, asm.DWord))
	a.follow(asm.R8, asm.R8, "file.f_inode", stTmp)
	a.identity(asm.R8, value)
	a.update(i.out, stKey, value)
	a.returns("allow", 0)
	i.prog, err = ebpf.NewProgram(&ebpf.ProgramSpec{Name: "mprox_ident", Type: ebpf.RawTracepoint, Instructions: a.ins, License: "GPL"})
	if err != nil {
		closeQuietly(i.out)
		return nil, fmt.Errorf("bpf program ident: %w", err)
	}
	return i, nil
}

func (i *identifier) Close() error { return errors.Join(i.prog.Close(), i.out.Close()) }

func (i *identifier) look(fd int) (seenSelf, error) {
	var ctx [8]byte
	binary.NativeEndian.PutUint64(ctx[:], uint64(fd))
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if _, err := i.prog.Run(&ebpf.RunOptions{Context: ctx[:]}); err != nil {
		return seenSelf{}, fmt.Errorf("run bpf program: %w", err)
	}
	b, err := i.out.LookupBytes(uint32(0))
	if err != nil || len(b) < sizeofSelf {
		return seenSelf{}, errors.Join(err, errors.New("bpf program ident says nothing"))
	}
	le := binary.NativeEndian
	return seenSelf{
		file: fileID{le.Uint64(b), le.Uint64(b[8:])}, exe: fileID{le.Uint64(b[16:]), le.Uint64(b[24:])},
		tgid: le.Uint32(b[32:]), euid: le.Uint32(b[36:]),
	}, nil
}

// file numbers the file, or directory, at a path.
func (i *identifier) file(path string) (fileID, error) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return fileID{}, fmt.Errorf("%s: %w", path, err)
	}
	defer closeFD(fd)
	s, err := i.look(fd)
	if err != nil {
		return fileID{}, err
	}
	if s.file.Inode == 0 {
		return fileID{}, fmt.Errorf("%s: the kernel shows no inode", path)
	}
	return s.file, nil
}

// check compares what a program reads with what this process knows of itself: offsets that are wrong are found out before anything is decided by them.
func (i *identifier) check() error {
	fd, err := unix.Open("/proc/self/exe", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer closeFD(fd)
	s, err := i.look(fd)
	switch {
	case err != nil:
		return err
	case s.tgid != uint32(os.Getpid()):
		return fmt.Errorf("%w: this is not the first PID namespace", ErrFeature)
	case s.file != s.exe || s.file.Inode == 0 || s.euid != uint32(os.Geteuid()):
		return fmt.Errorf("%w: the kernel's structures are not as its BTF says", ErrFeature)
	}
	return nil
}
