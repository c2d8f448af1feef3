// SPDX-License-Identifier: GPL-3.0-or-later

package config

import (
	"errors"
	"fmt"
	"hash/fnv"
	"maps"
	"math"
	"net/netip"
	"net/url"
	"reflect"
	"regexp"
	"slices"
	"strings"
)

// addressClasses are what bypass.address accepts beside addresses.
func addressClasses() []string {
	return []string{"local", "private", "link-local", "multicast", "loopback", "public"}
}

// nameDevices gives each context without tun.name its default. It depends on the context's name alone, so that adding a context renames
// no device.
func (c *Config) nameDevices() {
	for name, ctx := range c.Contexts {
		if ctx.TUN.Name == "" {
			ctx.TUN.Name = defaultDevice(name)
			c.Contexts[name] = ctx
		}
	}
}

func defaultDevice(context string) string {
	if context == "default" {
		return "mprox0"
	}
	if dev := "mprox-" + context; len(dev) <= maxIfName {
		return dev
	}
	h := fnv.New32a()
	_, _ = h.Write([]byte(context)) // a hash never fails
	return fmt.Sprintf("mprox-%08x", h.Sum32())
}

func (v *validator) contexts() {
	c := v.c
	switch n := len(c.Contexts); {
	case n == 0:
		v.add("$.contexts", "there is no context: nothing would be captured")
	case n > MaxContexts:
		v.add("$.contexts", "%d contexts are too many: the marks suffice for %d", n, MaxContexts)
	}
	devices := make(map[string]string)
	global := ""
	for _, name := range slices.Sorted(maps.Keys(c.Contexts)) {
		ctx := c.Contexts[name]
		path := joinKey("$.contexts", name)
		v.name(path, name)
		if ctx.Mode == "global" {
			if global != "" {
				v.add(path+".mode", "context %q is global already: there can be only one", global)
			}
			global = name
		}
		v.device(path+".tun.name", ctx.TUN.Name)
		if other, taken := devices[ctx.TUN.Name]; taken {
			v.add(path+".tun.name", "context %q has a device named %q too", other, ctx.TUN.Name)
		}
		devices[ctx.TUN.Name] = name
		v.context(path, &ctx)
	}
}

// device checks the name of a network interface, by the rules of dev_valid_name in the kernel's net/core/dev.c.
func (v *validator) device(path, name string) {
	switch {
	case len(name) > maxIfName:
		v.add(path, "%q has %d bytes, the name of a device at most %d", name, len(name), maxIfName)
	case name == "." || name == ".." || strings.ContainsAny(name, "/: \t\n\v\f\r%"):
		v.add(path, "%q is not a valid name of a device", name)
	}
}

func (v *validator) context(path string, ctx *Context) {
	v.target(path, "default", ctx.Default)
	for i := range ctx.Select {
		v.selector(joinIndex(path+".select", i), &ctx.Select[i], ctx.Mode)
	}
	for i := range ctx.Exclude {
		v.selector(joinIndex(path+".exclude", i), &ctx.Exclude[i], ctx.Mode)
	}
	for i, a := range ctx.Bypass.Address {
		v.bypassAddress(joinIndex(path+".bypass.address", i), a, &ctx.DNS.Fake)
	}
	for i := range ctx.Rules {
		r, at := &ctx.Rules[i], joinIndex(path+".rules", i)
		v.match(at, &r.Match)
		v.target(at, "upstream", r.Upstream)
	}
	v.dns(path+".dns", &ctx.DNS)
}

// target checks the upstream that flows are sent to.
func (v *validator) target(path, key, name string) {
	switch {
	case name != "":
		v.ref(path+"."+key, name, "direct", "reject", "drop")
	case v.given(path, key):
		v.add(path+"."+key, "no upstream is given")
	}
}

func (v *validator) selector(path string, s *Selector, mode string) {
	local := len(s.PID) + len(s.UID) + len(s.User) + len(s.GID) + len(s.Exe) + len(s.Cgroup) + len(s.Unit)
	remote := len(s.Interface) + len(s.SourceCIDR)
	v.emptyLists(path, reflect.ValueOf(*s))
	for i, name := range s.Container {
		if name == "" || strings.ContainsFunc(name, notContainerRune) {
			v.add(joinIndex(path+".container", i), "%q is not the name of a container: letters, digits, _ . and -", name)
		}
	}
	switch {
	case len(s.Container) > 0 && mode == "gateway":
		v.add(path, "mode gateway selects by interface and source_cidr: give the interface of the containers' network")
	case len(s.Container) > 0 && local+remote > 0:
		v.add(path, "container stands alone in its entry: users and executables of a container are its own")
	case len(s.Container) > 0:
	case local+remote == 0:
		v.add(path, "nothing is given that selects anyone")
	case mode == "gateway" && local > 0:
		v.add(path, "mode gateway selects by interface and source_cidr: processes of other hosts are not known")
	case mode != "gateway" && remote > 0:
		v.add(path, "interface and source_cidr select in mode gateway only")
	}
	for i, e := range s.Exe {
		v.absolute(joinIndex(path+".exe", i), e)
	}
	for i, g := range s.Cgroup {
		if !strings.HasPrefix(g, "/") {
			v.add(joinIndex(path+".cgroup", i), "%q does not start with /", g)
		} else if slices.Contains(strings.Split(g, "/"), "..") {
			v.add(joinIndex(path+".cgroup", i), "%q leads out of the tree of cgroups", g)
		}
	}
	// The kernel's "no change" (uid_t -1): nobody's.
	for i, u := range s.UID {
		if u == math.MaxUint32 {
			v.add(joinIndex(path+".uid", i), "%d is nobody's user ID", u)
		}
	}
	for i, g := range s.GID {
		if g == math.MaxUint32 {
			v.add(joinIndex(path+".gid", i), "%d is nobody's group ID", g)
		}
	}
	for i, name := range s.Interface {
		v.device(joinIndex(path+".interface", i), name)
	}
}

func notContainerRune(r rune) bool {
	return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '_' && r != '.' && r != '-'
}

func (v *validator) bypassAddress(path, a string, fake *Fake) {
	if slices.Contains(addressClasses(), a) {
		return
	}
	p, err := parsePrefix(a)
	switch {
	case err != nil && strings.ContainsAny(a, "./:"):
		hint := ""
		if h, ok := errors.AsType[*hinted](err); ok {
			hint = h.hint
		}
		v.addHint(path, hint, "%v", err)
	case err != nil:
		v.addHint(path, nearest(a, addressClasses()), "%q is not an address, a CIDR, or one of: %s", a, strings.Join(addressClasses(), ", "))
	case p.Overlaps(fake.V4) || p.Overlaps(fake.V6):
		v.add(path, "%s overlaps the fake range %s: names would lead nowhere", p, overlapping(p, fake))
	}
}

func overlapping(p netip.Prefix, fake *Fake) netip.Prefix {
	if p.Overlaps(fake.V4) {
		return fake.V4
	}
	return fake.V6
}

// emptyLists reports every list of the struct that is given without a member.
func (v *validator) emptyLists(path string, s reflect.Value) {
	for _, f := range fieldsOf(s.Type()) {
		if fv := s.FieldByIndex(f.index); fv.Kind() == reflect.Slice && !fv.IsNil() && fv.Len() == 0 {
			v.add(path+"."+f.key, "the list is empty: nothing would match")
		}
	}
}

// match checks what is not routing's to check: routing compiles the conditions themselves.
func (v *validator) match(path string, m *Match) {
	v.emptyLists(path, reflect.ValueOf(*m))
	for i, e := range m.DomainRegex {
		v.regex(joinIndex(path+".domain_regex", i), e)
	}
	for i, e := range m.ExeRegex {
		v.regex(joinIndex(path+".exe_regex", i), e)
	}
	for i, f := range m.RuleSet {
		v.absolute(joinIndex(path+".rule_set", i), f)
	}
	for _, k := range []struct {
		key  string
		list []Match
	}{{"and", m.And}, {"or", m.Or}, {"not", m.Not}} {
		for i := range k.list {
			v.match(joinIndex(path+"."+k.key, i), &k.list[i])
		}
	}
}

func (v *validator) regex(path, expr string) {
	if _, err := regexp.Compile(expr); err != nil {
		v.add(path, "%s", strings.TrimPrefix(err.Error(), "error parsing regexp: "))
	}
}

func (v *validator) dns(path string, d *DNS) {
	v.servers(path+".servers", d.Servers)
	if d.Mode == "real" && len(d.Servers) == 0 {
		v.add(path, "mode real needs servers to ask")
	}
	if d.Via != "" {
		v.ref(path+".via", d.Via, "direct")
	}
	for i := range d.Rules {
		r, at := &d.Rules[i], joinIndex(path+".rules", i)
		v.emptyLists(at, reflect.ValueOf(*r))
		v.servers(at+".servers", r.Servers)
		if r.Via != "" {
			v.ref(at+".via", r.Via, "direct")
		}
		switch {
		case len(r.Domain)+len(r.DomainSuffix) == 0:
			v.add(at, "domain or domain_suffix is missing: this would match every name")
		case r.Action == "" && len(r.Servers) == 0 && r.Via == "":
			v.add(at, "servers, via or action is missing")
		case r.Action != "" && (len(r.Servers) > 0 || r.Via != ""):
			v.add(at, "action %s asks no servers", r.Action)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(d.Hosts)) {
		v.empty(path+".hosts", name, true, len(d.Hosts[name]))
		if strings.ContainsAny(name, "*/: ") || strings.Trim(name, ".") == "" || len(name) > 253 {
			v.addKey(joinKey(path+".hosts", name), "%q is not a name", name)
		}
	}
	v.fakeRange(path+".fake.v4", d.Fake.V4, true, 8, 28)
	v.fakeRange(path+".fake.v6", d.Fake.V6, false, 32, 112)
	if d.Cache.MinTTL > d.Cache.MaxTTL {
		v.add(path+".cache.min_ttl", "%s is longer than max_ttl, which is %s", d.Cache.MinTTL, d.Cache.MaxTTL)
	}
}

func (v *validator) servers(path string, servers []string) {
	for i, s := range servers {
		if err := checkServer(s); err != nil {
			v.add(joinIndex(path, i), "%v", err)
		}
	}
}

// checkServer checks the address of a DNS server: an address, or a URL with one of the schemes below.
func checkServer(s string) error {
	if _, err := netip.ParseAddr(s); err == nil {
		return nil
	}
	if _, err := netip.ParseAddrPort(s); err == nil {
		return nil
	}
	u, err := url.Parse(s)
	switch {
	case err != nil || u.Host == "":
		return fmt.Errorf("%q is not an address or a URL such as tcp://192.0.2.53, https://192.0.2.53/dns-query", s)
	case !slices.Contains([]string{"udp", "tcp", "tls", "https"}, u.Scheme):
		return &hinted{fmt.Sprintf("%q: want udp://, tcp://, tls:// or https://", s), ""}
	case u.User != nil:
		return fmt.Errorf("a DNS server takes no credentials")
	case u.Hostname() == "":
		return fmt.Errorf("%q: the host is empty", s)
	case u.Scheme != "https" && (strings.Trim(u.Path, "/") != "" || u.RawQuery != ""):
		return fmt.Errorf("%q: only https:// takes a path", s)
	}
	if p := u.Port(); p != "" {
		_, err = parsePort(p)
	}
	return err
}

// fakeRange checks the range of fake addresses: large enough to be useful, small enough for the kernel's routes, and not an address range
// that means something else on every machine.
func (v *validator) fakeRange(path string, p netip.Prefix, is4 bool, minBits, maxBits int) {
	family := map[bool]string{true: "IPv4", false: "IPv6"}[is4]
	switch {
	case !p.IsValid():
		v.add(path, "the %s range is missing", family)
	case p.Addr().Is4() != is4:
		v.add(path, "%s is not an %s range", p, family)
	case p.Bits() < minBits || p.Bits() > maxBits:
		v.add(path, "%s is not between /%d and /%d", p, minBits, maxBits)
	default:
		for _, used := range []string{"0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3", "::/96", "::ffff:0:0/96", "fe80::/10", "ff00::/8"} {
			if netip.MustParsePrefix(used).Overlaps(p) {
				v.add(path, "%s overlaps %s, which has a meaning of its own", p, used)
			}
		}
	}
}
