// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"errors"
	"flag"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the golden files")

func globalSpec() Spec {
	return Spec{Instance: InstanceFor("/run/mprox/mprox.sock"), Contexts: []ContextSpec{{
		Name: "default", Mode: ModeGlobal, TUN: "mprox0", DNSPort4: 5301, DNSPort6: 5302,
		Direct: []netip.Prefix{netip.MustParsePrefix("198.51.100.0/24"), netip.MustParsePrefix("10.2.0.0/16"), netip.MustParsePrefix("2001:db8:77::/48")},
		Fake:   []netip.Prefix{netip.MustParsePrefix("198.18.0.0/15"), netip.MustParsePrefix("fd4d:5554:4558::/64")},
	}}}
}

func runSpec() Spec {
	return Spec{Instance: InstanceFor("/run/mprox/run-77.sock"), Contexts: []ContextSpec{{
		Name: "run-77", Mode: ModeCgroup, Slot: 159, TUN: "mprox-r0", DNSPort4: 5301, DNSPort6: 5302, MTU: 1400,
		Cgroups: []CgroupRef{{Path: "/user.slice/mprox-4026531840-run-77", ID: 4711, Level: 2}},
		Fake:    []netip.Prefix{netip.MustParsePrefix("198.18.0.0/15")},
	}}}
}

// selectSpec is two contexts of selected processes beside a global one that leaves some out.
func selectSpec() Spec {
	g := globalSpec()
	g.Contexts[0].Slot, g.Contexts[0].Direct = 2, nil
	g.Contexts[0].Exclude = []Selector{{UIDs: []uint32{993}}, {Units: []string{"web-*.service"}}}
	return Spec{Instance: g.Instance, Contexts: []ContextSpec{
		{Name: "alice", Mode: ModeProcess, Slot: 0, TUN: "mprox-alice", DNSPort4: 5303, DNSPort6: 5304, Select: []Selector{
			{UIDs: []uint32{1000}}, {UIDs: []uint32{1001, 1002}, GIDs: []uint32{50}},
		}},
		{Name: "web", Mode: ModeCgroup, Slot: 1, TUN: "mprox-web", Select: []Selector{
			{Cgroups: []string{"/user.slice", "/gone"}, UIDs: []uint32{33}}, {Units: []string{"web-*.service"}}, {Cgroups: []string{"/gone"}},
		}, Exclude: []Selector{{GIDs: []uint32{34}}}},
		g.Contexts[0],
	}}
}

// adopting lets all contexts adopt flows.
func adopting(s Spec) Spec {
	for i := range s.Contexts {
		s.Contexts[i].Offload = true
	}
	return s
}

func TestPlanGolden(t *testing.T) {
	service := &CgroupRef{Path: "/system.slice/mprox.service", ID: 99, Level: 2}
	features := Features{Cgroup2: true, NFTSocket: true, NFTOwner: true, BPFSockMark: true}
	tests := []struct {
		name string
		spec func() Spec
		snap func(*Snapshot)
	}{
		{"global", globalSpec, func(s *Snapshot) { s.Daemon.Cgroup = service }},
		{"global-closed", func() Spec { return closedSpec(globalSpec()) }, func(s *Snapshot) { s.Daemon.Cgroup = service }},
		{"global-no-ipv6-by-uid", globalSpec, func(s *Snapshot) { s.IPv6, s.Daemon.UID, s.Features = false, 993, Features{} }},
		{"global-excluded", globalSpec, func(s *Snapshot) {
			s.Daemon.Cgroup = service
			s.Excluded = Excluded{
				Cgroups: []CgroupRef{{Path: "/system.slice/tor@default.service", ID: 55, Level: 2}},
				Flows:   []Tuple{{Local: netip.MustParseAddrPort("192.168.1.20:40000"), Remote: netip.MustParseAddrPort("198.51.100.22:22")}},
			}
		}},
		{"global-egress", globalSpec, func(s *Snapshot) {
			s.Daemon.Cgroup, s.Features.NFTEgress = service, true
			s.Links = append(s.Links, Link{Index: 4, Name: "ppp0", Up: true})
			s.Routes = append(s.Routes, Route{Table: 254, Dst: netip.MustParsePrefix("0.0.0.0/0"), Dev: "ppp0", Metric: 900})
		}},
		{"global-offload", func() Spec { return adopting(globalSpec()) }, func(s *Snapshot) { s.Daemon.Cgroup = service }},
		{"selected-offload", func() Spec { return adopting(selectSpec()) }, func(s *Snapshot) { s.Daemon.Cgroup = service }},
		{"run", runSpec, func(*Snapshot) {}},
		{"run-nft", runSpec, func(s *Snapshot) { s.Features.BPFSockMark = false }},
		{"run-dead", func() Spec { return closedSpec(runSpec()) }, func(*Snapshot) {}},
		{"gateway", func() Spec {
			s := globalSpec()
			s.Contexts[0].Mode, s.Contexts[0].Direct = ModeGateway, nil
			s.Contexts[0].Select = []Selector{
				{Interfaces: []string{"eth1"}, Sources: []netip.Prefix{netip.MustParsePrefix("192.168.50.0/24"), netip.MustParsePrefix("fd00:50::/64")}},
				{Interfaces: []string{"docker0"}},
			}
			s.Contexts[0].Exclude = []Selector{{Sources: []netip.Prefix{netip.MustParsePrefix("192.168.50.9/32")}}}
			return s
		}, func(*Snapshot) {}},
		{"containers", func() Spec {
			s := runSpec()
			s.Instance, s.Contexts[0].Cgroups, s.Contexts[0].Mode, s.Contexts[0].Slot = globalSpec().Instance, nil, ModeProcess, 0
			s.Contexts[0].Containers, s.Bridges, s.Ports = true, []string{"lxcbr0", "virbr0"}, []int{7, 300}
			return s
		}, func(*Snapshot) {}},
		{"selected", selectSpec, func(s *Snapshot) {
			s.Daemon.Cgroup = service
			s.Cgroups = map[string][]CgroupRef{
				"/user.slice":   {{Path: "/user.slice", ID: 7, Level: 1}},
				"web-*.service": {{Path: "/system.slice/web-a.service", ID: 8, Level: 2}, {Path: "/system.slice/web-b.service", ID: 9, Level: 2}},
			}
		}},
		{"selected-by-uid", func() Spec {
			s := selectSpec()
			s.Contexts = s.Contexts[:1]
			return s
		}, func(s *Snapshot) { s.Features, s.IPv6 = Features{}, false }},
		{"selected-bpf", func() Spec {
			s := selectSpec()
			s.Contexts[0].Select = append(s.Contexts[0].Select, Selector{Exes: []string{"/opt/app/bin/app*"}, UIDs: []uint32{1003}}, Selector{PIDs: []int{4242}, Scope: ScopeSession})
			s.Contexts[1].Strict = true
			s.Contexts[2].Exclude = append(s.Contexts[2].Exclude, Selector{Exes: []string{"/usr/sbin/sshd"}})
			return s
		}, func(s *Snapshot) {
			s.Daemon.Cgroup, s.Features.BPF = service, true
			s.Cgroups = map[string][]CgroupRef{"/user.slice": {{Path: "/user.slice", ID: 7, Level: 1}}}
		}},
		{"global-bpf", func() Spec {
			s := globalSpec()
			s.Owners = true
			return s
		}, func(s *Snapshot) { s.Daemon.Cgroup, s.Features.BPF = service, true }},
		{"gateway-bpf", func() Spec {
			s := globalSpec()
			s.Owners = true
			s.Contexts[0].Mode, s.Contexts[0].Direct = ModeGateway, nil
			s.Contexts[0].Select = []Selector{{Interfaces: []string{"docker0"}}}
			return s
		}, func(s *Snapshot) { s.Features.BPF = true }},
		{"global-and-leases", func() Spec {
			s, r := globalSpec(), runSpec()
			r.Contexts[0].DNSOff = true
			s.Contexts = append(s.Contexts, r.Contexts[0], ContextSpec{Name: "ended", Mode: ModeCgroup, Slot: 158, Cgroups: []CgroupRef{{Path: "/x", ID: 5, Level: 1}}})
			return s
		}, func(s *Snapshot) { s.Daemon.Cgroup = service }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			snap := deskSnapshot()
			snap.Features = features
			tt.snap(&snap)
			p, err := NewPlan(tt.spec(), snap)
			if err != nil {
				t.Fatal(err)
			}
			file := filepath.Join("testdata", "plan", tt.name+".golden")
			if *update {
				if err := os.WriteFile(file, []byte(p.String()), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), p.String()); diff != "" {
				t.Errorf("-golden +got (go test ./policy -run TestPlanGolden -update):\n%s", diff)
			}
			for _, table := range p.Tables { // everything the plan says has a translation
				if _, err := tableMsgs(table); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

func TestPlanRefuses(t *testing.T) {
	tests := []struct {
		name   string
		change func(*Spec, *Snapshot)
		want   error
		text   string
	}{
		{"a mask of seven bits", func(s *Spec, _ *Snapshot) { s.Mask = 0xfe000000 }, nil, "mark_mask"},
		{"a mask with a hole", func(s *Spec, _ *Snapshot) { s.Mask = 0xff0f0000 &^ 0xf00000 }, nil, "mark_mask"},
		{"two global contexts", func(s *Spec, _ *Snapshot) {
			s.Contexts = append(s.Contexts, ContextSpec{Name: "b", Mode: ModeGlobal, Slot: 1})
		}, nil, "only one"},
		{"a slot twice", func(s *Spec, _ *Snapshot) { s.Contexts = append(s.Contexts, ContextSpec{Name: "b", Mode: ModeCgroup}) }, nil, "twice"},
		{"no more marks", func(s *Spec, _ *Snapshot) { s.Contexts[0].Slot = 160 }, ErrConflict, "160"},
		{"a selector of nobody", func(s *Spec, _ *Snapshot) { s.Contexts[0].Exclude = []Selector{{}} }, nil, "without any condition"},
		{"a relative cgroup", func(s *Spec, _ *Snapshot) { s.Contexts[0].Exclude = []Selector{{Cgroups: []string{"x"}}} }, nil, "start with /"},
		{"everybody by pid", func(s *Spec, _ *Snapshot) { s.Contexts[0].Exclude = []Selector{{PIDs: []int{1}}} }, nil, "mode global"},
		{"a bad pattern", func(s *Spec, _ *Snapshot) { s.Contexts[0].Exclude = []Selector{{Units: []string{"[a"}}} }, nil, "systemd unit"},
		{"too many combinations", func(s *Spec, _ *Snapshot) {
			s.Contexts[0].Exclude = []Selector{{UIDs: make([]uint32, 100), GIDs: make([]uint32, 100)}}
		}, ErrConflict, "4096"},
		{"a gateway of processes", func(s *Spec, _ *Snapshot) {
			s.Contexts[0].Mode, s.Contexts[0].Select = ModeGateway, []Selector{{UIDs: []uint32{1}}}
		}, nil, "gateway"},
		{"hosts on this machine", func(s *Spec, _ *Snapshot) { s.Contexts[0].Exclude = []Selector{{Interfaces: []string{"eth1"}}} }, nil, "gateway"},
		{"the listener on 53", func(s *Spec, _ *Snapshot) { s.Contexts[0].DNSPort6 = 53 }, nil, "53"},
		{"table 254", func(s *Spec, _ *Snapshot) { s.TableBase = 254 }, nil, "table_base"},
		{"foreign rule", func(_ *Spec, s *Snapshot) { s.Rules = append(s.Rules, Rule{Priority: 8500, Table: 7}) }, ErrConflict, "8500"},
		{"foreign mark", func(_ *Spec, s *Snapshot) {
			s.Rules = append(s.Rules, Rule{Priority: 1, Mark: 0x4d000000, Mask: 0xffffffff, Table: 7})
		}, ErrConflict, "mark"},
		{"foreign table", func(_ *Spec, s *Snapshot) {
			s.Routes = append(s.Routes, Route{Table: 19761, Dst: netip.MustParsePrefix("10.0.0.0/8"), Dev: "eth0"})
		}, ErrConflict, "table"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			spec, snap := globalSpec(), deskSnapshot()
			tt.change(&spec, &snap)
			_, err := NewPlan(spec, snap)
			if err == nil || tt.want != nil && !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("got %v, want %v with %q", err, tt.want, tt.text)
			}
		})
	}
}

// TestMarks: other masks give other marks, all inside the mask, none twice.
func TestMarks(t *testing.T) {
	for _, mask := range []uint32{0xff000000, 0x00ff0000, 0x000000ff, 0x0ff00000} {
		seen := map[uint32]bool{BypassMark(mask): true, InboundMark(mask): true}
		for slot := range MaxContexts {
			m := ContextMark(mask, slot)
			if m&^mask != 0 || seen[m] || !ourMark(mask, m) {
				t.Errorf("mask %#x slot %d: mark %#x", mask, slot, m)
			}
			seen[m] = true
		}
	}
}

// TestLocalPrefix: only what is private or link-local from its first to its last address.
func TestLocalPrefix(t *testing.T) {
	for s, want := range map[string]bool{
		"10.0.0.0/8": true, "10.1.2.0/24": true, "8.0.0.0/6": false, "10.0.0.0/7": false, "172.16.0.0/12": true, "172.0.0.0/8": false, "192.168.0.0/15": false,
		"169.254.0.0/16": true, "203.0.113.0/24": false, "0.0.0.0/0": false, "::/0": false, "fe80::/64": true, "fd00::/8": true, "fc00::/7": true, "f000::/4": false,
		"2001:db8::/32": false, "127.0.0.0/8": false, "100.64.0.0/10": false, "198.18.0.0/15": false,
	} {
		if got := isLocalPrefix(netip.MustParsePrefix(s)); got != want {
			t.Errorf("%s: got %v, want %v", s, got, want)
		}
	}
}

// TestRanges compares with asking every prefix about every address.
func TestRanges(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	prefix := func() netip.Prefix {
		a := netip.AddrFrom4([4]byte{10, 0, byte(rng.IntN(4)), byte(rng.IntN(256))})
		return netip.PrefixFrom(a, 20+rng.IntN(13)).Masked()
	}
	for range 300 {
		var add, cut []netip.Prefix
		for range rng.IntN(12) {
			add = append(add, prefix())
		}
		for range rng.IntN(4) {
			cut = append(cut, prefix())
		}
		got := subtract(rangesOf(add, false), rangesOf(cut, false))
		for i := 1; i < len(got); i++ {
			if !got[i-1].to.Less(got[i].from) {
				t.Fatalf("not ascending: %v", got)
			}
		}
		for a := netip.MustParseAddr("10.0.0.0"); a.Less(netip.MustParseAddr("10.0.5.0")); a = a.Next() {
			in := func(ps []netip.Prefix) bool {
				for _, p := range ps {
					if p.Contains(a) {
						return true
					}
				}
				return false
			}
			have := false
			for _, r := range got {
				have = have || !a.Less(r.from) && !r.to.Less(a)
			}
			if want := in(add) && !in(cut); have != want {
				t.Fatalf("%s: in %v is %v; add %v cut %v", a, got, have, add, cut)
			}
		}
	}
}

func TestInstanceFor(t *testing.T) {
	for socket, want := range map[string]Instance{
		"/run/mprox/mprox.sock":  {Socket: "/run/mprox/mprox.sock", Journal: "/run/mprox/state.json"},
		"/tmp/a.sock":            {Socket: "/tmp/a.sock", Journal: "/tmp/a.state.json"},
		"/run/mprox/run-12.sock": {Socket: "/run/mprox/run-12.sock", Journal: "/run/mprox/run-12.state.json", Run: true},
	} {
		if got := InstanceFor(socket); got != want {
			t.Errorf("%s: got %+v, want %+v", socket, got, want)
		}
	}
}
