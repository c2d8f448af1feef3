// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"encoding/binary"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
)

// maxOwners bounds the sockets whose owner is remembered; the least recently used goes first.
const maxOwners = 65536

// ownerRecord is who has made a socket, or connected it last.
type ownerRecord struct {
	PID      uint32 // of the process, in the initial PID namespace
	UID, GID uint32 // effective
	Cgroup   uint64 // id
	Start    uint64 // of the process, in nanoseconds since boot: with it, the PID is nobody else's
	Exe      fileID // its executable
}

// sizeofOwner: tgid, euid, egid, 4 bytes of nothing, cgroup id, start time, device and inode of the executable.
const sizeofOwner = 48

func parseOwner(b []byte) (ownerRecord, bool) {
	if len(b) < sizeofOwner {
		return ownerRecord{}, false
	}
	le := binary.NativeEndian
	return ownerRecord{
		PID: le.Uint32(b), UID: le.Uint32(b[4:]), GID: le.Uint32(b[8:]), Cgroup: le.Uint64(b[16:]), Start: le.Uint64(b[24:]),
		Exe: fileID{le.Uint64(b[32:]), le.Uint64(b[40:])},
	}, true
}

func (o ownerRecord) bytes() []byte {
	ne := binary.NativeEndian
	b := make([]byte, 16, sizeofOwner)
	ne.PutUint32(b, o.PID)
	ne.PutUint32(b[4:], o.UID)
	ne.PutUint32(b[8:], o.GID)
	for _, v := range []uint64{o.Cgroup, o.Start, o.Exe.Dev, o.Exe.Inode} {
		b = ne.AppendUint64(b, v)
	}
	return b
}

// writeOwner writes down who uses the socket whose cookie is at stCookie.
func (b *selectionBits) writeOwner(a *assembler, m *bpfMaps) {
	a.emit(asm.FnGetCurrentTask.Call(), asm.Mov.Reg(asm.R7, asm.R0))
	a.zero(stOwner, sizeofOwner)
	a.emit(
		asm.FnGetCurrentPidTgid.Call(), asm.RSh.Imm(asm.R0, 32),
		asm.StoreMem(asm.RFP, stOwner, asm.R0, asm.Word),
		asm.FnGetCurrentCgroupId.Call(),
		asm.StoreMem(asm.RFP, stOwner+16, asm.R0, asm.DWord))
	a.follow(asm.R8, asm.R7, "task_struct.cred", stTmp)
	a.read(stOwner+4, 4, asm.R8, a.off["cred.euid"])
	a.read(stOwner+8, 4, asm.R8, a.off["cred.egid"])
	a.follow(asm.R8, asm.R7, "task_struct.group_leader", stTmp)
	a.read(stOwner+24, 8, asm.R8, a.off["task_struct.start_boottime"])
	a.follow(asm.R8, asm.R7, "task_struct.mm", stTmp)
	a.follow(asm.R8, asm.R8, "mm_struct.exe_file", stTmp)
	a.follow(asm.R8, asm.R8, "file.f_inode", stTmp)
	a.identity(asm.R8, stOwner+32)
	a.update(m.owners, stCookie, stOwner)
}

// release forgets the owner of a socket that is closed.
func releaseProgram(m *bpfMaps, cookie uint64) *ebpf.ProgramSpec {
	a := &assembler{}
	a.emit(
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.FnGetNetnsCookie.Call(),
		asm.LoadImm(asm.R2, int64(cookie), asm.DWord),
		asm.JNE.Reg(asm.R0, asm.R2, "allow"),
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.FnGetSocketCookie.Call(),
		asm.StoreMem(asm.RFP, stTmp, asm.R0, asm.DWord))
	a.remove(m.owners, stTmp)
	a.returns("allow", 1)
	return &ebpf.ProgramSpec{Name: "mprox_release", Type: ebpf.CGroupSock, AttachType: ebpf.AttachCgroupInetSockRelease, Instructions: a.ins, License: "GPL"}
}
