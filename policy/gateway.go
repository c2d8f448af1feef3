// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"errors"
	"fmt"
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
		if name == "" || name == "lo" || name == c.TUN {
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
// itself stays, and so do answers to what came the other way: a published port, say.
func (g *guard) forwarded(pre *nfChain) {
	for _, c := range g.contexts {
		if c.Mode != ModeGateway {
			continue
		}
		chain := nfChain{name: setName("gateway", c), rules: []nfRule{
			rule(stToLocal{}, ret()),
			rule(stCtReply{}, ret()),
		}}
		for _, sel := range c.Exclude {
			for _, m := range sel.hostRules() {
				chain.rules = append(chain.rules, append(m, ret()))
			}
		}
		for _, sel := range c.Select {
			for _, m := range sel.hostRules() {
				chain.rules = append(chain.rules, append(m, g.set(false, ContextMark(g.spec.Mask, c.Slot)), accept()))
			}
		}
		g.chain(chain)
		pre.rules = append(pre.rules, rule(jump(chain.name)))
	}
}

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
