// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"sync"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/policy/process"
)

// The ways in which an owner is found, from the surest to the slowest.
const (
	OwnerTCX    = "tcx"    // who has made or connected the socket last, as a program has seen by the flow's first packet
	OwnerBPF    = "bpf"    // the same, by the socket
	OwnerProc   = "proc"   // who has the socket open, by a look at all processes
	OwnerCgroup = "cgroup" // nobody has it open: its user, and the cgroup it was made in
)

const (
	// maxOwnerCache bounds the paths of executables and cgroups that are remembered.
	maxOwnerCache = 4096
	// nanosPerTick is how /proc counts: USER_HZ is 100 wherever Linux has BTF.
	nanosPerTick = 10_000_000
)

// Owner is whose a socket is.
type Owner struct {
	PID      int // 0 = not known
	UID, GID uint32
	Exe      string
	Cgroup   string
	Method   string
}

// Owners finds whose sockets of a network namespace are. Safe for concurrent use.
type Owners struct {
	h       *LinuxHost
	exact   *process.Exact
	mapsMu  sync.RWMutex // held while a map is read; guards what follows
	records *ebpf.Map    // nil = no programs write them down
	flows   *ebpf.Map
	mu      sync.Mutex // guards what follows
	exes    map[exeKey]string
	byFile  map[fileID]string // the last path of an executable, for processes that have ended
	cgroups map[uint64]string // ids are never used again
}

type exeKey struct {
	pid   uint32
	start uint64
	file  fileID
}

// NewOwners opens what Lookup needs.
func NewOwners(h *LinuxHost) (*Owners, error) {
	o := &Owners{h: h, exes: map[exeKey]string{}, byFile: map[fileID]string{}, cgroups: map[uint64]string{}}
	err := h.inside(func() (err error) {
		o.exact, err = process.NewExact()
		return err
	})
	if err != nil {
		return nil, err
	}
	h.bpfMu.Lock()
	defer h.bpfMu.Unlock()
	h.owners = o
	h.publishOwnersLocked()
	return o, nil
}

// publishOwnersLocked tells Owners which map is in force.
func (h *LinuxHost) publishOwnersLocked() {
	if h.owners == nil {
		return
	}
	var records, flows *ebpf.Map
	if h.bpf != nil && h.bpf.bits.owners {
		records, _ = h.bpf.maps.owners.Clone() // nil: what is not known is looked up in /proc
		flows, _ = h.bpf.maps.flows.Clone()
	}
	h.owners.setMaps(records, flows)
}

func (o *Owners) setMaps(records, flows *ebpf.Map) {
	o.mapsMu.Lock()
	defer o.mapsMu.Unlock()
	for _, m := range []*ebpf.Map{o.records, o.flows} {
		if m != nil {
			closeQuietly(m)
		}
	}
	o.records, o.flows = records, flows
}

// Fast reports whether owners are written down, so that looking one up costs microseconds: else it can take a look at all processes.
func (o *Owners) Fast() bool {
	o.mapsMu.RLock()
	defer o.mapsMu.RUnlock()
	return o.records != nil
}

// Close closes the descriptors. It is idempotent.
func (o *Owners) Close() error {
	o.setMaps(nil, nil)
	return o.exact.Close()
}

// Lookup finds who sends from src to dst. proto is unix.IPPROTO_TCP or UDP. os.ErrNotExist if there is no such socket.
func (o *Owners) Lookup(proto uint8, src, dst netip.AddrPort) (Owner, error) {
	if r, ok := o.flow(proto, src, dst); ok {
		return o.describe(r, OwnerTCX), nil
	}
	f, err := o.exact.Socket(proto, src, dst)
	if err != nil {
		return Owner{}, err
	}
	if r, ok := o.record(f.Cookie); ok {
		return o.describe(r, OwnerBPF), nil
	}
	out := Owner{UID: f.UID, Cgroup: o.cgroup(f.Cgroup), Method: OwnerCgroup}
	if f.Inode == 0 {
		return out, nil
	}
	holders, err := process.Holders(context.Background(), map[uint32]bool{f.Inode: true})
	if err != nil {
		return out, nil //nolint:nilerr // what is known is known
	}
	for pid := range holders {
		if out.PID != 0 && pid >= out.PID {
			continue // the eldest of those that share it
		}
		facts, err := o.h.Process(pid)
		if err != nil {
			continue
		}
		out = Owner{PID: pid, UID: facts.UID, GID: facts.GID, Exe: facts.Exe, Cgroup: facts.Cgroup, Method: OwnerProc}
	}
	return out, nil
}

// Waits reports whether a TCP socket of this machine that is bound to no device sends from src to dst.
func (o *Owners) Waits(src, dst netip.AddrPort) bool {
	_, err := o.exact.Socket(unix.IPPROTO_TCP, src, dst) // finds sockets that are bound to a device only if it is told which
	return err == nil
}

// flow reads whose a flow's first packet was.
func (o *Owners) flow(proto uint8, src, dst netip.AddrPort) (ownerRecord, bool) {
	if src.Addr().Is4() != dst.Addr().Is4() {
		return ownerRecord{}, false
	}
	o.mapsMu.RLock()
	defer o.mapsMu.RUnlock()
	if o.flows == nil {
		return ownerRecord{}, false
	}
	k := flowKey(proto, src, dst)
	var b [sizeofFlow]byte
	if err := o.flows.Lookup(k[:], b[:]); err != nil {
		return ownerRecord{}, false
	}
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return ownerRecord{}, false
	}
	return parseFlow(b[:], now.Nano())
}

// record reads what a program has written down.
func (o *Owners) record(cookie uint64) (ownerRecord, bool) {
	o.mapsMu.RLock()
	defer o.mapsMu.RUnlock()
	if o.records == nil {
		return ownerRecord{}, false
	}
	var b [sizeofOwner]byte
	if err := o.records.Lookup(cookie, b[:]); err != nil {
		return ownerRecord{}, false
	}
	return parseOwner(b[:])
}

func (o *Owners) describe(r ownerRecord, method string) Owner {
	out := Owner{PID: int(r.PID), UID: r.UID, GID: r.GID, Method: method}
	key := exeKey{r.PID, r.Start, r.Exe}
	o.mu.Lock()
	exe, ok := o.exes[key]
	cgroup, known := o.cgroups[r.Cgroup]
	o.mu.Unlock()
	if !ok {
		exe = o.exe(key)
	}
	if !known {
		cgroup = o.cgroup(r.Cgroup)
	}
	out.Exe, out.Cgroup = exe, cgroup
	return out
}

// exe is the path of a process's executable, or, when it has ended, the last that the same file had.
func (o *Owners) exe(k exeKey) string {
	var out string
	link := process.Dir(int(k.pid)) + "/exe"
	if _, start, err := process.Stat(int(k.pid)); err == nil && start == k.start/nanosPerTick {
		if s, err := os.Readlink(link); err == nil {
			out = strings.TrimSuffix(s, " (deleted)")
		}
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if out == "" {
		return o.byFile[k.file]
	}
	if len(o.exes) >= maxOwnerCache {
		clear(o.exes)
	}
	if len(o.byFile) >= maxOwnerCache {
		clear(o.byFile)
	}
	o.exes[k], o.byFile[k.file] = out, out
	return out
}

// cgroup is the path of a cgroup, "" when it is gone.
func (o *Owners) cgroup(id uint64) string {
	o.mu.Lock()
	defer o.mu.Unlock()
	if p, ok := o.cgroups[id]; ok || id == 0 {
		return p
	}
	p := cgroupPath(id)
	if p == "" {
		return ""
	}
	if len(o.cgroups) >= maxOwnerCache {
		clear(o.cgroups)
	}
	o.cgroups[id] = p
	return p
}

// cgroupPath opens a cgroup by its id.
func cgroupPath(id uint64) string {
	mount, root, err := process.Cgroup2Mount()
	if err != nil {
		return ""
	}
	dir, err := unix.Open(mount, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return ""
	}
	defer closeFD(dir)
	const fileidKernfs = 0xfe // FILEID_KERNFS
	h := unix.NewFileHandle(fileidKernfs, binary.NativeEndian.AppendUint64(nil, id))
	fd, err := unix.OpenByHandleAt(dir, h, unix.O_PATH|unix.O_CLOEXEC)
	if err != nil {
		return ""
	}
	defer closeFD(fd)
	p, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	rest, ok := strings.CutPrefix(p, mount)
	if err != nil || !ok || strings.HasSuffix(p, " (deleted)") {
		return ""
	}
	if rest == "" {
		return root
	}
	return strings.TrimSuffix(root, "/") + rest
}

// seedOwners writes down whose the sockets are that are older than the programs: one dump, one look at all processes.
func (h *LinuxHost) seedOwners(s *bpfState) error {
	if !s.bits.owners || h.bpf != nil && h.bpf.bits.owners { // a set before has looked
		return nil
	}
	cookies, inodes := map[uint32]uint64{}, map[uint32]bool{}
	for _, proto := range []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
		socks, err := h.diag.Dump(proto, process.AllStates)
		if err != nil {
			return err
		}
		for _, x := range socks {
			if x.Inode != 0 {
				cookies[x.Inode], inodes[x.Inode] = x.Cookie, true
			}
		}
	}
	if len(inodes) == 0 {
		return nil
	}
	holders, err := process.Holders(context.Background(), inodes)
	if err != nil {
		return err
	}
	for pid, list := range holders {
		r, ok := s.recordOf(h, pid)
		if !ok {
			continue
		}
		for _, inode := range list {
			err := s.maps.owners.Update(cookies[inode], r.bytes(), ebpf.UpdateNoExist)
			if err != nil && !errors.Is(err, ebpf.ErrKeyExist) {
				return fmt.Errorf("bpf map owners: %w", err)
			}
		}
	}
	return nil
}

// recordOf is what a program would write about a process.
func (s *bpfState) recordOf(h *LinuxHost, pid int) (ownerRecord, bool) {
	_, start, err := process.Stat(pid)
	if err != nil {
		return ownerRecord{}, false
	}
	facts, err := h.Process(pid)
	if err != nil {
		return ownerRecord{}, false
	}
	r := ownerRecord{PID: uint32(pid), UID: facts.UID, GID: facts.GID, Start: start * nanosPerTick}
	if ref, err := cgroupRef(facts.Cgroup); err == nil && facts.Cgroup != "" {
		r.Cgroup = ref.ID
	}
	if id, err := s.ident.file(process.Dir(pid) + "/exe"); err == nil {
		r.Exe = id
	}
	return r, true
}
