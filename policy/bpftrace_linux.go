// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
)

// maxName bounds the names of files and cgroups that programs compare, with the NUL: beside the words of all selectors no more fits on the stack of
// one. A longer one is found by user space alone.
const maxName = 96

// maxCgroupPath bounds the paths of cgroups that programs compare, with the NUL.
const maxCgroupPath = 128

// traceKind is one raw tracepoint.
type traceKind struct {
	name    string // of the tracepoint
	program func(b *selectionBits, a *assembler, m *bpfMaps)
}

// traces are the tracepoints that a selection needs.
func (b *selectionBits) traces() []traceKind {
	var out []traceKind
	if b.pid.used || b.exe.used {
		out = append(out, traceKind{"sched_process_fork", (*selectionBits).fork})
	}
	if b.exe.used {
		out = append(out, traceKind{"sched_process_exec", (*selectionBits).exec})
	}
	if b.cgroup.used {
		out = append(out, traceKind{"cgroup_mkdir", (*selectionBits).mkdir}, traceKind{"cgroup_rmdir", (*selectionBits).rmdir})
	}
	return append(out, traceKind{"sched_process_exit", (*selectionBits).exit}) // also of the daemon itself
}

func (b *selectionBits) trace(k traceKind, m *bpfMaps, off offsets) *ebpf.ProgramSpec {
	a := &assembler{off: off}
	a.emit(asm.Mov.Reg(asm.R6, asm.R1))
	k.program(b, a, m)
	a.returns("allow", 0)
	return &ebpf.ProgramSpec{Name: "mprox_" + k.name[max(0, len(k.name)-9):], Type: ebpf.RawTracepoint, Instructions: a.ins, License: "GPL"}
}

// argument loads argument n of the tracepoint.
func (a *assembler) argument(reg asm.Register, n int16) {
	a.emit(asm.LoadMem(reg, asm.R6, 8*n, asm.DWord))
}

// fork copies what is selected by its ancestors from a process to a new one, before that runs. The entry of an earlier process with the same
// PID goes, whatever it was.
func (b *selectionBits) fork(a *assembler, m *bpfMaps) {
	value := stTmp2 - 8 - 16*b.n
	a.argument(asm.R7, 0)
	a.argument(asm.R8, 1)
	a.zero(stKey, 8)
	a.zero(stTmp, 8)
	a.read(stKey, 4, asm.R7, a.off["task_struct.tgid"])
	a.read(stTmp, 4, asm.R8, a.off["task_struct.tgid"])
	a.emit(
		asm.LoadMem(asm.R1, asm.RFP, stKey, asm.Word),
		asm.LoadMem(asm.R2, asm.RFP, stTmp, asm.Word),
		asm.JEq.Reg(asm.R1, asm.R2, "allow")) // a thread
	a.lookup(m.tasks, stKey)
	a.emit(
		asm.JEq.Imm(asm.R0, 0, "unknown"),
		asm.LoadMem(asm.R1, asm.R0, 0, asm.DWord),
		asm.And.Imm(asm.R1, taskDenied),
		asm.StoreMem(asm.RFP, int16(value), asm.R1, asm.DWord))
	a.zero(value+8, 16*b.n)
	a.orFrom(asm.R0, value+8, 8, 2*b.n)
	a.andBits(value+8, b.treePID)
	a.unlessEmpty(value, 1+2*b.n, "none")
	b.storeTask(a, m, stTmp, value, asm.R8)
	a.at("unknown")
	a.emit(clear8(stTmp2))
	a.lookup(m.state, stTmp2)
	a.emit(asm.JEq.Imm(asm.R0, 0, "none"), asm.Mov.Reg(asm.R9, asm.R0))
	a.unlessUnknown(asm.R7, asm.R9, stTmp2, "none")
	a.zero(value, 8+16*b.n)
	a.emit(asm.Mov.Imm(asm.R1, taskDenied), asm.StoreMem(asm.RFP, int16(value), asm.R1, asm.DWord))
	b.storeTask(a, m, stTmp, value, asm.R8)
	a.at("none")
	a.remove(m.tasks, stTmp)
}

// storeTask writes an entry; when the map is full, everybody who is as young as the task in reg, or younger, is denied from now on. The
// program ends here.
func (b *selectionBits) storeTask(a *assembler, m *bpfMaps, key, value int, reg asm.Register) {
	a.update(m.tasks, key, value)
	a.emit(asm.JEq.Imm(asm.R0, 0, "allow"))
	a.follow(asm.R1, reg, "task_struct.group_leader", stTmp2)
	a.read(stTmp2, 8, asm.R1, a.off["task_struct.start_boottime"])
	a.overflow(m, stateTasks)
}

// overflow counts, lowers the value at off of `state` to what is at stTmp2, and ends the program.
func (a *assembler) overflow(m *bpfMaps, off int16) {
	set := a.fresh("set")
	a.emit(clear8(stTmp))
	a.lookup(m.state, stTmp)
	a.emit(asm.JEq.Imm(asm.R0, 0, "allow"))
	if off == stateTasks {
		a.emit(asm.Mov.Imm(asm.R1, 0), asm.StoreMem(asm.R0, stateTasksEnd, asm.R1, asm.DWord))
	}
	a.emit(
		asm.Mov.Imm(asm.R1, 1),
		asm.AddAtomic.Mem(asm.R0, asm.R1, asm.DWord, stateOverflows),
		asm.LoadMem(asm.R2, asm.RFP, stTmp2, asm.DWord),
		asm.LoadMem(asm.R1, asm.R0, off, asm.DWord),
		asm.JEq.Imm(asm.R1, 0, set),
		asm.JLE.Reg(asm.R1, asm.R2, "allow"))
	a.at(set)
	a.emit(asm.StoreMem(asm.R0, off, asm.R2, asm.DWord), asm.Ja.Label("allow"))
}

// exit forgets a process with its last thread, not with its leader.
func (b *selectionBits) exit(a *assembler, m *bpfMaps) {
	a.argument(asm.R7, 0)
	a.follow(asm.R8, asm.R7, "task_struct.signal", stTmp)
	a.read(stTmp, 4, asm.R8, a.off["signal_struct.live"])
	a.emit(asm.LoadMem(asm.R1, asm.RFP, stTmp, asm.Word), asm.JNE.Imm(asm.R1, 0, "allow"))
	a.read(stKey, 4, asm.R7, a.off["task_struct.tgid"])
	a.remove(m.tasks, stKey)
}

// exec looks at what a process has become: by the file (device and inode) and by its directory and name.
func (b *selectionBits) exec(a *assembler, m *bpfMaps) {
	const ident, dentry = stTmp2 - 16, stTmp2 - 24 // device and inode; the dentry's address
	name := dentry - 16 - maxName                  // device and inode of the directory, then the name
	value := name - 8 - 16*b.n
	a.argument(asm.R7, 0)
	a.read(stKey, 4, asm.R7, a.off["task_struct.tgid"])
	a.zero(name, 16+maxName)
	a.blank(value, 1+2*b.n)
	a.lookup(m.tasks, stKey)
	fresh := a.fresh("new")
	a.emit(
		asm.JEq.Imm(asm.R0, 0, fresh),
		asm.LoadMem(asm.R1, asm.R0, 0, asm.DWord),
		asm.StoreMem(asm.RFP, int16(value), asm.R1, asm.DWord))
	a.orFrom(asm.R0, value+8, 8, 2*b.n)
	a.andBits(value+8+8*b.n, b.treeExe)
	a.at(fresh)
	a.follow(asm.R8, asm.R7, "task_struct.mm", stTmp)
	a.follow(asm.R8, asm.R8, "mm_struct.exe_file", stTmp)
	a.read(dentry, 8, asm.R8, a.off["file.f_path"]+a.off["path.dentry"])
	a.follow(asm.R8, asm.R8, "file.f_inode", stTmp)
	a.identity(asm.R8, ident)
	a.lookup(m.files, ident)
	a.orValue(value+8+8*b.n, 0, b.n)

	a.emit(asm.LoadMem(asm.R8, asm.RFP, int16(dentry), asm.DWord))
	a.follow(asm.R9, asm.R8, "dentry.d_parent", stTmp)
	a.follow(asm.R9, asm.R9, "dentry.d_inode", stTmp)
	a.identity(asm.R9, name)
	a.read(stTmp, 8, asm.R8, a.off["dentry.d_name"]+a.off["qstr.name"])
	a.emit(asm.LoadMem(asm.R8, asm.RFP, stTmp, asm.DWord))
	a.name(name + 16)
	a.lookup(m.names, name)
	a.orValue(value+8+8*b.n, 0, b.n)
	for i, g := range b.exeGlobs {
		miss := a.fresh("miss")
		a.emit(
			asm.LoadMem(asm.R1, asm.RFP, int16(name), asm.DWord),
			asm.LoadImm(asm.R2, int64(g.dir.Dev), asm.DWord), asm.JNE.Reg(asm.R1, asm.R2, miss),
			asm.LoadMem(asm.R1, asm.RFP, int16(name+8), asm.DWord),
			asm.LoadImm(asm.R2, int64(g.dir.Inode), asm.DWord), asm.JNE.Reg(asm.R1, asm.R2, miss))
		a.glob(m, len(b.unitGlobs)+i, b.n, name+16, value+8+8*b.n, miss)
		a.at(miss)
	}
	a.unlessEmpty(value, 1+2*b.n, "none")
	b.storeTask(a, m, stKey, value, asm.R7)
	a.at("none")
	a.remove(m.tasks, stKey)
}

// identity stores device and inode number of the inode that reg points to at dst of the stack. reg is spoilt.
func (a *assembler) identity(reg asm.Register, dst int) {
	a.emit(clear8(int16(dst)))
	a.read(dst+8, 8, reg, a.off["inode.i_ino"])
	a.follow(reg, reg, "inode.i_sb", stTmp)
	a.read(dst, 4, reg, a.off["super_block.s_dev"])
}

// name copies the name that R8 points to to the stack at dst, which is cleared; one that is too long ends as "".
func (a *assembler) name(dst int) {
	fits := a.fresh("fits")
	a.emit(
		asm.Mov.Reg(asm.R1, asm.RFP), asm.Add.Imm(asm.R1, int32(dst)),
		asm.Mov.Imm(asm.R2, maxName),
		asm.Mov.Reg(asm.R3, asm.R8),
		asm.FnProbeReadKernelStr.Call(),
		asm.JLT.Imm(asm.R0, maxName, fits),
		asm.StoreImm(asm.RFP, int16(dst), 0, asm.Byte))
	a.at(fits)
}

// mkdir selects a new cgroup by its parent, its path, or its name, before anybody is in it.
func (b *selectionBits) mkdir(a *assembler, m *bpfMaps) {
	value := stTmp2 - 8*b.n
	name := value - maxName
	path := name - maxCgroupPath
	a.unified()
	a.blank(value, b.n)
	a.zero(name, maxName)
	a.zero(path, maxCgroupPath)
	a.follow(asm.R8, asm.R7, "cgroup.kn", stTmp)
	a.read(stKey, 8, asm.R8, a.off["kernfs_node.id"])
	a.follow(asm.R8, asm.R8, "kernfs_node.name", stTmp2)
	// The parent: css.parent is the parent's self, the first member of a cgroup.
	a.read(stTmp2, 8, asm.R7, a.off["cgroup.self"]+a.off["cgroup_subsys_state.parent"])
	a.emit(asm.LoadMem(asm.R7, asm.RFP, stTmp2, asm.DWord), asm.Sub.Imm(asm.R7, a.off["cgroup.self"]))
	a.follow(asm.R7, asm.R7, "cgroup.kn", stTmp2)
	a.read(stTmp2, 8, asm.R7, a.off["kernfs_node.id"])
	a.lookup(m.cgroups, stTmp2)
	a.orValue(value, 0, b.n)
	a.argument(asm.R3, 1)
	a.emit(
		asm.Mov.Reg(asm.R1, asm.RFP), asm.Add.Imm(asm.R1, int32(path)),
		asm.Mov.Imm(asm.R2, maxCgroupPath),
		asm.FnProbeReadKernelStr.Call())
	a.lookup(m.paths, path)
	a.orValue(value, 0, b.n)
	a.name(name)
	a.lookup(m.units, name)
	a.orValue(value, 0, b.n)
	for i := range b.unitGlobs {
		miss := a.fresh("miss")
		a.glob(m, i, b.n, name, value, miss)
		a.at(miss)
	}
	a.unlessEmpty(value, b.n, "allow")
	a.update(m.cgroups, stKey, value)
	a.emit(
		asm.JEq.Imm(asm.R0, 0, "allow"),
		asm.LoadMem(asm.R1, asm.RFP, stKey, asm.DWord),
		asm.StoreMem(asm.RFP, stTmp2, asm.R1, asm.DWord))
	a.overflow(m, stateGroups)
}

// unified leaves the cgroup in R7, and ends the program for those of the old hierarchies: their ids are numbers of their own.
func (a *assembler) unified() {
	a.argument(asm.R7, 0)
	a.follow(asm.R8, asm.R7, "cgroup.root", stTmp)
	a.read(stTmp, 4, asm.R8, a.off["cgroup_root.hierarchy_id"])
	a.emit(asm.LoadMem(asm.R1, asm.RFP, stTmp, asm.Word), asm.JNE.Imm(asm.R1, 0, "allow"))
}

func (b *selectionBits) rmdir(a *assembler, m *bpfMaps) {
	a.unified()
	a.follow(asm.R8, asm.R7, "cgroup.kn", stTmp)
	a.read(stKey, 8, asm.R8, a.off["kernfs_node.id"])
	a.remove(m.cgroups, stKey)
}
