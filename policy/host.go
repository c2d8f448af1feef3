// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
)

// Host is everything of the world that this package touches: one network namespace, its sysctls, and the machine's cgroups. LinuxHost is
// the real one. Methods that create succeed when the object is there already, methods that delete succeed when it is not. All are safe for
// concurrent use, and act on the namespace the Host was made in, whatever thread calls them.
type Host interface {
	// Netns identifies the network namespace.
	Netns() Netns
	// Snapshot reads what a plan depends on. Routes are those of the main table and of tables base to base+319.
	Snapshot(ctx context.Context, base int) (Snapshot, error)
	// Features probes what the kernel can do, without leaving anything behind.
	Features() (Features, error)

	AddRule(Rule) error
	DeleteRule(Rule) error
	AddRoute(Route) error
	DeleteRoute(Route) error
	// SetLink sets addresses, MTU and queue length of a device of ours and brings it up. ok is false when it was so already.
	SetLink(LinkSpec) (changed bool, err error)

	// ApplyNFT replaces (or creates) and removes whole tables in one transaction: at no moment is a table missing.
	ApplyNFT(replace []NFTable, remove []string) error
	// NFTables returns the names of the inet tables whose name starts with prefix, each with a fingerprint of what it holds: equal before
	// and after means untouched. Counters do not count.
	NFTables(prefix string) (map[string]string, error)
	// NFCounter reads a named counter: packets.
	NFCounter(table, name string) (uint64, error)

	Sysctl(key string) (string, error) // key as in /proc/sys, with slashes; wraps os.ErrNotExist when it is not there
	SetSysctl(key, value string) error

	// Sockets lists what existed before conntrack saw it.
	Sockets(ctx context.Context) (Sockets, error)
	// DestroySockets ends the TCP connections whose mark within mask is one of values, and those of adopted flows whose other end is no more, so
	// that the kernel sends nothing more for them.
	DestroySockets(values []uint32, mask uint32) error
	// ResetSockets ends the connections that e means, and returns how many.
	ResetSockets(ctx context.Context, e Existing) (int, error)
	// Process reads what selectors ask of a process; os.ErrNotExist without it.
	Process(pid int) (ProcessFacts, error)
	// RunsAs reports whether all user IDs of a process (real, effective, saved, file system) are uid.
	RunsAs(pid int, uid uint32) bool
	// Listener finds the processes that listen (TCP) at an address of this machine, with their descendants. Empty when
	// none can be seen.
	Listener(ctx context.Context, addr netip.AddrPort) ([]Process, error)

	// Cgroup returns the cgroup v2 of a process (0 = self), as a path below the mount.
	Cgroup(pid int) (string, error)
	MakeCgroup(path string) (CgroupRef, error)
	RemoveCgroup(path string) error // fails while processes are in it
	CgroupProcs(path string) ([]int, error)
	// ProcessTree returns a process with all its descendants, and the time it was started (in ticks since boot); os.ErrNotExist without it.
	ProcessTree(ctx context.Context, pid int) (start uint64, pids []int, err error)
	// FindCgroups looks for cgroups by name: a path below the cgroup2 mount if it starts with /, else a unit as in Selector.Units. Names of
	// which nothing is there are left out.
	FindCgroups(names []string) (map[string][]CgroupRef, error)
	MoveProcess(pid int, path string) error
	// MarkCgroup makes every socket created in the cgroup, in this network namespace, carry value within mask. It lasts as long as the cgroup.
	MarkCgroup(path string, value, mask uint32) error
	// BPFDir is where the pins of an instance in this network namespace lie. It mounts bpffs if it is nowhere.
	BPFDir(instance string) (string, error)
	// ApplyBPF makes BPF programs, pinned in dir, decide as sel says, whatever was there before, and without a gap. old says what the bits of
	// followed processes in a set of programs left by a crash stand for (Selection.keys). Called again with the same, it repairs: restored is how many attachments
	// were lost. When it fails, nothing has changed.
	ApplyBPF(dir string, sel *Selection, old []string) (restored int, err error)
	// RemoveBPF detaches whatever is pinned in dir.
	RemoveBPF(dir string) error
	// SelectState reads what the programs report.
	SelectState() (SelectState, error)
	OpenCgroup(path string) (fd int, err error)
	// WaitCgroupEmpty returns when no process is left in the cgroup and below, or with ctx's error.
	WaitCgroupEmpty(ctx context.Context, path string) error

	// Watch calls changed for every change of links, addresses, routes, rules and nftables, ours included, until ctx ends. It calls it too
	// when events were lost.
	Watch(ctx context.Context, changed func()) error
	Close() error
}

// SelectState is what BPF programs report.
type SelectState struct {
	Attached []string // hooks
	Full     bool     // a map was full: whoever could be selected, and is not known, is denied sockets
	Denied   uint64   // how many
}

// Netns identifies a network namespace. Inodes are reused, cookies (0 on kernels before 5.14) are not until the machine restarts.
type Netns struct {
	Inode  uint64 `json:"inode"`
	Cookie uint64 `json:"cookie"`
	Boot   string `json:"boot"` // /proc/sys/kernel/random/boot_id
}

// Features is what the kernel offers.
type Features struct {
	Cgroup2     bool // a writable cgroup v2 mount
	NFTSocket   bool // nft `socket cgroupv2`
	NFTOwner    bool // tables that die with their maker (kernel ≥ 5.12)
	NFTEgress   bool // netdev chains on the egress hook (kernel ≥ 5.16, CONFIG_NETFILTER_EGRESS)
	BPFSockMark bool // cgroup/sock_create programs
	BPF         bool // filled in by Manager: programs on the root of all cgroups decide who is selected
}

// Snapshot is the state of the world that a plan depends on, and what is there of ours.
type Snapshot struct {
	Netns       Netns
	Features    Features
	Links       []Link
	Addrs       []IfAddr
	Routes      []Route // main table and ours
	Rules       []Rule  // all
	IPv6        bool    // the kernel has it
	RPFilter    map[string]int
	SrcValid    map[string]int // conf/DEV/src_valid_mark
	Nameservers []netip.AddrPort
	Sockets     Sockets // filled in by Manager: as they were before the start
	Daemon      Daemon  // filled in by Manager
	Excluded    Excluded
	Cgroups     map[string][]CgroupRef // filled in by Manager: what the selectors' cgroups and units stand for
}

// Link is one network device.
type Link struct {
	Index    int
	Name     string
	Up       bool
	Loopback bool
	Ethernet bool // its frames begin with an Ethernet header
}

// IfAddr is one address of a device.
type IfAddr struct {
	Link   int
	Prefix netip.Prefix
	// Unusable: tentative, deprecated, temporary or link-local: not a source for traffic to everywhere.
	Unusable bool
}

// LinkSpec is how a TUN device of ours shall look.
type LinkSpec struct {
	Name   string
	MTU    int
	TxQLen int
	Addr4  netip.Addr
	Addr6  netip.Addr // invalid when the kernel has no IPv6
}

// Daemon is whose bypass mark counts: the processes of the cgroup if it is set, else those of the uid.
type Daemon struct {
	Cgroup *CgroupRef
	UID    uint32
}

// Excluded is who is left alone, whatever the contexts say: listeners of loopback upstreams.
type Excluded struct {
	Cgroups []CgroupRef
	Flows   []Tuple // their connections that are older than the exclusion
}

// Sockets are the sockets that existed when the guard was set up first. Conntrack does not know which side opened them.
type Sockets struct {
	Inbound []Tuple  `json:"inbound,omitempty"` // established TCP connections on listening ports
	Clients []uint16 `json:"clients,omitempty"` // local ports of UDP sockets that are not servers, ascending
}

// Tuple is one TCP connection as this machine sees it.
type Tuple struct {
	Local  netip.AddrPort `json:"local"`
	Remote netip.AddrPort `json:"remote"`
}

// Process is a process found by Host.Listener.
type Process struct {
	PID    int
	Name   string
	Cgroup string
	Flows  []Tuple // its connections
}

// Protocol is the number our rules and routes carry (`ip route show proto 77`), so that they can be told from everyone else's.
const Protocol = 77

// Rule is one ip rule. The zero value of a field means that it does not select.
type Rule struct {
	V6       bool
	Priority int
	Mark     uint32
	Mask     uint32
	Local    bool // iif lo: sent by this machine itself
	IPProto  uint8
	Sport    uint16
	Dport    uint16
	Table    int // lookup, unless Goto or Nop
	Goto     int
	Nop      bool
	Protocol uint8
	Other    string // selectors that rules of ours never have
}

// String is the rule in the notation of `ip rule`.
func (r Rule) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d: from all", r.Priority)
	if r.Mark != 0 || r.Mask != 0 {
		fmt.Fprintf(&b, " fwmark %#x/%#x", r.Mark, r.Mask)
	}
	if r.Local {
		b.WriteString(" iif lo")
	}
	if r.IPProto != 0 {
		b.WriteString(" ipproto " + protoName(r.IPProto))
	}
	if r.Sport != 0 {
		fmt.Fprintf(&b, " sport %d", r.Sport)
	}
	if r.Dport != 0 {
		fmt.Fprintf(&b, " dport %d", r.Dport)
	}
	if r.Other != "" {
		b.WriteString(" " + r.Other)
	}
	switch {
	case r.Nop:
		b.WriteString(" nop")
	case r.Goto != 0:
		fmt.Fprintf(&b, " goto %d", r.Goto)
	default:
		fmt.Fprintf(&b, " lookup %d", r.Table)
	}
	if r.Protocol != 0 {
		fmt.Fprintf(&b, " proto %d", r.Protocol)
	}
	return b.String()
}

// RouteType is what a route does.
type RouteType uint8

// The route types in use. Any other type is foreign and never copied.
const (
	RouteUnicast RouteType = iota
	RouteUnreachable
	RouteThrow // this table has no answer: the next rule is asked
	RouteLocal // delivered on this machine
	RouteOther
)

// Route is one route of one table.
type Route struct {
	Table    int
	Dst      netip.Prefix // 0.0.0.0/0 or ::/0 = default
	Type     RouteType
	Dev      string
	Via      netip.Addr
	Src      netip.Addr
	Metric   int
	LinkOnly bool // scope link
	OnLink   bool
	Protocol uint8
}

// V6 reports whether it is an IPv6 route.
func (r Route) V6() bool { return r.Dst.Addr().Is6() }

// String is the route in the notation of `ip route`.
func (r Route) String() string {
	var b strings.Builder
	b.WriteString([...]string{"", "unreachable ", "throw ", "local ", "other "}[min(r.Type, RouteOther)])
	if r.Dst.Bits() == 0 {
		b.WriteString("default")
	} else {
		b.WriteString(r.Dst.String())
	}
	if r.Via.IsValid() {
		b.WriteString(" via " + r.Via.String())
	}
	if r.Dev != "" {
		b.WriteString(" dev " + r.Dev)
	}
	fmt.Fprintf(&b, " table %d", r.Table)
	if r.LinkOnly {
		b.WriteString(" scope link")
	}
	if r.Src.IsValid() {
		b.WriteString(" src " + r.Src.String())
	}
	if r.Metric != 0 {
		fmt.Fprintf(&b, " metric %d", r.Metric)
	}
	if r.OnLink {
		b.WriteString(" onlink")
	}
	return b.String()
}

func protoName(p uint8) string {
	switch p {
	case 6:
		return "tcp"
	case 17:
		return "udp"
	}
	return fmt.Sprint(p)
}
