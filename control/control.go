// SPDX-License-Identifier: GPL-3.0-or-later

// Package control is the daemon's side of the control socket: the API server, who may call what, and the metrics.
//
// It decides nothing about traffic. What it shows and changes belongs to the Backend, which cmd/mprox/daemon implements. The other side, and
// the types both sides speak, is control/client. The API is served on a unix socket only; over TCP there are only metrics and probes.
package control

import (
	"context"
	"errors"

	"github.com/mutex-proxy/mutex/control/client"
	"github.com/mutex-proxy/mutex/flow"
)

// The types of the API are those of its client, so that the two cannot drift apart.

type (
	// Status is what the daemon says about itself.
	Status = client.Status
	// ConfigStatus names the configuration in force.
	ConfigStatus = client.ConfigStatus
	// ContextStatus is one context with its counters.
	ContextStatus = client.ContextStatus
	// UpstreamStatus is one upstream and what is known of it.
	UpstreamStatus = client.UpstreamStatus
	// UpstreamTest is what came of trying an upstream.
	UpstreamTest = client.UpstreamTest
	// TestStep is one step of it.
	TestStep = client.TestStep
	// GuardStatus is the state of the guard.
	GuardStatus = client.GuardStatus
	// DNSStatus counts queries.
	DNSStatus = client.DNSStatus
	// Stats are the counters of a moment.
	Stats = client.Stats
	// Totals are sums over contexts.
	Totals = client.Totals
	// Flow is a flow in the shape of the API.
	Flow = client.Flow
	// App is the process a flow belongs to.
	App = client.App
	// ExplainRequest is a flow that need not exist.
	ExplainRequest = client.ExplainRequest
	// Explanation says which rule decides, and why.
	Explanation = client.Explanation
	// Condition is one key of a rule, tried.
	Condition = client.Condition
	// KernelPath is how the kernel brings a flow to its context.
	KernelPath = client.KernelPath
	// Check is one thing that must hold.
	Check = client.Check
	// Health is the judgement over all checks.
	Health = client.Health
	// DNSAnswer is what the DNS module answers.
	DNSAnswer = client.DNSAnswer
	// DNSRecord is one resource record.
	DNSRecord = client.DNSRecord
	// Event is something that happened to the daemon.
	Event = client.Event
	// LeaseRequest asks for a context bound to a connection.
	LeaseRequest = client.LeaseRequest
	// LeaseInfo is what the caller is told of its lease.
	LeaseInfo = client.Lease
	// ContextRequest asks for a context.
	ContextRequest = client.ContextRequest
	// Capture says which context captures a process.
	Capture = client.Capture
	// Verdict is what one context says about a process.
	Verdict = client.Verdict
	// Error is an error with a code of the API.
	Error = client.Error
)

// ErrConflict is wrapped by Start when another daemon answers on the socket, or something else holds the address of the HTTP listener.
var ErrConflict = errors.New("conflict")

// Backend is the daemon as the API sees it. Methods are called concurrently. An error that is or wraps an *Error reaches the caller with its
// code, any other as "internal": it must carry no secret.
type Backend interface {
	// Status returns a copy with every context and upstream; the server takes out what a caller may not see.
	Status(ctx context.Context) Status
	// Health returns the checks that must hold for the daemon to do its job. None is a daemon that is still starting: unhealthy.
	Health(ctx context.Context) []Check
	// Flows returns the live flows of all contexts, in any order.
	Flows() []flow.Info
	// WatchFlows sends each flow of any context when it starts and when it ends, from the call on, until ctx ends; then it closes the
	// channel. It never blocks a flow: what the channel has no room for is lost.
	WatchFlows(ctx context.Context) <-chan flow.Info
	// KillFlow resets one flow; false if there is none of that ID.
	KillFlow(id uint64) bool
	// TestUpstream tries an upstream or a pool with a connection to target, host:port. An *Error of code not_found if there is none of that name.
	TestUpstream(ctx context.Context, name, target string) (UpstreamTest, error)
	// SetUpstream switches an upstream or a pool to enabled, draining or disabled; the latter ends its flows. Errors as for TestUpstream.
	SetUpstream(name, state string) error
	// Explain walks the rules for a flow that need not exist. The request is complete: Network is tcp or udp, Dest host:port.
	Explain(ctx context.Context, r ExplainRequest) (Explanation, error)
	// ExchangeDNS answers one DNS message as if a process of the context had sent it. An empty name means the only context, or "default".
	ExchangeDNS(ctx context.Context, contextName string, query []byte) ([]byte, error)
	// Reload applies the changed configuration and returns when it is in force, or the first reason why it is not.
	Reload(ctx context.Context) error
	// AddContext makes a context, RemoveContext ends one, EnableContext switches one on or off. When they return the kernel follows.
	AddContext(ctx context.Context, r ContextRequest) error
	RemoveContext(ctx context.Context, name string) error
	EnableContext(ctx context.Context, name string, on bool) error
	// Attach adds a selector, in JSON as in the configuration, to a context; Detach takes it away.
	Attach(ctx context.Context, name string, selector []byte) error
	Detach(ctx context.Context, name string, selector []byte) error
	// Whose says which context captures a process. An *Error of code not_found without such a process.
	Whose(ctx context.Context, pid int) (Capture, error)
	// Lease makes, or joins, a context for the peer; ctx bounds the making. The server calls Close exactly once, when the connection ends.
	Lease(ctx context.Context, r LeaseRequest, p Peer) (Lease, error)
	// Stop begins the daemon's orderly end and returns at once; StopClosed leaves what is captured blocked.
	Stop()
	StopClosed()
}

// Lease is a context that lives as long as a connection.
type Lease interface {
	Info() LeaseInfo
	// Done is closed when the daemon has ended the lease itself.
	Done() <-chan struct{}
	// Close ends it: when it returns, device, netstack and flows are gone.
	Close() error
}
