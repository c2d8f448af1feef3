// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"net/netip"
	"testing"
)

func TestWhose(t *testing.T) {
	spec := Spec{Contexts: []ContextSpec{
		{Name: "a", Mode: ModeProcess, Select: []Selector{{UIDs: []uint32{1000}, GIDs: []uint32{50}}, {Units: []string{"web"}}}, Exclude: []Selector{{PIDs: []int{9}}}},
		{Name: "b", Mode: ModeProcess, Select: []Selector{{UIDs: []uint32{1000}}, {PIDs: []int{7}}}},
		{Name: "all", Mode: ModeGlobal, Exclude: []Selector{{UIDs: []uint32{2000}}}},
		{Name: "lease", Mode: ModeCgroup, Slot: 3, Cgroups: []CgroupRef{{Path: "/x/mprox-1-run"}}},
	}}
	found := map[string][]CgroupRef{"web": {{Path: "/system.slice/web.service"}}}
	for name, tt := range map[string]struct {
		p    ProcessFacts
		want string
	}{
		"both ids":           {ProcessFacts{UID: 1000, GID: 50}, "a"},
		"one id of two":      {ProcessFacts{UID: 1000, GID: 51}, "b"},
		"unit":               {ProcessFacts{Cgroup: "/system.slice/web.service/sub"}, "a"},
		"almost the unit":    {ProcessFacts{Cgroup: "/system.slice/web.service2"}, "all"},
		"excluded goes on":   {ProcessFacts{UID: 1000, GID: 50, Lineage: []int{12, 9, 1}}, "b"},
		"descendant":         {ProcessFacts{UID: 5, Lineage: []int{12, 7, 1}}, "b"},
		"nobody else's":      {ProcessFacts{UID: 5}, "all"},
		"excluded from all":  {ProcessFacts{UID: 2000}, ""},
		"a lease goes first": {ProcessFacts{UID: 1000, GID: 50, Cgroup: "/x/mprox-1-run"}, "lease"},
		"the daemon":         {ProcessFacts{UID: 1000, GID: 50, Cgroup: "/daemon"}, ""},
		"behind an upstream": {ProcessFacts{UID: 1000, GID: 50, Cgroup: "/ssh/x"}, ""},
	} {
		got := whose(spec, tt.p, found, []CgroupRef{{Path: "/ssh"}}, &CgroupRef{Path: "/daemon"})
		if got.Context != tt.want || got.Reason == "" {
			t.Errorf("%s: %q (%s), want %q; %+v", name, got.Context, got.Reason, tt.want, got.Verdicts)
		}
	}
}

// TestWhoseImagined describes processes that need not exist: what is not said of one, no selector matches.
func TestWhoseImagined(t *testing.T) {
	spec := Spec{Contexts: []ContextSpec{
		{Name: "a", Mode: ModeProcess, Select: []Selector{{UIDs: []uint32{0}}, {Units: []string{"web"}}}},
		{Name: "b", Mode: ModeProcess, Select: []Selector{{GIDs: []uint32{0}, Exes: []string{"/usr/bin/*"}}, {Cgroups: []string{"/x/"}}}},
	}}
	for name, tt := range map[string]struct {
		p    ProcessFacts
		want string
	}{
		"nothing is said": {ProcessFacts{NoUID: true, NoGID: true}, ""},
		"root":            {ProcessFacts{NoGID: true}, "a"},
		"exe, no gid":     {ProcessFacts{NoUID: true, NoGID: true, Exe: "/usr/bin/curl"}, ""},
		"exe and gid":     {ProcessFacts{NoUID: true, Exe: "/usr/bin/curl"}, "b"},
		"unit":            {ProcessFacts{NoUID: true, NoGID: true, Cgroup: "/system.slice/web.service/sub"}, "a"},
		"cgroup":          {ProcessFacts{NoUID: true, NoGID: true, Cgroup: "/x/y"}, "b"},
		"another cgroup":  {ProcessFacts{NoUID: true, NoGID: true, Cgroup: "/xy"}, ""},
	} {
		if got := WhoseImagined(spec, tt.p); got.Context != tt.want || got.Reason == "" {
			t.Errorf("%s: %q (%s), want %q; %+v", name, got.Context, got.Reason, tt.want, got.Verdicts)
		}
	}
}

func TestExistingMeant(t *testing.T) {
	ap := netip.MustParseAddrPort
	e := Existing{
		Direct:  []netip.Prefix{netip.MustParsePrefix("192.168.0.0/16")},
		Inbound: []Tuple{{Local: ap("198.51.100.1:22"), Remote: ap("203.0.113.9:5000")}},
		Ours:    func(mark uint32) bool { return mark != 0 },
	}
	for _, tt := range []struct {
		local, remote string
		mark          uint32
		want          bool
	}{
		{"198.51.100.1:40000", "203.0.113.9:443", 0, true},
		{"[2001:db8::1]:40000", "[2001:db8:1::1]:443", 0, true},
		{"198.51.100.1:40000", "203.0.113.9:443", 1, false},
		{"198.51.100.1:22", "203.0.113.9:5000", 0, false},
		{"198.51.100.1:40000", "192.168.3.4:443", 0, false},
		{"[::1]:40000", "[::1]:443", 0, false},
		{"[::ffff:127.0.0.1]:40000", "[::ffff:127.0.0.1]:443", 0, false},
		{"198.51.100.1:40000", "0.0.0.0:0", 0, false},
	} {
		if got := e.meant(ap(tt.local), ap(tt.remote), tt.mark); got != tt.want {
			t.Errorf("%+v: %v", tt, got)
		}
	}
}
