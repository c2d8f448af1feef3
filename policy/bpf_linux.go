// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// bpfSockMark is the offset of `mark` in struct bpf_sock (include/uapi/linux/bpf.h), the context of cgroup/sock_create.
const bpfSockMark = 16

// sockMarkProgram gives a new socket a mark, so that its very first route look-up, and with it the source address, is the TUN's. It leaves
// alone sockets of other network namespaces (where the kernel can tell, cookie ≠ 0), and those that a program of a cgroup further down has
// marked already: the innermost context wins.
func sockMarkProgram(value, mask uint32, cookie uint64) *ebpf.ProgramSpec {
	var ins asm.Instructions
	ins = append(ins, asm.Mov.Reg(asm.R6, asm.R1))
	if cookie != 0 {
		ins = append(ins,
			asm.FnGetNetnsCookie.Call(),
			asm.LoadImm(asm.R2, int64(cookie), asm.DWord),
			asm.JNE.Reg(asm.R0, asm.R2, "out"))
	}
	ins = append(ins,
		asm.LoadMem(asm.R2, asm.R6, bpfSockMark, asm.Word),
		asm.Mov.Reg(asm.R3, asm.R2),
		asm.LoadImm(asm.R4, int64(mask), asm.DWord),
		asm.And.Reg(asm.R3, asm.R4),
		asm.JNE.Imm(asm.R3, 0, "out"),
		asm.LoadImm(asm.R4, int64(value), asm.DWord),
		asm.Or.Reg(asm.R2, asm.R4),
		asm.StoreMem(asm.R6, bpfSockMark, asm.R2, asm.Word),
		asm.Mov.Imm(asm.R0, 1).WithSymbol("out"), // allow
		asm.Return())
	return &ebpf.ProgramSpec{
		Name: "mprox_sock_mark", Type: ebpf.CGroupSock, AttachType: ebpf.AttachCGroupInetSockCreate, Instructions: ins, License: "GPL",
	}
}

// probeSockMark loads the program and throws it away.
func probeSockMark(cookie uint64) error {
	p, err := ebpf.NewProgram(sockMarkProgram(1, 1, cookie))
	if err != nil {
		return err
	}
	return p.Close()
}

// attachSockMark attaches without a link: the attachment lives as long as the cgroup, not as long as a descriptor of ours.
func attachSockMark(cgroup int, value, mask uint32, cookie uint64) error {
	p, err := ebpf.NewProgram(sockMarkProgram(value, mask, cookie))
	if err != nil {
		if errors.Is(err, unix.EPERM) {
			return fmt.Errorf("%w: CAP_BPF and CAP_NET_ADMIN to load a cgroup program", ErrPrivilege)
		}
		return fmt.Errorf("load cgroup program: %w", err)
	}
	defer closeQuietly(p)
	err = link.RawAttachProgram(link.RawAttachProgramOptions{
		Target: cgroup, Program: p, Attach: ebpf.AttachCGroupInetSockCreate, Flags: unix.BPF_F_ALLOW_MULTI,
	})
	if err != nil {
		return fmt.Errorf("attach cgroup program: %w", err)
	}
	return nil
}
