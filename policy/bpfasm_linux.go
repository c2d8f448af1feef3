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

// orBits ors constant bits into the stack.
func (a *assembler) orBits(dst int, bits []uint64) {
	for i, w := range bits {
		if w == 0 {
			continue
		}
		a.emit(
			asm.LoadMem(asm.R2, asm.RFP, int16(dst+8*i), asm.DWord),
			asm.LoadImm(asm.R1, int64(w), asm.DWord),
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

// text compares the NUL-terminated name at name of the stack (length with the NUL in R9, its address in the kernel in R8) with
// prefix*suffix, and jumps to miss when it does not match. scratch has room for the suffix, 8 bytes at a time.
func (a *assembler) text(name int, prefix, suffix, miss string, scratch int) {
	if n := len(prefix) + len(suffix); n > 0 {
		a.emit(asm.JLT.Imm(asm.R9, int32(n+1), miss))
	}
	for i := range len(prefix) {
		a.emit(asm.LoadMem(asm.R1, asm.RFP, int16(name+i), asm.Byte), asm.JNE.Imm(asm.R1, int32(prefix[i]), miss))
	}
	for i := 0; i < len(suffix); i += 8 {
		part := suffix[i:min(i+8, len(suffix))]
		// R3 = R8 + (R9 - 1) - (len(suffix) - i)
		a.emit(
			asm.Mov.Reg(asm.R3, asm.R8), asm.Add.Reg(asm.R3, asm.R9), asm.Sub.Imm(asm.R3, int32(1+len(suffix)-i)),
			clear8(int16(scratch)),
			asm.Mov.Reg(asm.R1, asm.RFP), asm.Add.Imm(asm.R1, int32(scratch)),
			asm.Mov.Imm(asm.R2, int32(len(part))),
			asm.FnProbeReadKernel.Call())
		for k := range len(part) {
			a.emit(asm.LoadMem(asm.R1, asm.RFP, int16(scratch+k), asm.Byte), asm.JNE.Imm(asm.R1, int32(part[k]), miss))
		}
	}
}
