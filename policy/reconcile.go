// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"context"
	"errors"
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
	// watchRetry is the pause after the netlink sockets have failed.
	watchRetry = time.Second
)

// watchLocked starts the goroutine that keeps the kernel as the last Spec wants it. Close ends it.
func (m *Manager) watchLocked() {
	ctx, cancel := context.WithCancel(context.Background())
	m.stopWatch = cancel
	// One pending event stands for all: the kernel is read afresh.
	events := make(chan struct{}, 1)
	m.watching.Go(func() { m.listen(ctx, events) })
	m.watching.Go(func() { m.reconcile(ctx, events) })
}

// listen turns netlink events into wake-ups, and opens the sockets again should they fail.
func (m *Manager) listen(ctx context.Context, events chan<- struct{}) {
	for ctx.Err() == nil {
		err := m.host.Watch(ctx, func() {
			select {
			case events <- struct{}{}:
			default:
			}
		})
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

func (m *Manager) reconcile(ctx context.Context, events <-chan struct{}) {
	tick := time.NewTicker(recheck)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-events:
			wait(ctx, settle)
		case <-tick.C:
		}
		if err := m.repair(ctx); err != nil && ctx.Err() == nil && !errors.Is(err, ErrClosed) {
			// Whatever it was (a device that vanished between look and touch), the next event or tick tries again.
			m.log.Warn("kernel state not repaired", zap.Error(err))
		}
		wait(ctx, pause)
	}
}

// repair puts back what others have removed, and follows the links' routes and addresses.
func (m *Manager) repair(ctx context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return ErrClosed
	}
	return m.convergeLocked(ctx, m.spec, true)
}
