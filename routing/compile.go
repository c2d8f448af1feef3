// SPDX-License-Identifier: GPL-3.0-or-later

package routing

import (
	"errors"
	"fmt"
	"os/user"
	"regexp"
	"strconv"
	"strings"

	"github.com/mutex-proxy/mutex/flow"
)

// maxNesting bounds and/or/not, so that evaluation has a bounded stack.
const maxNesting = 16

// compiler turns Matches into matchSets and collects what is wrong.
type compiler struct {
	in    *Input
	class *classifier
	errs  []error
}

func (c *compiler) fail(path string, err error) {
	c.errs = append(c.errs, &PathError{Path: path, Err: err})
}

func at(path, key string, i int) string { return path + "." + key + "[" + strconv.Itoa(i) + "]" }

// match compiles one set. Conditions are in the order of their cost, so that the cheap ones decide first; Explain shows them in it too.
func (c *compiler) match(path string, m *Match, depth int) *matchSet {
	if depth > maxNesting {
		c.fail(path, fmt.Errorf("and, or, not are nested deeper than %d", maxNesting))
		return nil
	}
	before := len(c.errs)
	s := &matchSet{invert: m.Invert}
	c.unsupported(path, m)
	c.networks(s, path, m.Network)
	c.ports(s, path, "port", m.Port, testPort, havePort)
	c.ports(s, path, "port_range", m.PortRange, testPort, havePort)
	c.ports(s, path, "source_port", m.SourcePort, testSourcePort, haveSourcePort)
	c.prefixes(s, path, m)
	c.domains(s, path, m)
	c.apps(s, path, m)
	c.protocols(s, path, m.Protocol)
	c.nested(s, path, m, depth)
	if len(s.conds) == 0 && len(c.errs) == before {
		c.fail(path, errors.New("no conditions: this would match every flow"))
	}
	return s
}

func (c *compiler) unsupported(path string, m *Match) {
	for _, k := range []struct {
		key   string
		given bool
	}{
		{"geoip", len(m.GeoIP) > 0},
		{"asn", len(m.ASN) > 0},
		{"interface", len(m.Interface) > 0},
		{"dscp", len(m.DSCP) > 0},
		{"time", len(m.Time) > 0},
		{"rule_set", len(m.RuleSet) > 0},
		{"protocol", len(m.Protocol) > 0 && !c.in.Sniff},
	} {
		if k.given {
			// Ignoring it would send flows somewhere else.
			c.fail(path+"."+k.key, flow.ErrNotSupported)
		}
	}
}

func (s *matchSet) add(key, value string, needs flow.Needs, test func(*flow.Flow) bool, have func(*flow.Flow) string) {
	s.conds = append(s.conds, condition{key: key, value: value, needs: needs, test: test, have: have})
}

func (c *compiler) networks(s *matchSet, path string, names []string) {
	if len(names) == 0 {
		return
	}
	s.add("network", show(names), 0, testNetwork(c.networkSet(path, names)), haveNetwork)
}

func (c *compiler) networkSet(path string, names []string) (set uint8) {
	for i, name := range names {
		n, ok := networkByName(name)
		if !ok {
			c.fail(at(path, "network", i), fmt.Errorf("%q is not one of tcp, udp, icmp", name))
		}
		set |= 1 << n
	}
	return set
}

func (c *compiler) ports(s *matchSet, path, key string, ranges []PortRange, test func(portSet) func(*flow.Flow) bool, have func(*flow.Flow) string) {
	if len(ranges) == 0 {
		return
	}
	set, i, err := newPortSet(ranges)
	if err != nil {
		c.fail(at(path, key, i), err)
		return
	}
	s.add(key, show(ranges), 0, test(set), have)
}

func (c *compiler) prefixes(s *matchSet, path string, m *Match) {
	if len(m.SourceCIDR) > 0 {
		set, bad := newPrefixSet(m.SourceCIDR)
		if bad >= 0 {
			c.fail(at(path, "source_cidr", bad), errors.New("not a valid prefix"))
		} else {
			s.add("source_cidr", show(m.SourceCIDR), 0, func(f *flow.Flow) bool { return set.Contains(f.Src.Addr().Unmap().WithZone("")) }, haveSource)
		}
	}
	if len(m.IPCIDR) > 0 {
		set, bad := newPrefixSet(m.IPCIDR)
		if bad >= 0 {
			c.fail(at(path, "ip_cidr", bad), errors.New("not a valid prefix"))
		} else {
			s.add("ip_cidr", show(m.IPCIDR), 0, func(f *flow.Flow) bool { return set.Contains(dstIP(f)) }, haveIP)
		}
	}
	if m.IPIsPrivate != nil {
		want, classes := *m.IPIsPrivate, c.class
		s.add("ip_is_private", strconv.FormatBool(want), 0, func(f *flow.Flow) bool {
			ip := dstIP(f)
			// Neither private nor public: a flow known by name only, and a fake address.
			cl := classes.of(ip)
			return cl != 0 && (cl != classPublic) == want
		}, haveIP)
	}
}

func (c *compiler) domains(s *matchSet, path string, m *Match) {
	for _, k := range []struct {
		key  string
		list []string
		add  func(*domainSet, string) error
	}{
		{"domain", m.Domain, (*domainSet).addPattern},
		{"domain_suffix", m.DomainSuffix, (*domainSet).addSuffix},
	} {
		if len(k.list) == 0 {
			continue
		}
		set := &domainSet{}
		for i, name := range k.list {
			if err := k.add(set, name); err != nil {
				c.fail(at(path, k.key, i), err)
			}
		}
		s.add(k.key, show(k.list), 0, testDomain(set), haveHost)
	}
	if len(m.DomainKeyword) > 0 {
		words := make([]string, len(m.DomainKeyword))
		for i, w := range m.DomainKeyword {
			if w == "" {
				c.fail(at(path, "domain_keyword", i), errors.New("the keyword is empty: it would match everything"))
			}
			words[i] = strings.ToLower(w)
		}
		s.add("domain_keyword", show(m.DomainKeyword), 0, testKeywords(words), haveHost)
	}
	if len(m.DomainRegex) > 0 {
		res := c.regexes(path, "domain_regex", m.DomainRegex)
		s.add("domain_regex", show(m.DomainRegex), 0, func(f *flow.Flow) bool {
			return f.Dst.Host != "" && anyRegex(res, f.Dst.Host)
		}, haveHost)
	}
}

func (c *compiler) regexes(path, key string, exprs []string) []*regexp.Regexp {
	out := make([]*regexp.Regexp, 0, len(exprs))
	for i, e := range exprs {
		re, err := compileRegex(e)
		if err != nil {
			c.fail(at(path, key, i), err)
			continue
		}
		out = append(out, re)
	}
	return out
}

func anyRegex(res []*regexp.Regexp, s string) bool {
	for _, re := range res {
		if re.MatchString(s) {
			return true
		}
	}
	return false
}

func (c *compiler) apps(s *matchSet, path string, m *Match) {
	if uids := c.users(path, m.User); len(m.User) > 0 {
		s.add("user", show(m.User), flow.NeedApp, testApp(appUID, uids), haveUID())
	}
	if len(m.UID) > 0 {
		s.add("uid", show(m.UID), flow.NeedApp, testApp(appUID, setOf(m.UID)), haveUID())
	}
	if len(m.GID) > 0 {
		s.add("gid", show(m.GID), flow.NeedApp, testApp(appGID, setOf(m.GID)), haveApp("gid", func(a *flow.App) string { return fmt.Sprint(a.GID) }))
	}
	if len(m.PID) > 0 {
		s.add("pid", show(m.PID), flow.NeedApp, testApp(appPID, setOf(m.PID)), haveApp("pid", func(a *flow.App) string { return fmt.Sprint(a.PID) }))
	}
	if len(m.Exe) > 0 {
		s.add("exe", show(m.Exe), flow.NeedApp, testApp(appExe, setOf(m.Exe)), haveApp("executable", appExe))
	}
	if len(m.Process) > 0 {
		s.add("process", show(m.Process), flow.NeedApp, testApp(appProcess, setOf(m.Process)), haveApp("process", appProcess))
	}
	haveCgroup := haveApp("cgroup", func(a *flow.App) string { return a.Cgroup })
	if len(m.Cgroup) > 0 {
		paths := make([]string, len(m.Cgroup))
		for i, p := range m.Cgroup {
			if !strings.HasPrefix(p, "/") {
				c.fail(at(path, "cgroup", i), fmt.Errorf("%q: a cgroup is a path below the cgroup mount and starts with /", p))
			}
			if paths[i] = strings.TrimRight(p, "/"); paths[i] == "" {
				paths[i] = "/"
			}
		}
		s.add("cgroup", show(m.Cgroup), flow.NeedApp, testCgroup(paths), haveCgroup)
	}
	if len(m.Unit) > 0 {
		units := make(map[string]bool, len(m.Unit))
		for i, u := range m.Unit {
			if u == "" || strings.ContainsAny(u, "/ ") {
				c.fail(at(path, "unit", i), fmt.Errorf("%q is not the name of a unit", u))
			}
			units[unitName(u)] = true
		}
		s.add("unit", show(m.Unit), flow.NeedApp, testUnit(units), haveCgroup)
	}
	if len(m.ExeRegex) > 0 {
		res := c.regexes(path, "exe_regex", m.ExeRegex)
		s.add("exe_regex", show(m.ExeRegex), flow.NeedApp, func(f *flow.Flow) bool { return anyRegex(res, f.App.Exe) }, haveApp("executable", appExe))
	}
}

func haveUID() func(*flow.Flow) string {
	return haveApp("uid", func(a *flow.App) string { return fmt.Sprint(a.UID) })
}

// users looks up user names once, at compile time.
func (c *compiler) users(path string, names []string) map[uint32]bool {
	lookup := c.in.LookupUser
	if lookup == nil {
		lookup = lookupUser
	}
	uids := make(map[uint32]bool, len(names))
	for i, name := range names {
		uid, err := lookup(name)
		if err != nil {
			c.fail(at(path, "user", i), err)
			continue
		}
		uids[uid] = true
	}
	return uids
}

func lookupUser(name string) (uint32, error) {
	u, err := user.Lookup(name)
	if err != nil {
		return 0, err
	}
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	return uint32(uid), err
}

func (c *compiler) protocols(s *matchSet, path string, names []string) {
	if len(names) == 0 {
		return
	}
	for i, name := range names {
		if name == "" || name == protocolUnknown {
			c.fail(at(path, "protocol", i), fmt.Errorf("%q is not a protocol", name))
		}
	}
	s.add("protocol", show(names), flow.NeedPayload, testProtocol(setOf(names)), haveProtocol)
}

func (c *compiler) nested(s *matchSet, path string, m *Match, depth int) {
	for _, k := range []struct {
		key  string
		list []Match
		all  bool
	}{{"and", m.And, true}, {"or", m.Or, false}, {"not", m.Not, true}} {
		if len(k.list) == 0 {
			continue
		}
		cond := condition{key: k.key, all: k.all}
		for i := range k.list {
			set := c.match(at(path, k.key, i), &k.list[i], depth+1)
			if set == nil {
				continue
			}
			if k.key == "not" {
				// None may match: all of the opposites do.
				set.invert, set.negated = !set.invert, true
			}
			cond.sets = append(cond.sets, set)
		}
		s.conds = append(s.conds, cond)
	}
}

func setOf[T comparable](list []T) map[T]bool {
	out := make(map[T]bool, len(list))
	for _, v := range list {
		out[v] = true
	}
	return out
}

// show formats a list for Explain; long lists are cut.
func show[T any](list []T) string {
	const most = 8
	var b strings.Builder
	for i, v := range list {
		if i == most {
			fmt.Fprintf(&b, " and %d more", len(list)-most)
			break
		}
		if i > 0 {
			b.WriteByte(' ')
		}
		fmt.Fprint(&b, v)
	}
	return b.String()
}
