// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"fmt"
	"net/netip"
	"strings"
)

// The loopback device has the same name and index in every network namespace; the index cannot change (LOOPBACK_IFINDEX of the kernel).
const (
	loopback      = "lo"
	loopbackIndex = 1
)

// NFTable is one nftables table, of the inet family unless its name says otherwise, as data: the plan prints it, the Host sends it to the kernel.
type NFTable struct {
	Name string
	// owner: the table dies with the netlink socket that made it (kernel ≥ 5.12), for redirects to listeners that die too.
	owner    bool
	counters []string
	sets     []nfSet
	chains   []nfChain
}

// nfSet is one named set. Exactly one of the element lists is in use, by kind.
type nfSet struct {
	name   string
	kind   nfSetKind
	ranges []addrRange // kindAddr4, kindAddr6: ascending, disjoint
	tuples []Tuple     // kindTuple4, kindTuple6
	ports  []uint16    // kindPort
	index  []int       // kindIndex: ascending
	names  []string    // kindName: ascending
}

type nfSetKind uint8

const (
	kindAddr4 nfSetKind = iota
	kindAddr6
	kindTuple4 // local address . local port . remote address . remote port
	kindTuple6
	kindPort
	kindIndex // of devices
	kindName  // of devices
)

// addrRange is an inclusive range of addresses of one family.
type addrRange struct{ from, to netip.Addr }

// nfChain is a base chain when hook is set.
type nfChain struct {
	name     string
	typ      string // filter, route, nat
	hook     string // prerouting, output, postrouting; egress of a device, in a netdev table
	device   string
	priority int32
	rules    []nfRule
}

type nfRule []nfStmt

// nfStmt is one match or action. String is nft's own notation.
type nfStmt interface{ String() string }

type (
	// stMark matches the bits of the packet's mark (or of its connection's) within mask.
	stMark struct {
		ct          bool
		value, mask uint32
		not         bool
	}
	// stSetMark writes the bits within mask and leaves all others.
	stSetMark struct {
		ct          bool
		value, mask uint32
	}
	stIface struct {
		out  bool
		name string
		not  bool
	}
	// stKind matches the kind of device that a packet has come in by, as `ip link` names it. Devices of hardware, and lo, have none: a rule that asks
	// ends there, so there is no "not".
	stKind    struct{ kind string }
	stIndexIn struct{ set string } // the device that a packet has come in by, by its index
	stNameIn  struct{ set string } // and by its name
	// stLocal matches, in postrouting, packets that did not come in by a device: those of this machine itself, not forwarded ones.
	stLocal  struct{}
	stProto  struct{ proto uint8 }
	stFamily struct{ v6 bool }
	stPort   struct {
		src  bool
		port uint16
		not  bool
	}
	// stPortIn matches a destination port that is not in a set.
	stPortNotIn struct{ set string }
	stAddrIn    struct {
		v6  bool
		set string
	}
	// stTupleIn matches a TCP packet whose connection is in a set of tuples; in: the packet comes in, so its destination is the local end.
	stTupleIn struct {
		v6, in bool
		set    string
	}
	// stFrameType matches, in a netdev table, the type in the frame itself, not what its sender has told the kernel.
	stFrameType struct {
		proto    uint16
		ethernet bool
	}
	// stFrameAddrIn is stAddrIn behind a stFrameType: there is no protocol family in a netdev table.
	stFrameAddrIn struct {
		v6  bool
		set string
	}
	// stSYN matches TCP packets with SYN and neither ACK, RST nor FIN; not: all other TCP packets.
	stSYN   struct{ not bool }
	stCtNew struct{}
	// stCtDNS matches packets in the opening direction of a connection that was opened to port 53, whatever NAT has made of it since.
	stCtDNS    struct{}
	stCtReply  struct{} // packets that answer whoever opened the connection
	stSource   struct{ prefix netip.Prefix }
	stICMPType struct {
		v6       bool
		from, to uint8
	}
	// stHops255 matches IPv6 packets with hop limit 255: no router has forwarded them, or ever will (RFC 4861, section 7.1).
	stHops255 struct{}
	stToLocal struct{} // the destination is an address of this machine
	stCgroup  struct{ ref CgroupRef }
	stUID     struct {
		uid uint32
		not bool
	}
	stGID     struct{ gid uint32 }
	stOwned   struct{} // sent by a socket that a process has open
	stCounter struct{ name string }
	stDNAT    struct{ port uint16 } // redirect to a local port
	stDNATTo  struct{ addr netip.Addr }
	// stClampMSS lowers the segment size that a SYN or its answer announces to what the smaller of both ways takes; it never raises it.
	stClampMSS struct{}
	stVerdict  struct{ verb, chain string }
)

func (s stMark) String() string {
	return fmt.Sprintf("%s mark & %#08x %s %#08x", markOf(s.ct), s.mask, op(s.not), s.value)
}

func (s stSetMark) String() string {
	m := markOf(s.ct)
	if s.value == 0 {
		return fmt.Sprintf("%s mark set %s mark & %#08x", m, m, ^s.mask)
	}
	return fmt.Sprintf("%s mark set %s mark & %#08x | %#08x", m, m, ^s.mask, s.value)
}

func (s stIface) String() string {
	dir := "iif"
	if s.out {
		dir = "oif"
	}
	if s.name != loopback {
		dir += "name"
	}
	if s.not {
		dir += " !="
	}
	return fmt.Sprintf("%s %q", dir, s.name)
}

func (s stKind) String() string    { return fmt.Sprintf("meta iifkind %q", s.kind) }
func (s stIndexIn) String() string { return "iif @" + s.set }
func (s stNameIn) String() string  { return "iifname @" + s.set }
func (stLocal) String() string     { return "iif 0" }

func (s stProto) String() string { return "meta l4proto " + nfProto(s.proto) }

func (s stFamily) String() string {
	if s.v6 {
		return "meta nfproto ipv6"
	}
	return "meta nfproto ipv4"
}

func (s stPort) String() string {
	dir := "dport"
	if s.src {
		dir = "sport"
	}
	if s.not {
		dir += " !="
	}
	return fmt.Sprintf("th %s %d", dir, s.port)
}

func (s stPortNotIn) String() string { return "th dport != @" + s.set }

func (s stAddrIn) String() string { return ip(s.v6) + " daddr @" + s.set }

func (s stFrameType) String() string {
	if s.ethernet {
		return fmt.Sprintf("ether type %#04x", s.proto)
	}
	return fmt.Sprintf("meta protocol %#04x", s.proto)
}

func (s stFrameAddrIn) String() string { return ip(s.v6) + " daddr @" + s.set }

func (s stTupleIn) String() string {
	f := ip(s.v6)
	if s.in {
		return fmt.Sprintf("%s daddr . tcp dport . %s saddr . tcp sport @%s", f, f, s.set)
	}
	return fmt.Sprintf("%s saddr . tcp sport . %s daddr . tcp dport @%s", f, f, s.set)
}

func (s stSYN) String() string {
	return fmt.Sprintf("tcp flags & (fin | syn | rst | ack) %s syn", op(s.not))
}
func (stCtNew) String() string   { return "ct state new" }
func (stCtDNS) String() string   { return "ct direction original ct original proto-dst 53" }
func (stCtReply) String() string { return "ct direction reply" }
func (s stSource) String() string {
	return fmt.Sprintf("%s saddr %s", ip(s.prefix.Addr().Is6()), s.prefix)
}
func (stHops255) String() string { return "ip6 hoplimit 255" }
func (stToLocal) String() string { return "fib daddr type local" }

func (s stICMPType) String() string {
	name := "icmp"
	if s.v6 {
		name = "icmpv6"
	}
	if s.from == s.to {
		return fmt.Sprintf("%s type %d", name, s.from)
	}
	return fmt.Sprintf("%s type %d-%d", name, s.from, s.to)
}

func (s stCgroup) String() string {
	return fmt.Sprintf("socket cgroupv2 level %d %q", s.ref.Level, strings.TrimPrefix(s.ref.Path, "/"))
}

func (s stUID) String() string {
	if s.not {
		return fmt.Sprintf("meta skuid != %d", s.uid)
	}
	return fmt.Sprintf("meta skuid %d", s.uid)
}

func (s stGID) String() string     { return fmt.Sprintf("meta skgid %d", s.gid) }
func (stOwned) String() string     { return "meta skuid <= 4294967295" }
func (s stCounter) String() string { return "counter name " + s.name }
func (s stDNAT) String() string    { return fmt.Sprintf("redirect to :%d", s.port) }
func (s stDNATTo) String() string  { return fmt.Sprintf("dnat %s to %s", ip(s.addr.Is6()), s.addr) }
func (stClampMSS) String() string {
	return "tcp flags & (syn | rst) == syn tcp option maxseg size set rt mtu"
}
func (s stVerdict) String() string { return strings.TrimSpace(s.verb + " " + s.chain) }

// The verdicts.
func accept() nfStmt              { return stVerdict{verb: "accept"} }
func drop() nfStmt                { return stVerdict{verb: "drop"} }
func ret() nfStmt                 { return stVerdict{verb: "return"} }
func jump(chain string) nfStmt    { return stVerdict{verb: "jump", chain: chain} }
func goTo(chain string) nfStmt    { return stVerdict{verb: "goto", chain: chain} }
func rule(stmts ...nfStmt) nfRule { return stmts }

func markOf(ct bool) string {
	if ct {
		return "ct"
	}
	return "meta"
}

func op(not bool) string {
	if not {
		return "!="
	}
	return "=="
}

func ip(v6 bool) string {
	if v6 {
		return "ip6"
	}
	return "ip"
}

func nfProto(p uint8) string {
	switch p {
	case protoICMP:
		return "icmp"
	case protoICMPv6:
		return "ipv6-icmp"
	case protoIGMP:
		return "igmp"
	}
	return protoName(p)
}

// String is the table as `nft list table` would print it, but for the spelling of what nft abbreviates.
func (t NFTable) String() string {
	var b strings.Builder
	family := "inet"
	switch {
	case ofNetdev(t.Name):
		family = "netdev"
	case ofBridge(t.Name):
		family = "bridge"
	}
	fmt.Fprintf(&b, "table %s %s {\n", family, t.Name)
	if t.owner {
		b.WriteString("\tflags owner\n")
	}
	for _, c := range t.counters {
		fmt.Fprintf(&b, "\tcounter %s\n", c)
	}
	for _, s := range t.sets {
		fmt.Fprintf(&b, "\tset %s { %s }\n", s.name, s.text())
	}
	for _, c := range t.chains {
		fmt.Fprintf(&b, "\tchain %s {\n", c.name)
		if c.hook != "" {
			hook := c.hook
			if c.device != "" {
				hook += fmt.Sprintf(" device %q", c.device)
			}
			fmt.Fprintf(&b, "\t\ttype %s hook %s priority %d; policy accept\n", c.typ, hook, c.priority)
		}
		for _, r := range c.rules {
			words := make([]string, len(r))
			for i, s := range r {
				words[i] = s.String()
			}
			fmt.Fprintf(&b, "\t\t%s\n", strings.Join(words, " "))
		}
		b.WriteString("\t}\n")
	}
	b.WriteString("}\n")
	return b.String()
}

// identity is equal for tables that do the same. The text alone is not: a cgroup that was made again has the same path and another id.
func (t NFTable) identity() string {
	var b strings.Builder
	b.WriteString(t.String())
	for _, c := range t.chains {
		for _, r := range c.rules {
			for _, s := range r {
				if cg, ok := s.(stCgroup); ok {
					fmt.Fprintf(&b, "%d ", cg.ref.ID)
				}
			}
		}
	}
	return b.String()
}

func (s nfSet) text() string {
	var el []string
	for _, r := range s.ranges {
		el = append(el, r.String())
	}
	for _, t := range s.tuples {
		el = append(el, fmt.Sprintf("%s . %d . %s . %d", t.Local.Addr(), t.Local.Port(), t.Remote.Addr(), t.Remote.Port()))
	}
	for _, p := range s.ports {
		el = append(el, fmt.Sprint(p))
	}
	for _, i := range s.index {
		el = append(el, fmt.Sprint(i))
	}
	for _, n := range s.names {
		el = append(el, fmt.Sprintf("%q", n))
	}
	text := "type " + [...]string{
		"ipv4_addr; flags interval", "ipv6_addr; flags interval",
		"ipv4_addr . inet_service . ipv4_addr . inet_service", "ipv6_addr . inet_service . ipv6_addr . inet_service", "inet_service", "iface_index", "ifname",
	}[s.kind] + ";"
	if len(el) > 0 {
		text += " elements = { " + strings.Join(el, ", ") + " }"
	}
	return text
}

// String is the range as a prefix where it is one.
func (r addrRange) String() string {
	if r.from == r.to {
		return r.from.String()
	}
	for bits := r.from.BitLen(); bits >= 0; bits-- {
		p := netip.PrefixFrom(r.from, bits)
		if p.Masked().Addr() != r.from {
			break
		}
		if lastAddr(p) == r.to {
			return p.String()
		}
	}
	return r.from.String() + "-" + r.to.String()
}
