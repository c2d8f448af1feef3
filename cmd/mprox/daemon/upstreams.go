// SPDX-License-Identifier: GPL-3.0-or-later

package daemon

import (
	"context"
	"fmt"

	"github.com/mutex-proxy/mutex/control"
	"github.com/mutex-proxy/mutex/control/client"
	"github.com/mutex-proxy/mutex/dialers"
	"github.com/mutex-proxy/mutex/flow"
)

// upstream finds an upstream or a pool of the configuration, or else of a lease.
func (d *Daemon) upstream(name string) (flow.Dialer, error) {
	_, ups := d.current()
	if up, ok := ups.dialers[name]; ok {
		return up, nil
	}
	for _, c := range d.live() {
		if up, ok := c.ups.dialers[name]; ok && c.lease {
			return up, nil
		}
	}
	return nil, &control.Error{Code: client.CodeNotFound, Message: fmt.Sprintf("no upstream or pool is called %q: see mprox upstreams", name)}
}

// TestUpstream implements control.Backend.
func (b backend) TestUpstream(ctx context.Context, name, target string) (control.UpstreamTest, error) {
	t := control.UpstreamTest{Name: name, Target: target, OK: true}
	dst, err := dialers.ParseAddr(target)
	if err != nil {
		return t, &control.Error{Code: client.CodeBadRequest, Path: "$.target", Message: err.Error()}
	}
	up, err := b.upstream(name)
	if err != nil {
		return t, err
	}
	for _, s := range dialers.Trial(ctx, up, dst) {
		step := control.TestStep{Upstream: s.Upstream, Step: s.Name, Seconds: s.Took.Seconds(), OK: s.Err == nil, Says: s.Says}
		if s.Err != nil {
			step.Error, t.OK = s.Err.Error(), false
		}
		t.Steps = append(t.Steps, step)
	}
	return t, nil
}

// SetUpstream implements control.Backend.
func (b backend) SetUpstream(name, state string) error {
	up, err := b.upstream(name)
	if err != nil {
		return err
	}
	if name == direct {
		return &control.Error{Code: client.CodeUnsupported, Message: "direct is no upstream of yours, and cannot be switched: rules decide what goes directly"}
	}
	to := dialers.Enabled
	switch state {
	case dialers.Draining.String():
		to = dialers.Draining
	case dialers.Disabled.String():
		to = dialers.Disabled
	}
	if !dialers.SetState(up, to) {
		return &control.Error{Code: client.CodeUnsupported, Message: fmt.Sprintf("%q cannot be switched", name)}
	}
	if to == dialers.Disabled { // also those of a pool, whose connections are its members'
		for _, c := range b.live() {
			c.table.KillIf(flow.ErrDisabled, func(i *flow.Info) bool { return i.Upstream == name })
		}
	}
	return nil
}
