// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/mutex-proxy/mutex/config"
)

// maxEnvFile bounds a file named by MPROX_…_FILE: a secret, or a list of proxies.
const maxEnvFile = 64 << 10

// environment is what `mprox up` takes from MPROX_…, for containers. Flags go before it.
type environment struct {
	config, logLevel, httpListen string
	proxy, dns, bypass           []string
	tun                          string
	mtu                          int
	tunOffloads                  string // "" = as configured
	tunQueues                    int    // 0 = as configured
	inputPorts                   []config.PortRange
	allowLAN                     []string
	killswitch                   string // "", on, off
}

// readEnvironment reads the variables, each also as NAME_FILE: a file whose text, without the last line feed, is the value.
func readEnvironment(lookup func(string) (string, bool)) (environment, error) {
	var e environment
	var errs []error
	get := func(names ...string) string {
		for _, name := range names {
			value, err := envValue(lookup, name)
			errs = append(errs, err)
			if value != "" {
				return value
			}
		}
		return ""
	}
	e.config, e.logLevel, e.httpListen = get("MPROX_CONFIG"), get("MPROX_LOG_LEVEL"), get("MPROX_HTTP_LISTEN")
	e.proxy, e.dns, e.bypass = splitList(get("MPROX_PROXY", "PROXY")), splitList(get("MPROX_DNS")), splitList(get("MPROX_BYPASS"))
	e.tun = get("MPROX_TUN", "TUN")
	if text := get("MPROX_MTU", "MTU"); text != "" {
		n, err := strconv.Atoi(text)
		if err != nil {
			errs = append(errs, usageError("MTU %q is not a number", text))
		}
		e.mtu = n
	}
	switch e.tunOffloads = get("MPROX_TUN_OFFLOADS"); e.tunOffloads {
	case "", "auto", "no-uso", "none", "no-header":
	default:
		errs = append(errs, usageError("MPROX_TUN_OFFLOADS: %q is none of auto, no-uso, none, no-header", e.tunOffloads))
	}
	if text := get("MPROX_TUN_QUEUES"); text != "" {
		n, err := strconv.Atoi(text)
		if err != nil || n < 1 || n > 16 {
			errs = append(errs, usageError("MPROX_TUN_QUEUES: %q is not a number from 1 to 16", text))
		}
		e.tunQueues = n
	}
	for _, text := range splitList(get("MPROX_INPUT_PORTS")) {
		r, err := parsePorts(text)
		if err != nil {
			errs = append(errs, usageError("MPROX_INPUT_PORTS: %w", err))
		}
		e.inputPorts = append(e.inputPorts, r)
	}
	switch lan := get("MPROX_ALLOW_LAN"); strings.ToLower(lan) {
	case "", "off", "false", "no", "0":
	case "on", "true", "yes", "1":
		e.allowLAN = []string{"10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/8"}
	default:
		for _, p := range splitList(lan) {
			if _, err := netip.ParsePrefix(p); err != nil {
				errs = append(errs, usageError("MPROX_ALLOW_LAN: %q is neither on, off nor a prefix such as 192.168.0.0/16", p))
			}
			e.allowLAN = append(e.allowLAN, p)
		}
	}
	switch e.killswitch = strings.ToLower(get("MPROX_KILLSWITCH")); e.killswitch {
	case "", "on", "off":
	default:
		errs = append(errs, usageError("MPROX_KILLSWITCH: %q is neither on nor off", e.killswitch))
	}
	return e, errors.Join(errs...)
}

func envValue(lookup func(string) (string, bool), name string) (string, error) {
	value, given := lookup(name)
	file, fromFile := lookup(name + "_FILE")
	switch {
	case given && value != "" && fromFile && file != "":
		return "", usageError("%s and %s_FILE are both given", name, name)
	case !fromFile || file == "":
		return strings.TrimSpace(value), nil
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return "", exitError{exitConfig, fmt.Errorf("%s_FILE: %w", name, err)}
	}
	if len(b) > maxEnvFile {
		return "", exitError{exitConfig, fmt.Errorf("%s_FILE: %s is larger than %d KiB", name, file, maxEnvFile>>10)}
	}
	return strings.TrimSpace(string(b)), nil
}

// splitList splits at commas and line feeds.
func splitList(s string) []string {
	var out []string
	for item := range strings.FieldsFuncSeq(s, func(r rune) bool { return r == ',' || r == '\n' }) {
		if item = strings.TrimSpace(item); item != "" {
			out = append(out, item)
		}
	}
	return out
}

// parsePorts reads 443 or 6881-6889.
func parsePorts(s string) (config.PortRange, error) {
	from, to, ranged := strings.Cut(s, "-")
	if !ranged {
		to = from
	}
	a, err1 := strconv.ParseUint(from, 10, 16)
	b, err2 := strconv.ParseUint(to, 10, 16)
	if err1 != nil || err2 != nil || a == 0 || a > b {
		return config.PortRange{}, fmt.Errorf("%q is neither a port nor a range such as 6881-6889", s)
	}
	return config.PortRange{From: uint16(a), To: uint16(b)}, nil
}

// fill puts what the environment says where no flag says anything.
func (e *environment) fill(g *globals, f *upFlags) {
	if len(f.Proxy) == 0 && !g.configGiven {
		f.Proxy = e.proxy
		if e.config != "" {
			g.config, g.configGiven, f.Proxy = e.config, true, nil
		}
	}
	if g.logLevel == "" {
		g.logLevel = e.logLevel
	}
	if len(f.Proxy) == 0 {
		return
	}
	if len(f.DNS) == 0 {
		f.DNS = e.dns
	}
	if len(f.Bypass) == 0 {
		f.Bypass = e.bypass
	}
	if f.TUN == "" {
		f.TUN = e.tun
	}
	if f.MTU == 0 {
		f.MTU = e.mtu
	}
}

// over changes a configuration, of a file or of flags, as the environment says.
func (e *environment) over(cfg *config.Config) {
	if e.httpListen != "" {
		cfg.HTTP.Listen = e.httpListen
	}
	for name, c := range cfg.Contexts {
		c.Bypass.Address = append(slices.Clip(c.Bypass.Address), e.allowLAN...)
		if len(e.inputPorts) > 0 {
			c.InputPorts = e.inputPorts
		}
		switch e.killswitch {
		case "on":
			c.OnCrash, c.OnStop = "block", "block"
		case "off":
			c.OnCrash, c.OnStop = "open", "open"
		}
		if e.tunOffloads != "" {
			c.TUN.Offloads = e.tunOffloads
		}
		if e.tunQueues != 0 {
			c.TUN.Queues = e.tunQueues
		}
		cfg.Contexts[name] = c
	}
}
