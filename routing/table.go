// SPDX-License-Identifier: GPL-3.0-or-later

package routing

import (
	"errors"
	"fmt"
	"strconv"

	"github.com/mutex-proxy/mutex/flow"
)

// dnsPort is the port of DNS over UDP and TCP (RFC 1035 section 4.2).
const dnsPort = 53

// The results of a condition as Explain writes them.
const (
	resultYes     = "match"
	resultNo      = "no match"
	resultUnknown = "unknown"
)

// Table is the compiled rules of one context. It is immutable and safe for concurrent use.
//
//	port 53 ──▶ bypass ──▶ rules[0] ──▶ … ──▶ rules[n] ──▶ default
//	  │           │           │                  │            │
//	Resolve     direct     upstream, reject, drop, or Sniff first
type Table struct {
	dns    bool
	bypass *bypassSet
	rules  []compiledRule
	def    flow.Decision
}

type compiledRule struct {
	set      *matchSet
	decision flow.Decision
	sniff    flow.Decision // the answer while only payload can tell whether the rule matches
}

var _ flow.Decider = (*Table)(nil)

// Compile checks and compiles the rules. The error joins one *PathError for each thing that is wrong.
func Compile(in Input) (*Table, error) {
	c := &compiler{in: &in}
	fake, bad := newPrefixSet(append(defaultFake(), in.Fake...))
	if bad >= 0 {
		return nil, errors.New("routing: invalid fake range")
	}
	local, bad := newPrefixSet(in.Local)
	if bad >= 0 {
		return nil, errors.New("routing: invalid local prefix")
	}
	c.class = &classifier{fake: fake, local: local}
	path := contextPath(in.Context)
	t := &Table{dns: in.DNS, bypass: c.bypass(&in.Bypass), rules: c.bypassRules(&in.Bypass)}
	for i := range in.Rules {
		name := "rules[" + strconv.Itoa(i) + "]"
		rulePath := path + "." + name
		r := compiledRule{
			set:      c.match(rulePath, &in.Rules[i].Match, 0),
			decision: c.decision(rulePath+".upstream", name, in.Rules[i].Upstream),
			sniff:    flow.Decision{Action: flow.Sniff, Rule: name},
		}
		r.decision.FTP = in.Rules[i].FTP
		r.decision.Offload = in.Rules[i].Offload
		t.rules = append(t.rules, r)
	}
	t.def = c.decision(path+".default", "default", in.Default)
	if len(c.errs) > 0 {
		return nil, errors.Join(c.errs...)
	}
	return t, nil
}

// contextPath returns the JSON path of a context.
func contextPath(name string) string {
	for _, c := range name {
		if c != '_' && c != '-' && c != '$' && (c < '0' || c > '9') && (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') {
			return "$.contexts[" + strconv.Quote(name) + "]"
		}
	}
	return "$.contexts." + name
}

// decision returns what the name of an upstream stands for.
func (c *compiler) decision(path, rule, upstream string) flow.Decision {
	d := flow.Decision{Rule: rule}
	action, isAction := c.in.Actions[upstream]
	via := c.in.Upstreams[upstream]
	switch {
	case upstream == "":
		c.fail(path, errors.New("no upstream is given"))
	case upstream == "reject":
		d.Action = flow.Block
	case upstream == "drop":
		d.Action = flow.Drop
	case isAction && (action == flow.Block || action == flow.Drop):
		d.Action = action
	case via != nil:
		d.Action, d.Via = flow.Forward, via
	default:
		c.fail(path, fmt.Errorf("unknown upstream %q", upstream))
	}
	return d
}

// Decide returns what to do with the flow. Its owner has been looked up if Needs asked for it. It does not allocate.
func (t *Table) Decide(f *flow.Flow) flow.Decision {
	if t.isDNS(f) {
		return flow.Decision{Action: flow.Resolve, Rule: "dns"}
	}
	if d, ok := t.bypass.decide(f); ok {
		return d
	}
	for i := range t.rules {
		r := &t.rules[i]
		switch o, _ := r.set.eval(f, true); {
		case o == yes:
			return r.decision
		case o&yes != 0:
			return r.sniff
		}
	}
	return t.def
}

// Needs returns what the rules that can still match need to know. It does not allocate.
func (t *Table) Needs(f *flow.Flow) flow.Needs {
	if t.isDNS(f) {
		return 0
	}
	if _, ok := t.bypass.decide(f); ok {
		return 0
	}
	var needs flow.Needs
	for i := range t.rules {
		o, n := t.rules[i].set.eval(f, false)
		if o == yes {
			break
		}
		if o&yes != 0 {
			needs |= n
		}
	}
	return needs
}

func (t *Table) isDNS(f *flow.Flow) bool {
	return t.dns && f.Dst.Port == dnsPort && hasPorts(f)
}

// Explain returns the conditions that were looked at, in order, up to the one that decided.
func (t *Table) Explain(f *flow.Flow) []Condition {
	decided := t.Decide(f)
	var out []Condition
	if t.dns {
		c := Condition{Rule: "dns", Key: "port", Value: "53", Result: resultNo, Reason: havePort(f)}
		if decided.Action == flow.Resolve {
			c.Result = resultYes
			return append(out, c)
		}
		out = append(out, c)
	}
	out = append(out, t.bypass.explain(f, decided.Rule)...)
	if n := len(out); n > 0 && out[n-1].Rule == decided.Rule {
		return out
	}
	for i := range t.rules {
		r := &t.rules[i]
		out = append(out, r.set.explain(f, r.decision.Rule, "")...)
		if r.decision.Rule == decided.Rule {
			return out
		}
	}
	return append(out, Condition{Rule: "default", Result: resultYes, Reason: "no rule matched"})
}

// explain returns a line for each condition of the set, nested ones with the path to them, and one for the inversion.
func (s *matchSet) explain(f *flow.Flow, rule, prefix string) []Condition {
	var out []Condition
	for i := range s.conds {
		c := &s.conds[i]
		o, _ := c.eval(f, true)
		if c.sets == nil {
			out = append(out, Condition{Rule: rule, Key: prefix + c.key, Value: c.value, Result: o.String(), Reason: c.have(f)})
			continue
		}
		for j, set := range c.sets {
			out = append(out, set.explain(f, rule, prefix+c.key+"["+strconv.Itoa(j)+"].")...)
		}
		out = append(out, Condition{Rule: rule, Key: prefix + c.key, Result: o.String(), Reason: "taken together"})
	}
	if s.invert != s.negated {
		o, _ := s.eval(f, true)
		if s.negated {
			o = not(o)
		}
		out = append(out, Condition{Rule: rule, Key: prefix + "invert", Value: "true", Result: o.String(), Reason: "the opposite of the conditions"})
	}
	return out
}

// String returns the result as Explain writes it.
func (o outcome) String() string {
	switch o {
	case yes:
		return resultYes
	case no:
		return resultNo
	}
	return resultUnknown
}
