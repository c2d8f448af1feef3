// SPDX-License-Identifier: GPL-3.0-or-later

package config

import (
	"strings"
	"testing"
)

func overlaid(t *testing.T) *Config {
	t.Helper()
	c, err := Parse("c.json", []byte(`{ "upstreams": { "p": { "url": "socks5h://192.0.2.1:1080" } }, "contexts": { "a": { "mode": "global", "default": "p" } } }`))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestOverlay(t *testing.T) {
	c := overlaid(t)
	b, err := ParseContext("b", []byte(`{ "mode": "process", "select": { "uid": 1000 }, "default": "p" }`))
	if err != nil {
		t.Fatal(err)
	}
	if b.TUN.Name != "mprox-b" || b.DialTimeout == 0 || len(b.Select) != 1 || b.Select[0].Scope != "tree" {
		t.Errorf("defaults are missing: %+v", b)
	}
	got, err := c.With(Overlay{Contexts: map[string]Context{"b": b}, Removed: map[string]bool{"a": true}})
	if err != nil {
		t.Fatal(err)
	}
	if _, there := got.Contexts["a"]; there || got.Contexts["b"].Default != "p" || len(c.Contexts) != 1 || c.Contexts["a"].Default != "p" {
		t.Errorf("got %+v, the original %+v", got.Contexts, c.Contexts)
	}
	if none, err := c.With(Overlay{Removed: map[string]bool{"a": true}}); err != nil || len(none.Contexts) != 0 {
		t.Errorf("without the last one: %v", err)
	}
}

func TestOverlayRefuses(t *testing.T) {
	c := overlaid(t)
	for _, text := range []string{`{`, `[]`, `{ "default": "p", "mood": "global" }`, `{ "default": "${HOME}" }`, `{ "mode": "global" }`} {
		if ctx, err := ParseContext("b", []byte(text)); err == nil {
			t.Errorf("%s: %+v", text, ctx)
		}
	}
	second, err := ParseContext("b", []byte(`{ "mode": "global", "default": "q" }`))
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.With(Overlay{Contexts: map[string]Context{"b": second}})
	if err == nil || !strings.Contains(err.Error(), "global already") || !strings.Contains(err.Error(), `unknown upstream or pool "q"`) {
		t.Errorf("two global contexts and an unknown upstream: %v", err)
	}
	if _, err := ParseSelector([]byte(`{ "pid": 0, "uid": -1, "exe": [] , "x": 1 }`)); err == nil {
		t.Error("a selector full of mistakes passes")
	}
}

func FuzzParseContext(f *testing.F) {
	f.Add([]byte(`{ "mode": "process", "select": [ { "uid": 1000 }, { "pid": [4242], "scope": "session" } ], "default": "p" }`))
	f.Add([]byte(`{ "dns": { "fake": { "v4": "198.18.0.0/15" } }, "limits": { "bandwidth": "10mbit" }, }`))
	f.Fuzz(func(_ *testing.T, data []byte) {
		ctx, err := ParseContext("b", data)
		if err != nil {
			return
		}
		c := &Config{Upstreams: map[string]Upstream{}, Contexts: map[string]Context{}}
		_, _ = c.With(Overlay{Contexts: map[string]Context{"b": ctx}})
		_, _ = ParseSelector(data)
	})
}
