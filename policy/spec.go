// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"errors"
	"fmt"
	"math/bits"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
)

// Defaults of the keys `kernel.*` of the configuration.
const (
	DefaultMask         uint32 = 0xff000000
	DefaultTableBase    int    = 19760
	DefaultRulePriority int    = 8000
)

// MaxContexts is how many contexts the marks 0x50 to 0xef can tell apart.
const MaxContexts = 160

// tablesPerSlot is how many routing tables a context has: T (capture), D (direct) and A (adopted flows), each kind in a block of its own.
const tablesPerSlot = 3

// The values inside the mask. 0x4c stays unused, so that `fwmark 0x4c/0xfc` covers all privileged marks; 0x4f is that of accel.go.
const (
	markExcluded = 0x4c // of sockets, by BPF; packets get the bypass mark
	markBypass   = 0x4d
	markInbound  = 0x4e
	markFirst    = 0x50
)

// Mode says how a context chooses its traffic.
type Mode uint8

// The modes of a context. The zero value captures nothing.
const (
	ModeDisabled Mode = iota
	ModeProcess       // the processes in ContextSpec.Cgroups and of ContextSpec.Select
	ModeCgroup        // the same, by another name
	ModeGlobal        // everything this network namespace sends itself; one context at most
	ModeGateway       // what arrives from the hosts of ContextSpec.Select, to be forwarded
)

// String returns the name used in the configuration.
func (m Mode) String() string {
	return [...]string{"disabled", "process", "cgroup", "global", "gateway"}[min(m, ModeGateway)]
}

// OnEnd says what happens to the captured traffic of a context when the daemon ends.
type OnEnd uint8

// The values of on_stop and on_crash.
const (
	OnEndDefault OnEnd = iota // on_stop: open, on_crash: block
	OnEndOpen
	OnEndBlock
)

// StopMode says what Manager.Close leaves behind.
type StopMode uint8

// The stop modes.
const (
	StopConfigured StopMode = iota // each context by its OnStop
	StopOpen                       // undo everything
	StopBlock                      // keep marks, rules, unreachable routes and guard of every context
)

// Instance names one daemon (or one `run` that is its own engine) and where it keeps its journal.
type Instance struct {
	Socket  string // control socket; also the name of the instance in messages
	Journal string // state.json beside the socket
	opening bool   // a watcher, after a crash
	Run     bool   // an engine of `mprox run`: shares the namespace with others, each with slots of its own
}

// InstanceFor returns the instance of a control socket: its journal is state.json beside mprox.sock, NAME.state.json beside any NAME.sock.
// run-*.sock is an engine of `mprox run`.
func InstanceFor(socket string) Instance {
	dir, base := filepath.Split(socket)
	name := strings.TrimSuffix(base, ".sock")
	in := Instance{Socket: socket, Journal: filepath.Join(dir, name+".state.json"), Run: strings.HasPrefix(name, "run-")}
	if name == "mprox" {
		in.Journal = filepath.Join(dir, "state.json")
	}
	return in
}

// tableName is the name of the instance's nftables table. A daemon is alone in its network namespace, a run is not.
func (in Instance) tableName() string {
	if !in.Run {
		return "mprox"
	}
	return "mprox-" + strings.TrimSuffix(filepath.Base(in.Socket), ".sock")
}

// Spec is what an instance wants from the kernel. It is data: Manager copies it.
type Spec struct {
	Instance     Instance
	Mask         uint32 // which bits of mark and connmark are ours: eight adjacent ones; 0 = DefaultMask
	TableBase    int    // first of the 480 routing tables that are ours; 0 = DefaultTableBase
	RulePriority int    // first of the 1000 ip rule priorities that are ours; 0 = DefaultRulePriority
	Contexts     []ContextSpec
	Owners       bool // who makes sockets is written down, for Manager.Owner
	// Bridges are those that no container runtime has made, and Ports, by the index of the device on the host's side, the containers whose traffic is let
	// through by now: see ContextSpec.Containers. Both ascending.
	Bridges   []string `json:",omitempty"`
	Ports     []int    `json:",omitempty"`
	TaskLimit int      // how many selected processes BPF follows; who is more is blocked; 0 = 32768
}

// ContextSpec is one context.
type ContextSpec struct {
	Name  string
	Mode  Mode
	Slot  int    // 0 to MaxContexts-1; fixes mark, tables and priorities for as long as the context lives
	TUN   string // name of the open device; "" = none (yet, or no more): captured traffic is unreachable
	MTU   int    // 0 = 1500
	Addr4 netip.Addr
	Addr6 netip.Addr // the device's own addresses; invalid = 169.254.77.SLOT+1 and fd4d:5554:4558:1::SLOT+1
	// Direct are the prefixes of `bypass.address`: routed as the main table does, past the TUN. Link-local and private prefixes that are
	// on-link without a gateway are always direct.
	Direct []netip.Prefix
	Fake   []netip.Prefix // the ranges of fake IPs: never direct, whatever Direct says
	// DNSPort4 and DNSPort6 are our listeners on 127.0.0.1 and ::1, UDP and TCP, to which the context's port 53 traffic over loopback is
	// redirected; 0 = none: that traffic is dropped. Not 53.
	DNSPort4 uint16
	DNSPort6 uint16
	// DNSOff leaves port 53 alone (dns.mode off): neither led into the TUN before the direct routes nor redirected on loopback.
	DNSOff  bool
	Cgroups []CgroupRef // ModeProcess and ModeCgroup: captured with all their descendants
	Select  []Selector  // ModeProcess and ModeCgroup: captured beside them, from the next packet on; ModeGateway: whom
	Exclude []Selector  // in these modes not selected, in ModeGlobal not captured, by this context
	Offload bool        // TCP flows may be adopted into the kernel (accel.go). Not in ModeGateway
	OnStop  OnEnd
	OnCrash OnEnd
	Strict  bool // BPF and nftables both mark: a process that changes its socket's mark is captured all the same
	// Containers: it selects some by name, so that nobody knows whether one that has just been started is among them. What comes in by a bridge from a
	// network namespace is dropped, unless Spec.Bridges or Spec.Ports lets it through.
	Containers bool `json:",omitempty"`
	// InputPorts are the destination ports on which ModeGlobal lets TCP connections and UDP datagrams from outside in; empty = all.
	InputPorts []uint16
}

// CgroupRef is one cgroup v2 as nftables names it.
type CgroupRef struct {
	Path  string `json:"path"`  // below the cgroup2 mount, "/" first
	ID    uint64 `json:"id"`    // kernfs id, gone with the directory
	Level int    `json:"level"` // number of path components
	// Only: what sockets of other users than UID in it send is dropped. Whoever got another user by a set-uid program is blocked, not freed.
	Only bool   `json:"only,omitempty"`
	UID  uint32 `json:"uid,omitempty"`
}

// String returns path and id.
func (c CgroupRef) String() string { return fmt.Sprintf("%s (id %d)", c.Path, c.ID) }

// BypassMark is the mark of the daemon's own sockets within the mask.
func BypassMark(mask uint32) uint32 { return markBypass << bits.TrailingZeros32(mask) }

// InboundMark is the mark of connections that came from outside within the mask.
func InboundMark(mask uint32) uint32 { return markInbound << bits.TrailingZeros32(mask) }

// ContextMark is the mark of the context in a slot within the mask.
func ContextMark(mask uint32, slot int) uint32 {
	return uint32(markFirst+slot) << bits.TrailingZeros32(mask)
}

// Table is the context's routing table T: the way into its TUN, and nothing else.
func (s Spec) Table(slot int) int { return s.TableBase + slot }

// DirectTable is the context's table D of direct routes.
func (s Spec) DirectTable(slot int) int { return s.TableBase + MaxContexts + slot }

// withDefaults fills in what is zero.
func (s Spec) withDefaults() Spec {
	if s.Mask == 0 {
		s.Mask = DefaultMask
	}
	if s.TableBase == 0 {
		s.TableBase = DefaultTableBase
	}
	if s.RulePriority == 0 {
		s.RulePriority = DefaultRulePriority
	}
	s.Contexts = append([]ContextSpec(nil), s.Contexts...)
	for i := range s.Contexts {
		c := &s.Contexts[i]
		if c.MTU == 0 {
			c.MTU = 1500
		}
		if !c.Addr4.IsValid() {
			c.Addr4 = netip.AddrFrom4([4]byte{169, 254, 77, byte(c.Slot + 1)})
		}
		if !c.Addr6.IsValid() {
			c.Addr6 = netip.AddrFrom16([16]byte{0xfd, 0x4d, 0x55, 0x54, 0x45, 0x58, 0, 1, 14: byte((c.Slot + 1) >> 8), 15: byte(c.Slot + 1)})
		}
	}
	return s
}

// validate checks what NewPlan relies on.
func (s Spec) validate() error {
	if bits.OnesCount32(s.Mask) != 8 || bits.LeadingZeros32(s.Mask)+bits.TrailingZeros32(s.Mask) != 24 {
		return fmt.Errorf("kernel.mark_mask %#x: want eight adjacent bits", s.Mask)
	}
	if s.TableBase < 256 || s.RulePriority < 1 || s.RulePriority > 31000 {
		return fmt.Errorf("kernel.table_base %d, kernel.rule_priority %d: want a table from 256 on and a priority from 1 to 31000", s.TableBase, s.RulePriority)
	}
	slots, names, global := map[int]bool{}, map[string]bool{}, 0
	for _, c := range s.Contexts {
		switch {
		case c.Slot < 0 || c.Slot >= MaxContexts:
			return fmt.Errorf("%w: context %q has slot %d: there are %d marks", ErrConflict, c.Name, c.Slot, MaxContexts)
		case slots[c.Slot], names[c.Name]:
			return fmt.Errorf("context %q: name or slot %d is used twice", c.Name, c.Slot)
		case c.DNSPort4 == 53 || c.DNSPort6 == 53:
			return fmt.Errorf("context %q: the DNS listener cannot be on port 53 itself", c.Name)
		case !c.Addr4.Is4() || !c.Addr6.Is6():
			return fmt.Errorf("context %q: device addresses %s, %s", c.Name, c.Addr4, c.Addr6)
		}
		for _, sel := range slices.Concat(c.Select, c.Exclude) {
			if err := errors.Join(sel.validate(), c.validateGateway(sel)); err != nil {
				return fmt.Errorf("context %q: %w", c.Name, err)
			}
		}
		if c.Mode == ModeGlobal {
			if global++; global > 1 {
				return fmt.Errorf("context %q: only one context can be global", c.Name)
			}
		}
		slots[c.Slot], names[c.Name] = true, true
	}
	return nil
}
