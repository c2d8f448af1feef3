// SPDX-License-Identifier: GPL-3.0-or-later

package daemon

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.uber.org/zap"

	"github.com/mutex-proxy/mutex/config"
	"github.com/mutex-proxy/mutex/dialers"
	"github.com/mutex-proxy/mutex/flow"
	"github.com/mutex-proxy/mutex/policy"
	"github.com/mutex-proxy/mutex/routing"
)

// errNoFile is what a daemon started from flags answers to a reload.
var errNoFile = errors.New("started from flags: there is no configuration file to read again")

// Loader reads the configuration file again and returns it with the SHA-256 of its bytes.
type Loader func() (cfg *config.Config, digest string, err error)

// Reload reads the configuration again and puts it in force, under what has been changed over the control socket since the start. Flows that
// the new rules allow go on, those that they block are closed.
func (d *Daemon) Reload(ctx context.Context) (err error) {
	if d.opt.Load == nil {
		return errNoFile
	}
	d.reload.Lock()
	defer d.reload.Unlock()
	defer func() { d.metrics.Reloaded(err == nil, time.Now()) }()
	cfg, digest, err := d.opt.Load()
	if err != nil {
		return err
	}
	if err := d.put(ctx, cfg, d.changes); err != nil {
		return err
	}
	if d.opt.SetLevel != nil {
		d.opt.SetLevel(cfg.Log)
	}
	d.mu.Lock()
	d.digest = digest
	d.generation++
	d.loadedAt = time.Now()
	d.mu.Unlock()
	d.log.Info("configuration reloaded", zap.Uint64("generation", d.generation), zap.String("sha256", digest))
	return nil
}

// current returns the configuration in force and its upstreams.
func (d *Daemon) current() (*config.Config, *upstreams) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.cfg, d.ups
}

// fixed refuses changes of what cannot change while the daemon runs, all of them at once.
func fixed(old, cfg *config.Config) error {
	var errs config.Errors
	for _, ch := range config.Diff(old, cfg) {
		if ch.FixedAtStart {
			errs = append(errs, cfg.ErrorAt(ch.Path, errors.New("cannot change while the daemon runs"), "restart it: mprox down, mprox up"))
		}
	}
	if len(errs) > 0 {
		return errs
	}
	return nil
}

// generation is the difference between the contexts at work and those of a new configuration, built but not in force.
type generation struct {
	d       *Daemon
	changed []contextChange
	added   []*liveContext
	removed []*liveContext
}

// contextChange is a context that stays, with what it gets and what it had.
type contextChange struct {
	c         *liveContext
	cfg, old  config.Context
	who, was  selection
	rules     *routing.Table
	commitDNS func()
	views     map[flow.Dialer]flow.Dialer
}

// see gives the context its view of an upstream: the one it has, for an upstream that stays. A new one would make flow open new associations
// for sockets that have one, and their mapping would change in the middle of a conversation.
func (ch *contextChange) see(d flow.Dialer) flow.Dialer {
	if _, seen := ch.views[d]; !seen {
		v, kept := ch.c.views[d]
		if !kept {
			v = dialers.WithNames(d, ch.c.names)
		}
		ch.views[d] = v
	}
	return ch.views[d]
}

// next builds the contexts of a new configuration beside the old. It opens nothing.
func (d *Daemon) next(cfg *config.Config, ups *upstreams) (*generation, error) {
	n := &generation{d: d}
	byName := make(map[string]*liveContext)
	used := make(map[int]bool)
	for _, c := range d.live() {
		used[c.slot] = true
		if c.lease {
			continue // a lease has a configuration of its own
		}
		byName[c.name] = c
		if _, ok := cfg.Contexts[c.name]; !ok || cfg.Contexts[c.name].Mode == "disabled" {
			n.removed = append(n.removed, c)
		}
	}
	for _, name := range enabled(cfg) {
		c, ok := byName[name]
		if !ok {
			slot, err := freeSlot(used)
			if err != nil {
				return nil, err
			}
			if c, err = newContext(cfg, name, slot, ups, d.contextEnv(d.opt.StateDir)); err != nil {
				return nil, err
			}
			n.added = append(n.added, c)
			continue
		}
		ch, err := c.change(cfg, ups, d.contextEnv(d.opt.StateDir))
		if err != nil {
			return nil, err
		}
		n.changed = append(n.changed, ch)
	}
	return n, nil
}

// freeSlot takes the lowest free slot; leases take theirs from the top.
func freeSlot(used map[int]bool) (int, error) {
	for slot := range policy.MaxContexts {
		if !used[slot] {
			used[slot] = true
			return slot, nil
		}
	}
	return 0, fmt.Errorf("%w: all %d marks are in use", policy.ErrConflict, policy.MaxContexts)
}

// change builds what the context gets under a new configuration.
func (c *liveContext) change(cfg *config.Config, ups *upstreams, env contextEnv) (contextChange, error) {
	ch := contextChange{c: c, cfg: cfg.Contexts[c.name], old: c.cfg, was: c.who, views: make(map[flow.Dialer]flow.Dialer)}
	var err error
	if ch.who, err = buildSelection(cfg, c.name); err != nil {
		return ch, err
	}
	commit, err := c.names.Prepare(buildDNS(cfg, c.name, ups, ch.see, env))
	if err != nil {
		return ch, err
	}
	ch.commitDNS = commit
	ch.rules, err = buildRules(cfg, c.name, ups, ch.see)
	return ch, err
}

// apply puts the generation in force: devices of new contexts first, then the kernel, then rules and DNS by one store each. What fails
// before the last step is undone.
func (n *generation) apply(ctx context.Context) (err error) {
	defer func() {
		if err != nil {
			n.undo()
		}
	}()
	for _, c := range n.added {
		if err := c.open(ctx); err != nil {
			return err
		}
	}
	for _, ch := range n.changed {
		ch.c.setConfig(ch.cfg, ch.who)
	}
	for _, c := range n.removed {
		c.refuse() // while the resets still arrive: afterwards the kernel would send on what the applications have written, past us
	}
	n.d.setContexts(n.added, n.removed)
	n.d.doorman.look(ctx)
	if err := n.d.manager.Apply(ctx, n.d.spec()); err != nil {
		return err
	}
	for _, ch := range n.changed {
		ch.commitDNS()
		ch.c.views = ch.views
		ch.c.table.SetMaxFlows(ch.cfg.Limits.Flows)
		ch.c.table.SetLimits(limits(ch.cfg.Limits))
		ch.c.tune(tuning(ch.cfg))
		ch.c.setRules(ch.rules)
	}
	for _, c := range n.removed {
		c.close()
	}
	return nil
}

// undo takes back what apply has done to the objects; policy undoes its own part.
func (n *generation) undo() {
	for _, ch := range n.changed {
		ch.c.setConfig(ch.old, ch.was)
	}
	n.d.setContexts(n.removed, n.added)
	for _, c := range n.removed {
		c.setRules(c.rules.Load())
	}
	for _, c := range n.added {
		c.close()
	}
}

func (d *Daemon) setContexts(add, remove []*liveContext) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, c := range remove {
		delete(d.contexts, c.name)
	}
	for _, c := range add {
		d.contexts[c.name] = c
	}
}

// setRules puts new rules in force and ends the flows that they block.
func (c *liveContext) setRules(rules *routing.Table) {
	c.rules.Store(rules)
	c.follow(rules)
	c.table.KillIf(flow.ErrRules, func(i *flow.Info) bool {
		a := rules.Decide(i.Ruled()).Action
		return a == flow.Block || a == flow.Drop
	})
}

// follow makes all entrances of the context ask d.
func (c *liveContext) follow(d flow.Decider) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.decider = d
	for _, h := range c.handlersLocked() {
		h.SetDecider(d)
	}
}

func (c *liveContext) tune(t flow.Tuning) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, h := range c.handlersLocked() {
		h.Tune(t)
	}
}

// refuser is the rules of a context that is about to go.
type refuser struct{}

func (refuser) Decide(*flow.Flow) flow.Decision { return flow.Decision{} } // the zero value blocks
func (refuser) Needs(*flow.Flow) flow.Needs     { return 0 }

// refuse ends all flows, and lets none begin until setRules.
func (c *liveContext) refuse() {
	c.follow(refuser{})
	c.table.KillIf(flow.ErrRules, func(*flow.Info) bool { return true })
}
