// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"errors"
	"fmt"
	"net/netip"
)

// validateGateway checks the selectors of a context in ModeGateway, which know hosts, and of any other, which know processes.
func (c ContextSpec) validateGateway(sel Selector) error {
	hosts, gateway := len(sel.Interfaces)+len(sel.Sources) > 0, c.Mode == ModeGateway
	processes := len(sel.UIDs)+len(sel.GIDs)+len(sel.Cgroups)+len(sel.Units)+len(sel.PIDs) > 0
	switch {
	case gateway && processes:
		return errors.New("mode gateway selects by interface and source: processes of other hosts are not known")
	case !gateway && hosts:
		return errors.New("interface and source select in mode gateway only")
	}
	for _, name := range sel.Interfaces {
		if name == "" || name == loopback || name == c.TUN {
			return fmt.Errorf("interface %q is none that other hosts arrive on", name)
		}
	}
	for _, p := range sel.Sources {
		if !p.IsValid() {
			return errors.New("an invalid source")
		}
	}
	return nil
}

// hostRules are the combinations of interface and source of which one must match.
func (s Selector) hostRules() [][]nfStmt {
	var in, from []nfStmt
	for _, name := range s.Interfaces {
		in = append(in, stIface{name: name})
	}
	for _, p := range s.Sources {
		from = append(from, stSource{p.Masked()})
	}
	return product(product([][]nfStmt{nil}, len(in) > 0, in), len(from) > 0, from)
}

// forwarded adds the chains that mark what arrives from other hosts, before it is routed, and the jumps to them. What is for this machine
// itself stays, save queries, and so do answers to what came the other way: a published port, say.
func (g *guard) forwarded(pre *nfChain) {
	for _, c := range g.contexts {
		if c.Mode != ModeGateway {
			continue
		}
		chain := nfChain{name: setName("gateway", c), rules: []nfRule{rule(stCtReply{}, ret())}}
		for _, sel := range c.Exclude {
			for _, m := range sel.hostRules() {
				chain.rules = append(chain.rules, append(m, ret()))
			}
		}
		g.gatewayDNS(c, &chain)
		chain.rules = append(chain.rules, rule(stToLocal{}, ret()))
		for _, sel := range c.Select {
			for _, m := range sel.hostRules() {
				chain.rules = append(chain.rules, append(m, g.set(false, ContextMark(g.spec.Mask, c.Slot)), accept()))
			}
		}
		g.chain(chain)
		pre.rules = append(pre.rules, rule(jump(chain.name)))
	}
}

// clamp keeps both ends of a captured connection from sending segments that the way between the hosts and the TUN does not take: what is too large
// would be lost wherever ICMP is filtered.
func (g *guard) clamp() {
	mss := nfChain{name: "mss", typ: "filter", hook: "forward", priority: prioMangle}
	for _, c := range g.contexts {
		if c.Mode == ModeGateway && c.TUN != "" {
			mss.rules = append(mss.rules, rule(stIface{name: c.TUN}, stClampMSS{}), rule(stIface{out: true, name: c.TUN}, stClampMSS{}))
		}
	}
	if len(mss.rules) > 0 {
		g.chain(mss)
	}
}

// gatewayDNS captures the queries that the selected send to this machine itself. The table of local addresses is asked before any mark, so they are
// sent on to an address that is nobody's: that one is led into the TUN, or, with the daemon dead, nowhere.
func (g *guard) gatewayDNS(c ContextSpec, chain *nfChain) {
	if c.DNSOff {
		return
	}
	ctx := ContextMark(g.spec.Mask, c.Slot)
	nat := nfChain{name: setName("gateway_dns", c), typ: "nat", hook: "prerouting", priority: prioNAT}
	for _, proto := range []uint8{protoUDP, protoTCP} {
		for _, sel := range c.Select {
			for _, m := range sel.hostRules() {
				chain.rules = append(chain.rules, append(m, stProto{proto}, stPort{port: 53}, stToLocal{}, g.set(false, ctx), accept()))
			}
		}
		for _, addr := range []netip.Addr{dnsNowhere4(), dnsNowhere6()} {
			nat.rules = append(nat.rules, rule(stFamily{addr.Is6()}, g.mark(false, ctx), stProto{proto}, stPort{port: 53}, stToLocal{}, stDNATTo{addr}))
		}
	}
	g.chain(nat)
}

// dnsNowhere4 is the IPv4 dummy address (RFC 7600, section 4.8), dnsNowhere6 is in the discard prefix (RFC 6666).
func dnsNowhere4() netip.Addr { return netip.AddrFrom4([4]byte{192, 0, 0, 8}) }
func dnsNowhere6() netip.Addr { return netip.MustParseAddr("100::53") }

// forwarding are the settings without which nothing arrives at a gateway's context.
func forwarding(s Spec, snap Snapshot) []Sysctl {
	var out []Sysctl
	for _, c := range s.Contexts {
		if c.Mode != ModeGateway || len(out) > 0 {
			continue
		}
		out = append(out, Sysctl{Key: sysctlForward4, Value: "1"})
		if snap.IPv6 {
			out = append(out, Sysctl{Key: sysctlForward6, Value: "1"})
		}
	}
	return out
}

const (
	sysctlForward4 = "net/ipv4/ip_forward"
	sysctlForward6 = "net/ipv6/conf/all/forwarding"
)
