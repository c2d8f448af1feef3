// SPDX-License-Identifier: GPL-3.0-or-later

package daemon

import (
	"errors"
	"net/netip"
	"reflect"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"go.uber.org/zap"

	"github.com/mutex-proxy/mutex/config"
	"github.com/mutex-proxy/mutex/dialers"
	"github.com/mutex-proxy/mutex/flow"
	"github.com/mutex-proxy/mutex/policy"
	"github.com/mutex-proxy/mutex/routing"
)

// A condition that the schema has and the conversion forgets would be a rule that matches more than it says.
func TestMatchConvertsEveryField(t *testing.T) {
	var m config.Match
	fill(reflect.ValueOf(&m).Elem(), 2)
	got := reflect.ValueOf(match(m))
	for i := range got.NumField() {
		if got.Field(i).IsZero() {
			t.Errorf("%s is not converted", got.Type().Field(i).Name)
		}
	}
	if have, want := reflect.TypeFor[config.Match]().NumField(), reflect.TypeFor[routing.Match]().NumField(); have != want {
		t.Errorf("the schema has %d conditions, the router %d", have, want)
	}
}

// fill gives every field a value other than its zero, nested ones down to depth.
func fill(v reflect.Value, depth int) {
	switch v.Kind() {
	case reflect.Struct:
		for _, f := range v.Fields() {
			if f.CanSet() {
				fill(f, depth)
			}
		}
	case reflect.Slice:
		if depth > 0 {
			v.Set(reflect.MakeSlice(v.Type(), 1, 1))
			fill(v.Index(0), depth-1)
		}
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
	case reflect.String:
		v.SetString("x")
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Int, reflect.Int64:
		v.SetInt(7)
	case reflect.Uint16, reflect.Uint32:
		v.SetUint(7)
	}
}

func TestCheckSaysWhere(t *testing.T) {
	text := `{
  "upstreams": {
    "good": { "url": "socks5h://192.0.2.1:1080" },
    "bad":  { "url": "gopher://192.0.2.1" }
  },
  "contexts": { "default": { "default": "good" } }
}`
	_, err := config.Parse("test.json", []byte(text), Check)
	if err == nil || !strings.Contains(err.Error(), "test.json:4:") || !strings.Contains(err.Error(), "$.upstreams.bad.url") {
		t.Errorf("got %v, want the position of the bad url", err)
	}
}

func TestCheckRefusesKeysWithoutCode(t *testing.T) {
	for _, tt := range []struct{ name, context, path string }{
		{"rule", `"rules": { "geoip": "de", "upstream": "direct" }`, "$.contexts.default.rules[0].geoip"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			text := `{ "upstreams": { "p": { "url": "socks5h://192.0.2.1" } }, "contexts": { "default": { "default": "p", ` + tt.context + ` } } }`
			_, err := config.Parse("test.json", []byte(text), Check)
			if err == nil || !strings.Contains(err.Error(), tt.path) || !strings.Contains(err.Error(), "not supported yet") {
				t.Errorf("got %v, want %s: not supported yet", err, tt.path)
			}
		})
	}
}

// Active-mode FTP is refused where the upstream can never serve it, with the place.
func TestCheckActiveFTP(t *testing.T) {
	for upstream, ok := range map[string]bool{"socks": true, "auto": true, "mixed": true, "outer": true, "direct": true, "http": false, "https": false} {
		text := `{ "upstreams": { "socks": { "url": "socks5h://192.0.2.1" }, "auto": { "url": "auto://192.0.2.1" }, "http": { "url": "http://192.0.2.1" }, "h2": { "url": "https://192.0.2.1" } },
			"pools": { "mixed": { "members": ["http", "socks"] }, "outer": { "members": ["https", "mixed"] }, "https": { "members": "h2" } },
			"contexts": { "default": { "default": "socks", "rules": [{ "port": 21, "upstream": "` + upstream + `", "ftp": "active" }] } } }`
		_, err := config.Parse("test.json", []byte(text), Check)
		if ok && err != nil || !ok && (err == nil || !strings.Contains(err.Error(), "$.contexts.default.rules[0].ftp")) {
			t.Errorf("%s: %v", upstream, err)
		}
	}
}

// What a configuration says about pools reaches them.
func TestPoolConfiguration(t *testing.T) {
	cfg, err := config.Parse("test.json", []byte(`{
		"upstreams": { "a": { "url": "socks5h://192.0.2.1", "weight": 3, "priority": 7 }, "b": { "url": "socks5h://192.0.2.2?weight=5", "weight": 2 } },
		"pools": { "p": { "members": ["a", "b"], "strategy": "hash", "hash_by": "both", "hedge": "p95", "retry": 0,
			"health": { "target": "https://example.com/up", "interval": "7s", "timeout": "2s", "passive": { "failures": 4, "eject": "9s" } } } },
		"contexts": { "default": { "default": "p" } } }`), Check)
	if err != nil {
		t.Fatal(err)
	}
	got := poolConfig(cfg.Pools["p"], nil)
	want := dialers.PoolConfig{
		Retry: -1, Failures: 4, Eject: 9 * time.Second, HedgePercentile: 95, HashBy: dialers.ByBoth,
		Health: dialers.HealthConfig{Target: "https://example.com/up", Interval: 7 * time.Second, Timeout: 2 * time.Second},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
	u, err := buildUpstreams(cfg, dialers.NewNet(dialers.NetConfig{}), nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string][2]int{"a": {3, 7}, "b": {5, 0}} {
		s := u.dialers[name].(interface{ Spec() dialers.Spec }).Spec()
		if s.Weight != want[0] || s.Priority != want[1] {
			t.Errorf("%s: weight %d, priority %d, want %v", name, s.Weight, s.Priority, want)
		}
	}
	u.startChecks()
	u.stop(u) // taken over: they go on
	u.stop(nil)
	_, err = config.Parse("test.json", []byte(`{
		"upstreams": { "a": { "url": "socks5://192.0.2.1" } }, "pools": { "p": { "members": "a", "health": { "target": "example.com:443" } } },
		"contexts": { "default": { "default": "p", "dns": { "servers": "tcp://192.0.2.53" } } } }`), Check)
	if err == nil || !strings.Contains(err.Error(), "$.pools.p: ") || !strings.Contains(err.Error(), "takes no names") {
		t.Errorf("a target that a member cannot resolve: %v", err)
	}
}

func TestReloadKeepsUnchangedUpstreams(t *testing.T) {
	parse := func(second string) *config.Config {
		t.Helper()
		cfg, err := config.Parse("test.json", []byte(`{
			"upstreams": { "a": { "url": "socks5h://192.0.2.1" }, "b": { "url": "`+second+`" } },
			"pools": { "p": { "members": ["a", "b"] }, "q": { "members": ["a", "p"] } },
			"contexts": { "default": { "default": "q" } } }`), Check)
		if err != nil {
			t.Fatal(err)
		}
		return cfg
	}
	net := dialers.NewNet(dialers.NetConfig{})
	old, err := buildUpstreams(parse("http://192.0.2.2"), net, nil)
	if err != nil {
		t.Fatal(err)
	}
	same, err := buildUpstreams(parse("http://192.0.2.2"), net, old)
	if err != nil {
		t.Fatal(err)
	}
	for name, d := range old.dialers {
		if same.dialers[name] != d {
			t.Errorf("%s was made anew though nothing changed", name)
		}
	}
	changed, err := buildUpstreams(parse("http://192.0.2.3"), net, old)
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]bool{"a": true, "direct": true, "b": false, "p": false, "q": false} {
		if kept := changed.dialers[name] == old.dialers[name]; kept != want {
			t.Errorf("%s kept: %v, want %v", name, kept, want)
		}
	}
}

func TestCheckFindsEverythingAtOnce(t *testing.T) {
	text := `{
  "upstreams": { "bad": { "url": "gopher://192.0.2.1" }, "old": { "url": "http://192.0.2.1?udp=maybe" } },
  "pools": { "p": { "members": ["old", "bad", "reject"] } },
  "contexts": { "default": { "default": "p", "rules": [ { "asn": 64496, "upstream": "bad" } ] } }
}`
	_, err := config.Parse("test.json", []byte(text), Check)
	if err == nil {
		t.Fatal("no error")
	}
	for _, want := range []string{"$.upstreams.bad.url", "$.upstreams.old.url", "$.pools.p", "$.contexts.default.rules[0].asn"} {
		if !strings.Contains(err.Error(), want+":") {
			t.Errorf("%s is not among the errors:\n%v", want, err)
		}
	}
}

// Templates may use what is not supported yet, but nothing in them may be wrong.
func TestTemplatesPass(t *testing.T) {
	for _, name := range config.TemplateNames() {
		data, err := config.Template(name)
		if err != nil {
			t.Fatal(err)
		}
		cfg, err := config.Parse(name+".json", data)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range Check(cfg) {
			if !errors.Is(e, flow.ErrNotSupported) {
				t.Errorf("%s: %v", name, e)
			}
		}
	}
}

// What a configuration says about who is captured reaches the kernel's plan.
func TestSelection(t *testing.T) {
	for _, tt := range []struct {
		name, context string
		want          selection
		err           string
	}{
		{
			"all keys", `"mode": "process", "select": [ { "uid": [1, 2], "gid": 3 }, { "cgroup": "/a", "unit": "web-*.service" } ], "exclude": { "user": "root" }`,
			selection{
				chosen:   []policy.Selector{{UIDs: []uint32{1, 2}, GIDs: []uint32{3}}, {Cgroups: []string{"/a"}, Units: []string{"web-*.service"}}},
				excluded: []policy.Selector{{UIDs: []uint32{0}}},
			},
			"",
		},
		{"global", `"mode": "global", "select": { "uid": 1 }, "exclude": { "gid": 4 }`, selection{excluded: []policy.Selector{{GIDs: []uint32{4}}}}, ""},
		{"user and uid", `"mode": "cgroup", "select": { "user": "root", "uid": [0, 7] }`, selection{chosen: []policy.Selector{{UIDs: []uint32{0}}}}, ""},
		{"nobody", `"mode": "cgroup", "select": { "user": "root", "uid": 7 }`, selection{}, "nobody would match"},
		{"pid", `"mode": "process", "select": { "pid": [42, 43] }`, selection{chosen: []policy.Selector{{PIDs: []int{42, 43}}}}, ""},
		{"everybody", `"exclude": { "pid": 1 }`, selection{}, "mode global"},
		{
			"gateway", `"mode": "gateway", "select": { "interface": "eth1", "source_cidr": "192.168.50.0/24" }`,
			selection{chosen: []policy.Selector{{Interfaces: []string{"eth1"}, Sources: []netip.Prefix{netip.MustParsePrefix("192.168.50.0/24")}}}},
			"",
		},
		{"session of an executable", `"mode": "process", "select": { "exe": "/bin/x", "scope": "session" }`, selection{}, "select[0].scope: session goes with pid"},
		{"group of an executable", `"mode": "process", "select": { "exe": "/bin/x", "scope": "group" }`, selection{}, "with exe say tree or current"},
		{"gateway of nobody", `"mode": "gateway"`, selection{}, "select is missing"},
		{"unknown user", `"mode": "cgroup", "select": { "user": ["root", "no-such-user"] }`, selection{}, "select[0].user[1]"},
		{"up from the cgroups", `"mode": "cgroup", "select": { "cgroup": "/../../etc" }`, selection{}, "select[0].cgroup[0]"},
		{"no user", `"mode": "cgroup", "select": { "uid": 4294967295 }`, selection{}, "select[0].uid[0]"},
		{"no group", `"mode": "cgroup", "exclude": { "gid": [5, 4294967295] }`, selection{}, "exclude[0].gid[1]"},
		{"bad unit", `"mode": "cgroup", "exclude": { "unit": "a/b" }`, selection{}, "exclude[0].unit[0]"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			text := `{ "contexts": { "default": { "default": "direct", ` + tt.context + ` } } }`
			cfg, err := config.Parse("test.json", []byte(text), Check)
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Errorf("got %v, want %q", err, tt.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			got, err := buildSelection(cfg, "default")
			if diff := cmp.Diff(tt.want, got, cmp.AllowUnexported(selection{}), cmpopts.EquateComparable(netip.Prefix{}), cmpopts.EquateEmpty()); diff != "" || err != nil {
				t.Errorf("%v\n%s", err, diff)
			}
		})
	}
}

// Flow tells associations apart by the dialer: one that changes with a reload would give an application's socket another mapped port.
func TestReloadKeepsTheContextsViewOfUpstreams(t *testing.T) {
	cfg, err := config.Parse("test.json", []byte(`{
		"upstreams": { "a": { "url": "socks5://192.0.2.1" }, "b": { "url": "socks5h://192.0.2.2" } },
		"pools": { "p": { "members": ["a", "b"] } },
		"contexts": { "default": { "default": "p", "dns": { "servers": "tcp://192.0.2.53" } } } }`), Check)
	if err != nil {
		t.Fatal(err)
	}
	net := dialers.NewNet(dialers.NetConfig{})
	old, err := buildUpstreams(cfg, net, nil)
	if err != nil {
		t.Fatal(err)
	}
	env := contextEnv{net: net, ids: new(atomic.Uint64), log: zap.NewNop()}
	c, err := newContext(cfg, defaultContext, 0, old, env)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.close)
	same, err := buildUpstreams(cfg, net, old)
	if err != nil {
		t.Fatal(err)
	}
	ch, err := c.change(cfg, same, env)
	if err != nil {
		t.Fatal(err)
	}
	if len(ch.views) == 0 {
		t.Fatal("the context sees no upstream")
	}
	for d, v := range ch.views {
		if c.views[d] != v {
			t.Errorf("%s: a new view of an upstream that has not changed", d.Name())
		}
	}
}
