// SPDX-License-Identifier: GPL-3.0-or-later

package config

import "net/netip"

// Context is who is captured (mode, select, exclude) and what happens to their traffic (everything else).
type Context struct {
	Mode        string      `json:"mode" default:"global" enum:"disabled,process,cgroup,global,gateway" doc:"Whose traffic is captured: nobody's, that of the processes or of the cgroups in select, that of the whole machine, or that of other hosts which route through this one."`
	Select      []Selector  `json:"select" doc:"Who is captured in the modes process, cgroup and gateway: whoever matches one entry."`
	Exclude     []Selector  `json:"exclude" doc:"Who is never captured, in any mode: whoever matches one entry."`
	Bypass      Bypass      `json:"bypass" doc:"Destinations that are reached directly, before any rule is asked."`
	Rules       []Rule      `json:"rules" doc:"Which upstream a flow takes: the first rule that matches decides."`
	Default     string      `json:"default" required:"true" doc:"The upstream or pool of every flow that no rule matched; direct, reject and drop are built in."`
	DNS         DNS         `json:"dns" doc:"How names are resolved for the captured."`
	TUN         TUN         `json:"tun" doc:"The context's network device."`
	ICMP        string      `json:"icmp" default:"honest" enum:"honest,drop,reject" doc:"How an echo request is answered: honest only if a probe through the upstream succeeds, reject says unreachable, drop says nothing."`
	DialTimeout Duration    `json:"dial_timeout" default:"10s" min:"100ms" max:"5m" doc:"How long an upstream may take to answer before the application is told that the host is unreachable."`
	Existing    string      `json:"existing" default:"keep" enum:"keep,reset" doc:"What happens at start to connections that are older than the capture."`
	Strict      bool        `json:"strict" default:"false" doc:"Mark by BPF and by nftables, so that a process that sets its own packet mark is captured too."`
	OnCrash     string      `json:"on_crash" default:"block" enum:"block,open" doc:"What captured traffic does when the daemon dies: block fails closed, open lets it leave directly."`
	OnStop      string      `json:"on_stop" enum:"open,block" doc:"What captured traffic does after an orderly stop. Empty: open, and block in a container, so that a restart does not leak."`
	Offload     string      `json:"offload" default:"auto" enum:"auto,off" doc:"Whether the kernel moves the bytes of established TCP connections where it can (auto), or always the network stack in user space."`
	InputPorts  []PortRange `json:"input_ports" doc:"Mode global: ports on which TCP and UDP connections from outside are let in, and answered the way they came. Empty: all."`
	Limits      Limits      `json:"limits" doc:"Bounds of the context."`
}

// Selector describes processes or hosts. All keys that are given must match; a list matches if one member does.
type Selector struct {
	PID        []int          `json:"pid" min:"1" max:"4194304" doc:"Process ID, as seen in the namespace of the daemon."`
	UID        []uint32       `json:"uid" doc:"Effective user ID."`
	User       []string       `json:"user" doc:"User name, looked up at load."`
	GID        []uint32       `json:"gid" doc:"Effective group ID."`
	Exe        []string       `json:"exe" doc:"Absolute path of the executable."`
	Cgroup     []string       `json:"cgroup" doc:"Path below the cgroup v2 mount; everything below it is meant too."`
	Unit       []string       `json:"unit" doc:"systemd unit, such as nginx.service or user.slice."`
	Container  []string       `json:"container" doc:"Container by name or ID (Docker, Podman), or by the number of a process in it. Alone in its entry; also in mode global."`
	Interface  []string       `json:"interface" doc:"Mode gateway: the interface that packets arrive on."`
	SourceCIDR []netip.Prefix `json:"source_cidr" doc:"Mode gateway: the addresses that packets come from."`
	Scope      string         `json:"scope" default:"tree" enum:"current,tree,session,group" doc:"With pid and exe: the process alone, or with its descendants; with pid also its session, or its process group."`
}

// Bypass is a set of destinations that never go through an upstream. One match in any of its lists suffices.
type Bypass struct {
	Address []string    `json:"address" doc:"Addresses, CIDRs or classes: local private link-local multicast loopback public. Fake IPs belong to none."`
	Port    []PortRange `json:"port" doc:"Destination ports: 123, or 6881-6889."`
	Network []string    `json:"network" enum:"tcp,udp,icmp" doc:"Networks."`

	Protocol []string `json:"protocol" doc:"Detected protocols, such as bittorrent."`
	Process  []string `json:"process" pattern:"^[^/]+$" doc:"File names of executables, without the directory."`
}

// Match is a set of conditions. All that are given must match; a list matches if one member does.
type Match struct {
	Domain        []string       `json:"domain" doc:"The name itself; *.x is every name below x, +.x is x and every name below it."`
	DomainSuffix  []string       `json:"domain_suffix" doc:"The name itself or any name below it; with a leading dot only those below."`
	DomainKeyword []string       `json:"domain_keyword" doc:"Text that occurs anywhere in the name."`
	DomainRegex   []string       `json:"domain_regex" doc:"Regular expression (Go's RE2) that matches somewhere in the name."`
	IPCIDR        []netip.Prefix `json:"ip_cidr" doc:"Destination address. A flow that is known by name only does not match."`
	IPIsPrivate   *bool          `json:"ip_is_private" doc:"Whether the destination is not a public address: private, loopback, link-local, multicast or unspecified. Fake IPs are not private."`
	GeoIP         []string       `json:"geoip" pattern:"^[A-Za-z]{2}$" doc:"Country of the destination address, two letters (ISO 3166-1)."`
	ASN           []uint32       `json:"asn" min:"1" doc:"Autonomous system of the destination address."`
	Port          []PortRange    `json:"port" doc:"Destination port: 22, or a range 6881-6889."`
	PortRange     []PortRange    `json:"port_range" doc:"Destination ports: 1000-2000, 1000:2000, :1023, 1024:."`
	SourceCIDR    []netip.Prefix `json:"source_cidr" doc:"Address of the application's socket."`
	SourcePort    []PortRange    `json:"source_port" doc:"Port of the application's socket, or a range."`
	Network       []string       `json:"network" enum:"tcp,udp,icmp" doc:"Network of the flow."`
	Protocol      []string       `json:"protocol" pattern:"^[a-z0-9][a-z0-9_.-]*$" doc:"Detected protocol, such as tls, http, ssh, bittorrent."`
	User          []string       `json:"user" doc:"User that owns the socket, by name; looked up at load."`
	UID           []uint32       `json:"uid" doc:"User that owns the socket, by number."`
	GID           []uint32       `json:"gid" doc:"Group that owns the socket."`
	PID           []int          `json:"pid" min:"1" max:"4194304" doc:"Process that owns the socket."`
	Exe           []string       `json:"exe" pattern:"^/" doc:"Absolute path of the executable."`
	ExeRegex      []string       `json:"exe_regex" doc:"Regular expression that matches somewhere in the path of the executable."`
	Process       []string       `json:"process" pattern:"^[^/]+$" doc:"File name of the executable, without the directory."`
	Cgroup        []string       `json:"cgroup" pattern:"^/" doc:"cgroup v2 path of the process; everything below it matches too."`
	Unit          []string       `json:"unit" doc:"systemd unit of the process. Without a suffix, .service is meant."`
	Interface     []string       `json:"interface" doc:"Interface that a forwarded packet came in on (mode gateway)."`
	DSCP          []int          `json:"dscp" min:"0" max:"63" doc:"Differentiated services code point."`
	Time          []string       `json:"time" pattern:"^((mon|tue|wed|thu|fri|sat|sun)(-(mon|tue|wed|thu|fri|sat|sun))? ?)?(([01][0-9]|2[0-3]):[0-5][0-9]-([01][0-9]|2[0-4]):[0-5][0-9])?$" doc:"Local time: mon-fri 08:00-18:00, sat, 22:00-06:00."`
	RuleSet       []string       `json:"rule_set" doc:"File with a list of domains or prefixes."`
	Invert        bool           `json:"invert" default:"false" doc:"The rule matches when its conditions do not."`
	And           []Match        `json:"and" doc:"Nested sets of conditions, all of which must match."`
	Or            []Match        `json:"or" doc:"Nested sets of conditions, one of which must match."`
	Not           []Match        `json:"not" doc:"Nested sets of conditions, none of which may match."`
}

// Rule sends the flows that match to an upstream.
type Rule struct {
	Match
	Upstream string `json:"upstream" required:"true" doc:"Name of an upstream or pool; direct, reject and drop are built in."`
	FTP      string `json:"ftp" default:"refuse" enum:"active,refuse,ignore" doc:"Active-mode FTP: active lets the server connect to the client by BIND at the same SOCKS upstream (one that listens for a name in another family than it has connected in, as dante does, is asked to listen for anybody: who comes must have an address of the name then, if there are dns.servers to ask); refuse makes PORT and EPRT on port 21 fail at once, so that the client uses passive mode; ignore does not look. Direct flows are never looked at."`
	Offload  string `json:"offload" enum:"auto,off" doc:"Whether the kernel moves the bytes of these flows. Empty: as the context says."`
}

// DNS is how names are resolved for the captured.
type DNS struct {
	Mode    string                  `json:"mode" default:"fakeip" enum:"fakeip,real,off" doc:"fakeip answers address queries at once with an address that stands for the name; real asks the servers; off leaves DNS alone."`
	Servers []string                `json:"servers" doc:"Where queries go, through the proxy: udp:// tcp:// tls:// https://, or an address. Without servers, queries other than for addresses are SERVFAIL."`
	Via     string                  `json:"via" doc:"Upstream or pool that the servers are asked through. Empty: the context's default."`
	Rules   []DNSRule               `json:"rules" doc:"Other servers, or an action, for some names: the first rule that matches decides."`
	Hosts   map[string][]netip.Addr `json:"hosts" doc:"Names with fixed addresses."`
	Fake    Fake                    `json:"fake" doc:"The addresses that mode fakeip hands out."`
	System  string                  `json:"system" default:"off" enum:"off" doc:"Whether the machine's resolver configuration is changed. It is not: queries are captured on their way."`
	Cache   Cache                   `json:"cache" doc:"The cache of answers."`
}

// DNSRule treats some names differently.
type DNSRule struct {
	Domain       []string `json:"domain" doc:"The name itself; *.x is every name below x, +.x is x and every name below it."`
	DomainSuffix []string `json:"domain_suffix" doc:"The name itself or any name below it."`
	Servers      []string `json:"servers" doc:"Where queries for these names go. Empty: dns.servers."`
	Via          string   `json:"via" doc:"Upstream or pool that these servers are asked through. Empty: dns.via."`
	Action       string   `json:"action" enum:"block" doc:"block: the name does not exist."`
}

// Fake is the ranges that fake IPs come from, and who gets none.
type Fake struct {
	V4      netip.Prefix `json:"v4" default:"198.18.0.0/15" fixed:"true" doc:"IPv4 range of the fake addresses, /8 to /28."`
	V6      netip.Prefix `json:"v6" default:"fd4d:5554:4558::/64" fixed:"true" doc:"IPv6 range of the fake addresses, /32 to /112."`
	Exclude []string     `json:"exclude" default:"*.local" doc:"Names that get real addresses: patterns as in domain."`
}

// Cache is the cache of answers.
type Cache struct {
	Entries  int      `json:"entries" default:"10000" min:"0" max:"1000000" doc:"How many answers are kept. 0: no cache."`
	MinTTL   Duration `json:"min_ttl" default:"0s" max:"24h" doc:"Answers are kept at least this long."`
	MaxTTL   Duration `json:"max_ttl" default:"24h" max:"168h" doc:"Answers are kept at most this long."`
	Stale    Duration `json:"stale" default:"1h" max:"168h" doc:"How long an expired answer may still be used when the servers do not answer."`
	Prefetch bool     `json:"prefetch" default:"true" doc:"Refresh popular answers shortly before they expire."`
}

// TUN is the context's network device. It cannot change while the daemon runs.
type TUN struct {
	Name string `json:"name" fixed:"true" doc:"Name of the device, at most 15 bytes. Empty: mprox0 for the context default, mprox-NAME for another."`
	MTU  int    `json:"mtu" default:"1500" min:"1280" max:"65535" fixed:"true" doc:"MTU of the device in bytes; IPv6 needs 1280."`

	Offloads string `json:"offloads" default:"auto" enum:"auto,no-uso,none,no-header" fixed:"true" doc:"What the kernel is asked to leave to us: all it has (auto), no trains of datagrams (no-uso), neither trains nor checksums (none), nor a virtio-net header in front of packets (no-header). All but auto are for finding faults: they cost speed and nothing else."`
	Queues   int    `json:"queues" default:"1" min:"1" max:"16" fixed:"true" doc:"How many threads read the device at a time."`
}

// Limits are the bounds of a context.
type Limits struct {
	Flows             int       `json:"flows" default:"65536" min:"16" max:"1048576" doc:"How many flows may exist at a time; one more ends the one that has been idle for longest."`
	NewFlowsPerSecond int       `json:"new_flows_per_second" default:"0" min:"0" max:"1000000" doc:"How many flows may begin in a second. 0: no limit."`
	Bandwidth         Bandwidth `json:"bandwidth" default:"0" doc:"Bytes (10MB, 10MiB) or bits (100mbit) a second, each way. 0: no limit."`
}
