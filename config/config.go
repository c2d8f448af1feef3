// SPDX-License-Identifier: GPL-3.0-or-later

// Package config reads, checks, compares and describes the configuration file.
//
// It turns text into an immutable Config or into the complete list of what is wrong with it, each error with file, line, column and JSON
// path. It does not know what an upstream's URL, a rule or a kernel object means: dialers, routing and policy check those when the daemon
// builds them, return JSON paths, and Config.ErrorAt gives the paths their positions. cmd/mprox calls it; so does control, for `apply`.
//
// The structs of this file and its neighbours are the schema: their tags carry the key (json), the default, the bounds (min, max, enum,
// pattern), what cannot change while the daemon runs (fixed) and the description (doc). Decoder, Schema, Diff and the test of
// docs/config.md all read the same tags.
package config

import (
	"net/netip"
	"time"
)

// Config is a whole configuration, with defaults filled in. It is never changed after Load or Parse has returned it.
type Config struct {
	SchemaURL string              `json:"$schema" doc:"Where an editor finds the JSON schema (mprox schema writes it). Not read by mprox."`
	Log       Log                 `json:"log" doc:"Logging to stderr."`
	Control   Control             `json:"control" doc:"The control socket."`
	HTTP      HTTP                `json:"http" doc:"The listener for /metrics, /livez, /readyz and the dashboard."`
	Kernel    Kernel              `json:"kernel" doc:"Which marks, routing tables and rule priorities of the kernel are ours."`
	Upstreams map[string]Upstream `json:"upstreams" doc:"The proxy servers, by name. direct, reject and drop are built in."`
	Pools     map[string]Pool     `json:"pools" doc:"Groups of upstreams, by name; a pool is used wherever an upstream is."`
	Contexts  map[string]Context  `json:"contexts" doc:"Who is captured and what happens to their traffic, by name."`
	Alerts    []Alert             `json:"alerts" doc:"Conditions on metrics, and whom to tell."`
	Audit     Audit               `json:"audit" doc:"The log of administrative events."`

	tree  *node // the merged text, for ErrorAt; nil when the Config was built from flags or by hand
	flags bool  // built from flags: errors name them instead of paths
}

// Log says what is logged and how.
type Log struct {
	Level  string `json:"level" default:"info" enum:"debug,info,warn,error" doc:"The least severe message that is written."`
	Format string `json:"format" default:"text" fixed:"true" enum:"text,json" doc:"text for people, json for machines (one object a line)."`
}

// Control is the control socket.
type Control struct {
	Socket     string `json:"socket" default:"/run/mprox/mprox.sock" fixed:"true" doc:"Absolute path of the control socket. It names the instance: the journal lies beside it."`
	Group      string `json:"group" default:"mprox" fixed:"true" doc:"Members of this group may do everything over the control socket, as root may. A group that does not exist has no members."`
	UserLeases int    `json:"user_leases" default:"16" min:"0" max:"160" fixed:"true" doc:"How many leases (mprox run) each user without that authority may hold at a time, over processes of their own. 0: none."`
}

// HTTP is the metrics and dashboard listener.
type HTTP struct {
	Listen    string `json:"listen" fixed:"true" doc:"Address and port to listen on, such as 127.0.0.1:9464. Empty: no listener."`
	Dashboard bool   `json:"dashboard" default:"true" fixed:"true" doc:"Serve the dashboard beside the metrics."`
}

// Kernel is the layout of marks, tables and rules. It cannot change while the daemon runs.
type Kernel struct {
	MarkMask     Mark   `json:"mark_mask" default:"0xff000000" fixed:"true" doc:"The bits of the packet mark that are ours: one run of at least 8 bits. All others are preserved."`
	TableBase    uint32 `json:"table_base" default:"19760" min:"256" max:"4294967040" fixed:"true" doc:"The first routing table; contexts use this one and the 479 after it."`
	Marking      string `json:"marking" default:"auto" enum:"auto,bpf,nft" fixed:"true" doc:"How the sockets of selected processes are told apart: by BPF programs (auto: nftables where the kernel refuses them), by them or not at all (bpf), by nftables alone, without any BPF (nft)."`
	RulePriority uint32 `json:"rule_priority" default:"8000" min:"1" max:"32000" fixed:"true" doc:"The priority of our first ip rule; it must lie before the main table's 32766."`
}

// Upstream is one proxy server.
type Upstream struct {
	URL      ProxyURL `json:"url" required:"true" doc:"The proxy as a URL: socks5h://user:password@host:port. Schemes: socks4 socks4a socks5 socks5h socks5s http https auto direct reject drop."`
	Weight   int      `json:"weight" default:"1" min:"1" max:"1000" doc:"Share of the flows in a weighted pool."`
	Priority int      `json:"priority" default:"0" min:"0" max:"1000" doc:"Rank in a failover pool: the lowest number that is up is used."`
	MaxFlows int      `json:"max_flows" default:"0" min:"0" max:"1000000" doc:"Connections and associations through it at a time; a pool goes on to the next member. 0: no bound."`
	Auth     Auth     `json:"auth" doc:"Credentials that are not in the URL."`
}

// Auth is how we authenticate to an upstream. The zero value means that the URL says it.
type Auth struct {
	Type         string `json:"type" enum:"basic,digest,bearer" doc:"HTTP authentication scheme. Empty: basic for HTTP, user and password for SOCKS5."`
	Username     string `json:"username" doc:"User name."`
	Password     Secret `json:"password" doc:"Password; better written as ${ENV} or in password_file."`
	PasswordFile string `json:"password_file" doc:"File whose first line is the password."`
	Token        Secret `json:"token" doc:"Bearer token; better written as ${ENV} or in token_file."`
	TokenFile    string `json:"token_file" doc:"File whose first line is the bearer token."`

	fromFile bool // Load has read Password and Token from their files
}

// Pool is a group of upstreams and how one of them is chosen.
type Pool struct {
	Members  []string `json:"members" required:"true" doc:"Names of upstreams or of other pools, without cycles."`
	Strategy string   `json:"strategy" default:"round-robin" enum:"round-robin,weighted,least-connections,random,hash,least-latency,failover" doc:"How a member is chosen for a flow."`
	Retry    int      `json:"retry" default:"2" min:"0" max:"16" doc:"How many other members are tried before the application is told anything."`
	HashBy   string   `json:"hash_by" default:"destination" enum:"destination,source,both" doc:"With the strategy hash: what keeps its member, flows to the same name or address, flows of the same source address, or flows of the same source to the same destination."`
	Hedge    string   `json:"hedge" default:"off" pattern:"^(off|p[1-9][0-9]?|[0-9.]+(ms|s))$" doc:"When a second member is tried beside the first: off, a percentile of the connect times (p95), or a duration (300ms)."`
	Health   Health   `json:"health" doc:"How members are watched."`
}

// Health is how the members of a pool are watched.
type Health struct {
	Interval Duration `json:"interval" default:"30s" min:"1s" max:"24h" doc:"Time between two active checks of a member."`
	Timeout  Duration `json:"timeout" default:"5s" min:"100ms" max:"5m" doc:"How long one active check may take."`
	Target   string   `json:"target" doc:"What an active check reaches through the member: host:port (it accepts a TCP connection), or a URL http://host/path or https://host/path (it answers 2xx or 3xx). Empty: no active checks."`
	UDP      string   `json:"udp" doc:"Address of a DNS server, host or host:port, that an active check asks through a UDP association of the member; any answer will do. Empty: no active checks of UDP."`
	Passive  Passive  `json:"passive" doc:"What failed flows do to a member."`
}

// Passive is how failed flows count against a member.
type Passive struct {
	Failures int      `json:"failures" default:"3" min:"1" max:"1000" doc:"Failures in a row after which a member is set aside."`
	Eject    Duration `json:"eject" default:"30s" min:"1s" max:"24h" doc:"How long a member is set aside."`
}

// Alert is a condition on a metric.
type Alert struct {
	Name   string   `json:"name" required:"true" doc:"The alert's name, unique."`
	When   string   `json:"when" required:"true" doc:"A metric, with or without labels, compared with a number: upstream_up{upstream=\"paris\"} == 0. The prefix mprox_ may be left out."`
	For    Duration `json:"for" default:"0s" max:"24h" doc:"How long the condition must hold before the alert fires."`
	Notify []string `json:"notify" default:"log" doc:"Whom to tell: log, or webhook:URL."`
}

// Audit is the log of administrative events.
type Audit struct {
	File string `json:"file" doc:"Absolute path of the audit log (JSON lines). Empty: none."`
}

// Bounds of a configuration as a whole. A file beyond them is refused before it is parsed.
const (
	// MaxSize is the largest configuration file in bytes; large lists belong into rule sets.
	MaxSize = 4 << 20
	// MaxContexts is how many marks the layout of the kernel plan has for contexts (0x50 to 0xef).
	MaxContexts = 160
	// maxDepth bounds nesting, so that the recursive parser cannot exhaust the stack. The schema itself is 9 deep, plus and/or/not.
	maxDepth = 64
	// maxIfName is the longest name of a network interface (IFNAMSIZ - 1).
	maxIfName = 15
)

// The fake ranges that are used when none are configured: 198.18.0.0/15 (RFC 2544 section C.2.2, never routed) and a fixed ULA prefix
// (RFC 4193).
const (
	DefaultFakeV4 = "198.18.0.0/15"
	DefaultFakeV6 = "fd4d:5554:4558::/64"
)

// builtin upstreams, which need no entry in upstreams.
func isBuiltin(name string) bool { return name == "direct" || name == "reject" || name == "drop" }

// Duration is a span of time, written as in Go: 300ms, 30s, 5m, 24h.
type Duration time.Duration

// D returns the duration as the standard library's type.
func (d Duration) D() time.Duration { return time.Duration(d) }

// String returns the duration as it is written in a configuration.
func (d Duration) String() string { return time.Duration(d).String() }

// MarshalText implements encoding.TextMarshaler.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// PortRange is the ports from From to To, both included.
type PortRange struct{ From, To uint16 }

// Prefixes is a list of prefixes; a plain address counts as a prefix of full length.
type Prefixes = []netip.Prefix
