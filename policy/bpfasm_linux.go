// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"fmt"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
)

// assembler collects instructions. R6 holds the program's context throughout.
type assembler struct {
	ins   asm.Instructions
	label string // of the next instruction
	n     int
	off   offsets
}

func (a *assembler) emit(list ...asm.Instruction) {
	for _, i := range list {
		if a.label != "" {
			i, a.label = i.WithSymbol(a.label), ""
		}
		a.ins = append(a.ins, i)
	}
}

// fresh returns a label that is used nowhere else.
func (a *assembler) fresh(name string) string {
	a.n++
	return fmt.Sprintf("%s_%d", name, a.n)
}

// at puts a label before what follows. Two labels at one place are joined by an instruction that does nothing.
func (a *assembler) at(label string) {
	if a.label != "" {
		a.emit(asm.Mov.Reg(asm.R0, asm.R0))
	}
	a.label = label
}

// clear8 clears 8 bytes of the stack at off. asm.StoreImm has no such size, the kernel has.
func clear8(off int16) asm.Instruction {
	return asm.Instruction{OpCode: asm.StoreImmOp(asm.DWord), Dst: asm.RFP, Offset: off}
}

// zero clears size bytes of the stack, a multiple of 8, from off up.
func (a *assembler) zero(off, size int) {
	for i := 0; i < size; i += 8 {
		a.emit(clear8(int16(off + i)))
	}
}

// read copies size bytes from address src + off of the kernel to the stack at dst. A bad address reads as zeros.
func (a *assembler) read(dst, size int, src asm.Register, off int32) {
	a.emit(
		asm.Mov.Reg(asm.R3, src), asm.Add.Imm(asm.R3, off),
		asm.Mov.Reg(asm.R1, asm.RFP), asm.Add.Imm(asm.R1, int32(dst)),
		asm.Mov.Imm(asm.R2, int32(size)),
		asm.FnProbeReadKernel.Call())
}

// follow loads the pointer at member of the structure that src points to into reg, by way of the stack at scratch.
func (a *assembler) follow(reg, src asm.Register, member string, scratch int) {
	a.read(scratch, 8, src, a.off[member])
	a.emit(asm.LoadMem(reg, asm.RFP, int16(scratch), asm.DWord))
}

// lookup calls map_lookup_elem with the key at key of the stack; R0 is the value or 0.
func (a *assembler) lookup(m *ebpf.Map, key int) {
	a.emit(
		asm.LoadMapPtr(asm.R1, m.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, int32(key)),
		asm.FnMapLookupElem.Call())
}

func (a *assembler) update(m *ebpf.Map, key, value int) {
	a.emit(
		asm.LoadMapPtr(asm.R1, m.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, int32(key)),
		asm.Mov.Reg(asm.R3, asm.RFP), asm.Add.Imm(asm.R3, int32(value)),
		asm.Mov.Imm(asm.R4, 0),
		asm.FnMapUpdateElem.Call())
}

func (a *assembler) remove(m *ebpf.Map, key int) {
	a.emit(
		asm.LoadMapPtr(asm.R1, m.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, int32(key)),
		asm.FnMapDeleteElem.Call())
}

// orValue ors n words of the map value in R0 (at off in it) into the stack at dst, unless R0 is 0. It spoils R1 and R2.
func (a *assembler) orValue(dst, off, n int) {
	skip := a.fresh("none")
	a.emit(asm.JEq.Imm(asm.R0, 0, skip))
	a.orFrom(asm.R0, dst, off, n)
	a.at(skip)
}

func (a *assembler) orFrom(src asm.Register, dst, off, n int) {
	for i := range n {
		a.emit(
			asm.LoadMem(asm.R1, src, int16(off+8*i), asm.DWord),
			asm.LoadMem(asm.R2, asm.RFP, int16(dst+8*i), asm.DWord),
			asm.Or.Reg(asm.R2, asm.R1),
			asm.StoreMem(asm.RFP, int16(dst+8*i), asm.R2, asm.DWord))
	}
}

// storeBits writes constant words to the stack.
func (a *assembler) storeBits(dst int, bits []uint64) {
	for i, w := range bits {
		a.emit(asm.LoadImm(asm.R1, int64(w), asm.DWord), asm.StoreMem(asm.RFP, int16(dst+8*i), asm.R1, asm.DWord))
	}
}

// andBits keeps only the constant bits of words of the stack.
func (a *assembler) andBits(dst int, bits []uint64) {
	for i, w := range bits {
		a.emit(
			asm.LoadMem(asm.R2, asm.RFP, int16(dst+8*i), asm.DWord),
			asm.LoadImm(asm.R1, int64(w), asm.DWord),
			asm.And.Reg(asm.R2, asm.R1),
			asm.StoreMem(asm.RFP, int16(dst+8*i), asm.R2, asm.DWord))
	}
}

// unlessEmpty goes on, or to label when the n words of the stack at value have no bits. It spoils R1 and R2.
func (a *assembler) unlessEmpty(value, n int, label string) {
	a.emit(asm.Mov.Imm(asm.R1, 0))
	for i := range n {
		a.emit(asm.LoadMem(asm.R2, asm.RFP, int16(value+8*i), asm.DWord), asm.Or.Reg(asm.R1, asm.R2))
	}
	a.emit(asm.JEq.Imm(asm.R1, 0, label))
}

// returns ends the program with a value, under a label. One that nothing jumps to, after another end, is left out: the kernel takes no
// instruction that cannot be reached.
func (a *assembler) returns(label string, value int32) {
	if n := len(a.ins); n > 0 && a.ins[n-1].OpCode == asm.Return().OpCode && !slices.ContainsFunc(a.ins, func(i asm.Instruction) bool { return i.Reference() == label }) {
		return
	}
	a.at(label)
	a.emit(asm.Mov.Imm(asm.R0, value), asm.Return())
}

// glob runs the automaton of pattern n over the NUL-terminated name at name of the stack. It ors the pattern's words into the stack at value, or
// jumps to miss when it does not match. It spoils R0 to R5 and R9. All comes from the map, constants too: of what the verifier knows it would
// look at each value on its own.
func (a *assembler) glob(m *bpfMaps, n, words, name, value int, miss string) {
	step, end := a.fresh("step"), a.fresh("end")
	a.emit(
		asm.LoadMapValue(asm.R5, m.globs.FD(), uint32(n*sizeofGlob(words))),
		asm.LoadMem(asm.R0, asm.R5, 256*8, asm.DWord),   // stay
		asm.LoadMem(asm.R1, asm.R5, 256*8+8, asm.DWord), // the state: 1
		asm.Mov.Reg(asm.R4, asm.RFP), asm.Add.Imm(asm.R4, int32(name)),
		asm.Mov.Imm(asm.R9, 0))
	a.at(step)
	a.emit(
		asm.LoadMem(asm.R2, asm.R4, 0, asm.Byte),
		asm.JEq.Imm(asm.R2, 0, end),
		asm.LSh.Imm(asm.R2, 3),
		asm.Mov.Reg(asm.R3, asm.R5),
		asm.Add.Reg(asm.R3, asm.R2),
		asm.LoadMem(asm.R3, asm.R3, 0, asm.DWord),
		asm.And.Reg(asm.R3, asm.R1),
		asm.LSh.Imm(asm.R3, 1),
		asm.And.Reg(asm.R1, asm.R0),
		asm.Or.Reg(asm.R1, asm.R3),
		asm.Add.Imm(asm.R4, 1),
		asm.Add.Imm(asm.R9, 1),
		asm.JLT.Imm(asm.R9, maxName-1, step))
	a.at(end)
	a.emit(asm.LoadMem(asm.R2, asm.R5, 256*8+16, asm.DWord), asm.And.Reg(asm.R1, asm.R2), asm.JEq.Imm(asm.R1, 0, miss))
	a.orFrom(asm.R5, value, 256*8+24, words)
}

// blank clears n words of the stack so that the verifier does not know what they are. It would otherwise look at all that follows once for each
// combination of bits that may have been set by then.
func (a *assembler) blank(off, n int) {
	a.emit(asm.FnKtimeGetNs.Call(), asm.Mov.Reg(asm.R1, asm.R0), asm.Sub.Reg(asm.R0, asm.R1))
	for i := range n {
		a.emit(asm.StoreMem(asm.RFP, int16(off+8*i), asm.R0, asm.DWord))
	}
}
