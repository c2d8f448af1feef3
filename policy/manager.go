// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"reflect"
	"slices"
	"sync"

	"go.uber.org/zap"
)

// Config is what a Manager works with.
type Config struct {
	Host    Host
	Log     *zap.Logger // nil = silent
	LockDir string      // where the locks of this machine lie, the same for all instances; "" = /run/mprox
	Marking Marking     // "" = auto
	// Daemon is whose bypass mark counts, for a Manager of another namespace than the daemon's own (Manager.Daemon); nil = as the Manager finds out.
	Daemon *Daemon
	// Changed is called for every change of links, addresses, routes, rules and nftables while the Manager watches; nil = nobody asks. It must not block.
	Changed func()
	// Gone is told which device of the Spec no longer exists when that keeps the kernel from being repaired; nil = it is logged. It must not block.
	Gone func(device string)
	// Open: the devices that Prepare's spec names are open, and their packets are read. Who connects meanwhile waits, and is not refused.
	Open bool
}

func (c Config) withDefaults() Config {
	if c.Log == nil {
		c.Log = zap.NewNop()
	}
	if c.LockDir == "" {
		c.LockDir = defaultLockDir
	}
	return c
}

// Manager owns what one instance has changed in the kernel. Its methods are safe for concurrent use.
//
//	new ──Prepare──▶ closed (guard, unreachable) ──Apply──▶ capturing ──Close──▶ undone, or closed for good
type Manager struct {
	cfg  Config
	host Host
	log  *zap.Logger

	mu        sync.Mutex // guards what follows
	prepared  bool
	closed    bool
	observed  bool // base.Sockets is filled in
	spec      Spec
	base      Snapshot // what is read once: features, sockets, daemon, excluded
	journal   journal
	locks     *locks
	slots     map[int]bool    // locked by us
	ghosts    []ContextSpec   // contexts of a crashed instance whose processes live on: blocked, unless another context has their slot
	warned    map[string]bool // what has been logged already
	nftText   map[string]string
	nftPrint  map[string]string
	restored  map[string]uint64
	dropped   uint64                 // by guard tables that have been replaced since
	found     map[string][]CgroupRef // what the selectors' cgroups were in the last plan
	pids      map[int]*pidGroup      // selected processes; nil = was not there
	selected  *Selection             // by BPF; nil = nobody
	bpfErr    error                  // why the kernel refuses BPF
	later     bool                   // programs that decide nothing are still to be attached
	entering  <-chan error           // how the daemon's move into its cgroup ends; nil = it is not being moved
	stopWatch context.CancelFunc
	watching  sync.WaitGroup

	events chan struct{} // one pending stands for all: the kernel is read afresh; nil = not prepared
}

// NewManager touches nothing.
func NewManager(cfg Config) *Manager {
	cfg = cfg.withDefaults()
	return &Manager{
		cfg: cfg, host: cfg.Host, log: cfg.Log, slots: map[int]bool{}, nftText: map[string]string{}, nftPrint: map[string]string{},
		restored: map[string]uint64{}, warned: map[string]bool{}, pids: map[int]*pidGroup{},
	}
}

// Snapshot reads the world without changing it: nameservers, addresses and routes as they are.
func (m *Manager) Snapshot(ctx context.Context) (Snapshot, error) {
	m.mu.Lock()
	base := m.spec.withDefaults().TableBase
	m.mu.Unlock()
	return m.host.Snapshot(ctx, base)
}

// Prepare takes the instance lock and those of the slots, writes the journal, and closes everything that spec captures (with Config.Open: captures
// it): guard, unreachable routes, rules, in that order. It adopts what a crashed instance left, capture first. ErrConflict, ErrPrivilege, ErrFeature; then nothing
// is changed. From now on foreign changes are repaired.
func (m *Manager) Prepare(ctx context.Context, spec Spec) (err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed || m.prepared {
		return ErrClosed
	}
	spec = spec.withDefaults()
	if err := spec.validate(); err != nil {
		return err
	}
	if m.locks, err = lockInstance(m.cfg.LockDir, spec.Instance, m.host.Netns()); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			m.unlockLocked()
		}
	}()
	if err := m.lockSlotsLocked(spec); err != nil {
		return err
	}
	if m.base.Features, err = m.host.Features(); err != nil {
		return err
	}
	if !m.cfg.Open {
		spec = closedSpec(spec)
	}
	snap, err := m.host.Snapshot(ctx, spec.TableBase)
	if err != nil {
		return err
	}
	if err := conflicts(spec, snap); err != nil {
		return err
	}
	if others := Neighbours(snap); len(others) > 0 {
		m.log.Info("other network software on this machine is left alone", zap.Strings("names", others))
	}
	m.spec = spec
	adopted, err := m.loadJournalLocked(spec)
	if err != nil {
		return err
	}
	if err = m.closeLocked(ctx, spec); err != nil && !adopted { // what a crash has left closed stays closed
		t := teardown{host: m.host, log: m.log, journal: m.journal}
		if uerr := t.run(context.WithoutCancel(ctx)); uerr != nil {
			err = errors.Join(err, uerr) // the journal stays, for cleanup
		} else {
			err = errors.Join(err, os.Remove(spec.Instance.Journal))
		}
	}
	if err != nil {
		return err
	}
	m.prepared = true
	m.watchLocked()
	return nil
}

// closeLocked makes the kernel closed for the first time. The daemon's move, some 10 ms of waiting for the kernel, goes on beside the rest.
func (m *Manager) closeLocked(ctx context.Context, spec Spec) error {
	if err := m.daemonCgroupLocked(spec); err != nil {
		return err
	}
	if err := m.observeLocked(ctx, spec); err != nil {
		return errors.Join(err, m.enteredLocked())
	}
	return m.convergeLocked(ctx, spec, false)
}

// closedSpec is the spec before its devices are open.
func closedSpec(s Spec) Spec {
	s.Contexts = slices.Clone(s.Contexts)
	for i := range s.Contexts {
		c := &s.Contexts[i]
		c.TUN, c.DNSPort4, c.DNSPort6 = "", 0, 0
	}
	return s
}

// Apply makes the kernel as spec says. It is idempotent, and undoes itself when it fails. Devices named in spec must be open.
func (m *Manager) Apply(ctx context.Context, spec Spec) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed || !m.prepared {
		return ErrClosed
	}
	spec = spec.withDefaults()
	if err := spec.validate(); err != nil {
		return err
	}
	if spec.Mask != m.spec.Mask || spec.TableBase != m.spec.TableBase || spec.RulePriority != m.spec.RulePriority || spec.Instance != m.spec.Instance {
		return fmt.Errorf("kernel.* and the socket are fixed at start")
	}
	if err := m.lockSlotsLocked(spec); err != nil {
		return err
	}
	if err := m.observeLocked(ctx, spec); err != nil {
		return err
	}
	old := m.spec
	m.spec = spec
	if err := m.convergeLocked(ctx, spec, false); err != nil {
		m.spec = old
		if uerr := m.convergeLocked(context.WithoutCancel(ctx), old, false); uerr != nil {
			m.log.Error("kernel state is neither the old nor the new one; it is repaired with the next event", zap.Error(uerr))
		}
		return err
	}
	return nil
}

// convergeLocked makes the kernel as spec (and the ghosts) want it. repair counts what had to be put back.
func (m *Manager) convergeLocked(ctx context.Context, spec Spec, repair bool) error {
	if err := m.daemonCgroupLocked(spec); err != nil {
		return err
	}
	err := m.changeLocked(ctx, spec, repair)
	if moved := m.enteredLocked(); moved != nil {
		m.stayOutLocked(moved)
		err = m.changeLocked(ctx, spec, repair)
	}
	return err
}

func (m *Manager) changeLocked(ctx context.Context, spec Spec, repair bool) error {
	m.dropGhostsLocked()
	spec.Contexts = m.withGhosts(spec.Contexts)
	snap, err := m.host.Snapshot(ctx, spec.TableBase)
	if err != nil {
		return err
	}
	snap.Features, snap.Sockets, snap.Daemon, snap.Excluded = m.base.Features, m.base.Sockets, m.base.Daemon, m.base.Excluded
	if repair {
		// Somebody else's rule in our block is no reason to leave ours broken.
		snap.Rules = slices.DeleteFunc(snap.Rules, func(r Rule) bool { return r.Protocol != Protocol })
	}
	snap.Features.BPF = m.bpfInForceLocked(spec)
	found, err := m.findCgroupsLocked(spec)
	if err != nil {
		return err
	}
	if snap.Cgroups = found; snap.Features.BPF {
		// Processes are followed where they are.
	} else if snap.Cgroups, err = m.pidCgroupsLocked(ctx, spec, found); err != nil {
		return err
	}
	plan, err := NewPlan(spec, snap)
	if err != nil {
		return errors.Join(err, m.bpfErr)
	}
	m.found = found
	if err := m.recordLocked(spec, plan); err != nil {
		return err
	}
	a := applier{host: m.host, warn: m.warnLocked, snap: snap, plan: plan, nftText: m.nftText, nftPrint: m.nftPrint}
	a.replacing = m.keepDroppedLocked
	a.owns = ownsOf(Spec{Instance: spec.Instance, TableBase: spec.TableBase, RulePriority: spec.RulePriority, Contexts: m.journal.spec().Contexts})
	a.count = func(object string, n int) {
		if repair {
			m.restored[object] += uint64(n)
		}
	}
	m.endSocketsLocked(spec)
	if err := a.run(ctx); err != nil {
		return err
	}
	if refused, err := m.applyBPFLocked(plan, repair); err != nil {
		return err
	} else if refused {
		return m.changeLocked(ctx, m.spec, repair)
	}
	if err := m.movePIDsLocked(ctx, spec); err != nil {
		return err
	}
	return m.forgetLocked(spec)
}

// maxWarned bounds what is remembered to have been logged; devices come and go.
const maxWarned = 1000

func (m *Manager) warnLocked(object, msg string, fields ...zap.Field) {
	if m.warned[object] {
		return
	}
	if len(m.warned) >= maxWarned {
		clear(m.warned)
	}
	m.warned[object] = true
	m.log.Warn(msg, fields...)
}

// recordLocked writes the journal with what is about to be changed, if that is not in it yet.
func (m *Manager) recordLocked(spec Spec, plan *Plan) error {
	contexts, sysctls := slices.Clone(m.journal.Contexts), maps.Clone(m.journal.Sysctls)
	m.journal.addContexts(spec.Contexts)
	if m.journal.Sysctls == nil {
		m.journal.Sysctls = map[string]string{}
	}
	for _, s := range plan.Sysctls {
		if _, there := m.journal.Sysctls[s.Key]; there || s.Own {
			continue
		}
		have, err := m.host.Sysctl(s.Key)
		if err == nil && have != s.Value {
			m.journal.Sysctls[s.Key] = have
		}
	}
	reopen := m.journal.Reopen
	if m.journal.Reopen = staysClosed(spec); !sameClosed(reopen, m.journal.Reopen) {
		return m.journal.write(spec.Instance.Journal)
	}
	if reflect.DeepEqual(contexts, m.journal.Contexts) && maps.Equal(sysctls, m.journal.Sysctls) {
		return nil
	}
	return m.journal.write(spec.Instance.Journal)
}

// endSocketsLocked ends what contexts that are about to be removed have left of connections: the kernel would go on to send their last
// segments, past us.
func (m *Manager) endSocketsLocked(spec Spec) {
	var marks []uint32
	gone := false
	for _, j := range m.journal.Contexts {
		if slices.ContainsFunc(spec.Contexts, inSlot(j.Slot)) {
			continue
		}
		gone = true
		if j.Mode != ModeGlobal {
			marks = append(marks, ContextMark(m.spec.Mask, j.Slot))
		}
	}
	if !gone {
		return
	}
	if err := m.host.DestroySockets(marks, m.spec.Mask); err != nil {
		m.log.Debug("captured connections not ended", zap.Error(err))
	}
}

// forgetLocked takes contexts out of the journal whose objects have just been removed.
func (m *Manager) forgetLocked(spec Spec) error {
	n := len(m.journal.Contexts)
	m.journal.Contexts = slices.DeleteFunc(m.journal.Contexts, func(j journalContext) bool {
		return !slices.ContainsFunc(spec.Contexts, inSlot(j.Slot))
	})
	if len(m.journal.Contexts) == n {
		return nil
	}
	return m.journal.write(spec.Instance.Journal)
}

// observeLocked lists the sockets that are older than the guard. Conntrack is switched on first, by a table that does nothing: from then on
// it knows who opened a connection, so that none falls between the list and the guard.
func (m *Manager) observeLocked(ctx context.Context, spec Spec) error {
	if m.observed || len(spec.Contexts) == 0 {
		return nil
	}
	watch := NFTable{Name: spec.Instance.tableName(), chains: []nfChain{
		{name: "prerouting", typ: "filter", hook: "prerouting", priority: prioMangle, rules: []nfRule{rule(stCtNew{}, accept())}},
		{name: "output", typ: "route", hook: "output", priority: prioMangle, rules: []nfRule{rule(stCtNew{}, accept())}},
	}}
	there, err := m.host.NFTables(watch.Name)
	if err != nil {
		return err
	}
	if _, ok := there[watch.Name]; !ok { // a guard that is there, even without its journal, is never replaced by less
		if err := m.host.ApplyNFT([]NFTable{watch}, nil); err != nil {
			return err
		}
	}
	if m.base.Sockets, err = m.host.Sockets(ctx); err != nil {
		return err
	}
	m.observed, m.journal.Sockets = true, m.base.Sockets
	return m.journal.write(spec.Instance.Journal)
}

// lockSlotsLocked takes the locks of the spec's slots.
func (m *Manager) lockSlotsLocked(spec Spec) error {
	for _, c := range spec.Contexts {
		if m.slots[c.Slot] {
			continue
		}
		ok, err := m.locks.slot(c.Slot)
		if err != nil {
			return err
		}
		if !ok {
			return fmt.Errorf("%w: slot %d of context %q is in use by an `mprox run` in this network namespace", ErrConflict, c.Slot, c.Name)
		}
		m.slots[c.Slot] = true
	}
	return nil
}

func (m *Manager) unlockLocked() {
	if m.locks != nil {
		m.locks.close()
		m.locks = nil
	}
	clear(m.slots)
}

// AcquireSlot reserves a slot that no other instance in this network namespace uses, and nothing in the kernel does: from the top down.
// Prepare must have been called. ErrConflict when all are in use.
func (m *Manager) AcquireSlot(ctx context.Context) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed || !m.prepared {
		return 0, ErrClosed
	}
	snap, err := m.host.Snapshot(ctx, m.spec.TableBase)
	if err != nil {
		return 0, err
	}
	for slot := MaxContexts - 1; slot >= 0; slot-- {
		if m.slots[slot] {
			continue
		}
		// Blocked survivors of a killed run hold no lock.
		own := owns{spec: m.spec, slots: map[int]bool{slot: true}}
		if slices.ContainsFunc(snap.Rules, own.rule) || slices.ContainsFunc(snap.Routes, own.route) {
			continue
		}
		ok, err := m.locks.slot(slot)
		if err != nil {
			return 0, err
		}
		if ok {
			m.slots[slot] = true
			return slot, nil
		}
	}
	return 0, fmt.Errorf("%w: all %d marks are in use", ErrConflict, MaxContexts)
}

// ReleaseSlot gives a slot back that no context of the Spec uses any more.
func (m *Manager) ReleaseSlot(slot int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.locks != nil && m.slots[slot] {
		m.locks.release(slot)
		delete(m.slots, slot)
	}
}

// Close stops watching and undoes what mode says. It is idempotent.
func (m *Manager) Close(ctx context.Context, mode StopMode) error {
	m.mu.Lock()
	stop := m.stopWatch
	m.mu.Unlock()
	if stop != nil {
		stop()
		m.watching.Wait()
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return nil
	}
	m.closed = true
	if !m.prepared {
		return nil
	}
	defer m.unlockLocked()
	spec := closedSpec(m.spec)
	spec.Contexts = slices.DeleteFunc(spec.Contexts, func(c ContextSpec) bool { return !m.keep(c, mode) })
	m.ghosts = slices.DeleteFunc(m.ghosts, func(g ContextSpec) bool {
		heir := slices.ContainsFunc(m.spec.Contexts, inSlot(g.Slot)) && !slices.ContainsFunc(spec.Contexts, inSlot(g.Slot))
		return mode == StopOpen || heir // as the rest of the context that has got its slot
	})
	if len(spec.Contexts)+len(m.ghosts) > 0 {
		m.spec = spec
		return m.convergeLocked(ctx, spec, false)
	}
	t := teardown{host: m.host, log: m.log, journal: m.journal}
	if err := t.run(ctx); err != nil {
		return err // the journal stays, for cleanup
	}
	return os.Remove(m.spec.Instance.Journal)
}

// keep reports whether a context stays closed when the daemon stops.
func (m *Manager) keep(c ContextSpec, mode StopMode) bool {
	switch mode {
	case StopOpen:
		return false
	case StopBlock:
		return c.Mode != ModeDisabled
	}
	// What `mprox run` has started was meant to be proxied for all its life.
	return c.OnStop == OnEndBlock || m.spec.Instance.Run && m.populated(c.Cgroups)
}
