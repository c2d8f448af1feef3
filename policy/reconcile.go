// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"context"
	"errors"
	"slices"
	"time"

	"go.uber.org/zap"
)

const (
	// settle lets a burst of changes (a link coming up, our own transaction) end before the kernel is read. What was deleted has to be back
	// within a second.
	settle = 50 * time.Millisecond
	// pause after a repair keeps a stream of route updates from keeping us busy.
	pause = 100 * time.Millisecond
	// recheck finds what brings no event: settings, and cgroups that have become empty.
	recheck = 30 * time.Second
	// findEvery finds cgroups that were made again: they bring no event either, and until then nobody in them is selected.
	findEvery = 500 * time.Millisecond
	// watchRetry is the pause after the netlink sockets have failed.
	watchRetry = time.Second
)

// watchLocked starts the goroutine that keeps the kernel as the last Spec wants it. Close ends it.
func (m *Manager) watchLocked() {
	ctx, cancel := context.WithCancel(context.Background())
	m.stopWatch = cancel
	m.events = make(chan struct{}, 1)
	m.watching.Go(func() { m.listen(ctx) })
	m.watching.Go(func() { m.reconcile(ctx) })
}

// wake has the kernel looked at soon.
func (m *Manager) wake() {
	select {
	case m.events <- struct{}{}:
	default:
	}
}

// changed is called for every netlink event.
func (m *Manager) changed() {
	m.wake()
	if m.cfg.Changed != nil {
		m.cfg.Changed()
	}
}

// listen turns netlink events into wake-ups, and opens the sockets again should they fail.
func (m *Manager) listen(ctx context.Context) {
	for ctx.Err() == nil {
		err := m.host.Watch(ctx, m.changed)
		if ctx.Err() != nil {
			return
		}
		m.log.Warn("kernel events are lost for a moment", zap.Error(err))
		wait(ctx, watchRetry)
	}
}

// wait returns after d, or when ctx ends.
func wait(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

func (m *Manager) reconcile(ctx context.Context) {
	tick := time.NewTicker(recheck)
	defer tick.Stop()
	find := time.NewTicker(findEvery)
	defer find.Stop()
	for {
		old := false
		select {
		case <-ctx.Done():
			return
		case <-m.events:
			wait(ctx, settle)
		case <-find.C:
			m.syncBPF()
			if !m.cgroupsMoved() {
				continue
			}
		case <-tick.C:
			old = true
		}
		m.report(ctx, m.repair(ctx, old))
		wait(ctx, pause)
	}
}

// report says what has kept the kernel from being repaired. Whatever it was (a device that vanished between look and touch), the next event or tick
// tries again.
func (m *Manager) report(ctx context.Context, err error) {
	if err == nil || ctx.Err() != nil || errors.Is(err, ErrClosed) {
		return
	}
	if gone, ok := errors.AsType[*DeviceGoneError](err); ok && m.cfg.Gone != nil {
		m.cfg.Gone(gone.Device)
		return
	}
	m.log.Warn("kernel state not repaired", zap.Error(err))
}

// repair puts back what others have removed, and follows the links' routes and addresses. With old, it also forgets the sockets older than
// the start that have been closed since.
func (m *Manager) repair(ctx context.Context, old bool) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return ErrClosed
	}
	if old {
		m.pruneLocked(ctx)
	}
	return m.convergeLocked(ctx, m.spec, true)
}

// pruneLocked shortens the lists of sockets that are older than the guard: a port that has become free may be a server's one day. The lists
// never grow, since conntrack knows everything younger.
func (m *Manager) pruneLocked(ctx context.Context) {
	old := m.base.Sockets
	if len(old.Inbound)+len(old.Clients) == 0 {
		return
	}
	now, err := m.host.Sockets(ctx)
	if err != nil {
		m.warnLocked("sockets", "old sockets cannot be listed", zap.Error(err))
		return
	}
	inbound, clients := make(map[Tuple]bool, len(now.Inbound)), make(map[uint16]bool, len(now.Clients))
	for _, t := range now.Inbound {
		inbound[t] = true
	}
	for _, p := range now.Clients {
		clients[p] = true
	}
	m.base.Sockets = Sockets{
		Inbound: slices.DeleteFunc(slices.Clone(old.Inbound), func(t Tuple) bool { return !inbound[t] }),
		Clients: slices.DeleteFunc(slices.Clone(old.Clients), func(p uint16) bool { return !clients[p] }),
	}
	if len(m.base.Sockets.Inbound) == len(old.Inbound) && len(m.base.Sockets.Clients) == len(old.Clients) {
		return
	}
	m.journal.Sockets = m.base.Sockets
	if err := m.journal.write(m.spec.Instance.Journal); err != nil {
		m.log.Warn("journal", zap.Error(err))
	}
}
