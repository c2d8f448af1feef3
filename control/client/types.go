// SPDX-License-Identifier: GPL-3.0-or-later

package client

import (
	"encoding/json"
	"time"
)

// Status is what the daemon says about itself: GET /v1/status. Lists are never null. A caller without authority over the daemon (neither
// root nor in the control group) sees only the contexts of its own leases, no upstreams, and no configuration path.
type Status struct {
	Version       string           `json:"version"`
	PID           int              `json:"pid"`
	UptimeSeconds float64          `json:"uptime_seconds"`
	Config        ConfigStatus     `json:"config"`
	Contexts      []ContextStatus  `json:"contexts"`
	Upstreams     []UpstreamStatus `json:"upstreams"`
	Guard         GuardStatus      `json:"guard"`
	DNS           DNSStatus        `json:"dns"`
}

// ConfigStatus names the configuration that is in force.
type ConfigStatus struct {
	Path       string    `json:"path"`       // "" when the daemon was started from flags
	SHA256     string    `json:"sha256"`     // of the file's bytes, lower-case hex; "" without a file
	Generation uint64    `json:"generation"` // 1 at start, one more with each reload that was applied
	LoadedAt   time.Time `json:"loaded_at"`
}

// ContextStatus is one context: who is captured, and how much they have moved.
type ContextStatus struct {
	Name           string `json:"name"`
	Mode           string `json:"mode"` // disabled, process, cgroup, global, gateway
	Enabled        bool   `json:"enabled"`
	Lease          bool   `json:"lease"`   // true if it lives only as long as a connection to the control socket
	TUN            string `json:"tun"`     // the device's name
	Default        string `json:"default"` // the upstream or pool of flows that no rule names
	FlowsActive    uint64 `json:"flows_active"`
	FlowsTotal     uint64 `json:"flows_total"`
	BytesUp        uint64 `json:"bytes_up"`
	BytesDown      uint64 `json:"bytes_down"`
	PacketsDropped uint64 `json:"packets_dropped"`
}

// UpstreamStatus is one upstream: whether it works, how fast, and what it has been found to carry.
type UpstreamStatus struct {
	Name string `json:"name"`
	URL  string `json:"url"` // secrets print as ***
	// State is what the operator has decided: enabled, draining or disabled. GET /v1/upstreams has it; status, whose fields are fixed, not.
	State          string  `json:"state,omitempty"`
	Up             bool    `json:"up"`
	LatencySeconds float64 `json:"latency_seconds"` // 0 when not measured yet
	Active         uint64  `json:"active"`
	Total          uint64  `json:"total"`
	Errors         uint64  `json:"errors"`
	UDP            string  `json:"udp"`        // yes, no or unknown; so are the next three
	IPv6           string  `json:"ipv6"`       //
	RemoteDNS      string  `json:"remote_dns"` // whether it takes names
	Bind           string  `json:"bind"`       // SOCKS BIND
	// Auth is how the server was last seen to authenticate: none, password (SOCKS5), basic, digest, bearer, negotiate, ntlm; absent while nothing
	// is known. Warm is how many connections are ready for flows to come. Status has neither, as it has no State.
	Auth []string `json:"auth,omitempty"`
	Warm int      `json:"warm,omitempty"`
}

// UpstreamTest is what came of trying an upstream step by step.
type UpstreamTest struct {
	Name   string     `json:"name"`
	Target string     `json:"target"`
	OK     bool       `json:"ok"`
	Steps  []TestStep `json:"steps"` // of a pool those of each member
}

// TestStep is one step of a test. One that failed is the last of its upstream.
type TestStep struct {
	Upstream string  `json:"upstream"`
	Step     string  `json:"step"` // resolve, connect, tls, detect, greeting, authentication, request, udp
	Seconds  float64 `json:"seconds"`
	OK       bool    `json:"ok"`
	Says     string  `json:"says"`  // what the server said, or what was found out
	Error    string  `json:"error"` // "" if OK
}

// GuardStatus is the kernel state that keeps captured traffic in when the daemon is dead.
type GuardStatus struct {
	Active         bool   `json:"active"`
	DroppedPackets uint64 `json:"dropped_packets"`
	// Marking is how selected processes are told apart: bpf or nft; "" while none are selected. MarkingReason says why it is not bpf.
	Marking       string `json:"marking"`
	MarkingReason string `json:"marking_reason,omitempty"`
	// SelectionFull: more processes or cgroups are selected than BPF can follow. Who may be selected and is not known is denied sockets:
	// SelectionDenied so often.
	SelectionFull   bool   `json:"selection_full,omitempty"`
	SelectionDenied uint64 `json:"selection_denied,omitempty"`
}

// DNSStatus counts the queries of all contexts.
type DNSStatus struct {
	Queries   uint64 `json:"queries"`
	CacheHits uint64 `json:"cache_hits"`
	Blocked   uint64 `json:"blocked"`
	Failures  uint64 `json:"failures"`
}

// Flow is one TCP connection, one UDP association towards one destination, or one ICMP echo exchange.
type Flow struct {
	ID              uint64    `json:"id"`
	Context         string    `json:"context"`
	Network         string    `json:"network"` // tcp, udp, icmp
	Src             string    `json:"src"`     // address:port of the application's socket
	Dst             string    `json:"dst"`     // address:port; the fake IP when only the name is known
	Host            string    `json:"host"`    // "" when only the address is known
	HostSource      string    `json:"host_source"`
	Protocol        string    `json:"protocol"`
	Confidence      string    `json:"confidence"` // none, low, medium, high, certain
	App             App       `json:"app"`
	Rule            string    `json:"rule"`
	Upstream        string    `json:"upstream"`
	State           string    `json:"state"`     // new, establishing, established, closing, closed
	Handshake       string    `json:"handshake"` // honest or early
	Start           time.Time `json:"start"`
	DurationSeconds float64   `json:"duration_seconds"`
	BytesUp         uint64    `json:"bytes_up"`
	BytesDown       uint64    `json:"bytes_down"`
	PacketsUp       uint64    `json:"packets_up"`
	PacketsDown     uint64    `json:"packets_down"`
	ConnectSeconds  float64   `json:"connect_seconds"` // from the SYN to the upstream's answer; 0 while it is awaited
	Error           string    `json:"error"`
	Path            string    `json:"path"`        // kernel, netstack; "" until a TCP flow is established, and for others
	PathReason      string    `json:"path_reason"` // why not kernel
}

// App is the process a flow belongs to. When it is not known, Method is "", PID is 0, and UID and GID are -1 (0 would be root).
type App struct {
	PID    int    `json:"pid"`
	UID    int64  `json:"uid"`
	GID    int64  `json:"gid"`
	Exe    string `json:"exe"`
	Cgroup string `json:"cgroup"`
	Method string `json:"method"` // how the process was found
}

// AppUsage is what one process does at the moment: its live flows, and their bytes.
type AppUsage struct {
	App       App    `json:"app"`
	Flows     int    `json:"flows"`
	BytesUp   uint64 `json:"bytes_up"`
	BytesDown uint64 `json:"bytes_down"`
}

// ExplainRequest is a flow that need not exist. Network is tcp or udp; Dest is host:port. The other fields may stay empty.
type ExplainRequest struct {
	Context  string `json:"context"` // "" = the one that captures who is described below; of nobody: the global one, the only one, or the one named default
	Network  string `json:"network"`
	Dest     string `json:"dest"`
	UID      *int64 `json:"uid,omitempty"`
	GID      *int64 `json:"gid,omitempty"`
	PID      int    `json:"pid,omitempty"`
	Exe      string `json:"exe,omitempty"`
	Cgroup   string `json:"cgroup,omitempty"`
	Protocol string `json:"protocol,omitempty"`
	SNI      string `json:"sni,omitempty"`
}

// Explanation says which rule decides about a flow, and why each rule did or did not match.
type Explanation struct {
	Upstream   string      `json:"upstream"` // "" unless the flow is forwarded
	Member     string      `json:"member"`   // the member of the pool that would be tried first
	Rule       string      `json:"rule"`
	NameSource string      `json:"name_source"`
	Conditions []Condition `json:"conditions"`
	Kernel     KernelPath  `json:"kernel"`
}

// Condition is one key of one rule, tried against the flow.
type Condition struct {
	Rule   string `json:"rule"`
	Key    string `json:"key"`
	Value  string `json:"value"`
	Result bool   `json:"result"`
	Reason string `json:"reason"`
}

// KernelPath is how the kernel brings the flow to its context.
type KernelPath struct {
	Mark   string `json:"mark"` // hexadecimal, 0x…; "" when the context is not captured by mark
	Table  int    `json:"table"`
	Device string `json:"device"`
}

// Stats are the counters of a daemon at one moment: totals, then each context, then each upstream.
type Stats struct {
	Time          time.Time        `json:"time"`
	UptimeSeconds float64          `json:"uptime_seconds"`
	Total         Totals           `json:"total"`
	Contexts      []ContextStatus  `json:"contexts"`
	Upstreams     []UpstreamStatus `json:"upstreams"`
	Guard         GuardStatus      `json:"guard"`
	DNS           DNSStatus        `json:"dns"`
}

// Totals are the sums over all contexts.
type Totals struct {
	FlowsActive    uint64 `json:"flows_active"`
	FlowsTotal     uint64 `json:"flows_total"`
	BytesUp        uint64 `json:"bytes_up"`
	BytesDown      uint64 `json:"bytes_down"`
	PacketsDropped uint64 `json:"packets_dropped"`
}

// Health is the daemon's own judgement: Healthy exactly when every check is OK.
type Health struct {
	Healthy bool    `json:"healthy"`
	Checks  []Check `json:"checks"`
}

// Check is one thing that must hold for the daemon to do its job.
type Check struct {
	Name    string `json:"name"` // device:default, upstream:paris, guard …
	OK      bool   `json:"ok"`
	Message string `json:"message"` // "" when OK, else what is wrong and what to do
}

// DNSRequest is a question to the DNS module of a context, asked as a captured process would.
type DNSRequest struct {
	Context string // "" = the only context, or the one named default
	Name    string
	Type    string // A, AAAA, MX …; "" = A
}

// DNSAnswer is what the DNS module answers.
type DNSAnswer struct {
	Context         string      `json:"context"`
	Name            string      `json:"name"`
	Type            string      `json:"type"`
	Rcode           string      `json:"rcode"` // NOERROR, NXDOMAIN, SERVFAIL …
	Answers         []DNSRecord `json:"answers"`
	DurationSeconds float64     `json:"duration_seconds"`
}

// DNSRecord is one resource record; Data is its presentation form (RFC 1035 section 5.1).
type DNSRecord struct {
	Name string `json:"name"`
	Type string `json:"type"`
	TTL  uint32 `json:"ttl"`
	Data string `json:"data"`
}

// Event is something that happened to the daemon, as opposed to a flow: a reload, a lease, an upstream that went down, the end.
type Event struct {
	Time    time.Time `json:"time"`
	Kind    string    `json:"kind"` // reload, lease_opened, lease_closed, flow_killed, upstream_up, upstream_down, stopping …
	Context string    `json:"context"`
	UID     int64     `json:"uid"` // who asked for it; -1 when nobody did
	Message string    `json:"message"`
}

// ContextRequest asks for a context that lives until it is removed or the daemon ends. Context is what would stand at contexts.NAME of a
// configuration file; Proxies, in the place of its default, become upstreams of its own.
type ContextRequest struct {
	Name     string          `json:"name"`
	Context  json.RawMessage `json:"context,omitempty"`
	Proxies  []string        `json:"proxies,omitempty"`  // proxy URLs; several are a pool
	Strategy string          `json:"strategy,omitempty"` // of the pool
}

// Selector says whose traffic a context captures: all that is given must match, a list matches if one member does. It is one entry of select
// in a configuration file.
type Selector struct {
	PID    []int    `json:"pid,omitempty"`
	Scope  string   `json:"scope,omitempty"` // with PID and Exe: current, tree, session, group; "" = tree
	UID    []uint32 `json:"uid,omitempty"`
	User   []string `json:"user,omitempty"` // names
	GID    []uint32 `json:"gid,omitempty"`
	Exe    []string `json:"exe,omitempty"`    // absolute paths
	Cgroup []string `json:"cgroup,omitempty"` // below the cgroup v2 mount, everything below included
	Unit   []string `json:"unit,omitempty"`   // of systemd
	// Container is by name, ID, or the number of a process in it; alone in its selector.
	Container []string `json:"container,omitempty"`
}

// Capture says which context the next connection of a process belongs to, and why.
type Capture struct {
	PID      int       `json:"pid"`
	Name     string    `json:"name"`
	UID      int64     `json:"uid"`
	GID      int64     `json:"gid"`
	Exe      string    `json:"exe"`
	Cgroup   string    `json:"cgroup"`
	Context  string    `json:"context"` // "" = none: it goes directly
	Reason   string    `json:"reason"`
	Verdicts []Verdict `json:"verdicts"` // of the contexts, in the order in which they are asked
}

// Verdict is what one context says about a process.
type Verdict struct {
	Context string `json:"context"`
	Matched bool   `json:"matched"`
	Reason  string `json:"reason"`
}

// LeaseRequest asks for a context that lives as long as the connection that asked. Give Context (an existing one to join) or Proxies.
type LeaseRequest struct {
	Name     string   `json:"name,omitempty"`     // of the new context; "" = chosen by the daemon
	Context  string   `json:"context,omitempty"`  // an existing context to join
	Proxies  []string `json:"proxies,omitempty"`  // proxy URLs; several are a pool
	Strategy string   `json:"strategy,omitempty"` // of the pool
	DNS      []string `json:"dns,omitempty"`      // servers
	Bypass   []string `json:"bypass,omitempty"`   // addresses, prefixes or classes that stay direct
	// PID is a process to capture, with all that it starts from then on. 0: none, the caller starts processes in Cgroup, which takes root; for
	// any other user it is the caller itself. It must be the caller's own.
	PID int `json:"pid,omitempty"`
}

// Lease is a context that ends with the connection it was given on.
type Lease struct {
	ID      string `json:"id"`
	Context string `json:"context"`
	Cgroup  string `json:"cgroup"` // directory of the cgroup whose processes are captured
	TUN     string `json:"tun"`
	Mark    string `json:"mark"` // hexadecimal, 0x…
	Table   int    `json:"table"`
}
