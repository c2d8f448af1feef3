// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path"
	"slices"
	"strings"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// Cgroup is a cgroup made by Manager.NewCgroup.
type Cgroup struct {
	m      *Manager
	ref    CgroupRef
	fd     int
	method string
}

// NewCgroup makes a cgroup below the caller's whose sockets belong to the context in slot. Its name carries the network namespace, because
// cgroups are the machine's. Prepare must have been called. ErrFeature when there is no writable cgroup v2, or no way to mark its sockets.
func (m *Manager) NewCgroup(_ context.Context, name string, slot int) (*Cgroup, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed || !m.prepared {
		return nil, ErrClosed
	}
	f := m.base.Features
	if !f.Cgroup2 {
		return nil, fmt.Errorf("%w: writable cgroup v2: mount -t cgroup2 none /sys/fs/cgroup/unified; in a container mount /sys/fs/cgroup read-write", ErrFeature)
	}
	if !f.NFTSocket {
		return nil, fmt.Errorf("%w: nftables `socket cgroupv2` (CONFIG_NFT_SOCKET, kernel 5.13)", ErrFeature)
	}
	if slot < 0 || slot >= MaxContexts {
		return nil, fmt.Errorf("slot %d", slot)
	}
	own, err := m.host.Cgroup(0)
	if err != nil {
		return nil, fmt.Errorf("%w: cgroup v2 of this process: %w", ErrFeature, err)
	}
	// Not below the daemon's own cgroup, which is left alone.
	for strings.HasPrefix(path.Base(own), cgroupPrefix) {
		own = path.Dir(own)
	}
	ref, err := m.makeCgroupLocked(own, name)
	if err != nil {
		return nil, err
	}
	c := &Cgroup{m: m, ref: ref, fd: -1, method: "nft"}
	if f.BPFSockMark {
		if err := m.host.MarkCgroup(ref.Path, ContextMark(m.spec.Mask, slot), m.spec.Mask); err != nil {
			m.log.Warn("sockets are marked by nftables alone", zap.String("cgroup", ref.Path), zap.Error(err))
		} else {
			c.method = "bpf+nft"
		}
	}
	if c.fd, err = m.host.OpenCgroup(ref.Path); err != nil {
		m.removeCgroupLocked(ref.Path)
		return nil, err
	}
	return c, nil
}

// makeCgroupLocked journals a cgroup and makes it.
func (m *Manager) makeCgroupLocked(parent, name string) (CgroupRef, error) {
	clean := strings.Map(func(r rune) rune {
		if r == '/' || r == '\n' || r == 0 {
			return '_'
		}
		return r
	}, name)
	p := path.Join(parent, fmt.Sprintf("%s%d-%s", cgroupPrefix, m.host.Netns().Inode, clean))
	if !slices.Contains(m.journal.Cgroups, p) {
		m.journal.Cgroups = append(m.journal.Cgroups, p)
		if err := m.journal.write(m.spec.Instance.Journal); err != nil {
			return CgroupRef{}, err
		}
	}
	return m.host.MakeCgroup(p)
}

// removeCgroupLocked removes an empty cgroup of ours, and forgets it.
func (m *Manager) removeCgroupLocked(p string) {
	if err := m.host.RemoveCgroup(p); err != nil {
		m.log.Warn("cgroup stays", zap.Error(err))
		return
	}
	m.journal.Cgroups = slices.DeleteFunc(m.journal.Cgroups, func(x string) bool { return x == p })
	if err := m.journal.write(m.spec.Instance.Journal); err != nil {
		m.log.Warn("journal", zap.Error(err))
	}
}

// Ref returns what ContextSpec.Cgroups takes.
func (c *Cgroup) Ref() CgroupRef { return c.ref }

// FD is the directory's descriptor, for SysProcAttr.CgroupFD (clone3 CLONE_INTO_CGROUP). Valid until Remove; -1 after.
func (c *Cgroup) FD() int {
	c.m.mu.Lock()
	defer c.m.mu.Unlock()
	return c.fd
}

// Method says how sockets are marked: "bpf+nft" or "nft".
func (c *Cgroup) Method() string { return c.method }

// Own makes the cgroup one user's: what other users' sockets in it send is dropped from the next Apply of its Ref on.
func (c *Cgroup) Own(uid uint32) {
	c.ref.Only, c.ref.UID = true, uid
}

// Take moves a process of the cgroup's user into it; its sockets stay with the cgroup that they were made in. os.ErrPermission when it is, or
// meanwhile has become, another user's.
func (c *Cgroup) Take(pid int) error {
	owned := func() (uint64, error) {
		if c.ref.Only && !c.m.host.RunsAs(pid, c.ref.UID) {
			return 0, fmt.Errorf("process %d is not of user %d: %w", pid, c.ref.UID, os.ErrPermission)
		}
		start, _, err := c.m.host.ProcessTree(context.Background(), pid)
		return start, err
	}
	start, err := owned()
	if err != nil {
		return err
	}
	from, err := c.m.host.Cgroup(pid)
	if err != nil {
		return err
	}
	if err := c.m.host.MoveProcess(pid, c.ref.Path); err != nil {
		return err
	}
	if again, err := owned(); err != nil || again != start {
		return errors.Join(fmt.Errorf("process %d has changed: %w", pid, os.ErrPermission), err, c.m.host.MoveProcess(pid, from))
	}
	return nil
}

// Wait returns when the last process has gone, or with ctx's error. A cgroup nothing was started in yet is empty.
func (c *Cgroup) Wait(ctx context.Context) error {
	return c.m.host.WaitCgroupEmpty(ctx, c.ref.Path)
}

// Remove removes the directory; it fails while processes live in it. Idempotent.
func (c *Cgroup) Remove() error {
	c.m.mu.Lock()
	defer c.m.mu.Unlock()
	if c.fd < 0 {
		return nil
	}
	if err := c.m.host.RemoveCgroup(c.ref.Path); err != nil {
		return err
	}
	_ = unix.Close(c.fd) // of a directory: nothing to lose
	c.fd = -1
	if c.m.closed {
		return nil
	}
	c.m.journal.Cgroups = slices.DeleteFunc(c.m.journal.Cgroups, func(x string) bool { return x == c.ref.Path })
	return c.m.journal.write(c.m.spec.Instance.Journal)
}

// daemonCgroupLocked gives the daemon a cgroup that nobody else is in, once sockets of anybody's may be captured: only its own may carry the bypass mark.
// Without a writable cgroup v2 (containers) the uid has to do.
func (m *Manager) daemonCgroupLocked(spec Spec) error {
	if m.cfg.Daemon != nil {
		m.base.Daemon = *m.cfg.Daemon
		return nil
	}
	if !spec.wide() || m.base.Daemon.Cgroup != nil || m.closed {
		return nil
	}
	m.base.Daemon.UID = uint32(os.Geteuid())
	if !m.base.Features.Cgroup2 || !m.base.Features.NFTSocket {
		return nil
	}
	ref, err := m.enterCgroupLocked()
	if err != nil {
		m.stayOutLocked(err)
		return nil
	}
	m.base.Daemon.Cgroup = &ref
	return nil
}

// stayOutLocked makes do with the daemon's uid.
func (m *Manager) stayOutLocked(err error) {
	m.log.Warn("no cgroup of its own for the daemon: the bypass mark counts for all processes of its user", zap.Error(err))
	m.base.Daemon.Cgroup = nil
}

// enteredLocked waits until the daemon is in its cgroup: a socket belongs to the one it was made in.
func (m *Manager) enteredLocked() error {
	if m.entering == nil {
		return nil
	}
	err := <-m.entering
	m.entering = nil
	return err
}

// Daemon returns the cgroup that only the daemon is in, by which other namespaces tell its sockets from those of whoever sets marks: root in a
// container can. ErrFeature where there can be none.
func (m *Manager) Daemon() (Daemon, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.closed || !m.prepared:
		return Daemon{}, ErrClosed
	case m.base.Daemon.Cgroup != nil:
		return m.base.Daemon, nil
	case !m.base.Features.Cgroup2 || !m.base.Features.NFTSocket:
		return Daemon{}, fmt.Errorf("%w: containers are captured with a writable cgroup v2 and `socket cgroupv2` in nftables only", ErrFeature)
	}
	ref, err := m.enterCgroupLocked()
	if err == nil {
		err = m.enteredLocked()
	}
	if err != nil {
		return Daemon{}, err
	}
	m.base.Daemon = Daemon{Cgroup: &ref, UID: uint32(os.Geteuid())}
	return m.base.Daemon, nil
}

// enterCgroupLocked makes the cgroup and begins to move the daemon there, see enteredLocked: the kernel waits for all processors before it moves a
// process, some 10 ms, in which a start has much else to do.
func (m *Manager) enterCgroupLocked() (CgroupRef, error) {
	own, err := m.host.Cgroup(0)
	if err != nil {
		return CgroupRef{}, err
	}
	pids, err := m.host.CgroupProcs(own)
	if err != nil {
		return CgroupRef{}, err
	}
	if own != "/" && len(pids) == 1 && pids[0] == os.Getpid() && !strings.HasPrefix(path.Base(own), cgroupPrefix) {
		return m.host.MakeCgroup(own) // a service of its own: as good, and systemd stays in charge
	}
	pid := os.Getpid()
	ref, err := m.makeCgroupLocked(own, fmt.Sprintf("daemon-%d", pid))
	if err != nil {
		return CgroupRef{}, err
	}
	if err := m.journalMoveLocked(pid, own, ref.Path); err != nil {
		return CgroupRef{}, err
	}
	moved := make(chan error, 1)
	go func() { moved <- m.host.MoveProcess(pid, ref.Path) }()
	m.entering = moved
	return ref, nil
}

// moveLocked journals a move and does it.
func (m *Manager) moveLocked(pid int, from, to string) error {
	if err := m.journalMoveLocked(pid, from, to); err != nil {
		return err
	}
	return m.host.MoveProcess(pid, to)
}

func (m *Manager) journalMoveLocked(pid int, from, to string) error {
	m.journal.Moved = append(m.journal.Moved, movedProcess{PID: pid, From: from, To: to})
	return m.journal.write(m.spec.Instance.Journal)
}

// ExcludeListeners leaves the processes that listen at these addresses of this machine alone, whoever is captured: upstreams on loopback, whose
// own connections would otherwise come back to them for ever. Nothing is done for addresses that are excluded already, and while only
// cgroups of ours are captured. ErrConflict names the address when nobody is seen to listen there.
//
// nftables can tell processes apart by cgroup only, and BPF by process needs a program on the root of all cgroups, so it is done by cgroup:
// a service of systemd has one of its own, with all its helpers, and old sockets match too. Any other process is moved, with its
// descendants, into a cgroup below the one it is in (so that its session or scope keeps it), and back at the end; its sockets stay with the
// cgroup they were made in, so connections it has already are excluded one by one.
func (m *Manager) ExcludeListeners(ctx context.Context, addrs []netip.AddrPort) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed || !m.prepared {
		return ErrClosed
	}
	if !m.spec.wide() {
		return nil
	}
	ex := Excluded{Cgroups: slices.Clone(m.base.Excluded.Cgroups), Flows: slices.Clone(m.base.Excluded.Flows)}
	for _, addr := range addrs {
		if err := m.excludeLocked(ctx, addr, &ex); err != nil {
			return err
		}
	}
	old := m.base.Excluded
	m.base.Excluded = ex
	if err := m.convergeLocked(ctx, m.spec, false); err != nil {
		m.base.Excluded = old
		return err
	}
	return nil
}

func (m *Manager) excludeLocked(ctx context.Context, addr netip.AddrPort, ex *Excluded) error {
	procs, err := m.host.Listener(ctx, addr)
	if err != nil {
		return err
	}
	if len(procs) == 0 {
		return fmt.Errorf("%w: the upstream at %s is on this machine, and the process behind it is not to be seen, so its traffic would be captured: "+
			"start it before mprox, in the same process namespace", ErrConflict, addr)
	}
	if slices.ContainsFunc(procs, func(p Process) bool { return p.PID == os.Getpid() }) {
		return nil // our own sockets are marked
	}
	if !m.base.Features.Cgroup2 || !m.base.Features.NFTSocket {
		return fmt.Errorf("%w: process %d (%s) behind the upstream at %s cannot be left out of the capture without a writable cgroup v2 and nftables `socket cgroupv2`",
			ErrConflict, procs[0].PID, procs[0].Name, addr)
	}
	for _, p := range procs {
		ex.Flows = append(ex.Flows, p.Flows...)
		if slices.ContainsFunc(ex.Cgroups, func(r CgroupRef) bool { return p.Cgroup == r.Path || strings.HasPrefix(p.Cgroup, r.Path+"/") }) {
			continue
		}
		if service := ownService(p.Cgroup); service != "" && !m.inside(service) {
			ref, err := m.host.MakeCgroup(service)
			if err != nil {
				return err
			}
			ex.Cgroups = append(ex.Cgroups, ref)
			continue
		}
		ref, err := m.makeCgroupLocked(p.Cgroup, fmt.Sprintf("exclude-%d", procs[0].PID))
		if err != nil {
			return err
		}
		if m.base.Features.BPFSockMark {
			// From its first look-up on the right way: with nftables alone, connecting would fail whenever the TUN is not there.
			if err := m.host.MarkCgroup(ref.Path, BypassMark(m.spec.Mask), m.spec.Mask); err != nil {
				m.log.Warn("the upstream's sockets are marked by nftables alone", zap.Error(err))
			}
		}
		if err := m.moveLocked(p.PID, p.Cgroup, ref.Path); err != nil {
			return errors.Join(err, fmt.Errorf("%w: process %d (%s) behind the upstream at %s", ErrConflict, p.PID, p.Name, addr))
		}
		if !slices.Contains(ex.Cgroups, ref) {
			ex.Cgroups = append(ex.Cgroups, ref)
		}
	}
	return nil
}

// inside reports whether this process is in a cgroup.
func (m *Manager) inside(p string) bool {
	own, err := m.host.Cgroup(0)
	return err != nil || own == p || strings.HasPrefix(own, p+"/")
}

// ownService returns the innermost .service of a cgroup path that is one program's; "" for sessions and user managers.
func ownService(p string) string {
	for ; p != "/" && p != "."; p = path.Dir(p) {
		if base := path.Base(p); strings.HasSuffix(base, ".service") && !strings.HasPrefix(base, "user@") {
			return p
		}
	}
	return ""
}

func parentCgroup(p string) string { return path.Dir(p) }
