// SPDX-License-Identifier: GPL-3.0-or-later

package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"reflect"
	"slices"
	"strconv"
	"time"

	"go.uber.org/zap"

	"github.com/mutex-proxy/mutex/config"
	"github.com/mutex-proxy/mutex/control"
	"github.com/mutex-proxy/mutex/control/client"
	"github.com/mutex-proxy/mutex/policy"
	"github.com/mutex-proxy/mutex/policy/process"
	"github.com/mutex-proxy/mutex/tun"
)

// maxAttached bounds the selectors that are attached to one context: each is asked for by hand, or by a script that has gone mad.
const maxAttached = 1024

// changes is what has been asked for over the control socket. It lies on top of whatever configuration is loaded, and ends with the daemon.
// A value is never changed once it is in force: with makes a new one.
type changes struct {
	config.Overlay
	enabled  map[string]bool // contexts that were switched on (true) or off
	attached map[string][]config.Selector
	detached map[string][]config.Selector // of the configuration
}

// with returns a copy that edit may change.
func (ch changes) with(edit func(*changes)) changes {
	lists := func(m map[string][]config.Selector) map[string][]config.Selector {
		out := make(map[string][]config.Selector, len(m))
		for name, list := range m {
			out[name] = slices.Clone(list)
		}
		return out
	}
	out := changes{
		Overlay: config.Overlay{
			Upstreams: cloneOf(ch.Upstreams), Pools: cloneOf(ch.Pools), Contexts: cloneOf(ch.Contexts), Removed: cloneOf(ch.Removed),
		},
		enabled: cloneOf(ch.enabled), attached: lists(ch.attached), detached: lists(ch.detached),
	}
	edit(&out)
	return out
}

func (ch changes) none() bool {
	return len(ch.Contexts)+len(ch.Removed)+len(ch.enabled)+len(ch.attached)+len(ch.detached) == 0
}

// cloneOf is maps.Clone that never returns nil.
func cloneOf[V any](m map[string]V) map[string]V {
	out := make(map[string]V, len(m))
	maps.Copy(out, m)
	return out
}

// over returns what is in force: the configuration as loaded, with the changes on top. wanted are the modes that the contexts have when they
// are switched on.
func (ch changes) over(base *config.Config) (cfg *config.Config, wanted map[string]string, err error) {
	if ch.none() {
		wanted = make(map[string]string)
		for name, c := range base.Contexts {
			wanted[name] = c.Mode
		}
		return base, wanted, nil
	}
	if cfg, err = base.With(ch.Overlay); err != nil {
		return nil, nil, err
	}
	wanted = make(map[string]string)
	edited := config.Overlay{Contexts: make(map[string]config.Context)}
	for name, c := range cfg.Contexts {
		c.Select = slices.DeleteFunc(slices.Clone(c.Select), func(s config.Selector) bool { return contains(ch.detached[name], s) })
		c.Select = append(c.Select, ch.attached[name]...)
		on, said := ch.enabled[name]
		switch {
		case said && !on:
			wanted[name], c.Mode = c.Mode, "disabled"
		case said && c.Mode == "disabled":
			c.Mode = "global"
			if len(c.Select) > 0 {
				c.Mode = "process"
			}
			wanted[name] = c.Mode
		default:
			wanted[name] = c.Mode
		}
		edited.Contexts[name] = c
	}
	cfg, err = cfg.With(edited, Check)
	return cfg, wanted, err
}

func contains(list []config.Selector, s config.Selector) bool {
	return slices.ContainsFunc(list, func(x config.Selector) bool { return sameSelector(x, s) })
}

// sameSelector compares what two selectors mean: an absent list and an empty one are the same.
func sameSelector(a, b config.Selector) bool {
	va, vb := reflect.ValueOf(a), reflect.ValueOf(b)
	for i := range va.NumField() {
		x, y := va.Field(i), vb.Field(i)
		if x.Kind() == reflect.Slice && x.Len() == 0 && y.Len() == 0 {
			continue
		}
		if !reflect.DeepEqual(x.Interface(), y.Interface()) {
			return false
		}
	}
	return true
}

// AddContext implements control.Backend.
func (b backend) AddContext(ctx context.Context, r control.ContextRequest) error {
	add, err := requested(r)
	if err != nil {
		return err
	}
	return b.edit(ctx, func(ch *changes, cfg *config.Config) error {
		if _, there := cfg.Contexts[r.Name]; there || b.context(r.Name) != nil {
			return &control.Error{Code: client.CodeConflict, Path: "$.name", Message: fmt.Sprintf("a context is called %q already", r.Name)}
		}
		if n := len(cfg.Contexts); n >= config.MaxContexts {
			return &control.Error{Code: client.CodeConflict, Path: "$.name", Message: fmt.Sprintf("there are %d contexts: all marks are in use", n)}
		}
		delete(ch.Removed, r.Name)
		maps.Copy(ch.Upstreams, add.Upstreams)
		maps.Copy(ch.Pools, add.Pools)
		ch.Contexts[r.Name] = add.Contexts[r.Name]
		return nil
	})
}

// requested turns a request into the configuration it stands for. Proxies of its own become upstreams named after the context.
func requested(r control.ContextRequest) (config.Overlay, error) {
	out := config.Overlay{Upstreams: map[string]config.Upstream{}, Pools: map[string]config.Pool{}, Contexts: map[string]config.Context{}}
	text := []byte(r.Context)
	if len(r.Proxies) > 0 {
		own, err := config.FromFlags(config.OneLiner{Proxy: r.Proxies, Strategy: r.Strategy}, Check)
		if err != nil {
			return out, asRequest(err)
		}
		prefix := func(name string) string { return r.Name + "." + name }
		for name, u := range own.Upstreams {
			out.Upstreams[prefix(name)] = u
		}
		for name, p := range own.Pools {
			for i, member := range p.Members {
				p.Members[i] = prefix(member)
			}
			out.Pools[prefix(name)] = p
		}
		if text, err = withDefault(text, prefix(own.Contexts[defaultContext].Default)); err != nil {
			return out, err
		}
	}
	c, err := config.ParseContext(r.Name, text)
	if err != nil {
		return out, err
	}
	out.Contexts[r.Name] = c
	return out, nil
}

// RemoveContext implements control.Backend.
func (b backend) RemoveContext(ctx context.Context, name string) error {
	return b.edit(ctx, func(ch *changes, cfg *config.Config) error {
		if err := b.exists(cfg, name); err != nil {
			return err
		}
		own := name + "."
		maps.DeleteFunc(ch.Upstreams, func(u string, _ config.Upstream) bool { return len(u) > len(own) && u[:len(own)] == own })
		maps.DeleteFunc(ch.Pools, func(p string, _ config.Pool) bool { return len(p) > len(own) && p[:len(own)] == own })
		delete(ch.Contexts, name)
		delete(ch.enabled, name)
		delete(ch.attached, name)
		delete(ch.detached, name)
		ch.Removed[name] = true
		return nil
	})
}

// EnableContext implements control.Backend.
func (b backend) EnableContext(ctx context.Context, name string, on bool) error {
	return b.edit(ctx, func(ch *changes, cfg *config.Config) error {
		ch.enabled[name] = on
		return b.exists(cfg, name)
	})
}

// Attach implements control.Backend.
func (b backend) Attach(ctx context.Context, name string, selector []byte) error {
	s, err := config.ParseSelector(selector)
	if err != nil {
		return asRequest(err)
	}
	for _, pid := range s.PID {
		switch err := process.Lives(pid); {
		case errors.Is(err, process.ErrKernel):
			return &control.Error{Code: client.CodeBadRequest, Path: "$.pid", Message: fmt.Sprintf("process %d: %s, and sends nothing as a process does", pid, err)}
		case err != nil:
			return &control.Error{Code: client.CodeNotFound, Path: "$.pid", Message: fmt.Sprintf("there is no process %d", pid)}
		}
	}
	again := false
	attach := func(ch *changes, cfg *config.Config) error {
		if err := b.exists(cfg, name); err != nil {
			return err
		}
		switch mode := b.wants(name); {
		case mode == "gateway", mode == "global" && len(s.Container) == 0:
			return &control.Error{Code: client.CodeConflict, Message: fmt.Sprintf("context %q has mode %s: there is nobody to attach to it", name, mode)}
		}
		// Processes that have ended make room; a PID among them may by now be another process's.
		ch.attached[name] = slices.DeleteFunc(ch.attached[name], func(x config.Selector) bool { return len(x.PID) > 0 && !anyAlive(x.PID) })
		ch.detached[name] = slices.DeleteFunc(ch.detached[name], func(x config.Selector) bool { return sameSelector(x, s) })
		if again = contains(cfg.Contexts[name].Select, s) && len(s.PID) == 0; again {
			return nil
		}
		if len(ch.attached[name]) >= maxAttached {
			return &control.Error{Code: client.CodeTooMany, Message: fmt.Sprintf("%d selectors are attached to %q: detach some, or name a cgroup above them", maxAttached, name)}
		}
		if !contains(ch.attached[name], s) {
			ch.attached[name] = append(ch.attached[name], s)
		}
		return nil
	}
	if err := b.edit(ctx, attach); err != nil || len(s.Container) == 0 {
		return err
	}
	if c := b.context(name); c != nil && !again {
		if err := c.greet(ctx, s.Container); err != nil {
			return errors.Join(notCaptured(err), b.Detach(context.WithoutCancel(ctx), name, selector))
		}
	}
	return nil
}

func anyAlive(pids []int) bool {
	return slices.ContainsFunc(pids, func(pid int) bool {
		_, err := os.Stat("/proc/" + strconv.Itoa(pid))
		return err == nil
	})
}

// Detach implements control.Backend.
func (b backend) Detach(ctx context.Context, name string, selector []byte) error {
	s, err := config.ParseSelector(selector)
	if err != nil {
		return asRequest(err)
	}
	return b.edit(ctx, func(ch *changes, cfg *config.Config) error {
		if err := b.exists(cfg, name); err != nil {
			return err
		}
		if !contains(cfg.Contexts[name].Select, s) {
			return &control.Error{Code: client.CodeNotFound, Message: fmt.Sprintf("context %q has no such selector: give it as it was attached", name)}
		}
		n := len(ch.attached[name])
		ch.attached[name] = slices.DeleteFunc(ch.attached[name], func(x config.Selector) bool { return sameSelector(x, s) })
		if len(ch.attached[name]) == n {
			ch.detached[name] = append(ch.detached[name], s)
		}
		return nil
	})
}

// exists refuses names of contexts that are not of the configuration.
func (b backend) exists(cfg *config.Config, name string) error {
	if _, ok := cfg.Contexts[name]; ok {
		return nil
	}
	if c := b.context(name); c != nil && c.lease {
		return &control.Error{Code: client.CodeConflict, Message: fmt.Sprintf("%q belongs to a lease and ends with it", name)}
	}
	return noContext(cfg, name, "")
}

// wants is the mode that a context has when it is switched on.
func (d *Daemon) wants(name string) string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.wanted[name]
}

// edit changes the changes, and puts the result in force as a reload would.
func (d *Daemon) edit(ctx context.Context, change func(*changes, *config.Config) error) error {
	d.reload.Lock()
	defer d.reload.Unlock()
	cfg, _ := d.current()
	var err error
	next := d.changes.with(func(ch *changes) { err = change(ch, cfg) })
	if err != nil {
		return err
	}
	if err := d.put(ctx, d.base, next); err != nil {
		return apiError(err)
	}
	return nil
}

// put brings the daemon from what is in force to base with changes on top. Until everything of it has been built and checked nothing
// changes, and when the kernel refuses the new plan the old one stays. The caller holds d.reload.
func (d *Daemon) put(ctx context.Context, base *config.Config, ch changes) error {
	began := time.Now()
	cfg, wanted, err := ch.over(base)
	if err != nil {
		return err
	}
	old, oldUps := d.current()
	if err := fixed(old, cfg); err != nil {
		return err
	}
	ups, err := buildUpstreams(cfg, d.net, oldUps)
	if err != nil {
		return err
	}
	n, err := d.next(cfg, ups)
	if err != nil {
		return err
	}
	if err := d.excludeLocal(ctx, ups); err != nil {
		return err
	}
	if err := n.apply(ctx); err != nil {
		return err
	}
	// Before, nothing had to be left alone if nobody but leases was captured.
	if err := d.excludeLocal(ctx, ups); err != nil {
		d.log.Error("upstreams on this machine may be captured themselves", zap.Error(err))
	}
	again := false
	for _, c := range d.live() {
		again = d.invite(ctx, c) || again
	}
	if again {
		if err := d.manager.Apply(ctx, d.spec()); err != nil {
			d.log.Error("a container that shares the network of the daemon is still selected", zap.Error(err))
		}
	}
	oldUps.stop(ups)
	ups.startChecks()
	d.mu.Lock()
	d.cfg, d.ups, d.base, d.changes, d.wanted = cfg, ups, base, ch, wanted
	d.mu.Unlock()
	d.watcher.want(d)
	n.resetExisting(ctx)
	d.log.Debug("contexts changed", zap.Duration("took", time.Since(began)))
	return nil
}

// resetExisting ends the connections that those who are captured only now have made before, in the contexts that want it.
func (n *generation) resetExisting(ctx context.Context) {
	for _, c := range n.added {
		n.d.resetExisting(ctx, c, c.who.chosen)
	}
	for _, ch := range n.changed {
		fresh := slices.DeleteFunc(slices.Clone(ch.who.chosen), func(s policy.Selector) bool {
			return slices.ContainsFunc(ch.was.chosen, func(x policy.Selector) bool { return reflect.DeepEqual(x, s) })
		})
		if len(fresh) > 0 {
			n.d.resetExisting(ctx, ch.c, fresh)
		}
	}
}

func (d *Daemon) resetExisting(ctx context.Context, c *liveContext, chosen []policy.Selector) {
	c.mu.Lock()
	want := c.cfg.Existing == "reset"
	c.mu.Unlock()
	if !want {
		return
	}
	n, err := d.manager.ResetExisting(ctx, c.name, chosen)
	if err != nil {
		c.log.Error("connections older than the capture are not all reset", zap.Error(err))
	}
	c.log.Info("connections older than the capture reset", zap.Int("count", n))
}

// asRequest makes the errors of a configuration those of the request that it came with.
func asRequest(err error) error {
	if es, ok := errors.AsType[config.Errors](err); ok && len(es) > 0 {
		return &control.Error{Code: client.CodeBadRequest, Path: es[0].Path, Message: es[0].Msg}
	}
	return err
}

// apiError gives the errors of the kernel's side the codes of the API.
func apiError(err error) error {
	code := ""
	switch {
	case errors.Is(err, policy.ErrConflict), errors.Is(err, tun.ErrBusy):
		code = client.CodeConflict
	case errors.Is(err, policy.ErrPrivilege), errors.Is(err, policy.ErrFeature), errors.Is(err, tun.ErrNoPermission), errors.Is(err, tun.ErrNoDevice):
		code = client.CodePrivilege
	case errors.Is(err, policy.ErrClosed):
		code = client.CodeUnavailable
	default:
		return err
	}
	return &control.Error{Code: code, Message: err.Error()}
}

// withDefault names the upstream of a context that names none itself.
func withDefault(text []byte, upstream string) ([]byte, error) {
	fields := map[string]json.RawMessage{}
	if len(text) > 0 {
		if err := json.Unmarshal(text, &fields); err != nil {
			return nil, &control.Error{Code: client.CodeBadRequest, Path: "$.context", Message: "not a JSON object: " + err.Error()}
		}
	}
	if _, given := fields["default"]; given {
		return nil, &control.Error{Code: client.CodeBadRequest, Path: "$.context.default", Message: "the proxies are the default: give one of the two"}
	}
	fields["default"], _ = json.Marshal(upstream) // a string always encodes
	return json.Marshal(fields)
}
