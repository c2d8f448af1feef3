// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

// Offsets in the contexts of the cgroup programs (include/uapi/linux/bpf.h), which never change.
const (
	sockAddrSock = 64 // bpf_sock_addr.sk
)

// Of the map `state`: what could not be written down, because a map was full.
const (
	stateTasks        = 0  // start time of the oldest process that is not known to be selected or not; 0 = all are known
	stateTasksDenied  = 8  // sockets denied for that reason
	stateGroups       = 16 // id of the oldest cgroup of that kind
	stateGroupsDenied = 24
	stateOverflows    = 32 // how often a map was full
	stateTasksEnd     = 40 // who began at this time, or later, is known again; 0 = nobody
	stateSize         = 48
)

// Of a value of the map `tasks`: flags, then the bits of selectors by PID, then those by executable.
const (
	taskSelf   = 1 // mprox itself: left alone
	taskDenied = 2 // a descendant of one that was started when the map was full: nobody can say any more whether it is selected
)

// selectionBits is a Selection in the terms of the programs: bit sets, a word for 64 selectors.
type selectionBits struct {
	n                          int
	all                        []uint64
	uid, gid, cgroup, pid, exe attribute
	treePID, treeExe           []uint64 // what descendants inherit
	sessions, groups           bool     // whether there are selectors of that scope
	exeGlobs                   []globBits
	unitGlobs                  []globBits
	rules                      []ruleBits
	owners                     bool
	mask                       uint32
}

// attribute is one kind of condition: whom it does not bind, and whether it binds anybody.
type attribute struct {
	used bool
	free []uint64 // selectors without such a condition
}

// globBits is a pattern of names, in one directory for executables.
type globBits struct {
	dir  fileID
	glob *glob
	bits []uint64
}

type ruleBits struct {
	mark            uint32
	exclude, choose []uint64
}

func setBit(words []uint64, i int) { words[i/64] |= 1 << (i % 64) }

// newBits compiles what does not depend on the machine.
func newBits(s *Selection) *selectionBits {
	n := s.words()
	b := &selectionBits{n: n, mask: s.Mask, owners: s.Owners, treePID: make([]uint64, n), treeExe: make([]uint64, n), all: make([]uint64, n)}
	attr := func(given func(Selector) bool) attribute {
		a := attribute{free: make([]uint64, n)}
		for i, sel := range s.Selectors {
			if given(sel) {
				a.used = true
			} else {
				setBit(a.free, i)
			}
		}
		return a
	}
	b.uid = attr(func(s Selector) bool { return len(s.UIDs) > 0 })
	b.gid = attr(func(s Selector) bool { return len(s.GIDs) > 0 })
	b.cgroup = attr(func(s Selector) bool { return len(s.Cgroups)+len(s.Units) > 0 })
	b.pid = attr(func(s Selector) bool { return len(s.PIDs) > 0 })
	b.exe = attr(func(s Selector) bool { return len(s.Exes) > 0 })
	for i, sel := range s.Selectors {
		setBit(b.all, i)
		b.sessions = b.sessions || len(sel.PIDs) > 0 && sel.Scope == ScopeSession
		b.groups = b.groups || len(sel.PIDs) > 0 && sel.Scope == ScopeGroup
		if sel.Scope == ScopeTree {
			setBit(b.treePID, i)
			setBit(b.treeExe, i)
		}
	}
	for _, r := range s.Rules {
		rb := ruleBits{mark: r.Mark, exclude: make([]uint64, n), choose: make([]uint64, n)}
		for _, i := range r.Exclude {
			setBit(rb.exclude, i)
		}
		for _, i := range r.Select {
			setBit(rb.choose, i)
		}
		b.rules = append(b.rules, rb)
	}
	return b
}

// hookKind is where a cgroup program sits.
type hookKind struct {
	name   string
	typ    ebpf.ProgramType
	attach ebpf.AttachType
}

func hookKinds() []hookKind {
	return []hookKind{
		{"create", ebpf.CGroupSock, ebpf.AttachCGroupInetSockCreate},
		{"connect4", ebpf.CGroupSockAddr, ebpf.AttachCGroupInet4Connect},
		{"connect6", ebpf.CGroupSockAddr, ebpf.AttachCGroupInet6Connect},
		{"sendmsg4", ebpf.CGroupSockAddr, ebpf.AttachCGroupUDP4Sendmsg},
		{"sendmsg6", ebpf.CGroupSockAddr, ebpf.AttachCGroupUDP6Sendmsg},
	}
}

func (k hookKind) creates() bool { return k.name == "create" }
func (k hookKind) sends() bool   { return k.name == "sendmsg4" || k.name == "sendmsg6" }

// Where a cgroup program keeps what on its stack. Words of selectors follow below.
const (
	stKey    = -8
	stTmp    = -16
	stTmp2   = -24
	stCred   = -32 // euid, egid
	stOwner  = -80 // an owner record
	stCookie = stTmp2
)

// decision is the program of a hook: who makes or uses this socket, what the rules say, and the mark.
//
//	another namespace? the daemon itself? ─▶ allow
//	bits of uid, gid, cgroup, pid, exe ─▶ and ─▶ first rule that matches ─▶ mark ─▶ owner ─▶ allow
//	not known, since a map was full ─▶ deny
func (b *selectionBits) decision(k hookKind, m *bpfMaps, off offsets, cookie uint64) *ebpf.ProgramSpec {
	a := &assembler{off: off}
	acc, cur := stOwner-8*b.n, stOwner-16*b.n
	a.emit(
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.FnGetNetnsCookie.Call(),
		asm.LoadImm(asm.R2, int64(cookie), asm.DWord),
		asm.JNE.Reg(asm.R0, asm.R2, "allow"))
	a.currentTask(m)
	if len(b.rules) > 0 {
		if k.creates() {
			b.learnRun(a, m)
		}
		if k.sends() {
			// Marked by the other hooks: nothing is decided a datagram.
			a.socketMark(k)
			a.emit(asm.LoadImm(asm.R3, int64(b.mask), asm.DWord), asm.And.Reg(asm.R2, asm.R3))
			for _, r := range b.rules {
				if r.mark != 0 {
					a.emit(asm.LoadImm(asm.R3, int64(r.mark), asm.DWord), asm.JEq.Reg(asm.R2, asm.R3, "owner"))
				}
			}
		}
		b.evaluate(a, m, acc, cur)
		b.choose(a, acc)
		b.mark(a, m, k)
	}
	a.at("owner")
	if b.owners {
		a.emit(asm.Mov.Reg(asm.R1, asm.R6), asm.FnGetSocketCookie.Call(), asm.StoreMem(asm.RFP, stCookie, asm.R0, asm.DWord))
		if k.sends() {
			a.lookup(m.owners, stCookie)
			a.emit(
				asm.JEq.Imm(asm.R0, 0, "write"),
				asm.LoadMem(asm.R1, asm.R0, 0, asm.Word),
				asm.LoadMem(asm.R2, asm.RFP, stKey, asm.Word),
				asm.JEq.Reg(asm.R1, asm.R2, "allow"))
			a.at("write") // a socket that was passed on
		}
		b.writeOwner(a, m)
	}
	a.returns("allow", 1)
	a.returns("deny", 0)
	return &ebpf.ProgramSpec{Name: "mprox_" + k.name, Type: k.typ, AttachType: k.attach, Instructions: a.ins, License: "GPL"}
}

// currentTask leaves the current task in R7 and its entry in the map, or 0, in R9. The daemon itself is allowed everything.
func (a *assembler) currentTask(m *bpfMaps) {
	known := a.fresh("known")
	a.emit(
		asm.FnGetCurrentPidTgid.Call(),
		asm.RSh.Imm(asm.R0, 32),
		asm.StoreMem(asm.RFP, stKey, asm.R0, asm.Word),
		asm.FnGetCurrentTask.Call(),
		asm.Mov.Reg(asm.R7, asm.R0))
	a.lookup(m.tasks, stKey)
	a.emit(
		asm.Mov.Reg(asm.R9, asm.R0),
		asm.JEq.Imm(asm.R9, 0, known),
		asm.LoadMem(asm.R1, asm.R9, 0, asm.DWord),
		asm.JSet.Imm(asm.R1, taskSelf, "allow"))
	a.at(known)
}

// evaluate leaves the bits of all selectors that match at acc.
func (b *selectionBits) evaluate(a *assembler, m *bpfMaps, acc, cur int) {
	a.storeBits(acc, b.all)
	and := func() {
		for i := range b.n {
			a.emit(
				asm.LoadMem(asm.R1, asm.RFP, int16(cur+8*i), asm.DWord),
				asm.LoadMem(asm.R2, asm.RFP, int16(acc+8*i), asm.DWord),
				asm.And.Reg(asm.R2, asm.R1),
				asm.StoreMem(asm.RFP, int16(acc+8*i), asm.R2, asm.DWord))
		}
	}
	if b.pid.used || b.exe.used {
		b.denyUnknownTask(a, m)
	}
	if b.uid.used || b.gid.used {
		a.follow(asm.R8, asm.R7, "task_struct.cred", stTmp)
		a.read(stCred, 4, asm.R8, a.off["cred.euid"])
		a.read(stCred+4, 4, asm.R8, a.off["cred.egid"])
	}
	for _, x := range []struct {
		attr attribute
		m    *ebpf.Map
		key  int
	}{{b.uid, m.uids, stCred}, {b.gid, m.gids, stCred + 4}} {
		if x.attr.used {
			a.storeBits(cur, x.attr.free)
			a.lookup(x.m, x.key)
			a.orValue(cur, 0, b.n)
			and()
		}
	}
	if b.cgroup.used {
		a.storeBits(cur, b.cgroup.free)
		a.emit(asm.FnGetCurrentCgroupId.Call(), asm.StoreMem(asm.RFP, stTmp, asm.R0, asm.DWord))
		a.lookup(m.cgroups, stTmp)
		b.denyUnknownCgroup(a, m)
		a.orValue(cur, 0, b.n)
		and()
	}
	if b.pid.used {
		a.storeBits(cur, b.pid.free)
		a.emit(asm.Mov.Reg(asm.R0, asm.R9))
		a.orValue(cur, 8, b.n)
		b.numbered(a, m.sessions, 3, b.sessions, cur)
		b.numbered(a, m.groups, 2, b.groups, cur)
		and()
	}
	if b.exe.used {
		a.storeBits(cur, b.exe.free)
		a.emit(asm.Mov.Reg(asm.R0, asm.R9))
		a.orValue(cur, 8+8*b.n, b.n)
		and()
	}
}

// numbered ors the bits of the session (3, PIDTYPE_SID) or process group (2, PIDTYPE_PGID) of the task in R7.
func (b *selectionBits) numbered(a *assembler, m *ebpf.Map, which int32, used bool, cur int) {
	if !used {
		return
	}
	a.follow(asm.R8, asm.R7, "task_struct.signal", stTmp)
	a.read(stTmp, 8, asm.R8, a.off["signal_struct.pids"]+8*which)
	a.emit(asm.LoadMem(asm.R8, asm.RFP, stTmp, asm.DWord))
	a.read(stTmp, 4, asm.R8, a.off["pid.numbers"]+a.off["upid.nr"])
	a.lookup(m, stTmp)
	a.orValue(cur, 0, b.n)
}

// denyUnknownTask denies whoever was started when the map of tasks was full: selected or not, nobody knows.
func (b *selectionBits) denyUnknownTask(a *assembler, m *bpfMaps) {
	fine, unknown, deny := a.fresh("fine"), a.fresh("unknown"), a.fresh("deny")
	a.emit(
		clear8(stTmp),
		asm.JEq.Imm(asm.R9, 0, unknown),
		asm.LoadMem(asm.R1, asm.R9, 0, asm.DWord),
		asm.And.Imm(asm.R1, taskDenied),
		asm.JEq.Imm(asm.R1, 0, fine))
	a.lookup(m.state, stTmp)
	a.emit(asm.Mov.Reg(asm.R8, asm.R0), asm.JNE.Imm(asm.R8, 0, deny), asm.Ja.Label("deny"))
	a.at(unknown)
	a.lookup(m.state, stTmp)
	a.emit(asm.JEq.Imm(asm.R0, 0, fine), asm.Mov.Reg(asm.R8, asm.R0))
	a.unlessUnknown(asm.R7, asm.R8, stTmp, fine)
	a.at(deny)
	a.emit(
		asm.Mov.Imm(asm.R1, 1),
		asm.AddAtomic.Mem(asm.R8, asm.R1, asm.DWord, stateTasksDenied),
		asm.Ja.Label("deny"))
	a.at(fine)
}

// unlessUnknown goes to label unless the process of the task in reg, which is not in the map, was started when that was full. state has the
// address of the map `state`.
func (a *assembler) unlessUnknown(reg, state asm.Register, scratch int, label string) {
	inside := a.fresh("inside")
	a.emit(asm.LoadMem(asm.R1, state, stateTasks, asm.DWord), asm.JEq.Imm(asm.R1, 0, label))
	a.follow(asm.R1, reg, "task_struct.group_leader", scratch)
	a.read(scratch, 8, asm.R1, a.off["task_struct.start_boottime"])
	a.emit(
		asm.LoadMem(asm.R1, asm.RFP, int16(scratch), asm.DWord),
		asm.LoadMem(asm.R2, state, stateTasks, asm.DWord),
		asm.JLT.Reg(asm.R1, asm.R2, label),
		asm.LoadMem(asm.R2, state, stateTasksEnd, asm.DWord),
		asm.JEq.Imm(asm.R2, 0, inside),
		asm.JGE.Reg(asm.R1, asm.R2, label))
	a.at(inside)
}

// denyUnknownCgroup does the same for cgroups: their ids only grow. R0 is the entry of the cgroup whose id is at stTmp, or 0.
func (b *selectionBits) denyUnknownCgroup(a *assembler, m *bpfMaps) {
	fine, none := a.fresh("fine"), a.fresh("none")
	a.emit(asm.JNE.Imm(asm.R0, 0, fine), clear8(stTmp2))
	a.lookup(m.state, stTmp2)
	a.emit(
		asm.JEq.Imm(asm.R0, 0, none),
		asm.LoadMem(asm.R2, asm.R0, stateGroups, asm.DWord),
		asm.JEq.Imm(asm.R2, 0, none),
		asm.LoadMem(asm.R1, asm.RFP, stTmp, asm.DWord),
		asm.JLT.Reg(asm.R1, asm.R2, none),
		asm.Mov.Imm(asm.R1, 1),
		asm.AddAtomic.Mem(asm.R0, asm.R1, asm.DWord, stateGroupsDenied),
		asm.Ja.Label("deny"))
	a.at(none)
	a.emit(asm.Mov.Imm(asm.R0, 0))
	a.at(fine)
}

// choose leaves the mark of the first rule that matches in R8, or goes to owner.
func (b *selectionBits) choose(a *assembler, acc int) {
	test := func(words []uint64, hit string) {
		for i, w := range words {
			if w != 0 {
				a.emit(
					asm.LoadMem(asm.R1, asm.RFP, int16(acc+8*i), asm.DWord),
					asm.LoadImm(asm.R2, int64(w), asm.DWord),
					asm.JSet.Reg(asm.R1, asm.R2, hit))
			}
		}
	}
	for _, r := range b.rules {
		next, hit := a.fresh("next"), a.fresh("hit")
		test(r.exclude, next)
		test(r.choose, hit)
		a.emit(asm.Ja.Label(next))
		a.at(hit)
		if r.mark == 0 {
			a.emit(asm.Ja.Label("owner"))
		} else {
			a.emit(asm.LoadImm(asm.R8, int64(r.mark), asm.DWord), asm.Ja.Label("chosen"))
		}
		a.at(next)
	}
	a.emit(asm.Ja.Label("owner"))
}

// socketMark leaves the socket's mark in R2.
func (a *assembler) socketMark(k hookKind) {
	if k.creates() {
		a.emit(asm.LoadMem(asm.R2, asm.R6, bpfSockMark, asm.Word))
		return
	}
	a.emit(
		asm.LoadMem(asm.R1, asm.R6, sockAddrSock, asm.DWord),
		asm.JEq.Imm(asm.R1, 0, "allow"),
		asm.LoadMem(asm.R2, asm.R1, bpfSockMark, asm.Word))
}

// mark gives the socket the mark in R8. What another instance has marked stays.
func (b *selectionBits) mark(a *assembler, m *bpfMaps, k hookKind) {
	a.at("chosen")
	a.socketMark(k)
	a.emit(
		asm.Mov.Reg(asm.R9, asm.R2), // all bits
		asm.LoadImm(asm.R3, int64(b.mask), asm.DWord),
		asm.And.Reg(asm.R2, asm.R3),
		asm.JEq.Reg(asm.R2, asm.R8, "owner"),
		asm.JEq.Imm(asm.R2, 0, "set"))
	for _, r := range b.rules {
		a.emit(asm.LoadImm(asm.R3, int64(r.mark), asm.DWord), asm.JEq.Reg(asm.R2, asm.R3, "set"))
	}
	b.foreign(a, m)
	a.at("set")
	a.emit(
		asm.LoadImm(asm.R3, int64(^b.mask), asm.DWord),
		asm.And.Reg(asm.R9, asm.R3),
		asm.Or.Reg(asm.R9, asm.R8))
	if k.creates() {
		a.emit(asm.StoreMem(asm.R6, bpfSockMark, asm.R9, asm.Word))
		return
	}
	a.emit(
		asm.StoreMem(asm.RFP, stTmp, asm.R9, asm.Word),
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.Mov.Imm(asm.R2, unix.SOL_SOCKET),
		asm.Mov.Imm(asm.R3, unix.SO_MARK),
		asm.Mov.Reg(asm.R4, asm.RFP), asm.Add.Imm(asm.R4, stTmp),
		asm.Mov.Imm(asm.R5, 4),
		asm.FnSetsockopt.Call(),
		asm.JNE.Imm(asm.R0, 0, "deny")) // what cannot be marked does not leave
	if k.sends() {
		// This datagram has its old mark already: it must not go, the next one will.
		a.emit(asm.Ja.Label("deny"))
	}
}
