// SPDX-License-Identifier: GPL-3.0-or-later

package daemon

import (
	"errors"
	"testing"

	"github.com/mutex-proxy/mutex/config"
	"github.com/mutex-proxy/mutex/control"
	"github.com/mutex-proxy/mutex/control/client"
	"github.com/mutex-proxy/mutex/dialers"
)

func TestSwitchUpstreams(t *testing.T) {
	cfg, err := config.Parse("test.json", []byte(`{
		"upstreams": { "a": { "url": "socks5h://127.0.0.1:1" } }, "pools": { "p": { "members": "a" } }, "contexts": { "default": { "default": "p" } } }`), Check)
	if err != nil {
		t.Fatal(err)
	}
	d := New(Options{Config: cfg})
	defer d.stop()
	if d.ups, err = buildUpstreams(cfg, dialers.NewNet(dialers.NetConfig{}), nil); err != nil {
		t.Fatal(err)
	}
	b := backend{d}
	for _, name := range []string{"a", "p"} {
		for _, state := range []string{"draining", "disabled", "enabled"} {
			if err := b.SetUpstream(name, state); err != nil {
				t.Fatal(err)
			}
			if got := dialers.StatusOf(d.ups.dialers[name]).State.String(); got != state {
				t.Errorf("%s is %s, want %s", name, got, state)
			}
		}
		// Nothing listens there.
		got, err := b.TestUpstream(t.Context(), name, "192.0.2.1:80")
		if err != nil || got.OK || len(got.Steps) != 2 || got.Steps[1].Upstream != "a" || got.Steps[1].Step != "connect" || got.Steps[1].Error == "" {
			t.Errorf("%+v %v", got, err)
		}
	}
	for _, err := range []error{b.SetUpstream("none", "enabled"), second(b.TestUpstream(t.Context(), "none", "a:1"))} {
		if ce, ok := errors.AsType[*control.Error](err); !ok || ce.Code != client.CodeNotFound {
			t.Error(err)
		}
	}
	if _, err := b.TestUpstream(t.Context(), "a", "nonsense"); err == nil {
		t.Error("a target without a port")
	}
}

func second(_ control.UpstreamTest, err error) error { return err }
