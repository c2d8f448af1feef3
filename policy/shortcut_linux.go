// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// Where the members of struct bpf_sock_ops and of struct bpf_sock are, and their values (include/uapi/linux/bpf.h).
const (
	sockOpsOp      = 0      // op
	sockOpsNew     = 8      // args[1]: the new state
	sockOpsFlags   = 84     // bpf_sock_ops_cb_flags
	sockOpsSock    = 184    // sk
	sockOpsActive  = 4      // BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB
	sockOpsState   = 10     // BPF_SOCK_OPS_STATE_CB
	sockOpsStateCB = 1 << 2 // BPF_SOCK_OPS_STATE_CB_FLAG
	tcpClose       = 7      // BPF_TCP_CLOSE
)

// The option of a SYN-ACK by which the program knows an adopted flow: experimental (RFC 6994), of which the kernel takes no notice, and nothing
// but random bytes, which nobody learns whom the SYN-ACK is not for. The kernel searches for the first four of them.
const (
	shortcutKind   = 253
	shortcutMagic  = 4
	sizeofShortcut = 16
)

// maxShortcuts bounds the sockets that are marked at a time. Those beyond go the long way.
const maxShortcuts = 65536

// Shortcut is the short way of what applications send into adopted flows (accel.go): once the SYN-ACK is there, the application's socket itself
// bears the mark of adopted flows, until it is closed. Its route is looked up once, not for each packet, and is that of lo, whose segments
// are large. Nothing depends on it: without it each packet is led to the same place by the connection's mark.
//
// It ends with the process; nothing of it is pinned.
type Shortcut struct {
	Option []byte // of the SYN-ACKs of adopted flows, whether the program is attached or not
	mask   uint32
	link   link.Link // nil = not attached
}

// NewShortcut touches nothing.
func NewShortcut(mask uint32) *Shortcut {
	s := &Shortcut{Option: make([]byte, sizeofShortcut), mask: mask}
	_, _ = rand.Read(s.Option) // never fails
	s.Option[0], s.Option[1] = shortcutKind, sizeofShortcut
	return s
}

// Attach attaches the program to the root of all cgroups, once. ErrFeature: the kernel has no such programs, or refuses them, or cgroup v2 is not
// mounted.
func (s *Shortcut) Attach() error {
	root, err := rootCgroup()
	if err != nil {
		return err
	}
	// What sockets were marked with before, by their cookies. Storage of the socket's own would be freed by a kernel thread, after a grace period.
	before, err := ebpf.NewMap(&ebpf.MapSpec{
		Name: "mprox_marks", Type: ebpf.Hash, KeySize: 8, ValueSize: 4, MaxEntries: maxShortcuts, Flags: unix.BPF_F_NO_PREALLOC,
	})
	if err != nil {
		return fmt.Errorf("%w: bpf map of marks: %w", ErrFeature, err)
	}
	defer closeQuietly(before)
	p, err := ebpf.NewProgram(shortcutProgram(before, s.Option, s.mask))
	if err != nil {
		return fmt.Errorf("%w: bpf program shortcut: %w", ErrFeature, err)
	}
	defer closeQuietly(p)
	if s.link, err = link.AttachCgroup(link.CgroupOptions{Path: root, Program: p, Attach: ebpf.AttachCGroupSockOps}); err != nil {
		return fmt.Errorf("%w: attach bpf program shortcut: %w", ErrFeature, err)
	}
	return nil
}

// Close detaches the program. Sockets that it has marked stay so; their connections have ended with the daemon.
func (s *Shortcut) Close() error {
	if s.link == nil {
		return nil
	}
	return s.link.Close()
}

// shortcutProgram marks the socket whose SYN-ACK has the option, and gives it back its mark when it is closed: it may be connected again.
//
//	R6 context, R7 socket, then its mark
func shortcutProgram(before *ebpf.Map, option []byte, mask uint32) *ebpf.ProgramSpec {
	const stMark, stCookie, stOption = -8, -16, -16 - sizeofShortcut
	a := &assembler{}
	cookie := func() {
		a.emit(asm.Mov.Reg(asm.R1, asm.R6), asm.FnGetSocketCookie.Call(), asm.StoreMem(asm.RFP, stCookie, asm.R0, asm.DWord))
	}
	mark := func() {
		a.emit(
			asm.Mov.Reg(asm.R1, asm.R6), asm.Mov.Imm(asm.R2, unix.SOL_SOCKET), asm.Mov.Imm(asm.R3, unix.SO_MARK),
			asm.Mov.Reg(asm.R4, asm.RFP), asm.Add.Imm(asm.R4, stMark), asm.Mov.Imm(asm.R5, 4),
			asm.FnSetsockopt.Call())
	}
	a.emit(
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.LoadMem(asm.R1, asm.R6, sockOpsOp, asm.Word),
		asm.JEq.Imm(asm.R1, sockOpsState, "state"),
		asm.JNE.Imm(asm.R1, sockOpsActive, "out"))

	words := func(b []byte) []uint64 {
		return []uint64{binary.NativeEndian.Uint64(b), binary.NativeEndian.Uint64(b[8:])}
	}
	var search [sizeofShortcut]byte
	search[0], search[1] = shortcutKind, 2+shortcutMagic
	copy(search[2:2+shortcutMagic], option[2:])
	a.storeBits(stOption, words(search[:]))
	a.emit(
		asm.Mov.Reg(asm.R1, asm.R6), asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, stOption),
		asm.Mov.Imm(asm.R3, sizeofShortcut), asm.Mov.Imm(asm.R4, 0),
		asm.FnLoadHdrOpt.Call(),
		asm.JNE.Imm(asm.R0, sizeofShortcut, "out"))
	for i, w := range words(option) {
		a.emit(
			asm.LoadMem(asm.R1, asm.RFP, int16(stOption+8*i), asm.DWord),
			asm.LoadImm(asm.R2, int64(w), asm.DWord),
			asm.JNE.Reg(asm.R1, asm.R2, "out"))
	}
	cookie()
	a.emit(
		asm.LoadMem(asm.R7, asm.R6, sockOpsSock, asm.DWord),
		asm.JEq.Imm(asm.R7, 0, "out"),
		asm.LoadMem(asm.R7, asm.R7, bpfSockMark, asm.Word),
		asm.StoreMem(asm.RFP, stMark, asm.R7, asm.Word))
	a.update(before, stCookie, stMark)
	a.emit(
		asm.JNE.Imm(asm.R0, 0, "out"),
		asm.And.Imm32(asm.R7, int32(^mask)),
		asm.Or.Imm32(asm.R7, int32(AccelMark(mask))),
		asm.StoreMem(asm.RFP, stMark, asm.R7, asm.Word))
	mark()
	a.emit(
		asm.Mov.Reg(asm.R1, asm.R6), asm.LoadMem(asm.R2, asm.R6, sockOpsFlags, asm.Word), asm.Or.Imm(asm.R2, sockOpsStateCB),
		asm.FnSockOpsCbFlagsSet.Call(),
		asm.Ja.Label("out"))

	a.at("state")
	a.emit(asm.LoadMem(asm.R1, asm.R6, sockOpsNew, asm.Word), asm.JNE.Imm(asm.R1, tcpClose, "out"))
	cookie()
	a.lookup(before, stCookie)
	a.emit(asm.JEq.Imm(asm.R0, 0, "out"), asm.LoadMem(asm.R1, asm.R0, 0, asm.Word), asm.StoreMem(asm.RFP, stMark, asm.R1, asm.Word))
	mark()
	a.remove(before, stCookie)
	a.returns("out", 1)
	return &ebpf.ProgramSpec{Name: "mprox_shortcut", Type: ebpf.SockOps, AttachType: ebpf.AttachCGroupSockOps, Instructions: a.ins, License: "GPL"}
}
