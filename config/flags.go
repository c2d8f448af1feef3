// SPDX-License-Identifier: GPL-3.0-or-later

package config

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// poolName is the pool that several --proxy make.
const poolName = "proxies"

// OneLiner is what the flags of `mprox up` and `mprox run` can say without a file. The zero value of a field means its default.
type OneLiner struct {
	Proxy    []string // proxy URLs; several are a pool
	Mode     string   // global, process, cgroup ...
	DNS      []string // servers; or a mode: fakeip, real, off. Commas separate.
	Bypass   []string // addresses, CIDRs, classes; ports; networks. Commas separate.
	TUN      string
	MTU      int
	Strategy string // of the pool
}

// FromFlags returns the configuration that the flags stand for: one context named default. The error is an Errors whose paths are flags.
func FromFlags(o OneLiner, checks ...Check) (*Config, error) {
	if len(o.Proxy) == 0 {
		return nil, Errors{{Path: "--proxy", Msg: "no proxy is given, such as socks5h://user:password@host:1080"}}
	}
	if o.Strategy != "" && len(o.Proxy) == 1 {
		return nil, Errors{{Path: "--strategy", Msg: "a strategy chooses between proxies: give --proxy more than once"}}
	}
	names := make([]string, len(o.Proxy))
	for i, p := range o.Proxy {
		names[i] = proxyName(p, i, len(o.Proxy))
		if slices.Index(names, names[i]) < i || names[i] == poolName {
			return nil, Errors{{Path: "--proxy", Msg: fmt.Sprintf("the name %q is used twice", names[i])}}
		}
	}
	data, err := json.Marshal(o.document(names))
	if err != nil {
		return nil, err
	}
	flagged := func(c *Config) *Config {
		c.tree, c.flags = nil, true
		return c
	}
	late := make([]Check, len(checks))
	for i, check := range checks {
		late[i] = func(c *Config) []*Error { return check(flagged(c)) }
	}
	noEnv := func(string) (string, bool) { return "", false }
	c, err := parse("", data, noEnv, late)
	if err == nil {
		return flagged(c), nil
	}
	var errs Errors
	if !errors.As(err, &errs) {
		return nil, err
	}
	for _, e := range errs {
		e.Line, e.Column, e.Path = 0, 0, flagOf(e.Path)
	}
	return nil, errs
}

// OnRequest returns the configuration of a daemon that captures nothing until it is asked for a lease: every default and no context,
// which a file must have.
func OnRequest() *Config {
	tree, _ := parseTree(newSource("", []byte("{}")))
	c, _ := decode(tree, func(string) (string, bool) { return "", false })
	c.tree, c.flags = nil, true
	return c
}

// document is the configuration file that says the same as the flags.
func (o OneLiner) document(names []string) map[string]any {
	// The shell has expanded what it should: ${ is text here.
	literal := func(s string) string { return strings.ReplaceAll(s, "${", "$${") }
	literals := func(list []string) []string {
		out := []string{}
		for _, item := range list {
			for s := range strings.SplitSeq(item, ",") {
				if s = strings.TrimSpace(s); s != "" {
					out = append(out, literal(s))
				}
			}
		}
		return out
	}
	upstreams := make(map[string]any)
	for i, p := range o.Proxy {
		upstreams[names[i]] = map[string]any{"url": literal(p)}
	}
	doc := map[string]any{"upstreams": upstreams}
	context := map[string]any{"default": names[0]}
	if len(names) > 1 {
		pool := map[string]any{"members": names}
		if o.Strategy != "" {
			pool["strategy"] = literal(o.Strategy)
		}
		doc["pools"] = map[string]any{poolName: pool}
		context["default"] = poolName
	}
	if o.Mode != "" {
		context["mode"] = literal(o.Mode)
	}
	tun := map[string]any{}
	if o.TUN != "" {
		tun["name"] = literal(o.TUN)
	}
	if o.MTU != 0 {
		tun["mtu"] = o.MTU
	}
	context["tun"] = tun
	context["dns"] = dnsDocument(literals(o.DNS))
	context["bypass"] = bypassDocument(literals(o.Bypass))
	doc["contexts"] = map[string]any{"default": context}
	return doc
}

func dnsDocument(values []string) map[string]any {
	dns := map[string]any{}
	servers := []string{}
	for _, s := range values {
		if s == "fakeip" || s == "real" || s == "off" {
			dns["mode"] = s
			continue
		}
		servers = append(servers, s)
	}
	dns["servers"] = servers
	return dns
}

func bypassDocument(values []string) map[string]any {
	address, ports, networks := []string{}, []string{}, []string{}
	for _, s := range values {
		switch {
		case s == "tcp" || s == "udp" || s == "icmp":
			networks = append(networks, s)
		case isPorts(s):
			ports = append(ports, s)
		default:
			address = append(address, s)
		}
	}
	return map[string]any{"address": address, "port": ports, "network": networks}
}

// isPorts reports whether the text is a port or a range of ports, right or wrong.
func isPorts(s string) bool {
	ok, err := regexp.MatchString(`^[0-9]+(-[0-9]+)?$`, s)
	return ok && err == nil
}

// proxyName returns the name that the URL gives itself (?name=), or proxy, or proxy1, proxy2 ...
func proxyName(raw string, i, of int) string {
	if _, query, ok := strings.Cut(raw[strings.LastIndexByte(raw, '@')+1:], "?"); ok {
		if values, err := url.ParseQuery(query); err == nil && values.Get("name") != "" {
			return values.Get("name")
		}
	}
	if of == 1 {
		return "proxy"
	}
	return "proxy" + strconv.Itoa(i+1)
}

// flagOf returns the flag that a path of the one-liner's document comes from.
func flagOf(path string) string {
	for _, f := range []struct{ prefix, flag string }{
		{"$.upstreams", "--proxy"},
		{"$.pools", "--strategy"},
		{"$.contexts.default.mode", "--mode"},
		{"$.contexts.default.dns", "--dns"},
		{"$.contexts.default.bypass", "--bypass"},
		{"$.contexts.default.tun.name", "--tun"},
		{"$.contexts.default.tun.mtu", "--mtu"},
		{"$.contexts.default.default", "--proxy"},
	} {
		if strings.HasPrefix(path, f.prefix) {
			return f.flag
		}
	}
	return path
}
