// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import "github.com/cilium/ebpf/asm"

// An `mprox run` that is its own engine marks the sockets of its cgroup by a program on that (sockMarkProgram), and whom the selectors here match,
// too, is that instance's. The mark alone does not tell: whoever has CAP_NET_ADMIN or CAP_NET_RAW can set any mark, and one that no instance has a
// rule for would leave by the machine's own routes.
//
//	socket()   programs of cgroups further down run first, and nobody has had the socket yet: a mark of a context is theirs ─▶ runs[cgroup] = mark
//	connect()  mark = runs[cgroup] ─▶ stays; any other ─▶ as if it had none

// learnRun writes down that the current cgroup's sockets are another instance's, when a new one has the mark of a context.
func (b *selectionBits) learnRun(a *assembler, m *bpfMaps) {
	none := a.fresh("none")
	a.emit(
		asm.LoadMem(asm.R2, asm.R6, bpfSockMark, asm.Word),
		asm.LoadImm(asm.R3, int64(b.mask), asm.DWord),
		asm.And.Reg(asm.R2, asm.R3),
		asm.JEq.Imm(asm.R2, 0, none)) // nearly all
	b.unlessContext(a, none)
	a.emit(
		asm.StoreMem(asm.RFP, stTmp2, asm.R2, asm.Word),
		asm.FnGetCurrentCgroupId.Call(),
		asm.StoreMem(asm.RFP, stTmp, asm.R0, asm.DWord))
	a.update(m.runs, stTmp, stTmp2)
	a.at(none)
}

// foreign goes to owner when the mark in R2 is the one that another instance gives to sockets of the current cgroup, and else to set. A process
// that has left that cgroup is no longer of that instance, whatever sockets it has taken along.
func (b *selectionBits) foreign(a *assembler, m *bpfMaps) {
	a.emit(
		asm.StoreMem(asm.RFP, stTmp2, asm.R2, asm.Word),
		asm.FnGetCurrentCgroupId.Call(),
		asm.StoreMem(asm.RFP, stTmp, asm.R0, asm.DWord))
	a.lookup(m.runs, stTmp)
	a.emit(
		asm.JEq.Imm(asm.R0, 0, "set"),
		asm.LoadMem(asm.R1, asm.R0, 0, asm.Word),
		asm.LoadMem(asm.R2, asm.RFP, stTmp2, asm.Word),
		asm.JEq.Reg(asm.R1, asm.R2, "owner"))
}

// unlessContext goes to label unless the mark in R2 is one of a context.
func (b *selectionBits) unlessContext(a *assembler, label string) {
	low := uint64(b.mask & -b.mask)
	a.emit(
		asm.LoadImm(asm.R3, int64(low*markFirst), asm.DWord), asm.JLT.Reg(asm.R2, asm.R3, label),
		asm.LoadImm(asm.R3, int64(low*(markFirst+MaxContexts)), asm.DWord), asm.JGE.Reg(asm.R2, asm.R3, label))
}
