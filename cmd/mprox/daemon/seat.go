// SPDX-License-Identifier: GPL-3.0-or-later

package daemon

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/mutex-proxy/mutex/config"
	"github.com/mutex-proxy/mutex/dialers"
	"github.com/mutex-proxy/mutex/dns"
	"github.com/mutex-proxy/mutex/flow"
	"github.com/mutex-proxy/mutex/policy"
	"github.com/mutex-proxy/mutex/stack"
	"github.com/mutex-proxy/mutex/tun"
)

// seat is what a context has in the network namespace of a container: a device, a netstack, DNS listeners, and the kernel plan of a global context.
// Rules, names, limits and the table of flows are the context's own; upstreams are dialled from the daemon's namespace.
type seat struct {
	d       *Daemon
	c       *liveContext
	name    string // of the guest
	host    *policy.ContainerHost
	log     *zap.Logger
	manager *policy.Manager
	owners  *policy.Owners
	handler *flow.Handler
	near    *dns.Server // asks Docker's resolver in the container; nil = there is none
	device  *tun.Device
	stack   *stack.Stack
	dns     listeners
	opened  atomic.Bool // all of open has been done
}

// open goes from the inside out: first there is somebody to take the packets, then they are led to him. At the daemon's start everything is closed before;
// here the way out is closed already (doorman), and the container's first connection is not to be refused.
func (s *seat) open(ctx context.Context) error {
	daemon, err := s.d.manager.Daemon()
	if err != nil {
		return err
	}
	if err := tun.Available(); err != nil {
		return err
	}
	s.manager = policy.NewManager(policy.Config{Host: s.host, Log: s.log, Daemon: &daemon, Open: true})
	if s.owners, err = policy.NewOwners(s.host.LinuxHost); err != nil {
		return err
	}
	err = s.host.Inside(func() (err error) {
		s.device, err = tun.Open(tunConfig(s.c.deviceName(), s.c.tun()))
		return err
	})
	if err != nil {
		return err
	}
	if err := s.listen(ctx); err != nil {
		return fmt.Errorf("dns listener: %w", err)
	}
	s.handler = s.c.newHandler(owner{s.owners, s.d.metrics})
	s.c.seated(s)
	if s.stack, err = stack.New(stack.Config{Device: s.device, Handler: s.handler, Log: s.log}); err != nil {
		return fmt.Errorf("netstack: %w", err)
	}
	if err := s.stack.Start(); err != nil {
		return fmt.Errorf("netstack: %w", err)
	}
	if err := s.manager.Prepare(ctx, s.spec()); err != nil {
		return err
	}
	s.c.mu.Lock()
	reset := s.c.cfg.Existing == "reset"
	s.c.mu.Unlock()
	if reset {
		if _, err = s.manager.ResetExisting(ctx, s.c.name, nil); err != nil {
			return err
		}
	}
	s.opened.Store(true)
	return nil
}

// listen opens the sockets that port 53 of the container's loopback addresses is redirected to.
func (s *seat) listen(ctx context.Context) error {
	mask := uint32(s.d.opt.Config.Kernel.MarkMask)
	inside := dialers.NewNet(dialers.NetConfig{Mark: policy.BypassMark(mask), MarkMask: mask, Inside: s.host.Inside, Log: s.log})
	if s.host.DockerNames() {
		var err error
		s.near, err = dns.New(dns.Config{
			Context: s.c.name, Mode: dns.ModeReal, Log: s.log,
			Rules: []dns.Rule{{Domain: []string{"*"}, Servers: []string{"udp://" + dockerResolver}, Via: dialers.NewDirect(direct, inside)}},
		})
		if err != nil {
			return err
		}
	}
	names := dns.Near{Names: s.near, Rest: s.c.names}
	return s.dns.open(ctx, inside, names, s.log, zapcore.DebugLevel)
}

// spec is that of a global context in a namespace of its own. Processes that the context selects or excludes are not in it.
func (s *seat) spec() policy.Spec {
	c := s.c.spec()
	c.Mode, c.TUN, c.DNSPort4, c.DNSPort6 = policy.ModeGlobal, "", s.dns.ports[0], s.dns.ports[1]
	c.Cgroups, c.Select, c.Exclude, c.Offload, c.Strict = nil, nil, nil, false, false
	if s.device != nil {
		c.TUN = s.device.Name()
	}
	k := s.d.opt.Config.Kernel
	return policy.Spec{
		Instance: policy.ContainerInstance(s.d.opt.Socket, s.host.Netns()), Mask: uint32(k.MarkMask), TableBase: int(k.TableBase), RulePriority: int(k.RulePriority),
		Contexts: []policy.ContextSpec{c},
	}
}

// apply brings the kernel after the context's configuration.
func (s *seat) apply(ctx context.Context) error {
	return s.manager.Apply(ctx, s.spec())
}

// close undoes open, in the order of the daemon's own end. It works after any part of open.
func (s *seat) close(mode policy.StopMode) error {
	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	s.c.unseated(s)
	var errs []error
	if s.handler != nil {
		errs = append(errs, s.handler.Close())
	}
	if s.manager != nil {
		s.d.remember(s.manager.Stats())
		errs = append(errs, s.manager.Close(ctx, mode))
	}
	if s.stack != nil {
		errs = append(errs, s.stack.Close())
	}
	s.dns.close()
	s.dns.serving.Wait()
	if s.near != nil {
		errs = append(errs, s.near.Close())
	}
	if s.device != nil {
		_ = s.device.Close()
	}
	if s.owners != nil {
		errs = append(errs, s.owners.Close())
	}
	return errors.Join(append(errs, s.host.Close())...)
}

// tun describes the context's devices.
func (c *liveContext) tun() config.TUN {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.cfg.TUN
}

// newHandler makes one more entrance to the context, with an owner's look-up of its own. Sockets for adopted flows would have to be made in the
// container's namespace.
func (c *liveContext) newHandler(who flow.Owner) *flow.Handler {
	c.mu.Lock()
	defer c.mu.Unlock()
	return flow.NewHandler(flow.HandlerConfig{
		Context: c.name, Table: c.table, Names: c.names, Owner: who, Tuning: tuning(c.cfg), Apart: flow.PathContainer, Log: c.log,
	})
}

// seated lets a seat follow the context's rules. Until then its handler blocks everything.
func (c *liveContext) seated(s *seat) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.seats = append(c.seats, s)
	s.handler.SetDecider(c.decider)
}

// handlersLocked are all entrances of the context. The caller holds c.mu.
func (c *liveContext) handlersLocked() []*flow.Handler {
	out := []*flow.Handler{c.handler}
	for _, s := range c.seats {
		out = append(out, s.handler)
	}
	return out
}

func (c *liveContext) unseated(s *seat) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.seats = slices.DeleteFunc(c.seats, func(x *seat) bool { return x == s })
}
