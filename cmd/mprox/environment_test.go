// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/mutex-proxy/mutex/config"
)

func lookupIn(vars map[string]string) func(string) (string, bool) {
	return func(name string) (string, bool) { v, ok := vars[name]; return v, ok }
}

func TestEnvironment(t *testing.T) {
	secret := filepath.Join(t.TempDir(), "proxy")
	if err := os.WriteFile(secret, []byte("socks5h://a:b@192.0.2.1:1080,\nhttp://192.0.2.2:3128\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	e, err := readEnvironment(lookupIn(map[string]string{
		"MPROX_PROXY_FILE": secret, "MPROX_DNS": "tcp://192.0.2.53", "MTU": "1400", "TUN": "tun7", "MPROX_INPUT_PORTS": "80, 9000-9001",
		"MPROX_ALLOW_LAN": "192.168.0.0/16", "MPROX_KILLSWITCH": "OFF", "MPROX_HTTP_LISTEN": "127.0.0.1:9464", "MPROX_LOG_LEVEL": "debug",
		"MPROX_TUN_OFFLOADS": "none", "MPROX_TUN_QUEUES": "2",
	}))
	if err != nil {
		t.Fatal(err)
	}
	g, f := newGlobals(), upFlags{}
	f.MTU = 1300 // a flag goes before the environment
	e.fill(g, &f)
	if len(f.Proxy) != 2 || f.Proxy[1] != "http://192.0.2.2:3128" || f.MTU != 1300 || f.TUN != "tun7" || g.logLevel != "debug" || len(f.DNS) != 1 {
		t.Errorf("flags: %+v", f)
	}
	cfg, err := config.FromFlags(f.OneLiner)
	if err != nil {
		t.Fatal(err)
	}
	e.over(cfg)
	c := cfg.Contexts["default"]
	if !slices.Equal(c.InputPorts, []config.PortRange{{From: 80, To: 80}, {From: 9000, To: 9001}}) || !slices.Contains(c.Bypass.Address, "192.168.0.0/16") ||
		c.OnCrash != "open" || c.OnStop != "open" || cfg.HTTP.Listen != "127.0.0.1:9464" ||
		c.TUN.Offloads != "none" || c.TUN.Queues != 2 {
		t.Errorf("configuration: %+v", c)
	}
}

func TestEnvironmentRefuses(t *testing.T) {
	for _, vars := range []map[string]string{
		{"MPROX_PROXY": "a", "MPROX_PROXY_FILE": "/b"},
		{"MPROX_PROXY_FILE": "/no/such/file"},
		{"MPROX_MTU": "big"},
		{"MPROX_INPUT_PORTS": "0"},
		{"MPROX_INPUT_PORTS": "9-8"},
		{"MPROX_INPUT_PORTS": "65536"},
		{"MPROX_ALLOW_LAN": "maybe"},
		{"MPROX_KILLSWITCH": "1"},
		{"MPROX_TUN_OFFLOADS": "some"},
		{"MPROX_TUN_QUEUES": "0"},
	} {
		if e, err := readEnvironment(lookupIn(vars)); err == nil {
			t.Errorf("%v: %+v", vars, e)
		}
	}
}
