// SPDX-License-Identifier: GPL-3.0-or-later

package daemon

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"maps"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/mutex-proxy/mutex/config"
	"github.com/mutex-proxy/mutex/dialers"
	"github.com/mutex-proxy/mutex/dns"
	"github.com/mutex-proxy/mutex/flow"
	"github.com/mutex-proxy/mutex/routing"
)

// dockerResolver is the resolver inside a container on a network of its own.
const dockerResolver = "127.0.0.11:53"

// direct is the built-in upstream that dials without a proxy.
const direct = "direct"

// upstreams is what the upstreams and pools of a configuration become. Building touches nothing but the secret files it names.
type upstreams struct {
	cfg     *config.Config
	dialers map[string]flow.Dialer // upstreams, pools and direct
	actions map[string]flow.Action // upstreams with a reject:// or drop:// URL
	log     *zap.Logger
}

// Check reports everything that is wrong with a configuration that parses: what its URLs, rules and servers mean. It is a config.Check,
// so that Load reports it together with everything else, with positions.
func Check(cfg *config.Config) []*config.Error {
	ups, err := buildUpstreams(cfg, dialers.NewNet(dialers.NetConfig{}), nil)
	errs := locate(cfg, err)
	errs = append(errs, locate(cfg, supported(cfg))...)
	for _, name := range slices.Sorted(maps.Keys(cfg.Contexts)) {
		_, err := dns.New(buildDNS(cfg, name, ups, plain, contextEnv{log: zap.NewNop()}))
		errs = append(errs, locate(cfg, atDNS(name, err))...)
		_, err = buildRules(cfg, name, ups, plain)
		errs = append(errs, locate(cfg, err)...)
		_, err = buildSelection(cfg, name)
		errs = append(errs, locate(cfg, err)...)
	}
	return errs
}

// supported refuses what the schema knows and no code does yet.
func supported(cfg *config.Config) error {
	var errs []error
	if len(cfg.Alerts) > 0 {
		errs = append(errs, &routing.PathError{Path: "$.alerts", Err: flow.ErrNotSupported})
	}
	if cfg.Audit.File != "" {
		errs = append(errs, &routing.PathError{Path: "$.audit.file", Err: flow.ErrNotSupported})
	}
	return errors.Join(errs...)
}

// buildUpstreams makes the upstreams and pools. What old has that has not changed is kept, with what it has learned and counted. With an
// error the result serves only to check the rest of the configuration.
func buildUpstreams(cfg *config.Config, net *dialers.Net, old *upstreams) (*upstreams, error) {
	u := &upstreams{cfg: cfg, dialers: make(map[string]flow.Dialer), actions: make(map[string]flow.Action), log: net.Logger()}
	var errs config.Errors
	for _, name := range slices.Sorted(maps.Keys(cfg.Upstreams)) {
		if err := u.add(name, net, old); err != nil {
			path := configPath("upstreams", name)
			if ue, ok := errors.AsType[*dialers.URLError](err); ok {
				path, err = path+".url", ue
			}
			errs = append(errs, cfg.ErrorAt(path, err, ""))
			u.dialers[name] = dialers.NewDirect(name, net) // never used: it lets the rest be checked in the same run
		}
	}
	if _, ok := u.dialers[direct]; !ok {
		if d := old.unchanged(direct, cfg); d != nil {
			u.dialers[direct] = d
		} else {
			u.dialers[direct] = dialers.NewDirect(direct, net)
		}
	}
	// Members before the pools they are in: config has made sure that there are no cycles.
	for len(u.dialers)+len(u.actions) < len(cfg.Upstreams)+len(cfg.Pools)+1 {
		before := len(u.dialers)
		for _, name := range slices.Sorted(maps.Keys(cfg.Pools)) {
			if err := u.addPool(name, old); err != nil {
				errs = append(errs, cfg.ErrorAt(configPath("pools", name), err, ""))
				u.dialers[name] = dialers.NewDirect(name, net)
			}
		}
		if len(u.dialers) == before {
			break
		}
	}
	if len(errs) > 0 {
		return u, errs
	}
	return u, nil
}

// Upstream returns an upstream or a pool of a configuration that Check accepts.
func Upstream(cfg *config.Config, name string, net *dialers.Net) (flow.Dialer, error) {
	u, err := buildUpstreams(cfg, net, nil)
	if err != nil {
		return nil, err
	}
	d, ok := u.dialers[name]
	if !ok {
		return nil, fmt.Errorf("no upstream %q in the configuration", name)
	}
	return d, nil
}

// add makes one upstream.
func (u *upstreams) add(name string, net *dialers.Net, old *upstreams) error {
	c := u.cfg.Upstreams[name]
	spec, err := dialers.ParseURL(c.URL.Reveal())
	if err != nil {
		return err
	}
	switch spec.Scheme {
	case dialers.SchemeReject:
		u.actions[name] = flow.Block
		return nil
	case dialers.SchemeDrop:
		u.actions[name] = flow.Drop
		return nil
	}
	if d := old.unchanged(name, u.cfg); d != nil {
		u.dialers[name] = d
		return nil
	}
	if spec.Weight == 0 {
		spec.Weight = c.Weight
	}
	if spec.Priority == 0 {
		spec.Priority = c.Priority
	}
	if spec.MaxFlows == 0 {
		spec.MaxFlows = c.MaxFlows
	}
	authenticate(&spec, c.Auth)
	if err := spec.ReadSecrets(); err != nil {
		return err
	}
	d, err := dialers.New(name, spec, net)
	if err != nil {
		return err
	}
	u.dialers[name] = d
	return nil
}

// authenticate puts the credentials that are not in the URL into the spec. config has read the files.
func authenticate(s *dialers.Spec, a config.Auth) {
	if a.Type != "" {
		s.Auth = a.Type
	}
	if a.Username != "" {
		s.Username, s.HasUser = a.Username, true
	}
	if a.Password != "" {
		s.Password, s.HasPassword = dialers.NewSecret(a.Password.Reveal()), true
	}
	if a.Token != "" {
		s.Token = dialers.NewSecret(a.Token.Reveal())
	}
}

// addPool makes one pool, unless a member of it is still missing.
func (u *upstreams) addPool(name string, old *upstreams) error {
	if _, done := u.dialers[name]; done {
		return nil
	}
	c := u.cfg.Pools[name]
	members := make([]flow.Dialer, 0, len(c.Members))
	for _, m := range c.Members {
		d, ok := u.dialers[m]
		if !ok {
			if _, action := u.actions[m]; action || m == "reject" || m == "drop" {
				return fmt.Errorf("member %s is an action, not a server", m)
			}
			return nil
		}
		members = append(members, d)
	}
	if d := old.unchangedPool(name, u, members); d != nil {
		u.dialers[name] = d
		return nil
	}
	pool, err := dialers.NewPool(name, c.Strategy, members, poolConfig(c, u.log))
	if err != nil {
		return err
	}
	u.dialers[name] = pool
	return nil
}

func poolConfig(c config.Pool, log *zap.Logger) dialers.PoolConfig {
	p := dialers.PoolConfig{
		Retry: c.Retry, Failures: c.Health.Passive.Failures, Eject: c.Health.Passive.Eject.D(), Log: log,
		Health: dialers.HealthConfig{Target: c.Health.Target, UDPTarget: c.Health.UDP, Interval: c.Health.Interval.D(), Timeout: c.Health.Timeout.D()},
	}
	switch c.HashBy {
	case "source":
		p.HashBy = dialers.BySource
	case "both":
		p.HashBy = dialers.ByBoth
	}
	if c.Retry == 0 {
		p.Retry = -1 // the schema's 0 is none, the pool's is the default
	}
	if d, err := time.ParseDuration(c.Hedge); err == nil {
		p.Hedge = d
	} else if percent, ok := strings.CutPrefix(c.Hedge, "p"); ok {
		p.HedgePercentile, _ = strconv.Atoi(percent) // config has checked it
	}
	return p
}

// startChecks begins the health checks of the pools. Pools that are shared with an older set have theirs running already.
func (u *upstreams) startChecks() {
	for _, d := range u.dialers {
		if p, ok := d.(*dialers.Pool); ok {
			p.Start()
		}
	}
}

// stop ends the health checks of pools and the connections kept ready of upstreams that next has not taken over, and waits for them. Flows go
// on. Both may be nil.
func (u *upstreams) stop(next *upstreams) {
	if u == nil {
		return
	}
	for name, d := range u.dialers {
		if c, ok := d.(io.Closer); ok && (next == nil || next.dialers[name] != d) {
			_ = c.Close() // never fails
		}
	}
}

// unchanged returns the upstream that old has for an unchanged configuration of it, or nil.
func (u *upstreams) unchanged(name string, cfg *config.Config) flow.Dialer {
	if u == nil || !reflect.DeepEqual(u.cfg.Upstreams[name], cfg.Upstreams[name]) {
		return nil
	}
	return u.dialers[name]
}

// unchangedPool is unchanged for pools: configuration and members are the same.
func (u *upstreams) unchangedPool(name string, next *upstreams, members []flow.Dialer) flow.Dialer {
	if u == nil || !reflect.DeepEqual(u.cfg.Pools[name], next.cfg.Pools[name]) {
		return nil
	}
	for i, m := range next.cfg.Pools[name].Members {
		if u.dialers[m] != members[i] {
			return nil
		}
	}
	return u.dialers[name]
}

// view is an upstream as one context sees it: with the context's DNS behind those that take no names.
type view func(flow.Dialer) flow.Dialer

// plain is the view of nobody: to check, and to explain.
func plain(d flow.Dialer) flow.Dialer { return d }

// find returns the dialer of a name as a context sees it, or nil for an action such as reject.
func (u *upstreams) find(name string, see view) flow.Dialer {
	d, ok := u.dialers[name]
	if !ok {
		return nil
	}
	return see(d)
}

// buildRules compiles a context's rules.
func buildRules(cfg *config.Config, name string, u *upstreams, see view) (*routing.Table, error) {
	c := cfg.Contexts[name]
	byName := make(map[string]flow.Dialer, len(u.dialers))
	for k := range u.dialers {
		byName[k] = u.find(k, see)
	}
	in := routing.Input{
		Context: name, Default: c.Default, DNS: c.DNS.Mode != "off", Upstreams: byName, Actions: u.actions,
		Bypass: routing.Bypass{Address: c.Bypass.Address, Port: portRanges(c.Bypass.Port), Network: c.Bypass.Network, Protocol: c.Bypass.Protocol, Process: c.Bypass.Process},
		Fake:   fakePrefixes(c.DNS.Fake),
	}
	var errs []error
	for i, r := range c.Rules {
		if d := u.dialers[r.Upstream]; r.FTP == "active" && d != nil && r.Upstream != direct && !dialers.Binds(d) {
			path := fmt.Sprintf("%s.rules[%d].ftp", configPath("contexts", name), i)
			errs = append(errs, &routing.PathError{Path: path, Err: fmt.Errorf("active needs an upstream that can be asked to accept connections: SOCKS, not %s", r.Upstream)})
		}
		in.Rules = append(in.Rules, routing.Rule{Match: match(r.Match), Upstream: r.Upstream, FTP: ftpMode(r.FTP), Offload: offloadOf(r.Offload)})
	}
	t, err := routing.Compile(in)
	return t, errors.Join(append(errs, err)...)
}

// offloadOf is the value of an offload key.
func offloadOf(s string) flow.Offload {
	switch s {
	case "auto":
		return flow.OffloadAuto
	case "off":
		return flow.OffloadOff
	}
	return flow.OffloadDefault
}

// match turns the schema's conditions into the router's. The two have the same fields, and a test compares them.
func ftpMode(s string) flow.FTPMode {
	switch s {
	case "active":
		return flow.FTPActive
	case "ignore":
		return flow.FTPIgnore
	}
	return flow.FTPRefuse
}

func match(m config.Match) routing.Match {
	return routing.Match{
		Domain: m.Domain, DomainSuffix: m.DomainSuffix, DomainKeyword: m.DomainKeyword, DomainRegex: m.DomainRegex,
		IPCIDR: m.IPCIDR, IPIsPrivate: m.IPIsPrivate, GeoIP: m.GeoIP, ASN: m.ASN,
		Port: portRanges(m.Port), PortRange: portRanges(m.PortRange), SourceCIDR: m.SourceCIDR, SourcePort: portRanges(m.SourcePort),
		Network: m.Network, Protocol: m.Protocol, User: m.User, UID: m.UID, GID: m.GID, PID: m.PID,
		Exe: m.Exe, ExeRegex: m.ExeRegex, Process: m.Process, Cgroup: m.Cgroup, Unit: m.Unit,
		Interface: m.Interface, DSCP: m.DSCP, Time: m.Time, RuleSet: m.RuleSet, Invert: m.Invert,
		And: matches(m.And), Or: matches(m.Or), Not: matches(m.Not),
	}
}

func matches(ms []config.Match) []routing.Match {
	var out []routing.Match
	for _, m := range ms {
		out = append(out, match(m))
	}
	return out
}

func portRanges(ps []config.PortRange) []routing.PortRange {
	var out []routing.PortRange
	for _, p := range ps {
		out = append(out, routing.PortRange(p))
	}
	return out
}

// buildDNS returns the configuration of a context's DNS module.
func buildDNS(cfg *config.Config, name string, u *upstreams, see view, env contextEnv) dns.Config {
	c := cfg.Contexts[name].DNS
	d := dns.Config{
		Context: name, Mode: dnsMode(c.Mode), Servers: c.Servers, Hosts: c.Hosts,
		Fake:  dns.FakeConfig{V4: c.Fake.V4, V6: c.Fake.V6, Exclude: c.Fake.Exclude, Path: fakePath(env.stateDir, name)},
		Cache: cache(c.Cache),
		Log:   env.log,
	}
	d.Via = u.find(cmp.Or(c.Via, cfg.Contexts[name].Default), see)
	for _, r := range c.Rules {
		rule := dns.Rule{Domain: r.Domain, DomainSuffix: r.DomainSuffix, Servers: r.Servers, Block: r.Action == "block"}
		if r.Via != "" {
			rule.Via = u.find(r.Via, see)
		}
		d.Rules = append(d.Rules, rule)
	}
	if env.docker {
		// Names without a dot are other containers'. Nobody else is asked for them, and Docker's resolver is asked for nothing else.
		d.Rules = append(d.Rules, dns.Rule{Domain: []string{"*"}, Servers: []string{"udp://" + dockerResolver}, Via: u.find(direct, see)})
		d.Fake.Exclude = append(slices.Clone(d.Fake.Exclude), "*")
	}
	return d
}

func dnsMode(s string) dns.Mode {
	switch s {
	case "real":
		return dns.ModeReal
	case "off":
		return dns.ModeOff
	}
	return dns.ModeFakeIP
}

// atDNS says where an error of the DNS module comes from.
func atDNS(name string, err error) error {
	if err == nil {
		return nil
	}
	return &routing.PathError{Path: configPath("contexts", name) + ".dns", Err: err}
}

func cache(c config.Cache) dns.CacheConfig {
	entries := c.Entries
	if entries == 0 {
		entries = -1 // the schema's 0 is none, the module's is the default
	}
	return dns.CacheConfig{Entries: entries, MinTTL: c.MinTTL.D(), MaxTTL: c.MaxTTL.D(), Stale: c.Stale.D(), Prefetch: c.Prefetch}
}

// fakePath is where a context's fake IPs are kept: fakeip.db, as documented, for the context named default.
func fakePath(stateDir, context string) string {
	switch {
	case stateDir == "":
		return ""
	case context == defaultContext:
		return filepath.Join(stateDir, "fakeip.db")
	}
	return filepath.Join(stateDir, "fakeip-"+context+".db")
}

// locate gives errors that know a JSON path their positions in the text. nil gives none.
func locate(cfg *config.Config, err error) []*config.Error {
	var out []*config.Error
	switch e := err.(type) { //nolint:errorlint // takes joined errors apart, so it must look at the outermost
	case interface{ Unwrap() []error }:
		for _, sub := range e.Unwrap() {
			out = append(out, locate(cfg, sub)...)
		}
	case nil:
	case *config.Error:
		out = append(out, e)
	case *routing.PathError:
		out = append(out, cfg.ErrorAt(e.Path, e.Err, ""))
	default:
		out = append(out, &config.Error{Msg: err.Error()})
	}
	return out
}

// configPath is the JSON path of an entry of one of the maps of the configuration.
func configPath(key, name string) string {
	if strings.ContainsAny(name, `.[]" `) {
		return fmt.Sprintf("$.%s[%q]", key, name)
	}
	return "$." + key + "." + name
}
