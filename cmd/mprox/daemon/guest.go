// SPDX-License-Identifier: GPL-3.0-or-later

package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/mutex-proxy/mutex/control"
	"github.com/mutex-proxy/mutex/control/client"
	"github.com/mutex-proxy/mutex/policy"
	"github.com/mutex-proxy/mutex/policy/process"
)

const (
	// guestRetry is when a container that could not be captured is looked at again, though no event speaks of it.
	guestRetry = 2 * time.Second
	// guestPatience bounds how long a start and an attach wait for the containers that they name.
	guestPatience = 10 * time.Second
	// lockPause is between two tries to become the one who changes the plan, for who must give up when told to.
	lockPause = 5 * time.Millisecond
)

// errEnded: a process that was selected by its number is gone, and so is what the number meant.
var errEnded = errors.New("it has ended")

// errTaken: another context captures all that is in its network namespace.
var errTaken = errors.New("it is captured already")

// guest is one container that a context selects or excludes, by name or by a process in it, whether it runs or not.
//
//	find ──▶ seat (its own namespace) ──────────▶ its last process ends, or the guest is told to go ──▶ find
//	     └─▶ shared (the daemon's: its cgroup) ─▶ ...
type guest struct {
	d     *Daemon
	c     *liveContext
	name  string
	spare bool // excluded: of interest only where it shares the daemon's namespace
	log   *zap.Logger
	first chan error // how the first try ended
	done  chan struct{}
	stop  context.CancelFunc

	living sync.WaitGroup

	mu     sync.Mutex // guards what follows
	mode   policy.StopMode
	seats  []*seat // this container's, as it was started one time after the other, as long as somebody is left in the namespace
	shared *policy.Selector
}

// newsroom tells those who wait for a container that one has been started.
type newsroom struct {
	mu     sync.Mutex
	change chan struct{}
	once   sync.Once
}

// next is closed with the next piece of news.
func (n *newsroom) next() <-chan struct{} {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.change == nil {
		n.change = make(chan struct{})
	}
	return n.change
}

func (n *newsroom) publish() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.change != nil {
		close(n.change)
		n.change = nil
	}
}

// invite brings the guests of a context after its selection, and tells those that stay that something may have changed. A guest that goes is free when
// invite returns; the kernel plan may have to be applied again then.
func (d *Daemon) invite(ctx context.Context, c *liveContext) (again bool) {
	type key struct {
		name  string
		spare bool
	}
	c.mu.Lock()
	wanted := map[key]bool{}
	for _, n := range c.who.guests {
		wanted[key{n, false}] = true
	}
	for _, n := range c.who.spared {
		wanted[key{n, true}] = true
	}
	var leaving []*guest
	c.guests = slices.DeleteFunc(c.guests, func(g *guest) bool {
		k := key{g.name, g.spare}
		if !wanted[k] {
			leaving = append(leaving, g)
			return true
		}
		delete(wanted, k)
		return false
	})
	staying := slices.Clone(c.guests)
	for k := range wanted {
		life, stop := context.WithCancel(context.WithoutCancel(d.life)) // how it ends, leave says
		g := &guest{
			d: d, c: c, name: k.name, spare: k.spare, log: c.log.With(zap.String("container", k.name)), stop: stop, mode: policy.StopConfigured,
			first: make(chan error, 1), done: make(chan struct{}),
		}
		c.guests = append(c.guests, g)
		d.news.once.Do(func() { d.leftovers.Go(func() { d.containers.Follow(d.life, d.news.publish) }) })
		go g.run(life)
	}
	c.mu.Unlock()
	for _, g := range staying {
		g.renew(ctx)
	}
	for _, g := range leaving {
		again = g.leave(policy.StopOpen) || again
	}
	return again
}

// welcome captures the containers that the configuration names and that run, before anybody is told that the daemon is ready.
func (d *Daemon) welcome(ctx context.Context) {
	for _, c := range d.live() {
		d.invite(ctx, c)
	}
	for _, c := range d.live() {
		_ = c.greet(ctx, slices.Concat(c.who.guests, c.who.spared)) // each has said in the log what is wrong, and goes on trying
	}
	d.leftClosed(ctx)
}

// leave ends the guest and waits for it. It reports whether the plan of the daemon's own namespace was about it.
func (g *guest) leave(mode policy.StopMode) bool {
	g.mu.Lock()
	g.mode = mode
	shared := g.shared != nil
	g.mu.Unlock()
	g.stop()
	<-g.done
	return shared
}

// greet waits until each of the context's guests has been tried once, and returns what went wrong with those called names.
func (c *liveContext) greet(ctx context.Context, names []string) error {
	ctx, cancel := context.WithTimeout(ctx, guestPatience)
	defer cancel()
	c.mu.Lock()
	guests := slices.Clone(c.guests)
	c.mu.Unlock()
	var errs []error
	for _, g := range guests {
		if !slices.Contains(names, g.name) {
			continue
		}
		select {
		case err := <-g.first:
			g.first <- err // for whoever asks next
			if err != nil {
				errs = append(errs, fmt.Errorf("container %s: %w", g.name, err))
			}
		case <-ctx.Done():
			errs = append(errs, fmt.Errorf("container %s: %w", g.name, context.Cause(ctx)))
		}
	}
	return errors.Join(errs...)
}

// run captures the container whenever it runs, until ctx ends.
func (g *guest) run(ctx context.Context) {
	defer close(g.done)
	defer g.living.Wait()
	said := ""
	for ctx.Err() == nil {
		news := g.d.news.next() // before looking, or a start in between would be missed
		err := g.visit(ctx)
		g.tell(err)
		if ctx.Err() != nil || errors.Is(err, errEnded) {
			return
		}
		switch {
		case err == nil:
			said = ""
			continue // it has ended, and may have been started again already
		case errors.Is(err, process.ErrNoContainer), errors.Is(err, os.ErrNotExist): // the latter when it has just ended
			g.log.Debug("not there yet", zap.Error(err))
		case err.Error() != said:
			g.log.Error("container is not captured", zap.Error(err))
		}
		said = err.Error()
		retry := time.NewTimer(guestRetry)
		select {
		case <-news:
		case <-retry.C:
		case <-ctx.Done():
		}
		retry.Stop()
	}
}

// tell keeps how the first try has ended.
func (g *guest) tell(err error) {
	select {
	case g.first <- err:
	default:
	}
}

// visit captures the container as it is now, until its last process has ended.
func (g *guest) visit(ctx context.Context) error {
	pid, byPID, err := g.d.whoIs(ctx, g.name)
	if err != nil {
		return err
	}
	err = g.take(ctx, pid)
	if byPID && err == nil {
		return errEnded
	}
	return err
}

// whoIs returns a process of the container that a name means: a number is that of a process, as long as it has one.
func (d *Daemon) whoIs(ctx context.Context, name string) (pid int, byPID bool, err error) {
	if pid, err = strconv.Atoi(name); err == nil {
		switch err = process.Lives(pid); {
		case err == nil:
			return pid, true, nil
		case !errors.Is(err, os.ErrNotExist): // the kernel's own threads are in the machine's first network namespace: nobody's container
			return 0, true, fmt.Errorf("process %d: %w", pid, err)
		}
	}
	found, err := d.containers.Find(ctx, name)
	return found.PID, false, err
}

// take captures the namespace that a process is in, and returns when that process has ended. The capture stays until the namespace is empty: others
// may share it, and so may the container when it is started again.
func (g *guest) take(ctx context.Context, pid int) error {
	host, err := g.d.host.Container(pid)
	if errors.Is(err, policy.ErrSameNetns) {
		return g.share(ctx, pid)
	}
	if err != nil {
		return err
	}
	if g.spare { // nothing of a namespace of its own is captured unless it is selected
		g.tell(nil)
		return errors.Join(host.Ended(ctx), host.Close())
	}
	if s := g.d.seatIn(host.Netns().Inode); s != nil {
		var err error
		if s.c != g.c {
			err = fmt.Errorf("%w: context %s captures its network namespace, for container %s", errTaken, s.c.name, s.name)
			g.log.Warn("container is captured already", zap.Error(err))
		}
		g.tell(err)
		return errors.Join(g.stand(ctx, host), host.Close())
	}
	s := &seat{d: g.d, c: g.c, name: g.name, host: host, log: g.log}
	if err := s.open(ctx); err != nil {
		return errors.Join(err, s.close(policy.StopOpen))
	}
	g.mu.Lock()
	g.seats = append(g.seats, s)
	g.mu.Unlock()
	g.log.Info("container captured", zap.Int("pid", pid), zap.Uint64("netns", host.Netns().Inode))
	g.living.Go(func() { g.outlive(ctx, s) })
	if err := g.d.doorman.settle(ctx); err != nil && ctx.Err() == nil {
		g.log.Error("container is captured, and its way to its neighbours is still closed", zap.Error(err))
	}
	g.tell(nil)
	return host.Ended(ctx)
}

// outlive closes a seat when its namespace is empty, or the guest is told to go.
func (g *guest) outlive(ctx context.Context, s *seat) {
	err := s.host.Wait(ctx)
	mode := policy.StopOpen
	g.mu.Lock()
	if err != nil {
		mode = g.mode
	}
	g.seats = slices.DeleteFunc(g.seats, func(x *seat) bool { return x == s })
	g.mu.Unlock()
	if ctx.Err() != nil {
		err = nil // it was told to go
	}
	err = errors.Join(err, s.close(mode))
	g.log.Info("container let go", zap.Error(err))
}

// stand waits in a namespace that is captured already, for this container's end or that of the capture.
func (g *guest) stand(ctx context.Context, host *policy.ContainerHost) error {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	unseated := errors.New("no longer captured by another")
	g.living.Go(func() {
		for g.d.seatIn(host.Netns().Inode) != nil {
			select {
			case <-time.After(guestRetry):
			case <-ctx.Done():
				return
			}
		}
		stop(unseated)
	})
	err := host.Ended(ctx)
	if errors.Is(err, unseated) {
		return nil
	}
	return err
}

// captured reports whether everything in a network namespace is captured.
func (d *Daemon) captured(netns uint64) bool {
	s := d.seatIn(netns)
	return s != nil && s.opened.Load()
}

// seatIn returns the seat in a network namespace; nil = none.
func (d *Daemon) seatIn(netns uint64) *seat {
	for _, c := range d.live() {
		c.mu.Lock()
		i := slices.IndexFunc(c.seats, func(s *seat) bool { return s.host.Netns().Inode == netns })
		var found *seat
		if i >= 0 {
			found = c.seats[i]
		}
		c.mu.Unlock()
		if found != nil {
			return found
		}
	}
	return nil
}

// renew brings the kernel after the context's configuration.
func (g *guest) renew(ctx context.Context) {
	g.mu.Lock()
	seats := slices.Clone(g.seats)
	g.mu.Unlock()
	for _, s := range seats {
		if err := s.apply(ctx); err != nil && !errors.Is(err, policy.ErrClosed) {
			g.log.Error("container keeps its old rules in the kernel", zap.Error(err))
		}
	}
}

// share selects, or excludes, a container that uses the daemon's own network by its cgroup; where it has none of its own, by its first process.
func (g *guest) share(ctx context.Context, pid int) error {
	who := policy.Selector{PIDs: []int{pid}}
	if path, err := g.d.host.Cgroup(pid); err == nil && path != "/" && path != "" {
		who = policy.Selector{Cgroups: []string{path}}
	}
	set := func(s *policy.Selector) error {
		if err := g.d.lockReload(ctx); err != nil {
			g.setShared(s)
			return err
		}
		defer g.d.reload.Unlock()
		g.setShared(s)
		return g.d.manager.Apply(ctx, g.d.spec())
	}
	if err := set(&who); err != nil {
		g.setShared(nil)
		return err
	}
	g.log.Info("container that shares the network of the daemon selected", zap.Stringer("by", who))
	g.tell(nil)
	err := policy.WaitProcess(ctx, pid)
	if ctx.Err() != nil {
		g.setShared(nil)
		return nil
	}
	return errors.Join(err, set(nil))
}

// lockReload takes d.reload, unless ctx ends first: whoever has it may be waiting for the caller to go.
func (d *Daemon) lockReload(ctx context.Context) error {
	for !d.reload.TryLock() {
		select {
		case <-time.After(lockPause):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

func (g *guest) setShared(s *policy.Selector) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.shared = s
}

// sharedLocked are the selectors that stand for the context's guests in the daemon's own namespace. The caller holds c.mu.
func (c *liveContext) sharedLocked() (chosen, excluded []policy.Selector) {
	for _, g := range c.guests {
		g.mu.Lock()
		if s := g.shared; s != nil && g.spare {
			excluded = append(excluded, *s)
		} else if s != nil {
			chosen = append(chosen, *s)
		}
		g.mu.Unlock()
	}
	return chosen, excluded
}

// dismiss lets all guests go.
func (c *liveContext) dismiss(mode policy.StopMode) {
	c.mu.Lock()
	guests := c.guests
	c.guests = nil
	c.mu.Unlock()
	var wg sync.WaitGroup
	for _, g := range guests {
		wg.Go(func() { g.leave(mode) })
	}
	wg.Wait()
}

// guestOf returns the context and the container that a process is in, if one is captured.
func (d *Daemon) guestOf(pid int) (contextName, container string, ok bool) {
	inode, err := policy.NetnsOf(pid)
	if err != nil {
		return "", "", false
	}
	s := d.seatIn(inode)
	if s == nil {
		return "", "", false
	}
	return s.c.name, s.name, true
}

// notCaptured gives the errors of a container that could not be attached the codes of the API.
func notCaptured(err error) error {
	code := ""
	switch {
	case errors.Is(err, process.ErrNoContainer), errors.Is(err, os.ErrNotExist):
		code = client.CodeNotFound
	case errors.Is(err, process.ErrKernel):
		code = client.CodeBadRequest
	case errors.Is(err, errTaken):
		code = client.CodeConflict
	case errors.Is(err, process.ErrNoRuntime):
		code = client.CodeUnavailable
	default:
		return apiError(err)
	}
	return &control.Error{Code: code, Path: "$.container", Message: err.Error()}
}

// leftClosed says which containers a crash has left closed that nothing selects any more, and forgets those that have gone meanwhile.
func (d *Daemon) leftClosed(ctx context.Context) {
	for _, in := range policy.ContainersOf(d.opt.Socket) {
		host, err := policy.HostFor(in)
		if err != nil {
			if !errors.Is(err, os.ErrNotExist) {
				d.log.Warn("container of a crashed daemon", zap.String("journal", in.Journal), zap.Error(err))
			}
			continue
		}
		s, err := policy.Guard(ctx, policy.Config{Host: host}, in)
		if err == nil && s.Owner == "" && s.Active() {
			d.log.Warn("a container is blocked since a crash: attach it again, or run `mprox cleanup`", zap.Uint64("netns", host.Netns().Inode))
		}
		_ = host.Close()
	}
}
