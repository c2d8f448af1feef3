// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestNeighboursAreLeftAlone: what others have by default is no conflict, and is recognised.
func TestNeighboursAreLeftAlone(t *testing.T) {
	snap := deskSnapshot()
	snap.Links = append(snap.Links, Link{Index: 9, Name: "virbr0"}, Link{Index: 10, Name: "cali1234"}, Link{Index: 11, Name: "br-abcdef"})
	snap.Rules = append(snap.Rules,
		Rule{Priority: 5210, Mark: 0x80000, Mask: 0xff0000, Table: 254}, Rule{Priority: 5270, Table: 52},
		Rule{Priority: 32764, Mark: 0xca6c, Mask: 0xffffffff, Table: 51820, Other: "not"},
		Rule{Priority: 9, Mark: 0x200, Mask: 0xf00, Table: 2004}, Rule{Priority: 9001, Table: 2022},
	)
	if _, err := NewPlan(globalSpec(), snap); err != nil {
		t.Error(err)
	}
	want := []string{"Docker", "libvirt", "Tailscale", "wg-quick", "Cilium", "Calico", "sing-box or mihomo"}
	if diff := cmp.Diff(want, Neighbours(snap)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// TestOverlapsAreNamed: an overlap of marks, tables or priorities is a conflict that names the other.
func TestOverlapsAreNamed(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(*Spec, *Snapshot)
		want   string
	}{
		"Mullvad's mark": {func(_ *Spec, s *Snapshot) {
			s.Rules = append(s.Rules, Rule{Priority: 32500, Mark: 0x6d6f6c65, Mask: 0xffffffff, Table: 254})
		}, "Mullvad VPN"},
		"one bit of ours, dae": {func(_ *Spec, s *Snapshot) {
			s.Rules = append(s.Rules, Rule{Priority: 100, Mark: 0x8000000, Mask: 0x8000000, Table: 2023})
		}, "dae"},
		"Tailscale's priorities": {func(sp *Spec, s *Snapshot) {
			sp.RulePriority = 5000
			s.Rules = append(s.Rules, Rule{Priority: 5230, Table: 253})
		}, "Tailscale"},
		"wg-quick's table": {func(sp *Spec, _ *Snapshot) {
			sp.TableBase = 51800
		}, "wg-quick"},
		"Cilium's table": {func(sp *Spec, s *Snapshot) {
			sp.TableBase = 2000
			s.Routes = append(s.Routes, Route{Table: 2004, Dst: netip.MustParsePrefix("0.0.0.0/0"), Dev: "cilium_host"})
		}, "Cilium"},
		"an unknown one": {func(sp *Spec, s *Snapshot) {
			sp.Mask = 0xff00000
			s.Rules = append(s.Rules, Rule{Priority: 7000, Mark: 0x4d00000, Mask: 0xffffffff, Table: 254})
		}, "foreign rule"},
	} {
		spec, snap := globalSpec(), deskSnapshot()
		tt.change(&spec, &snap)
		if _, err := NewPlan(spec, snap); !errors.Is(err, ErrConflict) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
