// SPDX-License-Identifier: GPL-3.0-or-later

// Package routing is the router: compiled rules that say which upstream a flow takes, and why.
//
// It is the only decision point. It opens no sockets, resolves no names and looks up no processes: it answers from what the flow already
// knows, and Needs says what the flow would have to know. cmd/mprox/daemon compiles a Table from a configuration, flow's handler asks it.
package routing

import (
	"fmt"
	"net/netip"
	"strconv"

	"github.com/mutex-proxy/mutex/flow"
)

// Input is what a Table is compiled from.
type Input struct {
	Context string // the context's name, for the paths of errors
	Bypass  Bypass
	Rules   []Rule
	Default string // an upstream, reject or drop
	DNS     bool   // TCP and UDP to port 53 is resolved, before anything else is asked
	// Sniff says that the caller can act on flow.Sniff. Without it, rules that need payload do not compile.
	Sniff bool
	// Upstreams are the upstreams and pools by name; direct must be among them if anything uses it.
	Upstreams map[string]flow.Dialer
	// Actions are names beside reject and drop that block (flow.Block) or silence (flow.Drop): upstreams with a reject:// or drop:// URL.
	Actions map[string]flow.Action
	// Fake are the fake ranges in use; the default ones count always. They belong to no address class.
	Fake []netip.Prefix
	// Local are the prefixes on the links of this machine; they belong to the class local.
	Local []netip.Prefix
	// LookupUser turns a user name into a uid; nil asks the system's user database.
	LookupUser func(name string) (uid uint32, err error)
}

// Bypass is the destinations that are reached directly, before any rule is asked. One match suffices.
type Bypass struct {
	Address []string // addresses, CIDRs, classes: local private link-local multicast loopback public
	Port    []PortRange
	Network []string

	Protocol []string // detected ones
	Process  []string // file names of executables
}

// PortRange is the ports from From to To, both included, 1 to 65535.
type PortRange struct{ From, To uint16 }

// String returns the range as rules write it.
func (r PortRange) String() string {
	if r.From == r.To {
		return strconv.Itoa(int(r.From))
	}
	return strconv.Itoa(int(r.From)) + "-" + strconv.Itoa(int(r.To))
}

// Match is a set of conditions. All that are given (not nil, not empty) must match; a list matches if one member does.
type Match struct {
	Domain        []string // exact, *.x (below x), +.x (x and below)
	DomainSuffix  []string
	DomainKeyword []string
	DomainRegex   []string
	IPCIDR        []netip.Prefix
	IPIsPrivate   *bool
	GeoIP         []string
	ASN           []uint32
	Port          []PortRange
	PortRange     []PortRange
	SourceCIDR    []netip.Prefix
	SourcePort    []PortRange
	Network       []string
	Protocol      []string
	User          []string
	UID           []uint32
	GID           []uint32
	PID           []int
	Exe           []string
	ExeRegex      []string
	Process       []string
	Cgroup        []string
	Unit          []string
	Interface     []string
	DSCP          []int
	Time          []string
	RuleSet       []string
	Invert        bool
	And           []Match // all
	Or            []Match // at least one
	Not           []Match // none
}

// Rule sends the flows that match to an upstream, a pool, or to direct, reject or drop.
type Rule struct {
	Match
	Upstream string
	FTP      flow.FTPMode
	Offload  flow.Offload
}

// PathError is an error at a place of the configuration.
type PathError struct {
	Path string // $.contexts.default.rules[2].port
	Err  error
}

// Error returns the path and the error.
func (e *PathError) Error() string { return fmt.Sprintf("%s: %v", e.Path, e.Err) }

// Unwrap returns the error without its path.
func (e *PathError) Unwrap() error { return e.Err }

// Condition is one line of Explain: one condition of one rule, and whether it matched.
type Condition struct {
	Rule   string `json:"rule"`   // rules[2], bypass, dns, default
	Key    string `json:"key"`    // domain_suffix; and.domain when nested
	Value  string `json:"value"`  // what the rule asks for
	Result string `json:"result"` // match, no match, unknown
	Reason string `json:"reason"` // what the flow has
}
