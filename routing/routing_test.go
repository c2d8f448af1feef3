// SPDX-License-Identifier: GPL-3.0-or-later

package routing

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/mutex-proxy/mutex/flow"
)

// fakeDialer is an upstream that is only ever compared.
type fakeDialer string

func (d fakeDialer) Name() string { return string(d) }

func (d fakeDialer) Dial(context.Context, flow.Addr) (flow.Conn, error) {
	return nil, errors.ErrUnsupported
}

func (d fakeDialer) ListenPacket(context.Context, *flow.Flow) (flow.PacketConn, error) {
	return nil, errors.ErrUnsupported
}

var upstreams = map[string]flow.Dialer{"direct": fakeDialer("direct"), "eu": fakeDialer("eu"), "us": fakeDialer("us")}

// app is the owner in the flows of the tests.
var app = flow.App{PID: 42, UID: 1000, GID: 100, Exe: "/usr/bin/firefox", Cgroup: "/user.slice/user-1000.slice/app.service", Method: "test"}

// newFlow makes a flow to host:port over a network; host is a name, an address, or name=address for both.
func newFlow(tb testing.TB, network, dst string) *flow.Flow {
	tb.Helper()
	n, ok := networkByName(network)
	if !ok {
		tb.Fatalf("network %q", network)
	}
	f := &flow.Flow{Network: n, Src: netip.MustParseAddrPort("192.0.2.7:40000")}
	i := strings.LastIndexByte(dst, ':')
	host, port := dst[:i], dst[i+1:]
	for _, c := range port {
		f.Dst.Port = f.Dst.Port*10 + uint16(c-'0')
	}
	name, addr, both := strings.Cut(host, "=")
	if !both {
		addr = strings.Trim(host, "[]")
	}
	if ip, err := netip.ParseAddr(strings.Trim(addr, "[]")); err == nil {
		f.Dst.IP = ip
	} else {
		name, both = host, true
	}
	if both {
		f.Dst.Host = name
	}
	return f
}

func prefixes(list ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range list {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

func TestMatch(t *testing.T) {
	t.Parallel()
	truth, lie := true, false
	const tcp, udp, icmp = "tcp", "udp", "icmp"
	tests := []struct {
		name    string
		match   Match
		network string
		dst     string
		want    bool
	}{
		{"exact domain", Match{Domain: []string{"a.example"}}, tcp, "a.example:443", true},
		{"exact domain, case and dot", Match{Domain: []string{"A.Example."}}, tcp, "a.example:443", true},
		{"exact domain, not below", Match{Domain: []string{"a.example"}}, tcp, "b.a.example:443", false},
		{"exact domain, not above", Match{Domain: []string{"b.a.example"}}, tcp, "a.example:443", false},
		{"star, below", Match{Domain: []string{"*.example"}}, tcp, "a.example:443", true},
		{"star, far below", Match{Domain: []string{"*.example"}}, tcp, "b.a.example:443", true},
		{"star, not itself", Match{Domain: []string{"*.example"}}, tcp, "example:443", false},
		{"plus, below", Match{Domain: []string{"+.example"}}, tcp, "a.example:443", true},
		{"plus, itself", Match{Domain: []string{"+.example"}}, tcp, "example:443", true},
		{"suffix, itself", Match{DomainSuffix: []string{"corp.example"}}, tcp, "corp.example:443", true},
		{"suffix, below", Match{DomainSuffix: []string{"corp.example"}}, tcp, "a.b.corp.example:443", true},
		{"suffix, whole labels only", Match{DomainSuffix: []string{"corp.example"}}, tcp, "xcorp.example:443", false},
		{"dotted suffix, not itself", Match{DomainSuffix: []string{".corp.example"}}, tcp, "corp.example:443", false},
		{"dotted suffix, below", Match{DomainSuffix: []string{".corp.example"}}, tcp, "a.corp.example:443", true},
		{"keyword", Match{DomainKeyword: []string{"ADS"}}, tcp, "my-ads-server.example:443", true},
		{"regex", Match{DomainRegex: []string{`^cdn\d+\.`}}, tcp, "cdn42.example:443", true},
		{"regex, not", Match{DomainRegex: []string{`^cdn\d+\.`}}, tcp, "xcdn42.example:443", false},
		{"regex that matches everything, no name", Match{DomainRegex: []string{`.*`}}, tcp, "192.0.2.1:443", false},
		{"name and address known, domain", Match{Domain: []string{"a.example"}}, tcp, "a.example=10.0.0.1:443", true},
		{"name and address known, cidr", Match{IPCIDR: prefixes("10.0.0.0/8")}, tcp, "a.example=10.0.0.1:443", true},
		{"cidr", Match{IPCIDR: prefixes("10.0.0.0/8")}, tcp, "10.255.0.1:443", true},
		{"cidr v6", Match{IPCIDR: prefixes("2001:db8::/32")}, tcp, "[2001:db8::1]:443", true},
		{"cidr, v4-mapped", Match{IPCIDR: prefixes("10.0.0.0/8")}, tcp, "[::ffff:10.0.0.1]:443", true},
		{"cidr, mapped prefix", Match{IPCIDR: prefixes("::ffff:10.0.0.0/104")}, tcp, "10.0.0.1:443", true},
		{"cidr, zone", Match{IPCIDR: prefixes("fe80::/10")}, tcp, "[fe80::1%eth0]:443", true},
		{"cidr, name only", Match{IPCIDR: prefixes("0.0.0.0/0", "::/0")}, tcp, "a.example:443", false},
		{"private", Match{IPIsPrivate: &truth}, tcp, "192.168.1.1:443", true},
		{"private loopback", Match{IPIsPrivate: &truth}, tcp, "[::1]:443", true},
		{"private link-local", Match{IPIsPrivate: &truth}, tcp, "[fe80::1%eth0]:443", true},
		{"private, public address", Match{IPIsPrivate: &truth}, tcp, "192.0.2.1:443", false},
		{"not private, public address", Match{IPIsPrivate: &lie}, tcp, "192.0.2.1:443", true},
		{"private, fake v4", Match{IPIsPrivate: &truth}, tcp, "198.18.0.7:443", false},
		{"private, fake v6", Match{IPIsPrivate: &truth}, tcp, "[fd4d:5554:4558::7]:443", false},
		{"not private, name only", Match{IPIsPrivate: &lie}, tcp, "a.example:443", false},
		{"port", Match{Port: []PortRange{{22, 22}, {80, 80}}}, tcp, "a.example:80", true},
		{"port, not", Match{Port: []PortRange{{22, 22}, {80, 80}}}, tcp, "a.example:81", false},
		{"port_range", Match{PortRange: []PortRange{{1000, 2000}}}, udp, "a.example:2000", true},
		{"port_range, not", Match{PortRange: []PortRange{{1000, 2000}}}, udp, "a.example:2001", false},
		{"port of icmp", Match{Port: []PortRange{{1, 65535}}}, icmp, "192.0.2.1:7", false},
		{"network", Match{Network: []string{"udp", "icmp"}}, icmp, "192.0.2.1:0", true},
		{"network, not", Match{Network: []string{"udp", "icmp"}}, tcp, "192.0.2.1:1", false},
		{"source_cidr", Match{SourceCIDR: prefixes("192.0.2.0/24")}, tcp, "a.example:1", true},
		{"source_port", Match{SourcePort: []PortRange{{39999, 40001}}}, tcp, "a.example:1", true},
		{"uid", Match{UID: []uint32{0, 1000}}, tcp, "a.example:1", true},
		{"uid, not", Match{UID: []uint32{0}}, tcp, "a.example:1", false},
		{"gid", Match{GID: []uint32{100}}, tcp, "a.example:1", true},
		{"pid", Match{PID: []int{42}}, tcp, "a.example:1", true},
		{"exe", Match{Exe: []string{"/usr/bin/firefox"}}, tcp, "a.example:1", true},
		{"exe_regex", Match{ExeRegex: []string{"^/usr/"}}, tcp, "a.example:1", true},
		{"process", Match{Process: []string{"firefox"}}, tcp, "a.example:1", true},
		{"process, not a part", Match{Process: []string{"fire"}}, tcp, "a.example:1", false},
		{"user", Match{User: []string{"alice"}}, tcp, "a.example:1", true},
		{"cgroup", Match{Cgroup: []string{"/user.slice/"}}, tcp, "a.example:1", true},
		{"cgroup, whole elements", Match{Cgroup: []string{"/user"}}, tcp, "a.example:1", false},
		{"cgroup root", Match{Cgroup: []string{"/"}}, tcp, "a.example:1", true},
		{"unit", Match{Unit: []string{"app"}}, tcp, "a.example:1", true},
		{"unit, slice", Match{Unit: []string{"user.slice"}}, tcp, "a.example:1", true},
		{"unit, not", Match{Unit: []string{"user"}}, tcp, "a.example:1", false},
		{"all keys must match", Match{Network: []string{"tcp"}, Port: []PortRange{{22, 22}}, UID: []uint32{1000}}, tcp, "a.example:23", false},
		{"all keys match", Match{Network: []string{"tcp"}, Port: []PortRange{{22, 22}}, UID: []uint32{1000}}, tcp, "a.example:22", true},
		{"domain and suffix are both asked", Match{Domain: []string{"a.example"}, DomainSuffix: []string{"b.example"}}, tcp, "a.example:1", false},
		{"invert", Match{Port: []PortRange{{22, 22}}, Invert: true}, tcp, "a.example:23", true},
		{"invert, not", Match{Port: []PortRange{{22, 22}}, Invert: true}, tcp, "a.example:22", false},
		{"invert, name only", Match{IPCIDR: prefixes("10.0.0.0/8"), Invert: true}, tcp, "a.example:22", true},
		{"or", Match{Or: []Match{{Port: []PortRange{{22, 22}}}, {Network: []string{"udp"}}}}, udp, "a.example:1", true},
		{"or, none", Match{Or: []Match{{Port: []PortRange{{22, 22}}}, {Network: []string{"udp"}}}}, tcp, "a.example:1", false},
		{"and", Match{And: []Match{{Port: []PortRange{{22, 22}}}, {Network: []string{"tcp"}}}}, tcp, "a.example:22", true},
		{"and, one not", Match{And: []Match{{Port: []PortRange{{22, 22}}}, {Network: []string{"tcp"}}}}, udp, "a.example:22", false},
		{"not", Match{Not: []Match{{Port: []PortRange{{22, 22}}}, {Port: []PortRange{{23, 23}}}}}, tcp, "a.example:24", true},
		{"not, second", Match{Not: []Match{{Port: []PortRange{{22, 22}}}, {Port: []PortRange{{23, 23}}}}}, tcp, "a.example:23", false},
		{"not, inverted inside", Match{Not: []Match{{Port: []PortRange{{22, 22}}, Invert: true}}}, tcp, "a.example:22", true},
		{"deep", Match{Or: []Match{{And: []Match{{Not: []Match{{Network: []string{"udp"}}}}, {DomainSuffix: []string{"example"}}}}}}, tcp, "a.example:22", true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			table, err := Compile(Input{
				Context: "default", Rules: []Rule{{Match: tt.match, Upstream: "eu"}}, Default: "reject", Upstreams: upstreams,
				LookupUser: func(string) (uint32, error) { return 1000, nil },
			})
			if err != nil {
				t.Fatal(err)
			}
			f := newFlow(t, tt.network, tt.dst)
			f.App = app
			got := table.Decide(f)
			want := flow.Decision{Action: flow.Block, Rule: "default"}
			if tt.want {
				want = flow.Decision{Action: flow.Forward, Via: upstreams["eu"], Rule: "rules[0]"}
			}
			if got != want {
				t.Errorf("got %+v, want %+v\n%+v", got, want, table.Explain(f))
			}
		})
	}
}

func TestOrder(t *testing.T) {
	t.Parallel()
	table, err := Compile(Input{
		Context: "default", DNS: true,
		Bypass: Bypass{Address: []string{"local", "private", "203.0.113.0/24", "2001:db8::1"}, Port: []PortRange{{123, 123}}, Network: []string{"icmp"}},
		Rules: []Rule{
			{Match: Match{DomainSuffix: []string{"ads.example"}}, Upstream: "drop"},
			{Match: Match{Port: []PortRange{{25, 25}}}, Upstream: "sink"},
			{Match: Match{Domain: []string{"a.example"}}, Upstream: "us"},
			{Match: Match{DomainSuffix: []string{"example"}}, Upstream: "direct"},
		},
		Default: "eu", Upstreams: upstreams, Actions: map[string]flow.Action{"sink": flow.Block},
		Local: prefixes("192.0.2.0/24"),
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ network, dst, want string }{
		{"udp", "192.168.1.1:53", "resolve dns"},
		{"tcp", "203.0.113.1:53", "resolve dns"},
		{"icmp", "198.51.100.1:53", "forward direct bypass.network[0]"},
		{"tcp", "127.0.0.1:80", "forward direct bypass.address[0]"},
		{"tcp", "192.0.2.9:80", "forward direct bypass.address[0]"},
		{"udp", "255.255.255.255:67", "forward direct bypass.address[0]"},
		{"tcp", "10.1.2.3:80", "forward direct bypass.address[1]"},
		{"tcp", "203.0.113.1:80", "forward direct bypass.address[2]"},
		{"tcp", "[2001:db8::1]:80", "forward direct bypass.address[3]"},
		{"udp", "198.51.100.1:123", "forward direct bypass.port[0]"},
		{"tcp", "198.18.0.1:80", "forward eu default"},
		{"tcp", "[fd4d:5554:4558::1]:80", "forward eu default"},
		{"tcp", "x.ads.example:80", "drop rules[0]"},
		{"tcp", "mail.test:25", "block rules[1]"},
		{"tcp", "a.example:80", "forward us rules[2]"},
		{"tcp", "b.example:80", "forward direct rules[3]"},
		{"tcp", "b.test:80", "forward eu default"},
	} {
		d := table.Decide(newFlow(t, tt.network, tt.dst))
		got := d.Action.String() + " " + d.Rule
		if d.Via != nil {
			got = d.Action.String() + " " + d.Via.Name() + " " + d.Rule
		}
		if got != tt.want {
			t.Errorf("%s %s: got %q, want %q", tt.network, tt.dst, got, tt.want)
		}
	}
}

func TestUnknownOwnerMatchesNeitherWay(t *testing.T) {
	t.Parallel()
	table, err := Compile(Input{Context: "default", Default: "eu", Upstreams: upstreams, Rules: []Rule{
		{Match: Match{UID: []uint32{0}}, Upstream: "us"},
		{Match: Match{UID: []uint32{0}, Invert: true}, Upstream: "direct"},
		{Match: Match{Not: []Match{{Exe: []string{"/bin/x"}}}}, Upstream: "direct"},
		{Match: Match{Or: []Match{{UID: []uint32{0}}, {Port: []PortRange{{22, 22}}}}}, Upstream: "drop"},
	}})
	if err != nil {
		t.Fatal(err)
	}
	if d := table.Decide(newFlow(t, "tcp", "a.example:80")); d.Rule != "default" {
		t.Errorf("unknown owner: %q decided", d.Rule)
	}
	if d := table.Decide(newFlow(t, "tcp", "a.example:22")); d.Rule != "rules[3]" {
		t.Errorf("or with a condition that holds: %q decided", d.Rule)
	}
}

func TestNeeds(t *testing.T) {
	t.Parallel()
	ssh := []PortRange{{22, 22}}
	uid := []uint32{1000}
	tls := []string{"tls"}
	tests := []struct {
		name  string
		rules []Match
		dst   string
		owner bool
		want  flow.Needs
		rule  string // what Decide answers
	}{
		{"nothing", []Match{{Port: ssh}}, "a.example:80", false, 0, "default"},
		{"app", []Match{{UID: uid}}, "a.example:80", false, flow.NeedApp, "default"},
		{"app, other key decides", []Match{{UID: uid, Port: ssh}}, "a.example:80", false, 0, "default"},
		{"app, other key holds", []Match{{UID: uid, Port: ssh}}, "a.example:22", false, flow.NeedApp, "default"},
		{"app, earlier rule decides", []Match{{Port: ssh}, {UID: uid}}, "a.example:22", false, 0, "rules[0]"},
		{"app is known", []Match{{UID: uid}}, "a.example:22", true, 0, "rules[0]"},
		{"bypass decides", []Match{{UID: uid}}, "10.0.0.1:22", false, 0, "bypass.address[0]"},
		{"dns decides", []Match{{UID: uid}}, "a.example:53", false, 0, "dns"},
		{"payload", []Match{{Protocol: tls}}, "a.example:443", false, flow.NeedPayload, "rules[0] sniff"},
		{"payload, other key decides", []Match{{Protocol: tls, Port: ssh}}, "a.example:443", false, 0, "default"},
		{"payload and app", []Match{{Protocol: tls, UID: uid}}, "a.example:443", false, flow.NeedPayload | flow.NeedApp, "default"},
		{"payload and known app", []Match{{Protocol: tls, UID: uid}}, "a.example:443", true, flow.NeedPayload, "rules[0] sniff"},
		{"payload, wrong app", []Match{{Protocol: tls, UID: []uint32{7}}}, "a.example:443", true, 0, "default"},
		{"or: one holds", []Match{{Or: []Match{{UID: uid}, {Port: ssh}}}}, "a.example:22", false, 0, "rules[0]"},
		{"or: none yet", []Match{{Or: []Match{{UID: uid}, {Port: ssh}}}}, "a.example:80", false, flow.NeedApp, "default"},
		{"not", []Match{{Not: []Match{{UID: uid}}}}, "a.example:80", false, flow.NeedApp, "default"},
		{"invert decides", []Match{{UID: uid, Port: ssh, Invert: true}}, "a.example:80", false, 0, "rules[0]"},
		{"two rules", []Match{{Protocol: tls}, {UID: uid}}, "a.example:80", false, flow.NeedPayload | flow.NeedApp, "rules[0] sniff"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			in := Input{Context: "default", Default: "eu", DNS: true, Sniff: true, Bypass: Bypass{Address: []string{"private"}}, Upstreams: upstreams}
			for _, m := range tt.rules {
				in.Rules = append(in.Rules, Rule{Match: m, Upstream: "us"})
			}
			table, err := Compile(in)
			if err != nil {
				t.Fatal(err)
			}
			f := newFlow(t, "tcp", tt.dst)
			if tt.owner {
				f.App = app
			}
			if got := table.Needs(f); got != tt.want {
				t.Errorf("needs %b, want %b", got, tt.want)
			}
			d := table.Decide(f)
			got := d.Rule
			if d.Action == flow.Sniff {
				got += " sniff"
			}
			if got != tt.rule {
				t.Errorf("decided by %q, want %q", got, tt.rule)
			}
			f.Protocol = "unknown"
			if d := table.Decide(f); d.Action == flow.Sniff || table.Needs(f)&flow.NeedPayload != 0 {
				t.Errorf("payload is asked for again after it was looked at in vain: %+v", d)
			}
		})
	}
}

func TestCompileErrors(t *testing.T) {
	t.Parallel()
	deep := Match{Port: []PortRange{{1, 1}}}
	for range maxNesting + 1 {
		deep = Match{And: []Match{deep}}
	}
	_, err := Compile(Input{
		Context: "a.b", Default: "nowhere", Upstreams: map[string]flow.Dialer{"eu": fakeDialer("eu")},
		Bypass:     Bypass{Address: []string{"private", "10.0.0/8"}, Port: []PortRange{{0, 0}}, Network: []string{"sctp"}},
		LookupUser: func(string) (uint32, error) { return 0, errors.New("unknown user nobody2") },
		Rules: []Rule{
			{Match: Match{}, Upstream: "eu"},
			{Match: Match{Port: []PortRange{{1, 2}, {9, 3}}}, Upstream: ""},
			{Match: Match{Domain: []string{"ok.example", "a.*.example", "192.0.2.1", "", "bücher.example", strings.Repeat("x", 64), strings.Repeat("x.", 127) + "yy"}}, Upstream: "eu"},
			{Match: Match{DomainRegex: []string{"(", ""}, ExeRegex: []string{"*"}}, Upstream: "eu"},
			{Match: Match{Network: []string{"tcp", "gre"}}, Upstream: "eu"},
			{Match: Match{User: []string{"nobody2"}}, Upstream: "eu"},
			{Match: Match{GeoIP: []string{"de"}, ASN: []uint32{1}, Interface: []string{"x"}, DSCP: []int{1}, Time: []string{"sat"}, RuleSet: []string{"x"}, Protocol: []string{"tls"}}, Upstream: "eu"},
			{Match: Match{Or: []Match{{}, {Not: []Match{{DomainSuffix: []string{"a b"}}}}}}, Upstream: "eu"},
			{Match: deep, Upstream: "eu"},
			{Match: Match{IPCIDR: []netip.Prefix{{}}, SourceCIDR: []netip.Prefix{{}}, DomainKeyword: []string{""}}, Upstream: "eu"},
			{Match: Match{Cgroup: []string{"x"}, Unit: []string{"a/b"}}, Upstream: "eu"},
		},
	})
	var joined interface{ Unwrap() []error }
	if !errors.As(err, &joined) {
		t.Fatalf("not joined: %v", err)
	}
	var got []string
	for _, e := range joined.Unwrap() {
		var pe *PathError
		if !errors.As(e, &pe) || pe.Unwrap() == nil {
			t.Errorf("not a PathError: %v", e)
			continue
		}
		got = append(got, pe.Error())
	}
	const ctx = `$.contexts["a.b"]`
	want := []string{
		ctx + `.bypass: there is no upstream named direct`,
		ctx + `.bypass.address[1]: "10.0.0/8" is not an address, a CIDR, or one of local, private, link-local, multicast, loopback, public`,
		ctx + `.bypass.port[0]: ports are 1 to 65535`,
		ctx + `.bypass.network[0]: "sctp" is not one of tcp, udp, icmp`,
		ctx + `.rules[0]: no conditions: this would match every flow`,
		ctx + `.rules[1].port[1]: the range 9-3 ends before it starts`,
		ctx + `.rules[1].upstream: no upstream is given`,
		ctx + `.rules[2].domain[1]: "a.*.example": wildcards are only *.name and +.name`,
		ctx + `.rules[2].domain[2]: "192.0.2.1" is an address: use ip_cidr`,
		ctx + `.rules[2].domain[3]: the name is empty`,
		ctx + `.rules[2].domain[4]: "bücher.example": write international names in their ASCII form (xn--...)`,
		ctx + `.rules[2].domain[5]: "` + strings.Repeat("x", 64) + `": each label of a name has 1 to 63 characters`,
		ctx + `.rules[2].domain[6]: "` + strings.Repeat("x.", 16) + `"...: a name has at most 253 characters`,
		ctx + `.rules[3].domain_regex[0]: missing closing ): ` + "`(`",
		ctx + `.rules[3].domain_regex[1]: the regular expression is empty: it would match everything`,
		ctx + `.rules[3].exe_regex[0]: missing argument to repetition operator: ` + "`*`",
		ctx + `.rules[4].network[1]: "gre" is not one of tcp, udp, icmp`,
		ctx + `.rules[5].user[0]: unknown user nobody2`,
		ctx + `.rules[6].geoip: not supported yet`,
		ctx + `.rules[6].asn: not supported yet`,
		ctx + `.rules[6].interface: not supported yet`,
		ctx + `.rules[6].dscp: not supported yet`,
		ctx + `.rules[6].time: not supported yet`,
		ctx + `.rules[6].rule_set: not supported yet`,
		ctx + `.rules[6].protocol: not supported yet`,
		ctx + `.rules[7].or[0]: no conditions: this would match every flow`,
		ctx + `.rules[7].or[1].not[0].domain_suffix[0]: "a b": ' ' cannot occur in a name`,
		ctx + `.rules[8]` + strings.Repeat(".and[0]", maxNesting+1) + `: and, or, not are nested deeper than 16`,
		ctx + `.rules[9].source_cidr[0]: not a valid prefix`,
		ctx + `.rules[9].ip_cidr[0]: not a valid prefix`,
		ctx + `.rules[9].domain_keyword[0]: the keyword is empty: it would match everything`,
		ctx + `.rules[10].cgroup[0]: "x": a cgroup is a path below the cgroup mount and starts with /`,
		ctx + `.rules[10].unit[0]: "a/b" is not the name of a unit`,
		ctx + `.default: unknown upstream "nowhere"`,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestExplain(t *testing.T) {
	t.Parallel()
	table, err := Compile(Input{
		Context: "default", DNS: true, Default: "eu", Upstreams: upstreams,
		Bypass: Bypass{Address: []string{"private"}, Port: []PortRange{{123, 123}}},
		Rules: []Rule{
			{Match: Match{Network: []string{"tcp"}, Port: []PortRange{{22, 22}}, UID: []uint32{1000}}, Upstream: "us"},
			{Match: Match{Or: []Match{{DomainSuffix: []string{"test"}}, {Domain: []string{"a.example"}, Invert: true}}, Not: []Match{{Network: []string{"udp"}}}}, Upstream: "us"},
			{Match: Match{DomainSuffix: []string{"example"}}, Upstream: "direct"},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	f := newFlow(t, "tcp", "a.example=192.0.2.1:443")
	f.HostSource = flow.SourceDNS
	want := []Condition{
		{"dns", "port", "53", "no match", "port is 443"},
		{"bypass.address[0]", "address", "private", "no match", "address is 192.0.2.1, which is public"},
		{"bypass.port[0]", "port", "123", "no match", "port is 443"},
		{"rules[0]", "network", "tcp", "match", "network is tcp"},
		{"rules[0]", "port", "22", "no match", "port is 443"},
		{"rules[0]", "uid", "1000", "unknown", "the owner of the flow is not known"},
		{"rules[1]", "or[0].domain_suffix", "test", "no match", "name is a.example (dns)"},
		{"rules[1]", "or[1].domain", "a.example", "match", "name is a.example (dns)"},
		{"rules[1]", "or[1].invert", "true", "no match", "the opposite of the conditions"},
		{"rules[1]", "or", "", "no match", "taken together"},
		{"rules[1]", "not[0].network", "udp", "no match", "network is tcp"},
		{"rules[1]", "not", "", "match", "taken together"},
		{"rules[2]", "domain_suffix", "example", "match", "name is a.example (dns)"},
	}
	if diff := cmp.Diff(want, table.Explain(f)); diff != "" {
		t.Error(diff)
	}
	for dst, last := range map[string]string{"10.0.0.1:1": "bypass.address[0]", "192.0.2.1:53": "dns", "b.test:22": "rules[1]", "192.0.2.1:9": "rules[1]", "c.invalid=192.0.2.2:1": "rules[1]"} {
		got := table.Explain(newFlow(t, "tcp", dst))
		if rule := got[len(got)-1].Rule; rule != last {
			t.Errorf("%s: last line is of %s, want %s", dst, rule, last)
		}
	}
	got := table.Explain(newFlow(t, "udp", "192.0.2.2:1"))
	if last := got[len(got)-1]; last != (Condition{"default", "", "", "match", "no rule matched"}) {
		t.Errorf("last line is %+v", last)
	}
}

func TestClassPrefixesAgreeWithClassifier(t *testing.T) {
	t.Parallel()
	set, _ := newPrefixSet(nil)
	c := classifier{fake: set, local: set}
	for _, name := range []string{"local", "private", "link-local", "multicast", "loopback"} {
		want, _ := classByName(name)
		for _, p := range ClassPrefixes(name) {
			last := lastAddr(p)
			for _, ip := range []netip.Addr{p.Addr(), last} {
				if c.of(ip)&want == 0 {
					t.Errorf("%s: %s is in the prefix %s but not in the class", name, ip, p)
				}
			}
			for _, ip := range []netip.Addr{p.Addr().Prev(), last.Next()} {
				in := slices.ContainsFunc(ClassPrefixes(name), func(p netip.Prefix) bool { return p.Contains(ip) })
				if ip.IsValid() && c.of(ip)&want != 0 && !in {
					t.Errorf("%s: %s is in the class but in no prefix", name, ip)
				}
			}
		}
	}
	if ClassPrefixes("public") != nil || ClassPrefixes("x") != nil {
		t.Error("public and unknown classes have no prefixes")
	}
}

func lastAddr(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}
