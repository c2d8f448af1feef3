// SPDX-License-Identifier: GPL-3.0-or-later

package daemon

import (
	"cmp"
	"context"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/mutex-proxy/mutex/control"
	"github.com/mutex-proxy/mutex/dialers"
	"github.com/mutex-proxy/mutex/policy"
)

// Status implements control.Backend.
func (b backend) Status(context.Context) control.Status {
	cfg := b.configStatus()
	s := control.Status{
		Version: b.opt.Version, PID: os.Getpid(), UptimeSeconds: time.Since(b.started).Seconds(), Config: cfg,
		Contexts: []control.ContextStatus{}, Upstreams: b.upstreamStatus(),
	}
	for _, c := range b.live() {
		st := c.table.Stats()
		active := 0
		for _, n := range st.Active {
			active += n
		}
		spec := c.spec()
		s.Contexts = append(s.Contexts, control.ContextStatus{
			Name: c.name, Mode: spec.Mode.String(), Enabled: spec.TUN != "", Lease: c.lease, TUN: spec.TUN, Default: c.defaultUpstream(),
			FlowsActive: uint64(active), FlowsTotal: st.Flows, BytesUp: st.BytesUp, BytesDown: st.BytesDown,
			PacketsDropped: sum(st.Dropped) + c.stackDrops(),
		})
		d := c.dnsStatus()
		s.DNS.Queries += d.Queries
		s.DNS.CacheHits += d.CacheHits
		s.DNS.Blocked += d.Blocked
		s.DNS.Failures += d.Failures
	}
	s.Contexts = append(s.Contexts, b.switchedOff()...)
	slices.SortFunc(s.Contexts, func(x, y control.ContextStatus) int { return cmp.Compare(x.Name, y.Name) })
	k := b.kernelStats()
	s.Guard = control.GuardStatus{
		Active: k.GuardActive, DroppedPackets: k.GuardDropped, Marking: string(k.Marking), MarkingReason: k.MarkingWhy,
		SelectionFull: k.Select.Full, SelectionDenied: k.Select.Denied,
	}
	return s
}

// switchedOff lists the contexts that capture nobody at the moment.
func (d *Daemon) switchedOff() []control.ContextStatus {
	d.mu.Lock()
	defer d.mu.Unlock()
	var out []control.ContextStatus
	for name, c := range d.cfg.Contexts {
		if c.Mode == "disabled" && d.contexts[name] == nil {
			out = append(out, control.ContextStatus{Name: name, Mode: d.wanted[name], Default: c.Default})
		}
	}
	return out
}

func (d *Daemon) configStatus() control.ConfigStatus {
	d.mu.Lock()
	defer d.mu.Unlock()
	return control.ConfigStatus{Path: d.opt.ConfigPath, SHA256: d.digest, Generation: d.generation, LoadedAt: d.loadedAt}
}

// upstreamStatus lists the upstreams of the configuration and those of the leases, by name.
func (d *Daemon) upstreamStatus() []control.UpstreamStatus {
	out := []control.UpstreamStatus{}
	seen := make(map[*upstreams]bool)
	add := func(u *upstreams) {
		if u == nil || seen[u] {
			return
		}
		seen[u] = true
		for _, name := range slices.Sorted(maps.Keys(u.dialers)) {
			if u.listed(name) {
				out = append(out, upstreamStatus(dialers.StatusOf(u.dialers[name])))
			}
		}
	}
	_, ups := d.current()
	add(ups)
	for _, c := range d.live() {
		if c.lease {
			add(c.ups)
		}
	}
	return out
}

// listed says whether an upstream is shown: the built-in direct only if the configuration has an upstream of that name.
func (u *upstreams) listed(name string) bool {
	if name != direct {
		return true
	}
	_, ok := u.cfg.Upstreams[name]
	return ok
}

func upstreamStatus(s dialers.Status) control.UpstreamStatus {
	return control.UpstreamStatus{
		Name: s.Name, URL: s.URL, State: s.State.String(), Up: s.Up, LatencySeconds: s.Latency.Seconds(), Active: s.Active, Total: s.Total, Errors: s.Errors,
		UDP: s.UDP, IPv6: s.IPv6, RemoteDNS: s.RemoteDNS, Bind: s.Bind, Auth: strings.Fields(s.Auth), Warm: s.Warm,
	}
}

// Health implements control.Backend: every context has its device, and the guard stands.
func (b backend) Health(context.Context) []control.Check {
	if !b.ready.Load() {
		return nil
	}
	// Without a context there is nothing to guard.
	guard := control.Check{Name: "guard", OK: b.manager.Stats().GuardActive || len(b.live()) == 0}
	if !guard.OK {
		guard.Message = "the guard is not in the kernel: restart mprox"
	}
	checks := []control.Check{guard}
	for _, c := range b.live() {
		device, _ := c.deviceState()
		if c.lease && device == "" {
			continue // ended, and waiting for its last process
		}
		gone, lost := c.lostDevice()
		check := control.Check{Name: "device:" + c.name, OK: device != "" && !lost}
		switch {
		case lost:
			check.Message = "somebody has deleted the device " + gone + ": it is being made again; if that fails, the log says why"
		case !check.OK:
			check.Message = "the context has no device: restart mprox"
		}
		checks = append(checks, check)
	}
	for _, u := range b.upstreamStatus() {
		check := control.Check{Name: "upstream:" + u.Name, OK: u.Up || u.Total == 0 || u.State != dialers.Enabled.String()}
		if !check.OK {
			check.Message = "the last connection to it failed: see mprox upstreams"
		}
		checks = append(checks, check)
	}
	return checks
}

// Counters implements control.Source.
func (d *Daemon) Counters() control.Counters {
	k := d.kernelStats()
	n := control.Counters{Upstreams: d.upstreamStatus(), Restored: k.Restored, GuardDropped: k.GuardDropped}
	for _, c := range d.live() {
		cc := control.ContextCounters{Name: c.name, Table: c.table.Stats(), DNS: c.dnsStatus()}
		if st := c.stack; st != nil {
			ss := st.Stats()
			cc.PacketsUp, cc.PacketsDown, cc.Dropped = ss.PacketsIn, ss.PacketsOut, ss.Drops
		}
		n.Contexts = append(n.Contexts, cc)
	}
	return n
}

// kernelStats are those of the daemon's own namespace and of all containers, those that have gone included.
func (d *Daemon) kernelStats() policy.Stats {
	k := d.manager.Stats()
	for _, c := range d.live() {
		c.mu.Lock()
		for _, s := range c.seats {
			k.Add(s.manager.Stats())
		}
		c.mu.Unlock()
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	k.Add(d.past)
	return k
}

// remember keeps the counters of a namespace that is let go.
func (d *Daemon) remember(s policy.Stats) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.past.Add(s)
}

func (c *liveContext) defaultUpstream() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.cfg.Default
}

// stackDrops is how many packets the netstack has not passed on.
func (c *liveContext) stackDrops() uint64 {
	if c.stack == nil {
		return 0
	}
	return sum(c.stack.Stats().Drops)
}

func (c *liveContext) dnsStatus() control.DNSStatus {
	st := c.names.Stats()
	return control.DNSStatus{Queries: st.Queries, CacheHits: st.CacheHits, Blocked: st.Blocked, Failures: st.Failures}
}

func sum(m map[string]uint64) (n uint64) {
	for _, v := range m {
		n += v
	}
	return n
}
