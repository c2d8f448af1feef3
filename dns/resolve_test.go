// SPDX-License-Identifier: GPL-3.0-or-later

package dns

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/mutex-proxy/mutex/flow"
)

func TestRulesChooseServers(t *testing.T) {
	def, corp := &fakeVia{name: "def", serve: streamed(zone("a.example. 300 IN TXT def"))}, &fakeVia{name: "corp", serve: streamed(zone("a.corp. 300 IN TXT corp"))}
	s := start(t, Config{
		Servers: []string{"tcp://192.0.2.53"}, Via: def,
		Rules: []Rule{{DomainSuffix: []string{"corp"}, Servers: []string{"tcp://192.0.2.54:5353"}, Via: corp}},
	})
	if got := ask(t, s, "a.corp", "TXT"); got != `NOERROR; a.corp. 300 IN TXT "corp"` {
		t.Error(got)
	}
	if got := ask(t, s, "a.example", "TXT"); got != `NOERROR; a.example. 300 IN TXT "def"` {
		t.Error(got)
	}
	want := []flow.Addr{{IP: addr("192.0.2.54"), Port: 5353}}
	if diff := cmp.Diff(want, corp.dials, cmpopts.EquateComparable(netip.Addr{})); diff != "" {
		t.Error(diff)
	}
}

func TestResolve(t *testing.T) {
	v := &fakeVia{serve: streamed(testZone())}
	s := start(t, Config{
		Servers: []string{"tcp://192.0.2.53"}, Via: v,
		Hosts: map[string][]netip.Addr{"pinned.example": {addr("192.0.2.99")}}, Rules: []Rule{{Domain: []string{"ads.example"}, Block: true}},
	})
	none := start(t, Config{})
	tests := []struct {
		s    *Server
		host string
		want []string
		err  error
	}{
		{s, "Real.Example.", []string{"192.0.2.10", "2001:db8::10"}, nil},
		{s, "v4.example", []string{"192.0.2.50"}, nil},
		{s, "www.example", []string{"192.0.2.20"}, nil},
		{s, "pinned.example", []string{"192.0.2.99"}, nil},
		{s, "192.0.2.1", []string{"192.0.2.1"}, nil},
		{s, "localhost", []string{"127.0.0.1", "::1"}, nil},
		{s, "none.example", nil, flow.ErrHostUnreachable},
		{s, "text.example", nil, flow.ErrHostUnreachable},
		{s, "a.invalid", nil, flow.ErrHostUnreachable},
		{s, "a b", nil, flow.ErrHostUnreachable},
		{s, "ads.example", nil, flow.ErrProhibited},
		{none, "real.example", nil, flow.ErrNoServers},
	}
	for _, tt := range tests {
		ips, err := tt.s.Resolve(t.Context(), tt.host)
		var got []string
		for _, ip := range ips {
			got = append(got, ip.String())
		}
		if !slices.Equal(got, tt.want) || !errors.Is(err, tt.err) {
			t.Errorf("Resolve(%q) = %v, %v; want %v, %v", tt.host, got, err, tt.want, tt.err)
		}
	}
	v.dialErr = flow.ErrRefused
	if _, err := s.Resolve(t.Context(), "new.example"); err == nil { // the connection is still there
		t.Error("want an error")
	}
	s2 := start(t, Config{Servers: []string{"tcp://192.0.2.53"}, Via: v})
	if _, err := s2.Resolve(t.Context(), "new.example"); !errors.Is(err, flow.ErrUpstream) || flow.ReasonOf(err) == flow.ReasonRefused {
		t.Errorf("a server that refuses looks like a destination that does: %v", err)
	}
}

// resolvingVia is a dialer that needs addresses, and gets them from the Server that uses it.
type resolvingVia struct {
	fakeVia
	names flow.Names
}

func (v *resolvingVia) Dial(ctx context.Context, dst flow.Addr) (flow.Conn, error) {
	if dst.IsName() {
		ips, err := v.names.Resolve(ctx, dst.Host)
		if err != nil {
			return nil, err
		}
		dst = flow.Addr{IP: ips[0], Port: dst.Port}
	}
	return v.fakeVia.Dial(ctx, dst)
}

// A server given by name, through a dialer that resolves with this very Server: the servers given by address are asked; without them it
// fails, and does not go round in circles.
func TestServerByName(t *testing.T) {
	for _, tt := range []struct {
		servers []string
		want    string
	}{
		{[]string{"tcp://real.example"}, "SERVFAIL"},
		{[]string{"tcp://real.example", "tcp://v4.example"}, "SERVFAIL"},
		{[]string{"tcp://real.example:5353", "tcp://192.0.2.53"}, `NOERROR; text.example. 300 IN TXT "hello"`},
	} {
		v := &resolvingVia{fakeVia: fakeVia{serve: streamed(testZone())}}
		s := start(t, Config{Servers: tt.servers, Via: v})
		v.names = s
		if got := ask(t, s, "text.example", "TXT"); got != tt.want {
			t.Errorf("%v: %s", tt.servers, got)
		}
	}
}

func TestPrepare(t *testing.T) {
	old, fresh := &fakeVia{serve: streamed(zone("a.example. 300 IN TXT old"))}, &fakeVia{serve: streamed(zone("a.example. 300 IN TXT new"))}
	s := start(t, Config{Servers: []string{"tcp://192.0.2.53"}, Via: old})
	fake := ask(t, s, "a.example", "A")
	ask(t, s, "a.example", "TXT")
	if _, err := s.Prepare(Config{Fake: FakeConfig{V4: netip.MustParsePrefix("198.51.100.0/24")}}); err == nil {
		t.Error("the fake ranges were changed")
	}
	if _, err := s.Prepare(Config{Servers: []string{"ftp://192.0.2.53"}, Via: fresh}); err == nil {
		t.Error("want an error")
	}
	commit, err := s.Prepare(Config{Servers: []string{"tcp://192.0.2.53"}, Via: fresh})
	if err != nil {
		t.Fatal(err)
	}
	if got := ask(t, s, "a.example", "TXT"); got != `NOERROR; a.example. 300 IN TXT "old"` {
		t.Error("before commit:", got)
	}
	commit()
	if got := ask(t, s, "a.example", "TXT"); got != `NOERROR; a.example. 300 IN TXT "new"` {
		t.Error("after commit:", got)
	}
	if got := ask(t, s, "a.example", "A"); got != fake {
		t.Errorf("the mapping changed: %s, was %s", got, fake)
	}
	old.wg.Wait() // its connections are closed
}

func TestNewErrors(t *testing.T) {
	via := &fakeVia{}
	for name, cfg := range map[string]Config{
		"no upstream":                 {Servers: []string{"udp://192.0.2.53"}},
		`scheme "quic"`:               {Servers: []string{"quic://192.0.2.53"}, Via: via},
		"port":                        {Servers: []string{"udp://192.0.2.53:0"}, Via: via},
		"takes no user":               {Servers: []string{"https://u:secret@192.0.2.53/"}, Via: via},
		"not a host":                  {Servers: []string{"tcp://a..b"}, Via: via},
		"only https":                  {Servers: []string{"tcp://192.0.2.53/x"}, Via: via},
		"not the address of a server": {Servers: []string{"tcp://0.0.0.0"}, Via: via},
		"lies in the fake range":      {Servers: []string{"tcp://198.18.0.53"}, Via: via},
		"rules[0]":                    {Rules: []Rule{{Domain: []string{"a..b"}}}},
		"rules[0].servers[0]":         {Rules: []Rule{{Domain: []string{"a"}, Servers: []string{"x://"}, Via: via}}},
		"fake.exclude[0]":             {Fake: FakeConfig{Exclude: []string{"*.*"}}},
		"hosts":                       {Hosts: map[string][]netip.Addr{"a b": nil}},
		"want an IPv4 prefix":         {Fake: FakeConfig{V4: netip.MustParsePrefix("198.18.0.0/31")}},
		"want an IPv6 prefix":         {Fake: FakeConfig{V6: netip.MustParsePrefix("198.18.0.0/15")}},
	} {
		_, err := New(cfg)
		if err == nil || !strings.Contains(err.Error(), strings.SplitN(name, " (", 2)[0]) || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: %v", name, err)
		}
	}
}
