// SPDX-License-Identifier: GPL-3.0-or-later

package daemon

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/sync/errgroup"

	"github.com/mutex-proxy/mutex/config"
	"github.com/mutex-proxy/mutex/dialers"
	"github.com/mutex-proxy/mutex/dns"
	"github.com/mutex-proxy/mutex/flow"
	"github.com/mutex-proxy/mutex/policy"
	"github.com/mutex-proxy/mutex/routing"
	"github.com/mutex-proxy/mutex/stack"
	"github.com/mutex-proxy/mutex/stack/offload"
	"github.com/mutex-proxy/mutex/tun"
)

// defaultContext is the context that commands mean when none is named.
const defaultContext = "default"

// liveContext is one context at work: device, netstack, rules, DNS.
//
//	prepare (pure) ──▶ open (device, listeners) ──▶ start (netstack) ──▶ close
type liveContext struct {
	name  string
	slot  int
	lease bool
	// offload is there from the start, and what the kernel needs for it, whatever the configuration says of it: a rule may ask for it after a
	// reload, and flows that were adopted before one live on.
	offload offload.Config
	forget  func(src, dst netip.AddrPort) error
	missed  func() // has lost devices made again soon
	log     *zap.Logger
	net     *dialers.Net
	table   *flow.Table

	names   *dns.Server
	handler *flow.Handler

	mu    sync.Mutex // guards what follows
	cfg   config.Context
	who   selection
	ups   *upstreams
	rules atomic.Pointer[routing.Table]
	// What all entrances follow: the rules, or nothing any more. guests are containers, seats those of them that are captured in their own namespaces.
	decider flow.Decider
	guests  []*guest
	seats   []*seat
	views   map[flow.Dialer]flow.Dialer // the upstreams in use, as this context sees them

	device  *tun.Device
	lost    bool // somebody has deleted the device: deviceKeeper makes it again
	gone    bool // the device is about to go: the kernel is told first, or it would be seen as a fault and repaired
	stack   *stack.Stack
	dns     listeners
	cgroups []policy.CgroupRef
}

// contextEnv is what contexts share.
type contextEnv struct {
	net      *dialers.Net
	owner    flow.Owner
	ids      *atomic.Uint64
	recorder flow.Recorder
	stateDir string
	forget   func(src, dst netip.AddrPort) error // makes conntrack forget a connection
	offload  offload.Config
	missed   func() // see liveContext
	docker   bool   // the machine's resolver is Docker's: it knows the names of containers
	log      *zap.Logger
}

// newContext builds a context. It opens nothing.
func newContext(cfg *config.Config, name string, slot int, ups *upstreams, env contextEnv) (*liveContext, error) {
	c := &liveContext{name: name, slot: slot, cfg: cfg.Contexts[name], ups: ups, net: env.net}
	c.offload, c.forget, c.missed = env.offload, env.forget, env.missed
	c.log = env.log.With(zap.String("context", name))
	// First without servers: an upstream that takes no names resolves a server's name through the module that is to ask it.
	base := buildDNS(cfg, name, ups, plain, env)
	base.Servers, base.Rules = nil, nil
	var err error
	if c.names, err = dns.New(base); err != nil {
		return nil, err
	}
	ch, err := c.change(cfg, ups, env)
	if err != nil {
		return nil, err
	}
	c.who = ch.who
	c.table = flow.NewTable(flow.TableConfig{
		Context: name, MaxFlows: c.cfg.Limits.Flows, IDs: env.ids, Log: c.log, Recorder: env.recorder,
	})
	c.table.SetLimits(limits(c.cfg.Limits))
	apart := ""
	if c.cfg.Mode == "gateway" { // flows of other hosts cannot end at a socket of this machine
		apart = flow.PathForwarded
	}
	c.handler = flow.NewHandler(flow.HandlerConfig{
		Context: name, Table: c.table, Names: c.names, Owner: env.owner, Tuning: tuning(c.cfg), Apart: apart, Log: c.log,
	})
	ch.commitDNS()
	c.views = ch.views
	c.setRules(ch.rules)
	return c, nil
}

func tuning(c config.Context) flow.Tuning {
	return flow.Tuning{DialTimeout: c.DialTimeout.D(), ICMP: icmpMode(c.ICMP), Offload: offloadOf(c.Offload)}
}

func limits(c config.Limits) flow.Limits {
	return flow.Limits{NewFlows: c.NewFlowsPerSecond, Bandwidth: uint64(c.Bandwidth)}
}

func icmpMode(s string) flow.ICMPMode {
	switch s {
	case "drop":
		return flow.ICMPDrop
	case "reject":
		return flow.ICMPReject
	}
	return flow.ICMPHonest
}

// open makes the device, the DNS listeners and the netstack. The device is not up and no packet comes in before policy says so.
func (c *liveContext) open(ctx context.Context) (err error) {
	defer func() {
		if err != nil {
			c.close()
		}
	}()
	var names errgroup.Group
	names.Go(c.names.Start) // writes a file to the disk meanwhile
	dev, err := tun.Open(tunConfig(c.deviceName(), c.cfg.TUN))
	if err != nil {
		err = fmt.Errorf("context %s: %w", c.name, err)
	} else {
		c.device = dev
	}
	if nerr := names.Wait(); nerr != nil {
		err = errors.Join(err, fmt.Errorf("context %s: dns: %w", c.name, nerr))
	}
	if err != nil {
		return err
	}
	if err := c.dns.open(ctx, c.net, c.names, c.log, zapcore.WarnLevel); err != nil {
		return fmt.Errorf("context %s: dns listener: %w", c.name, err)
	}
	cfg := stack.Config{Device: dev, Handler: c.handler, Gone: c.deviceGone, Log: c.log}
	if c.cfg.Mode != "gateway" {
		cfg.Offload = &c.offload
		cfg.Forget = func(src, dst netip.AddrPort) {
			if err := c.forget(src, dst); err != nil {
				c.log.Debug("conntrack does not forget an adopted flow", zap.Error(err))
			}
		}
	}
	if c.stack, err = stack.New(cfg); err != nil {
		return fmt.Errorf("context %s: netstack: %w", c.name, err)
	}
	if err := c.stack.Start(); err != nil {
		return fmt.Errorf("context %s: netstack: %w", c.name, err)
	}
	return nil
}

// tunConfig is the device that the configuration describes.
func tunConfig(name string, cfg config.TUN) tun.Config {
	return tun.Config{
		Name: name, MTU: cfg.MTU, Queues: cfg.Queues,
		NoUSO: cfg.Offloads == "no-uso", NoOffload: cfg.Offloads == "none", NoHeader: cfg.Offloads == "no-header",
	}
}

// deviceName is the TUN's configured name, or one that shows the context.
func (c *liveContext) deviceName() string {
	switch {
	case c.cfg.TUN.Name != "":
		return c.cfg.TUN.Name
	case c.name == defaultContext:
		return "mprox0"
	}
	const longest = 15 // IFNAMSIZ without the NUL
	name := "mprox-" + c.name
	if len(name) > longest || c.lease {
		name = fmt.Sprintf("mprox-%d", c.slot)
	}
	return name
}

// spec is what the context wants from the kernel.
func (c *liveContext) spec() policy.ContextSpec {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := policy.ContextSpec{
		Name: c.name, Mode: policyMode(c.cfg.Mode), Slot: c.slot, MTU: c.cfg.TUN.MTU,
		Direct: bypassPrefixes(c.cfg.Bypass), Fake: fakePrefixes(c.cfg.DNS.Fake),
		DNSPort4: c.dns.ports[0], DNSPort6: c.dns.ports[1], DNSOff: c.cfg.DNS.Mode == "off",
		Cgroups: slices.Clone(c.cgroups), Select: c.who.chosen, Exclude: c.who.excluded, Offload: true, OnStop: onStop(c.cfg.OnStop), OnCrash: onEnd(c.cfg.OnCrash),
		Strict:     c.cfg.Strict,
		Containers: len(c.who.named()) > 0,
		InputPorts: ports(c.cfg.InputPorts),
	}
	if c.device != nil && !c.gone && !c.lost {
		s.TUN = c.device.Name()
	}
	chosen, excluded := c.sharedLocked()
	if s.Exclude = slices.Concat(s.Exclude, excluded); s.Mode != policy.ModeGlobal {
		s.Select = slices.Concat(s.Select, chosen)
	}
	return s
}

// detach takes the device out of the next plan: what is captured is unreachable from then on.
func (c *liveContext) detach() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.gone = true
}

// setConfig changes what spec says. Rules and DNS have their own ways.
func (c *liveContext) setConfig(cfg config.Context, who selection) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.cfg, c.who = cfg, who
}

// addCgroup captures a cgroup from the next plan on.
func (c *liveContext) addCgroup(r policy.CgroupRef) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.cgroups = append(c.cgroups, r)
}

func (c *liveContext) removeCgroup(r policy.CgroupRef) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.cgroups = slices.DeleteFunc(c.cgroups, func(x policy.CgroupRef) bool { return x.ID == r.ID })
}

func policyMode(s string) policy.Mode {
	switch s {
	case "process":
		return policy.ModeProcess
	case "cgroup":
		return policy.ModeCgroup
	case "global":
		return policy.ModeGlobal
	case "gateway":
		return policy.ModeGateway
	}
	return policy.ModeDisabled
}

func onEnd(s string) policy.OnEnd {
	switch s {
	case "open":
		return policy.OnEndOpen
	case "block":
		return policy.OnEndBlock
	}
	return policy.OnEndDefault
}

// onStop is onEnd with a default of its own: the init of a container blocks, so that restarting it lets nothing of those out who share its
// network namespace.
func onStop(s string) policy.OnEnd {
	if s == "" && os.Getpid() == 1 {
		return policy.OnEndBlock
	}
	return onEnd(s)
}

// bypassPrefixes are the addresses of `bypass` that the kernel can route directly. Classes such as private are the router's: what they
// mean depends on the links.
func bypassPrefixes(b config.Bypass) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range b.Address {
		if p, err := netip.ParsePrefix(s); err == nil {
			out = append(out, p.Masked())
		} else if a, err := netip.ParseAddr(s); err == nil {
			out = append(out, netip.PrefixFrom(a, a.BitLen()))
		}
	}
	return out
}

// ports are the ports in ranges, each once, ascending.
func ports(ranges []config.PortRange) []uint16 {
	var out []uint16
	for _, r := range ranges {
		for p := int(r.From); p <= int(r.To); p++ {
			out = append(out, uint16(p))
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

func fakePrefixes(f config.Fake) []netip.Prefix {
	var out []netip.Prefix
	for _, p := range []netip.Prefix{f.V4, f.V6} {
		if p.IsValid() {
			out = append(out, p)
		}
	}
	return out
}

// close lets the containers go, ends the flows, the netstack, the listeners and the device, in this order. It is idempotent.
func (c *liveContext) close() {
	c.dismiss(policy.StopOpen)
	_ = c.handler.Close()
	if c.stack != nil {
		_ = c.stack.Close()
	}
	c.dns.close()
	if err := c.names.Close(); err != nil {
		c.log.Error("dns: close", zap.Error(err))
	}
	c.dns.serving.Wait()
	c.mu.Lock()
	dev := c.device
	c.device, c.dns.ports = nil, [2]uint16{}
	c.mu.Unlock()
	if dev != nil {
		_ = dev.Close()
	}
}
