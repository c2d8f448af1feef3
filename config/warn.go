// SPDX-License-Identifier: GPL-3.0-or-later

package config

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Warnings returns what is legal but probably not meant, with positions, in the order of the text.
func (c *Config) Warnings() []*Error {
	var out Errors
	for _, name := range slices.Sorted(maps.Keys(c.Contexts)) {
		ctx := c.Contexts[name]
		path := joinKey("$.contexts", name)
		if ctx.Mode == "disabled" {
			continue
		}
		if ctx.Mode == "global" && slices.ContainsFunc(ctx.Select, func(s Selector) bool { return len(s.Container) == 0 }) {
			out = append(out, c.errorAt(path+".select", "select has no effect in mode global, which captures everyone but containers", ""))
		}
		out = append(out, c.warnDNS(path, &ctx)...)
	}
	return out.sorted()
}

// warnDNS: without servers, an upstream that wants addresses cannot be given the flows that are known by name, which are nearly all of
// them with fake IPs.
func (c *Config) warnDNS(path string, ctx *Context) Errors {
	if ctx.DNS.Mode != "fakeip" || len(ctx.DNS.Servers) > 0 {
		return nil
	}
	out := Errors{c.errorAt(path+".dns", "no servers: queries other than for addresses fail (SERVFAIL)", "")}
	warned := make(map[string]bool)
	check := func(at, upstream string) {
		if who := c.wantsAddress(upstream, nil); who != "" && !warned[upstream] {
			warned[upstream] = true
			msg := fmt.Sprintf("%s is sent addresses, and without dns.servers names cannot be resolved: flows known by name fail", who)
			out = append(out, c.errorAt(at, msg, ""))
		}
	}
	for i := range ctx.Rules {
		check(joinIndex(path+".rules", i)+".upstream", ctx.Rules[i].Upstream)
	}
	check(path+".default", ctx.Default)
	return out
}

// wantsAddress returns the upstream that has to be sent addresses instead of names, if the name stands for one or for a pool with one.
func (c *Config) wantsAddress(name string, seen []string) string {
	if name == "direct" {
		return name
	}
	url := string(c.Upstreams[name].URL)
	for _, scheme := range []string{"socks4://", "socks5://", "direct://"} {
		if strings.HasPrefix(url, scheme) {
			return fmt.Sprintf("%s (%s)", name, scheme)
		}
	}
	if slices.Contains(seen, name) {
		return ""
	}
	for _, m := range c.Pools[name].Members {
		if who := c.wantsAddress(m, append(seen, name)); who != "" {
			return who
		}
	}
	return ""
}
