// SPDX-License-Identifier: GPL-3.0-or-later

package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"time"

	"go.uber.org/zap"

	"github.com/mutex-proxy/mutex/stack"
	"github.com/mutex-proxy/mutex/tun"
)

// deviceRetry is when a device is tried again that could not be made: its name may be in use meanwhile.
const deviceRetry = 500 * time.Millisecond

const madeAgain = "the TUN device was deleted by somebody, and has been made again"

// deviceKeeper makes the contexts' devices again that somebody deletes (`ip link del`). Meanwhile the plan has none: the guard and the unreachable
// routes stay, and other changes are possible.
//
//	the reader ends, or a repair fails ──▶ lost ──▶ a new device under the old netstack ──▶ kernel plan ──▶ as before
//	                                        ▲                  └── cannot be made ──▶ kernel plan without it ──┐
//	                                        └──────────────────────────────────────────────────────────────────┘
type deviceKeeper struct {
	d    *Daemon
	bell bell
	late bool // the kernel does not know of the last change yet; run's
}

func newDeviceKeeper(d *Daemon) *deviceKeeper {
	return &deviceKeeper{d: d, bell: newBell()}
}

// knock has the devices looked at soon.
func (k *deviceKeeper) knock() { k.bell.ring() }

// miss is told by policy which device is not there. It may be older news than the device.
func (k *deviceKeeper) miss(name string) {
	for _, c := range k.d.live() {
		c.mu.Lock()
		dev := c.device
		c.mu.Unlock()
		if dev != nil && dev.Name() == name && !present(dev) {
			c.deviceGone(dev)
		}
	}
}

// present reports whether the device is in the network namespace of the daemon. Another one may have its name.
func present(dev *tun.Device) bool {
	ifi, err := net.InterfaceByIndex(dev.Index())
	return err == nil && ifi.Name == dev.Name()
}

// run makes again what is lost, until ctx ends.
func (k *deviceKeeper) run(ctx context.Context) {
	said := ""
	for {
		var retry <-chan time.Time
		switch err := k.restore(ctx); {
		case ctx.Err() != nil:
			return
		case err == nil:
			said = ""
		default:
			if said != err.Error() {
				said = err.Error()
				k.d.log.Warn("a TUN device that was deleted cannot be made again: what its context captures stays closed until it can", zap.Error(err))
			}
			retry = time.After(deviceRetry)
		}
		select {
		case <-k.bell:
		case <-retry:
		case <-ctx.Done():
			return
		}
	}
}

// restore makes the devices that are lost, and brings the kernel after that.
func (k *deviceKeeper) restore(ctx context.Context) error {
	var lost []*liveContext
	var fail error
	for _, c := range k.d.live() {
		for _, s := range c.seatedNow() {
			if err := s.restore(ctx); err != nil && fail == nil {
				fail = fmt.Errorf("context %s: container %s: %w", c.name, s.name, err)
			}
		}
		if _, is := c.deviceState(); is {
			lost = append(lost, c)
		}
	}
	if len(lost) == 0 && !k.late {
		return fail
	}
	if err := k.d.lockReload(ctx); err != nil {
		return err
	}
	defer k.d.reload.Unlock()
	for _, c := range lost {
		if err := c.replaceDevice(); err != nil && fail == nil {
			fail = fmt.Errorf("context %s: %w", c.name, err)
		}
	}
	k.late = true
	if err := k.d.manager.Apply(ctx, k.d.spec()); err != nil {
		return err
	}
	k.late = false
	return fail
}

// deviceGone is called when the device does not exist any more.
func (c *liveContext) deviceGone(dev *tun.Device) {
	c.mu.Lock()
	lost := c.device == dev && !c.gone
	c.lost = c.lost || lost
	c.mu.Unlock()
	if lost {
		c.missed()
	}
}

// seatedNow are the seats of the context at the moment.
func (c *liveContext) seatedNow() []*seat {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.seats)
}

// lostDevice is the name of a device of the context, also in a container, that somebody has deleted.
func (c *liveContext) lostDevice() (name string, lost bool) {
	if name, lost = c.deviceState(); lost {
		return name, true
	}
	for _, s := range c.seatedNow() {
		if name, lost = s.lostDevice(); lost {
			return name + " in container " + s.name, true
		}
	}
	return "", false
}

// deviceState is the name of the device, "" if there is none, and whether somebody has deleted it.
func (c *liveContext) deviceState() (name string, lost bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.device == nil || c.gone {
		return "", false
	}
	return c.device.Name(), c.lost
}

// replaceDevice makes the device that is lost again and puts it under the netstack: what the context has accepted lives on. The caller holds
// Daemon.reload.
func (c *liveContext) replaceDevice() error {
	name, lost := c.deviceState()
	if !lost {
		return nil // the context has ended meanwhile
	}
	dev, err := putUnder(c.stack, func() (*tun.Device, error) { return tun.Open(tunConfig(name, c.tun())) })
	if err != nil {
		return err
	}
	c.mu.Lock()
	old := c.device
	c.device, c.lost = dev, false
	c.mu.Unlock()
	_ = old.Close()
	c.log.Warn(madeAgain, zap.String("device", name))
	return nil
}

// putUnder opens a device and puts it under a netstack. With an error there is none.
func putUnder(st *stack.Stack, open func() (*tun.Device, error)) (*tun.Device, error) {
	dev, err := open()
	if err != nil {
		return nil, err
	}
	if err := st.Replace(dev); err != nil {
		return nil, errors.Join(err, dev.Close())
	}
	return dev, nil
}
