// SPDX-License-Identifier: GPL-3.0-or-later

package daemon

import (
	"context"
	"errors"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/mutex-proxy/mutex/policy"
	"github.com/mutex-proxy/mutex/policy/process"
)

const (
	// doorRetry is when somebody who could not be told is looked at again: between the veth and the container's first instruction are some hundredths of a
	// second. It is doubled each time.
	doorRetry = 20 * time.Millisecond
	// doorPause is between two looks, however many routes change meanwhile.
	doorPause = 5 * time.Millisecond
	// doorPatience is the longest pause: whoever is not known by then is not being started, or the runtime does not answer.
	doorPatience = time.Second
)

// doorman knows the ports on the bridges of container runtimes, as long as a context selects containers by name. The kernel drops what comes from a port
// that he has not let in (policy.ContextSpec.Containers): that of a container that has just been started may be a selected one's. He lets those in that
// are captured in their own namespace, and those that nobody has selected.
//
//	a new port ──▶ whose? ──▶ nobody's whom a context names ──────────▶ let in
//	                 ▲   └──▶ a selected container's ──▶ a seat in it ──▶ let in
//	                 └─────── not known yet
type doorman struct {
	d       *Daemon
	bell    bell
	once    sync.Once
	late    atomic.Bool // the kernel does not know of the last change yet
	looking sync.Mutex  // one look at a time; guards what follows
	said    string      // what has been logged last
	named   map[string]bool

	mu      sync.Mutex // guards what follows, for a moment each
	bridges []string   // that no runtime has made
	ports   []int
}

func newDoorman(d *Daemon) *doorman { return &doorman{d: d, bell: newBell()} }

// knock has the ports looked at soon.
func (w *doorman) knock() { w.bell.ring() }

// passing are the bridges and the ports that are let through.
func (w *doorman) passing() (bridges []string, ports []int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.bridges), slices.Clone(w.ports)
}

// named are the containers that are selected by name. A number is taken for that of a process, which runs already.
func (s selection) named() []string {
	return slices.DeleteFunc(slices.Clone(s.guests), func(name string) bool {
		_, err := strconv.Atoi(name)
		return err == nil
	})
}

// names are the containers that all contexts at work select by name.
func (d *Daemon) names() []string {
	var out []string
	for _, c := range d.live() {
		c.mu.Lock()
		out = append(out, c.who.named()...)
		c.mu.Unlock()
	}
	return out
}

// settle looks, and tells the kernel what has changed.
func (w *doorman) settle(ctx context.Context) error {
	_, _, err := w.update(ctx)
	return err
}

// update is settle. again: somebody is not known yet.
func (w *doorman) update(ctx context.Context) (changed, again bool, err error) {
	changed, again = w.look(ctx)
	if !changed && !w.late.Load() {
		return false, again, nil
	}
	w.late.Store(true)
	if err := w.d.lockReload(ctx); err != nil {
		return true, again, err
	}
	defer w.d.reload.Unlock()
	if err := w.d.manager.Apply(ctx, w.d.spec()); err != nil {
		return true, true, err
	}
	w.late.Store(false)
	return true, again, nil
}

// look finds out who is there. What cannot be found out stays closed, and is looked at again. From the first time that somebody is selected by name
// on, it goes on by itself.
func (w *doorman) look(ctx context.Context) (changed, again bool) {
	w.looking.Lock()
	defer w.looking.Unlock()
	names := w.d.names()
	if len(names) == 0 {
		return w.admit(nil, nil), false
	}
	w.once.Do(func() { w.d.leftovers.Go(func() { w.run(w.d.life) }) })
	bridges, ports, err := w.d.host.Ports()
	if err != nil {
		w.say(err)
		return false, true
	}
	foreign, known := w.passing()
	known = slices.DeleteFunc(known, func(i int) bool {
		return !slices.ContainsFunc(ports, func(p policy.Port) bool { return p.Index == i })
	})
	unknown := slices.DeleteFunc(ports, func(p policy.Port) bool {
		return slices.Contains(known, p.Index) || slices.Contains(foreign, p.Bridge)
	})
	if len(unknown) == 0 && !slices.ContainsFunc(bridges, func(b string) bool { return !slices.Contains(foreign, b) && !w.named[b] && !process.RuntimeBridge(b) }) {
		return w.admit(slices.DeleteFunc(foreign, func(b string) bool { return !slices.Contains(bridges, b) }), known), false
	}
	inventory, ierr := w.d.containers.Inventory(ctx)
	if ierr == nil {
		w.named = make(map[string]bool)
		for _, b := range inventory.Bridges {
			w.named[b] = true
		}
	}
	foreign = slices.DeleteFunc(bridges, func(b string) bool { return w.named[b] || process.RuntimeBridge(b) })
	unknown = slices.DeleteFunc(unknown, func(p policy.Port) bool { return slices.Contains(foreign, p.Bridge) })
	if len(unknown) == 0 {
		return w.admit(foreign, known), false
	}
	netns, pids, err := w.d.host.Behind(unknown)
	if err := errors.Join(err, ierr); err != nil {
		w.say(err)
	}
	chosen := make(map[string]bool)
	for _, name := range names {
		for _, c := range inventory.Named(name) {
			chosen[c.ID] = true
		}
	}
	for _, p := range unknown {
		inode, ok := netns[p.Index]
		if ok && (w.d.captured(inode) || letIn(idsOf(pids[inode]), inventory, chosen)) {
			known = append(known, p.Index)
		} else {
			again = true
		}
	}
	return w.admit(foreign, known), again
}

// idsOf are the containers that processes may be of.
func idsOf(pids []int) (ids []string) {
	for _, pid := range pids {
		ids = append(ids, process.ContainerIDs(pid)...)
	}
	return ids
}

// letIn reports whether ids, from the names of cgroups, are those of containers that the runtime knows, and that nobody has chosen.
func letIn(ids []string, inventory process.Inventory, chosen map[string]bool) bool {
	if slices.ContainsFunc(ids, func(id string) bool { return chosen[id] }) {
		return false
	}
	return slices.ContainsFunc(inventory.Containers, func(c process.Container) bool { return slices.Contains(ids, c.ID) })
}

// admit keeps who is let through, and reports whether that has changed.
func (w *doorman) admit(bridges []string, ports []int) bool {
	slices.Sort(ports)
	w.mu.Lock()
	defer w.mu.Unlock()
	if slices.Equal(w.bridges, bridges) && slices.Equal(w.ports, ports) {
		return false
	}
	w.bridges, w.ports = bridges, ports
	return true
}

// say logs what keeps ports closed, once.
func (w *doorman) say(err error) {
	if w.said != err.Error() {
		w.said = err.Error()
		w.d.log.Warn("containers on bridges that are not known yet stay closed: nobody tells who they are", zap.Error(err))
	}
}

// run looks whenever a device has changed or a container has been started, until ctx ends.
func (w *doorman) run(ctx context.Context) {
	pause := doorRetry
	for ctx.Err() == nil {
		news := w.d.news.next()
		changed, again, err := w.update(ctx)
		if err != nil && ctx.Err() == nil && !errors.Is(err, policy.ErrClosed) {
			w.say(err)
		}
		if changed {
			pause = doorRetry
		}
		var retry <-chan time.Time
		if again {
			retry = time.After(pause)
			pause = min(2*pause, doorPatience)
		}
		wait(ctx, doorPause)
		select {
		case <-w.bell:
			if !again {
				pause = doorRetry
			}
		case <-news:
			pause = doorRetry
		case <-retry:
		case <-ctx.Done():
		}
	}
}

// wait returns after pause, or when ctx ends.
func wait(ctx context.Context, pause time.Duration) {
	t := time.NewTimer(pause)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
