// SPDX-License-Identifier: GPL-3.0-or-later

// Package daemon wires the packages together: configuration into objects (build.go), a context at work (context.go), the order of start and
// stop (this file), reload (reload.go), leases (lease.go) and what the control socket asks (backend.go, status.go). It holds no logic of
// its own about packets, protocols or rules. The commands up and run call it.
package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/mutex-proxy/mutex/config"
	"github.com/mutex-proxy/mutex/control"
	"github.com/mutex-proxy/mutex/dialers"
	"github.com/mutex-proxy/mutex/flow"
	"github.com/mutex-proxy/mutex/policy"
	"github.com/mutex-proxy/mutex/policy/process"
	"github.com/mutex-proxy/mutex/stack/offload"
	"github.com/mutex-proxy/mutex/tun"
)

const (
	// resolveTimeout bounds the look-up of upstreams' names before capture starts: a dead resolver must not keep the machine open.
	resolveTimeout = 5 * time.Second
	// stopTimeout bounds undoing the kernel state at the end, when the caller's own context is over.
	stopTimeout = 10 * time.Second
)

// Options is what a Daemon is made from.
type Options struct {
	Config     *config.Config
	ConfigPath string // "" when the configuration comes from flags
	Digest     string // SHA-256 of the file's bytes, lower-case hex; "" without a file
	Load       Loader // for a reload; nil = there is nothing to read again
	Socket     string
	StateDir   string // where fake IPs are kept; "" = in memory only
	Version    string
	Log        *zap.Logger
	SetLevel   func(config.Log) // follows a reload; nil = the level stays
	DockerHost string           // where the container runtime answers, unix:///path; "" = at the usual places
}

// Daemon is one running mprox.
type Daemon struct {
	opt     Options
	log     *zap.Logger
	started time.Time
	ids     atomic.Uint64
	net     *dialers.Net
	metrics *control.Metrics
	server  *control.Server

	host      *policy.LinuxHost
	shortcut  *policy.Shortcut
	owners    *policy.Owners
	manager   *policy.Manager
	life      context.Context //nolint:containedctx // the daemon's own, for what outlives the call that began it
	stop      context.CancelFunc
	docker    bool           // see contextEnv
	leftovers sync.WaitGroup // leases that have ended, waiting for their last process; keepMemory, keepProcs
	ready     atomic.Bool
	watcher   watcher
	closed    atomic.Bool // the end leaves everything closed

	containers *process.Containers
	news       newsroom
	doorman    *doorman
	devices    *deviceKeeper

	reload     sync.Mutex     // held by whoever changes the set of contexts or the kernel plan
	mu         sync.Mutex     // guards what follows, for a moment each
	cfg        *config.Config // in force: base with changes on top
	base       *config.Config // as loaded
	changes    changes
	wanted     map[string]string // the modes that contexts have when they are switched on
	digest     string
	ups        *upstreams
	contexts   map[string]*liveContext
	generation uint64
	loadedAt   time.Time
	past       policy.Stats // of containers that were let go
}

// New returns a Daemon that has not touched anything. The configuration must have passed Check.
func New(opt Options) *Daemon {
	if opt.Log == nil {
		opt.Log = zap.NewNop()
	}
	life, stop := context.WithCancel(context.Background())
	wanted := make(map[string]string)
	for name, c := range opt.Config.Contexts {
		wanted[name] = c.Mode
	}
	d := &Daemon{
		life: life, stop: stop, wanted: wanted,
		opt: opt, log: opt.Log, started: time.Now(), cfg: opt.Config, base: opt.Config, digest: opt.Digest,
		contexts: make(map[string]*liveContext), generation: 1, loadedAt: time.Now(),
	}
	d.doorman = newDoorman(d)
	d.devices = newDeviceKeeper(d)
	return d
}

// Run starts the daemon, calls ready when it captures, and stops it, undoing what it did, when ctx ends or Stop is called. When
// it cannot start it undoes what it has done and returns why.
func (d *Daemon) Run(ctx context.Context, ready func()) (err error) {
	defer context.AfterFunc(ctx, d.stop)()
	defer d.stop()
	ctx = d.life
	percent := debug.SetGCPercent(memoryStartGC)
	if err := d.start(ctx); err != nil {
		debug.SetGCPercent(percent)
		return errors.Join(err, d.shutdown(policy.StopOpen))
	}
	d.leftovers.Go(func() { keepMemory(ctx, percent) })
	d.leftovers.Go(func() { keepProcs(ctx, d.flowsStarted) })
	d.leftovers.Go(func() { d.devices.run(ctx) })
	d.watcher.want(d)
	d.ready.Store(true)
	if ready != nil {
		ready()
	}
	<-ctx.Done()
	mode := policy.StopConfigured
	if d.closed.Load() {
		mode = policy.StopBlock
	}
	return d.shutdown(mode)
}

// start goes from the outside in: first everything is closed (Prepare), then opened for what has a context (Apply).
func (d *Daemon) start(ctx context.Context) error {
	var err error
	if d.metrics, err = control.NewMetrics(d, d.opt.Version); err != nil {
		return err
	}
	if d.host, err = policy.NewLinuxHost(); err != nil {
		return err
	}
	if d.containers, err = process.NewContainers(d.opt.DockerHost); err != nil {
		return err
	}
	if len(enabled(d.cfg)) > 0 {
		if err := tun.Available(); err != nil {
			return err
		}
	}
	if d.owners, err = policy.NewOwners(d.host); err != nil {
		return err
	}
	d.manager = policy.NewManager(policy.Config{Host: d.host, Log: d.log, Marking: policy.Marking(d.cfg.Kernel.Marking), Changed: d.doorman.knock, Gone: d.devices.miss})
	snap, err := d.manager.Snapshot(ctx)
	if err != nil {
		return err
	}
	mask := uint32(d.cfg.Kernel.MarkMask)
	d.net = dialers.NewNet(dialers.NetConfig{
		MaxFD: maxFD(),
		Mark:  policy.BypassMark(mask), MarkMask: mask, Nameservers: snap.Nameservers, Log: d.log,
	})
	d.docker = slices.Contains(snap.Nameservers, netip.MustParseAddrPort(dockerResolver))
	if d.ups, err = buildUpstreams(d.cfg, d.net, nil); err != nil {
		return err
	}
	d.shortcut = policy.NewShortcut(mask)
	for slot, name := range enabled(d.cfg) {
		c, err := newContext(d.cfg, name, slot, d.ups, d.contextEnv(d.opt.StateDir))
		if err != nil {
			return err
		}
		d.contexts[name] = c
	}
	d.resolve(ctx, d.ups)
	d.doorman.look(ctx)
	if err := d.manager.Prepare(ctx, d.spec()); err != nil {
		return err
	}
	if err := d.excludeLocal(ctx, d.ups); err != nil {
		return err
	}
	for _, c := range d.live() {
		if err := c.open(ctx); err != nil {
			return err
		}
	}
	if err := d.manager.Apply(ctx, d.spec()); err != nil {
		return err
	}
	for _, c := range d.live() {
		d.resetExisting(ctx, c, c.who.chosen)
	}
	d.welcome(ctx)
	d.ups.startChecks()
	d.leftovers.Go(d.shorten)
	if err := d.manager.Settle(ctx); err != nil { // tried again with the next repair
		d.log.Warn("whose flows are whose is not written down yet", zap.Error(err))
	}
	d.server = control.NewServer(control.Config{
		Socket: d.opt.Socket, Group: d.cfg.Control.Group, UserLeases: d.cfg.Control.UserLeases, HTTPListen: d.cfg.HTTP.Listen, Backend: backend{d}, Metrics: d.metrics, Log: d.log,
	})
	if err := d.server.Start(); err != nil {
		if errors.Is(err, control.ErrConflict) {
			return fmt.Errorf("%w: %w", policy.ErrConflict, err)
		}
		return err
	}
	return nil
}

// shorten shortens the way of what applications send into adopted flows. Until it is done, and where it cannot be, they are only slower.
func (d *Daemon) shorten() {
	if policy.Marking(d.cfg.Kernel.Marking) == policy.MarkingNFT {
		return
	}
	if err := d.shortcut.Attach(); err != nil {
		d.log.Debug("adopted flows go the long way to their sockets", zap.Error(err))
	}
}

// shutdown undoes start, in reverse. The kernel state goes after the flows have ended and before the devices vanish: the other way round,
// their last packets would meet a half-removed plan.
func (d *Daemon) shutdown(mode policy.StopMode) error {
	d.ready.Store(false)
	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	var errs []error
	if d.server != nil {
		errs = append(errs, d.server.Close())
	}
	d.stop()
	d.leftovers.Wait()
	d.reload.Lock()
	defer d.reload.Unlock()
	_, ups := d.current()
	ups.stop(nil)
	for _, c := range d.live() {
		c.dismiss(mode)
		errs = append(errs, c.handler.Close())
	}
	if d.manager != nil {
		errs = append(errs, d.manager.Close(ctx, mode))
	}
	errs = append(errs, d.watcher.dismiss())
	var closing sync.WaitGroup
	for _, c := range d.live() { // side by side: the kernel takes its time to let a device go
		closing.Go(c.close)
	}
	closing.Wait()
	if d.shortcut != nil {
		errs = append(errs, d.shortcut.Close())
	}
	if d.owners != nil {
		errs = append(errs, d.owners.Close())
	}
	if d.host != nil {
		errs = append(errs, d.host.Close())
	}
	return errors.Join(errs...)
}

// Stop begins an orderly end and returns at once.
func (d *Daemon) Stop() { d.stop() }

// StopClosed is Stop, but what is captured stays blocked until the next start: for an upgrade.
func (d *Daemon) StopClosed() {
	d.closed.Store(true)
	d.stop()
}

func (d *Daemon) contextEnv(stateDir string) contextEnv {
	return contextEnv{
		net: d.net, owner: owner{d.owners, d.metrics}, ids: &d.ids, recorder: d.metrics, stateDir: stateDir, docker: d.docker, log: d.log,
		forget: d.host.ForgetConnection, missed: d.devices.knock, offload: offload.Config{
			Mark: policy.AccelMark(uint32(d.cfg.Kernel.MarkMask)), TTL: policy.AccelTTL, Option: d.shortcut.Option, Waits: d.owners.Waits, Log: d.log,
		},
	}
}

// enabled lists the contexts that capture anything, in a fixed order: their position is their slot, and with it mark and table.
func enabled(cfg *config.Config) []string {
	names := slices.Sorted(maps.Keys(cfg.Contexts))
	return slices.DeleteFunc(names, func(n string) bool { return cfg.Contexts[n].Mode == "disabled" })
}

// live returns the contexts at work, in the order in which they are asked.
func (d *Daemon) live() []*liveContext {
	d.mu.Lock()
	defer d.mu.Unlock()
	out := slices.Collect(maps.Values(d.contexts))
	// Leases last: who is in their cgroups belongs to them before any selector is asked. Selectors are asked by the contexts' names.
	slices.SortFunc(out, func(a, b *liveContext) int {
		if a.lease != b.lease {
			return map[bool]int{true: 1, false: -1}[a.lease]
		}
		return cmp.Compare(a.name, b.name)
	})
	return out
}

// flowsStarted is how many flows have begun in the contexts at work.
func (d *Daemon) flowsStarted() uint64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	total := uint64(0)
	for _, c := range d.contexts {
		total += c.table.Started()
	}
	return total
}

// spec is what all contexts together want from the kernel.
func (d *Daemon) spec() policy.Spec {
	k := d.opt.Config.Kernel // fixed at start
	s := policy.Spec{
		Instance: policy.InstanceFor(d.opt.Socket), Mask: uint32(k.MarkMask), TableBase: int(k.TableBase), RulePriority: int(k.RulePriority),
	}
	s.Bridges, s.Ports = d.doorman.passing()
	for _, c := range d.live() {
		s.Contexts = append(s.Contexts, c.spec())
	}
	s.Owners = needsOwners(s)
	return s
}

// needsOwners reports whether it has to be written down who makes sockets: flows of this machine's processes are shown and logged with theirs. Those of
// other hosts, and of containers, are not this namespace's sockets. One command of `mprox run` has no need of it, and no time for it at its start.
func needsOwners(s policy.Spec) bool {
	return !s.Instance.Run && slices.ContainsFunc(s.Contexts, func(c policy.ContextSpec) bool {
		return c.Mode != policy.ModeGateway && c.Mode != policy.ModeDisabled
	})
}

// preparer is an upstream whose server has a name to resolve.
type preparer interface {
	Prepare(context.Context) error
	Servers() []netip.AddrPort
}

// resolve looks up the upstreams' own names while everybody can still reach the machine's resolvers. One that cannot be resolved
// now is tried again with each flow, over marked sockets: no reason not to close the machine.
func (d *Daemon) resolve(ctx context.Context, u *upstreams) {
	ctx, cancel := context.WithTimeout(ctx, resolveTimeout)
	defer cancel()
	var wg sync.WaitGroup
	for name, up := range u.dialers {
		if p, ok := up.(preparer); ok {
			wg.Go(func() {
				if err := p.Prepare(ctx); err != nil {
					d.log.Warn("upstream cannot be resolved yet", zap.String("upstream", name), zap.Error(err))
				}
			})
		}
	}
	wg.Wait()
}

// excludeLocal keeps the processes behind upstreams on loopback (ssh -D, tor) out of the capture: their own connections would come back to
// them for ever.
func (d *Daemon) excludeLocal(ctx context.Context, u *upstreams) error {
	var local []netip.AddrPort
	for _, up := range u.dialers {
		p, ok := up.(preparer)
		if !ok {
			continue
		}
		for _, s := range p.Servers() {
			if s.Addr().IsLoopback() {
				local = append(local, s)
			}
		}
	}
	if len(local) == 0 {
		return nil
	}
	return d.manager.ExcludeListeners(ctx, local)
}

// flowsOf returns the live flows of all contexts.
func (d *Daemon) flowsOf() []flow.Info {
	var out []flow.Info
	for _, c := range d.live() {
		out = append(out, c.table.Snapshot()...)
	}
	return out
}
