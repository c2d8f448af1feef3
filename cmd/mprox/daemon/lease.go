// SPDX-License-Identifier: GPL-3.0-or-later

package daemon

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"os"
	"sync"

	"go.uber.org/zap"

	"github.com/mutex-proxy/mutex/config"
	"github.com/mutex-proxy/mutex/control"
	"github.com/mutex-proxy/mutex/control/client"
	"github.com/mutex-proxy/mutex/policy"
)

// Lease is a captured cgroup that lives as long as whoever asked for it. With it lives the context it was made for, or it has joined one
// of the configuration.
//
//	open ──▶ (processes start in the cgroup) ──▶ Close: device and flows end ──▶ last process ends: marks, guard and cgroup go
type Lease struct {
	d      *Daemon
	c      *liveContext
	joined bool
	cgroup *policy.Cgroup
	done   chan struct{}
	once   sync.Once
	err    error
}

// Lease makes a context for the request, or joins one. ctx bounds the making. The caller closes it.
func (d *Daemon) Lease(ctx context.Context, r client.LeaseRequest, owner control.Peer) (*Lease, error) {
	d.reload.Lock()
	defer d.reload.Unlock()
	l := &Lease{d: d, done: make(chan struct{})}
	var err error
	if r.Context != "" {
		err = l.join(ctx, r.Context, owner)
	} else {
		err = l.create(ctx, r, owner)
	}
	if err != nil {
		return nil, err
	}
	if r.PID != 0 {
		if err := l.cgroup.Take(r.PID); err != nil {
			d.leftovers.Go(func() { _ = l.Close() }) // it waits for the lock that is held here
			return nil, notYours(r.PID, err)
		}
	}
	return l, nil
}

func notYours(pid int, err error) error {
	if errors.Is(err, os.ErrPermission) || errors.Is(err, os.ErrNotExist) {
		return &control.Error{Code: client.CodeForbidden, Path: "$.pid", Message: fmt.Sprintf("process %d is not one of yours", pid)}
	}
	return err
}

// mayLease keeps users without authority from using a lease as a way around what captures them, and from changing what is others': the
// processes behind an upstream on this machine would be left out of the capture.
func (b backend) mayLease(ctx context.Context, r control.LeaseRequest, p control.Peer) error {
	if p.Trusted {
		return nil
	}
	refuse := func(path, format string, args ...any) error {
		return &control.Error{Code: client.CodeForbidden, Path: path, Message: fmt.Sprintf(format, args...)}
	}
	if r.PID <= 0 {
		return refuse("$.pid", "your process cannot be seen from the daemon's process namespace")
	}
	w, err := b.manager.Whose(ctx, r.PID)
	if errors.Is(err, os.ErrNotExist) {
		return notYours(r.PID, err)
	}
	if err != nil || w.Context == "" || r.Context != "" {
		return apiError(err)
	}
	if len(r.Bypass) > 0 {
		return refuse("$.bypass", "context %s captures you: nothing of yours may go around it", w.Context)
	}
	for i, raw := range r.Proxies {
		path := fmt.Sprintf("$.proxies[%d]", i)
		u, err := url.Parse(raw)
		if err != nil {
			continue // refused with a better message where it is parsed
		}
		if u.Scheme == "direct" {
			return refuse(path, "context %s captures you: nothing of yours may go around it", w.Context)
		}
		if a, err := netip.ParseAddr(u.Hostname()); err != nil || a.Unmap().IsLoopback() {
			return refuse(path, "context %s captures you: give the address of a proxy on another machine", w.Context)
		}
	}
	return nil
}

// join captures one more cgroup for a context of the configuration.
func (l *Lease) join(ctx context.Context, name string, owner control.Peer) (err error) {
	l.joined = true
	l.c = l.d.context(name)
	if l.c == nil {
		return l.d.notAtWork(name)
	}
	if l.cgroup, err = l.d.manager.NewCgroup(ctx, fmt.Sprintf("%s-%d-%d", name, owner.PID, l.d.ids.Add(1)), l.c.slot); err != nil {
		return err
	}
	l.own(owner)
	l.c.addCgroup(l.cgroup.Ref())
	if err := l.d.manager.Apply(ctx, l.d.spec()); err != nil {
		l.c.removeCgroup(l.cgroup.Ref())
		return errors.Join(err, l.cgroup.Remove())
	}
	return nil
}

// create makes a context of its own.
func (l *Lease) create(ctx context.Context, r client.LeaseRequest, owner control.Peer) (err error) {
	name := r.Name
	if name == "" {
		name = fmt.Sprintf("run-%d", owner.PID)
	}
	if l.d.context(name) != nil {
		return &control.Error{Code: client.CodeConflict, Path: "$.name", Message: fmt.Sprintf("a context is called %q already", name)}
	}
	cfg, err := leaseConfig(name, r)
	if err != nil {
		return err
	}
	ups, err := buildUpstreams(cfg, l.d.net, nil)
	if err != nil {
		return err
	}
	slot, err := l.d.manager.AcquireSlot(ctx)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			l.d.manager.ReleaseSlot(slot)
		}
	}()
	env := l.d.contextEnv("") // its fake IPs end with it
	if l.c, err = newContext(cfg, name, slot, ups, env); err != nil {
		return err
	}
	l.c.lease = true
	l.d.resolve(ctx, ups)
	if err := l.d.excludeLocal(ctx, ups); err != nil {
		return err
	}
	if l.cgroup, err = l.d.manager.NewCgroup(ctx, name, slot); err != nil {
		return err
	}
	l.own(owner)
	l.c.addCgroup(l.cgroup.Ref())
	if err := l.c.open(ctx); err != nil {
		return errors.Join(err, l.cgroup.Remove())
	}
	l.d.setContexts([]*liveContext{l.c}, nil)
	if err := l.d.manager.Apply(ctx, l.d.spec()); err != nil {
		l.d.setContexts(nil, []*liveContext{l.c})
		l.c.close()
		ups.stop(nil)
		return errors.Join(err, l.cgroup.Remove())
	}
	l.d.log.Info("lease opened", zap.String("context", name), zap.Int("pid", owner.PID), zap.Uint32("uid", owner.UID), zap.String("marked_by", l.cgroup.Method()))
	return nil
}

// own ties the cgroup to the user of a lease. Root may become whoever it likes.
func (l *Lease) own(owner control.Peer) {
	if owner.UID != 0 {
		l.cgroup.Own(owner.UID)
	}
}

// leaseConfig turns a request into the configuration it stands for.
func leaseConfig(name string, r client.LeaseRequest) (*config.Config, error) {
	cfg, err := config.FromFlags(config.OneLiner{
		Proxy: r.Proxies, Mode: "cgroup", DNS: r.DNS, Bypass: r.Bypass, Strategy: r.Strategy,
	}, Check)
	if err != nil {
		return nil, err
	}
	c := cfg.Contexts[defaultContext]
	c.TUN.Name = "" // named after the slot
	cfg.Contexts = map[string]config.Context{name: c}
	return cfg, nil
}

// FD is the cgroup's directory, for clone3 CLONE_INTO_CGROUP.
func (l *Lease) FD() int { return l.cgroup.FD() }

// Info implements control.Lease.
func (l *Lease) Info() control.LeaseInfo {
	mask := uint32(l.d.opt.Config.Kernel.MarkMask)
	s := l.c.spec()
	return control.LeaseInfo{
		ID: fmt.Sprintf("%s/%d", l.c.name, l.cgroup.Ref().ID), Context: l.c.name, Cgroup: cgroupDir(l.cgroup), TUN: s.TUN,
		Mark: fmt.Sprintf("%#x", policy.ContextMark(mask, l.c.slot)), Table: l.d.spec().Table(l.c.slot),
	}
}

// Done implements control.Lease.
func (l *Lease) Done() <-chan struct{} { return l.done }

// Close implements control.Lease: when it returns, device, netstack and flows are gone. Processes that are still in the cgroup stay marked
// and guarded, so blocked, until the last of them has ended; a goroutine of the daemon waits for that.
func (l *Lease) Close() error {
	l.once.Do(func() {
		defer close(l.done)
		if !l.joined {
			_ = l.c.handler.Close() // never fails
			l.err = l.apply(l.c.detach)
			l.c.close()
			l.c.ups.stop(nil)
		}
		l.d.leftovers.Go(func() { l.outlive() })
	})
	return l.err
}

// outlive removes the rest when the last process has ended, or leaves it to the daemon's own end.
func (l *Lease) outlive() {
	if err := l.cgroup.Wait(l.d.life); err != nil {
		return
	}
	err := l.apply(func() {
		l.c.removeCgroup(l.cgroup.Ref())
		if !l.joined {
			l.d.setContexts(nil, []*liveContext{l.c})
		}
	})
	if err = errors.Join(err, l.cgroup.Remove()); err != nil {
		l.d.log.Error("lease not undone", zap.String("context", l.c.name), zap.Error(err))
	}
	if !l.joined {
		l.d.manager.ReleaseSlot(l.c.slot)
	}
}

// apply changes the set of contexts and brings the kernel after it.
func (l *Lease) apply(change func()) error {
	l.d.reload.Lock()
	defer l.d.reload.Unlock()
	change()
	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	return l.d.manager.Apply(ctx, l.d.spec())
}

// cgroupDir is the absolute path of a cgroup, as the kernel knows its open directory.
func cgroupDir(c *policy.Cgroup) string {
	path, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", c.FD()))
	if err != nil {
		return "" // it has been removed: the lease is over
	}
	return path
}
