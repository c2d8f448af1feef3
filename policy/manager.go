// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"context"
	"net/netip"

	"go.uber.org/zap"
)

// Config is what a Manager works with.
type Config struct {
	Host    Host
	Log     *zap.Logger // nil = silent
	LockDir string      // where the locks of this machine lie, the same for all instances; "" = /run/mprox
}

// Manager owns what one instance has changed in the kernel. Its methods are safe for concurrent use.
type Manager struct{}

// NewManager touches nothing.
func NewManager(cfg Config) *Manager { return &Manager{} }

// Snapshot reads the world without changing it: nameservers, addresses and routes as they are.
func (m *Manager) Snapshot(ctx context.Context) (Snapshot, error) { return Snapshot{}, ErrClosed }

// Prepare takes the instance lock and those of the slots, writes the journal, and closes everything that spec captures: guard, unreachable
// routes, rules, in that order. It adopts what a crashed instance left, capture first. ErrConflict, ErrPrivilege, ErrFeature; then nothing
// is changed. From now on foreign changes are repaired.
func (m *Manager) Prepare(ctx context.Context, spec Spec) error { return ErrClosed }

// Apply makes the kernel as spec says. It is idempotent, and undoes itself when it fails. Devices named in spec must be open.
func (m *Manager) Apply(ctx context.Context, spec Spec) error { return ErrClosed }

// ExcludeListeners leaves the processes that listen at these addresses of this machine alone in global mode: upstreams on loopback.
// ErrConflict names the address when the process cannot be seen.
func (m *Manager) ExcludeListeners(ctx context.Context, addrs []netip.AddrPort) error {
	return ErrClosed
}

// AcquireSlot reserves a slot that no other instance in this network namespace uses, and nothing in the kernel does: from the top down.
func (m *Manager) AcquireSlot(ctx context.Context) (int, error) { return 0, ErrClosed }

// ReleaseSlot gives a slot back that no context of the Spec uses any more.
func (m *Manager) ReleaseSlot(slot int) {}

// NewCgroup makes a cgroup below the caller's whose sockets belong to the context in slot.
func (m *Manager) NewCgroup(ctx context.Context, name string, slot int) (*Cgroup, error) {
	return nil, ErrClosed
}

// Stats returns counters since Prepare.
func (m *Manager) Stats() Stats { return Stats{} }

// Close stops watching and undoes what mode says. It is idempotent.
func (m *Manager) Close(ctx context.Context, mode StopMode) error { return ErrClosed }

// Stats is what status and metrics show.
type Stats struct {
	GuardActive  bool
	GuardDropped uint64            // packets
	Restored     map[string]uint64 // by object: rule, route, nft, link, sysctl
}

// Cgroup is a cgroup made by Manager.NewCgroup.
type Cgroup struct{}

// Ref returns what ContextSpec.Cgroups takes.
func (c *Cgroup) Ref() CgroupRef { return CgroupRef{} }

// FD is the directory's descriptor, for SysProcAttr.CgroupFD (clone3 CLONE_INTO_CGROUP). Valid until Remove.
func (c *Cgroup) FD() int { return -1 }

// Method says how sockets are marked: "bpf+nft" or "nft".
func (c *Cgroup) Method() string { return "" }

// Wait returns when the last process has gone, or with ctx's error. A cgroup nothing was started in yet is empty.
func (c *Cgroup) Wait(ctx context.Context) error { return ErrClosed }

// Remove removes the directory; it fails while processes live in it. Idempotent.
func (c *Cgroup) Remove() error { return ErrClosed }

// Report says what Cleanup did.
type Report struct {
	Removed []string // one line an object
	Skipped string   // why nothing was done: the owner lives
}

// Cleanup removes, without a daemon, what a crash of the instance left behind, and restores the sysctls. It does nothing when the owner of
// the journal lives. A damaged journal is an error (ErrJournal), after everything that carries our marks has been removed.
func Cleanup(ctx context.Context, cfg Config, in Instance) (Report, error) {
	return Report{}, ErrClosed
}
