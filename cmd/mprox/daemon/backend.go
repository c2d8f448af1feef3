// SPDX-License-Identifier: GPL-3.0-or-later

package daemon

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/mutex-proxy/mutex/config"
	"github.com/mutex-proxy/mutex/control"
	"github.com/mutex-proxy/mutex/control/client"
	"github.com/mutex-proxy/mutex/dialers"
	"github.com/mutex-proxy/mutex/flow"
	"github.com/mutex-proxy/mutex/policy"
	"github.com/mutex-proxy/mutex/routing"
)

// watchBuffer is how many changes of flows a slow watcher may be behind before it misses some.
const watchBuffer = 1024

// backend is the daemon as the control socket sees it.
type backend struct{ *Daemon }

var _ control.Backend = backend{}

// Flows implements control.Backend.
func (b backend) Flows() []flow.Info { return b.flowsOf() }

// WatchFlows implements control.Backend. Contexts that begin later are not watched.
func (b backend) WatchFlows(ctx context.Context) <-chan flow.Info {
	out := make(chan flow.Info, watchBuffer)
	var wg sync.WaitGroup
	for _, c := range b.live() {
		w := c.table.Watch(watchBuffer)
		wg.Go(func() {
			defer w.Close()
			for {
				select {
				case ev, ok := <-w.C:
					if !ok {
						return
					}
					select {
					case out <- ev.Info:
					default:
					}
				case <-ctx.Done():
					return
				}
			}
		})
	}
	go func() {
		wg.Wait()
		close(out)
	}()
	return out
}

// KillFlow implements control.Backend.
func (b backend) KillFlow(id uint64) bool {
	for _, c := range b.live() {
		if c.table.Kill(id) {
			return true
		}
	}
	return false
}

// Explain implements control.Backend.
func (b backend) Explain(ctx context.Context, r control.ExplainRequest) (control.Explanation, error) {
	var whose []control.Condition
	if r.Context == "" {
		if done, err := b.whoseFlow(ctx, &r, &whose); done || err != nil {
			return uncaptured(whose), err
		}
	}
	c, err := b.named(r.Context)
	if err != nil {
		return control.Explanation{}, err
	}
	x, err := explain(c.name, c.rules.Load(), c.names, r)
	if err != nil {
		return x, err
	}
	x.Conditions = append(whose, x.Conditions...)
	s := c.spec()
	x.Kernel = control.KernelPath{
		Mark: fmt.Sprintf("%#x", policy.ContextMark(uint32(b.opt.Config.Kernel.MarkMask), c.slot)), Table: b.spec().Table(c.slot), Device: s.TUN,
	}
	return x, nil
}

// explain asks a context's rules about a flow that need not exist. names may be nil: then only what the request says is known.
func explain(contextName string, rules *routing.Table, names flow.Names, r control.ExplainRequest) (control.Explanation, error) {
	f, err := imagined(contextName, names, r)
	if err != nil {
		return control.Explanation{}, err
	}
	d := rules.Decide(f)
	x := control.Explanation{Rule: d.Rule, NameSource: f.HostSource.String(), Conditions: []control.Condition{}}
	switch d.Action {
	case flow.Forward:
		x.Upstream, x.Member = d.Via.Name(), member(d.Via)
	case flow.Block:
		x.Upstream = "reject"
	default:
		x.Upstream = d.Action.String()
	}
	for _, c := range rules.Explain(f) {
		x.Conditions = append(x.Conditions, control.Condition{
			Rule: c.Rule, Key: c.Key, Value: c.Value, Result: c.Result == "match", Reason: c.Reason,
		})
	}
	return x, nil
}

// imagined makes the flow that a request describes.
func imagined(contextName string, names flow.Names, r control.ExplainRequest) (*flow.Flow, error) {
	dst, err := dialers.ParseAddr(r.Dest)
	if err != nil {
		return nil, &control.Error{Code: client.CodeBadRequest, Path: "$.dest", Message: err.Error()}
	}
	f := &flow.Flow{Context: contextName, Network: flow.TCP, Dst: dst, Orig: dst.AddrPort(), Protocol: r.Protocol, Start: time.Now()}
	if r.Network == "udp" {
		f.Network = flow.UDP
	}
	switch {
	case dst.IsName():
		f.HostSource = flow.SourceDNS
	case names != nil:
		if host, src, ok := names.HostOf(dst.IP); ok {
			f.Dst.Host, f.HostSource = host, src
			if names.IsFake(dst.IP) {
				f.Dst.IP = netip.Addr{}
			}
		}
	}
	if r.SNI != "" {
		f.Dst.Host, f.HostSource = r.SNI, flow.SourceSNI
	}
	f.App = flow.App{PID: r.PID, Exe: r.Exe, Cgroup: r.Cgroup}
	if r.UID != nil {
		f.App.UID = uint32(*r.UID)
	}
	if r.GID != nil {
		f.App.GID = uint32(*r.GID)
	}
	if r.PID != 0 || r.Exe != "" || r.Cgroup != "" || r.UID != nil || r.GID != nil {
		f.App.Method = "asked"
	}
	return f, nil
}

// member is the member of a pool that would be tried first, or the upstream itself.
func member(d flow.Dialer) string {
	if p, ok := d.(interface{ Next() string }); ok {
		return p.Next()
	}
	return d.Name()
}

// ExchangeDNS implements control.Backend.
func (b backend) ExchangeDNS(ctx context.Context, contextName string, query []byte) ([]byte, error) {
	c, err := b.named(contextName)
	if err != nil {
		return nil, err
	}
	return c.names.Exchange(ctx, &flow.Flow{Context: c.name, Network: flow.TCP, Start: time.Now()}, query)
}

// Whose implements control.Backend.
func (b backend) Whose(ctx context.Context, pid int) (control.Capture, error) {
	c, err := b.manager.Whose(ctx, pid)
	if errors.Is(err, os.ErrNotExist) {
		return control.Capture{}, &control.Error{Code: client.CodeNotFound, Path: "pid", Message: fmt.Sprintf("there is no process %d", pid)}
	}
	if err != nil {
		return control.Capture{}, apiError(err)
	}
	out := control.Capture{
		PID: pid, Name: c.Process.Name, UID: int64(c.Process.UID), GID: int64(c.Process.GID), Exe: c.Process.Exe, Cgroup: c.Process.Cgroup,
		Context: c.Context, Reason: c.Reason,
	}
	if name, container, ok := b.guestOf(pid); ok {
		out.Context, out.Reason = name, "in container "+container
		out.Verdicts = []control.Verdict{{Context: name, Matched: true, Reason: out.Reason}}
		return out, nil
	}
	for _, v := range c.Verdicts {
		out.Verdicts = append(out.Verdicts, control.Verdict(v))
	}
	return out, nil
}

// Lease implements control.Backend.
func (b backend) Lease(ctx context.Context, r control.LeaseRequest, p control.Peer) (control.Lease, error) {
	if r.PID == 0 && p.UID != 0 {
		r.PID = p.PID
	}
	if err := b.mayLease(ctx, r, p); err != nil {
		return nil, err
	}
	l, err := b.Daemon.Lease(ctx, r, p)
	if err != nil {
		return nil, apiError(err)
	}
	return l, nil
}

// context returns a context at work, nil if there is none of that name.
func (d *Daemon) context(name string) *liveContext {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.contexts[name]
}

// named is context for a request, where no name means the only context or the one called default.
func (d *Daemon) named(name string) (*liveContext, error) {
	if name == "" {
		live := d.live()
		if len(live) == 1 {
			return live[0], nil
		}
		name = defaultContext
	}
	if c := d.context(name); c != nil {
		return c, nil
	}
	return nil, d.notAtWork(name)
}

// notAtWork says why a request cannot have a context: it is disabled, or there is none of that name.
func (d *Daemon) notAtWork(name string) error {
	cfg, _ := d.current()
	if _, there := cfg.Contexts[name]; there {
		return &control.Error{Code: client.CodeNotFound, Path: "$.context", Message: fmt.Sprintf("context %q is disabled: enable it with: mprox contexts enable %s", name, name)}
	}
	return noContext(cfg, name, "$.context")
}

// noContext refuses a name that no context of the configuration has.
func noContext(cfg *config.Config, name, path string) error {
	there := "there is none"
	if names := slices.Sorted(maps.Keys(cfg.Contexts)); len(names) > 0 {
		there = "there are: " + strings.Join(names, ", ")
	}
	return &control.Error{Code: client.CodeNotFound, Path: path, Message: fmt.Sprintf("no context is called %q; %s", name, there)}
}
