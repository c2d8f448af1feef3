// SPDX-License-Identifier: GPL-3.0-or-later

package daemon

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
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
	stack   *stack.Stack
	dns     listeners
	opened  atomic.Bool // all of open has been done

	mu     sync.Mutex // guards what follows
	device *tun.Device
	lost   bool // somebody has deleted the device: deviceKeeper makes it again
	late   bool // the kernel plan does not know of the device's last change yet
	closed bool
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
	s.manager = policy.NewManager(policy.Config{Host: s.host, Log: s.log, Daemon: &daemon, Open: true, Gone: func(string) { s.deviceGone(nil) }})
	if s.owners, err = policy.NewOwners(s.host.LinuxHost); err != nil {
		return err
	}
	dev, err := s.openDevice(s.c.deviceName())
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.device = dev
	s.mu.Unlock()
	if err := s.listen(ctx); err != nil {
		return fmt.Errorf("dns listener: %w", err)
	}
	s.handler = s.c.newHandler(owner{s.owners, s.d.metrics})
	s.c.seated(s)
	if s.stack, err = stack.New(stack.Config{Device: dev, Handler: s.handler, Gone: s.deviceGone, Log: s.log}); err != nil {
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
	s.c.missed() // a device that was deleted meanwhile
	return nil
}

// openDevice makes the device in the container's namespace. It is there until it is closed.
func (s *seat) openDevice(name string) (dev *tun.Device, err error) {
	err = s.host.Inside(func() (err error) {
		dev, err = tun.Open(tunConfig(name, s.c.tun()))
		return err
	})
	return dev, err
}

// deviceGone is called when the device does not exist any more. nil = that of the plan; it may be older news than the device.
func (s *seat) deviceGone(dev *tun.Device) {
	s.mu.Lock()
	current := s.device
	if dev == nil && current != nil {
		_ = s.host.Inside(func() error { // what cannot be looked at is left to the reader
			if !present(current) {
				dev = current
			}
			return nil
		})
	}
	lost := dev != nil && current == dev && !s.closed
	s.lost = s.lost || lost
	s.mu.Unlock()
	if lost {
		s.c.missed()
	}
}

// lostDevice is the name of the device that somebody has deleted.
func (s *seat) lostDevice() (name string, lost bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.lost || s.closed {
		return "", false
	}
	return s.device.Name(), true
}

// restore makes the device that is lost again and puts it under the netstack, then brings the kernel after that.
func (s *seat) restore(ctx context.Context) error {
	err := s.replaceDevice()
	s.mu.Lock()
	late := s.late && !s.closed
	s.mu.Unlock()
	if !late {
		return err
	}
	if aerr := s.apply(ctx); aerr != nil && !errors.Is(aerr, policy.ErrClosed) {
		return aerr
	}
	s.mu.Lock()
	s.late = false
	s.mu.Unlock()
	return err
}

// replaceDevice keeps close from taking the old device for the last one.
func (s *seat) replaceDevice() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.lost || s.closed || !s.opened.Load() {
		return nil
	}
	s.late = true
	name := s.device.Name()
	dev, err := putUnder(s.stack, func() (*tun.Device, error) { return s.openDevice(name) })
	if err != nil {
		return err
	}
	_ = s.device.Close()
	s.device, s.lost = dev, false
	s.log.Warn(madeAgain, zap.String("device", name))
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
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.device != nil && !s.lost {
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
	s.mu.Lock()
	s.closed = true // from here on the device is not made again
	dev := s.device
	s.mu.Unlock()
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
	if dev != nil {
		_ = dev.Close()
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
