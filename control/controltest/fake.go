// SPDX-License-Identifier: GPL-3.0-or-later

// Package controltest has a Backend without a daemon, for the tests of the API, of its client and of the commands.
package controltest

import (
	"context"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/miekg/dns"

	"github.com/mutex-proxy/mutex/control"
	"github.com/mutex-proxy/mutex/control/client"
	"github.com/mutex-proxy/mutex/flow"
)

// Epoch is when everything in a Fake happened.
func Epoch() time.Time { return time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC) }

// Fake is a Backend whose answers are its fields. Set them before it is used.
type Fake struct {
	StatusValue  control.Status
	Checks       []control.Check
	FlowList     []flow.Info
	Changes      []flow.Info // what WatchFlows sends
	Explained    control.Explanation
	ReloadErr    error
	LeaseErr     error
	CountersNow  control.Counters
	OnExplain    func(control.ExplainRequest)
	OnStop       func()
	ExchangeFunc func(query []byte) ([]byte, error) // nil = SERVFAIL

	mu        sync.Mutex
	killed    []uint64
	reloads   int
	leases    []*FakeLease
	selectors []string
	stopped   bool
}

var (
	_ control.Backend = (*Fake)(nil)
	_ control.Source  = (*Fake)(nil)
)

// New returns a Fake with one context, two upstreams (one of them down), two flows and good health.
func New() *Fake {
	return &Fake{
		StatusValue: control.Status{
			Version: "v1.2.3", PID: 4242, UptimeSeconds: 93784.5,
			Config: control.ConfigStatus{Path: "/etc/mprox/config.json", SHA256: "9f86d081884c7d65", Generation: 2, LoadedAt: Epoch()},
			Contexts: []control.ContextStatus{{
				Name: "default", Mode: "global", Enabled: true, TUN: "mprox0", Default: "eu",
				FlowsActive: 2, FlowsTotal: 17, BytesUp: 2048, BytesDown: 5 << 20, PacketsDropped: 3,
			}},
			Upstreams: []control.UpstreamStatus{
				{Name: "berlin", URL: "https://bob:***@proxy.example:8443", State: "draining", Errors: 4, UDP: "no", IPv6: "unknown", RemoteDNS: "yes", Bind: "no"},
				{Name: "paris", URL: "socks5h://alice:***@203.0.113.10:1080", State: "enabled", Up: true, LatencySeconds: 0.0213, Active: 2, Total: 17, UDP: "yes", IPv6: "yes", RemoteDNS: "yes", Bind: "unknown", Auth: []string{"password"}, Warm: 2},
			},
			Guard: control.GuardStatus{Active: true, DroppedPackets: 7},
			DNS:   control.DNSStatus{Queries: 10, CacheHits: 4, Blocked: 1, Failures: 2},
		},
		Checks:    []control.Check{{Name: "context:default", OK: true}, {Name: "guard", OK: true}},
		FlowList:  Flows(),
		Explained: Explanation(),
	}
}

// Flows returns a TCP flow whose process is known and a UDP flow that failed and is not.
func Flows() []flow.Info {
	return []flow.Info{
		{
			Flow: flow.Flow{
				ID: 2, Context: "default", Network: flow.UDP, Src: netip.MustParseAddrPort("[2001:db8::2]:50000"),
				Orig: netip.MustParseAddrPort("[2001:db8::35]:443"), Dst: flow.AddrFrom(netip.MustParseAddrPort("[2001:db8::35]:443")),
				Start: Epoch().Add(-time.Second),
			},
			Rule: "rules[1]", Upstream: "berlin", State: flow.StateClosing, Handshake: flow.HandshakeHonest, PacketsUp: 1, BytesUp: 1200,
			Err: "the upstream carries no UDP",
		},
		{
			Flow: flow.Flow{
				ID: 1, Context: "default", Network: flow.TCP, Src: netip.MustParseAddrPort("192.0.2.7:40000"),
				Orig: netip.MustParseAddrPort("198.18.0.5:443"), Dst: flow.Addr{Host: "example.com", Port: 443}, HostSource: flow.SourceFakeIP,
				App:      flow.App{PID: 77, UID: 1000, GID: 1000, Exe: "/usr/bin/curl", Cgroup: "/user.slice", Method: "diag"},
				Protocol: "tls", Confidence: flow.ConfidenceHigh, Start: Epoch().Add(-90 * time.Second),
			},
			Rule: "default", Upstream: "paris", State: flow.StateEstablished, Handshake: flow.HandshakeHonest,
			BytesUp: 517, BytesDown: 5 << 20, Connect: 42 * time.Millisecond,
		},
	}
}

// Explanation returns one rule that did not match and the default.
func Explanation() control.Explanation {
	return control.Explanation{
		Upstream: "eu", Member: "paris", Rule: "default", NameSource: "given",
		Conditions: []control.Condition{{Rule: "rules[0]", Key: "domain_suffix", Value: "corp.example", Reason: "example.com does not end in it"}},
		Kernel:     control.KernelPath{Mark: "0x50000000", Table: 19760, Device: "mprox0"},
	}
}

// Status implements control.Backend.
func (f *Fake) Status(context.Context) control.Status { return f.StatusValue }

// TestUpstream implements control.Backend: paris works, berlin refuses the password.
func (f *Fake) TestUpstream(_ context.Context, name, target string) (control.UpstreamTest, error) {
	t := control.UpstreamTest{Name: name, Target: target, Steps: []control.TestStep{
		{Upstream: name, Step: "resolve", Seconds: 0.0001, OK: true, Says: "203.0.113.10"},
		{Upstream: name, Step: "connect", Seconds: 0.0213, OK: true, Says: "203.0.113.10:1080"},
	}}
	switch name {
	case "paris":
		t.OK = true
		t.Steps = append(t.Steps, control.TestStep{Upstream: name, Step: "request", Seconds: 0.042, OK: true, Says: "succeeded"})
	case "berlin":
		t.Steps = append(t.Steps, control.TestStep{Upstream: name, Step: "authentication", Seconds: 0.02, Says: "refused", Error: "wrong user or password"})
	default:
		return t, noUpstream(name)
	}
	return t, nil
}

// SetUpstream implements control.Backend. The next Status shows it.
func (f *Fake) SetUpstream(name, state string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i := range f.StatusValue.Upstreams {
		if u := &f.StatusValue.Upstreams[i]; u.Name == name {
			u.State = state
			return nil
		}
	}
	return noUpstream(name)
}

func noUpstream(name string) error {
	return &control.Error{Code: client.CodeNotFound, Message: "no upstream or pool is called " + name}
}

// Health implements control.Backend.
func (f *Fake) Health(context.Context) []control.Check { return f.Checks }

// Flows implements control.Backend.
func (f *Fake) Flows() []flow.Info { return slices.Clone(f.FlowList) }

// Counters implements control.Source.
func (f *Fake) Counters() control.Counters { return f.CountersNow }

// WatchFlows implements control.Backend: it sends Changes, then nothing until ctx ends.
func (f *Fake) WatchFlows(ctx context.Context) <-chan flow.Info {
	ch := make(chan flow.Info, len(f.Changes))
	for _, c := range f.Changes {
		ch <- c
	}
	context.AfterFunc(ctx, func() { close(ch) })
	return ch
}

// KillFlow implements control.Backend.
func (f *Fake) KillFlow(id uint64) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !slices.ContainsFunc(f.FlowList, func(i flow.Info) bool { return i.ID == id }) {
		return false
	}
	f.killed = append(f.killed, id)
	return true
}

// Killed returns the flows that KillFlow was called for.
func (f *Fake) Killed() []uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.killed)
}

// Explain implements control.Backend.
func (f *Fake) Explain(_ context.Context, r control.ExplainRequest) (control.Explanation, error) {
	if f.OnExplain != nil {
		f.OnExplain(r)
	}
	return f.Explained, nil
}

// ExchangeDNS implements control.Backend.
func (f *Fake) ExchangeDNS(_ context.Context, _ string, query []byte) ([]byte, error) {
	if f.ExchangeFunc != nil {
		return f.ExchangeFunc(query)
	}
	var m dns.Msg
	if err := m.Unpack(query); err != nil {
		return nil, err
	}
	return new(dns.Msg).SetRcode(&m, dns.RcodeServerFailure).Pack()
}

// Reload implements control.Backend.
func (f *Fake) Reload(context.Context) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.reloads++
	return f.ReloadErr
}

// Reloads returns how often Reload was called.
func (f *Fake) Reloads() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.reloads
}

// Stop implements control.Backend.
func (f *Fake) Stop() {
	f.mu.Lock()
	first := !f.stopped
	f.stopped = true
	f.mu.Unlock()
	if first && f.OnStop != nil {
		f.OnStop()
	}
}

// StopClosed implements control.Backend.
func (f *Fake) StopClosed() { f.Stop() }

// AddContext implements control.Backend.
func (f *Fake) AddContext(_ context.Context, r control.ContextRequest) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.find(r.Name) != nil {
		return &control.Error{Code: client.CodeConflict, Path: "$.name", Message: "a context is called " + r.Name + " already"}
	}
	f.StatusValue.Contexts = append(slices.Clone(f.StatusValue.Contexts), control.ContextStatus{
		Name: r.Name, Mode: "process", Enabled: true, TUN: "mprox-" + r.Name, Default: "paris",
	})
	return nil
}

// find is called with mu held.
func (f *Fake) find(name string) *control.ContextStatus {
	for i := range f.StatusValue.Contexts {
		if f.StatusValue.Contexts[i].Name == name {
			return &f.StatusValue.Contexts[i]
		}
	}
	return nil
}

func noContext(name string) error {
	return &control.Error{Code: client.CodeNotFound, Message: "no context is called " + name}
}

// RemoveContext implements control.Backend.
func (f *Fake) RemoveContext(_ context.Context, name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.find(name) == nil {
		return noContext(name)
	}
	f.StatusValue.Contexts = slices.DeleteFunc(slices.Clone(f.StatusValue.Contexts), func(c control.ContextStatus) bool { return c.Name == name })
	return nil
}

// EnableContext implements control.Backend.
func (f *Fake) EnableContext(_ context.Context, name string, on bool) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	c := f.find(name)
	if c == nil {
		return noContext(name)
	}
	c.Enabled = on
	return nil
}

// Attach implements control.Backend.
func (f *Fake) Attach(_ context.Context, name string, selector []byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.find(name) == nil {
		return noContext(name)
	}
	f.selectors = append(f.selectors, string(selector))
	return nil
}

// Detach implements control.Backend.
func (f *Fake) Detach(_ context.Context, name string, selector []byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	i := slices.Index(f.selectors, string(selector))
	if f.find(name) == nil || i < 0 {
		return noContext(name)
	}
	f.selectors = slices.Delete(f.selectors, i, i+1)
	return nil
}

// Selectors returns what is attached, in JSON.
func (f *Fake) Selectors() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.selectors)
}

// Whose implements control.Backend: process 77 is captured, process 78 is excluded, no other exists.
func (f *Fake) Whose(_ context.Context, pid int) (control.Capture, error) {
	out := control.Capture{PID: pid, Name: "curl", UID: 1000, GID: 1000, Exe: "/usr/bin/curl", Cgroup: "/user.slice"}
	switch pid {
	case 77:
		out.Context, out.Reason = "default", "global: everything that no other context selects"
		out.Verdicts = []control.Verdict{{Context: "default", Matched: true, Reason: out.Reason}}
	case 78:
		out.Reason = "no context selects it"
		out.Verdicts = []control.Verdict{{Context: "default", Reason: "excluded: uid 1000"}}
	default:
		return out, &control.Error{Code: client.CodeNotFound, Path: "pid", Message: "there is no process " + strconv.Itoa(pid)}
	}
	return out, nil
}

// Lease implements control.Backend. A lease of proxies gets a context of its own, which is not added to the status.
func (f *Fake) Lease(_ context.Context, r control.LeaseRequest, p control.Peer) (control.Lease, error) {
	if f.LeaseErr != nil {
		return nil, f.LeaseErr
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	id := "lease-" + strconv.Itoa(len(f.leases)+1)
	l := &FakeLease{Request: r, Peer: p, done: make(chan struct{}), closed: make(chan struct{})}
	l.info = client.Lease{ID: id, Context: id, Cgroup: "/sys/fs/cgroup/mprox/" + id, TUN: "mprox7", Mark: "0x51000000", Table: 19761}
	if r.Name != "" {
		l.info.Context = r.Name
	}
	f.leases = append(f.leases, l)
	return l, nil
}

// Leases returns every lease that was made, closed ones included.
func (f *Fake) Leases() []*FakeLease {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.leases)
}

// FakeLease is a lease of a Fake.
type FakeLease struct {
	Request control.LeaseRequest
	Peer    control.Peer

	info         control.LeaseInfo
	once         sync.Once
	end          sync.Once
	done, closed chan struct{}
}

// Info implements control.Lease.
func (l *FakeLease) Info() control.LeaseInfo { return l.info }

// Done implements control.Lease.
func (l *FakeLease) Done() <-chan struct{} { return l.done }

// Revoke ends the lease from the daemon's side.
func (l *FakeLease) Revoke() { l.end.Do(func() { close(l.done) }) }

// Close implements control.Lease.
func (l *FakeLease) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

// Closed is closed by Close.
func (l *FakeLease) Closed() <-chan struct{} { return l.closed }
