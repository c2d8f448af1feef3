// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// TestExcludeFake: a service's own cgroup is used, anybody else is moved, and what cannot be seen is a conflict.
func TestExcludeFake(t *testing.T) {
	b := newBench(t)
	was := b.host.world()
	b.host.procs["127.0.0.1:9050"] = []Process{{PID: 50, Name: "tor", Cgroup: "/system.slice/tor.service"}, {PID: 51, Name: "obfs4proxy", Cgroup: "/system.slice/tor.service"}}
	b.host.procs["127.0.0.1:1080"] = []Process{{PID: 42, Name: "ssh", Cgroup: "/user.slice/session-1.scope", Flows: []Tuple{{
		Local: netip.MustParseAddrPort("192.168.1.20:40000"), Remote: netip.MustParseAddrPort("198.51.100.22:22"),
	}}}}
	b.host.cgroups["/system.slice/tor.service"] = []int{50, 51}
	if err := b.m.Prepare(t.Context(), b.spec); err != nil {
		t.Fatal(err)
	}
	b.host.take()
	addr := netip.MustParseAddrPort
	for range 2 {
		if err := b.m.ExcludeListeners(t.Context(), []netip.AddrPort{addr("127.0.0.1:9050"), addr("127.0.0.1:1080")}); err != nil {
			t.Fatal(err)
		}
	}
	log := strings.Join(b.host.take(), "\n")
	for text, want := range map[string]int{"move 42 to": 1, "move 50 to": 0, "bpf mprox-4026531840-exclude-42 0x4d000000": 1} {
		if got := strings.Count(log, text); got != want {
			t.Errorf("%q: %d times, want %d:\n%s", text, got, want, log)
		}
	}
	table := b.host.tables["mprox"]
	for _, want := range []string{`"system.slice/tor.service"`, "exclude-42", "192.168.1.20 . 40000 . 198.51.100.22 . 22"} {
		if !strings.Contains(table, want) {
			t.Errorf("no %s in\n%s", want, table)
		}
	}
	if err := b.m.ExcludeListeners(t.Context(), []netip.AddrPort{addr("127.0.0.1:1")}); !errors.Is(err, ErrConflict) || !strings.Contains(err.Error(), "127.0.0.1:1") {
		t.Errorf("nobody there: %v", err)
	}
	if err := b.m.Close(t.Context(), StopOpen); err != nil {
		t.Fatal(err)
	}
	delete(b.host.cgroups, "/system.slice/tor.service")
	if diff := cmp.Diff(was, b.host.world()); diff != "" {
		t.Errorf("not as it was:\n%s", diff)
	}
}

func TestCleanupKinds(t *testing.T) {
	b := newBench(t)
	if r, err := Cleanup(t.Context(), b.config(), b.spec.Instance); err != nil || len(r.Removed) > 0 {
		t.Errorf("nothing there: %+v, %v", r, err)
	}
	if err := b.m.Prepare(t.Context(), b.spec); err != nil {
		t.Fatal(err)
	}
	if r, err := Cleanup(t.Context(), b.config(), b.spec.Instance); err != nil || r.Skipped == "" {
		t.Errorf("its owner lives: %+v, %v", r, err)
	}
	b.die()
	j, err := readJournal(b.spec.Instance.Journal)
	if err != nil {
		t.Fatal(err)
	}
	elsewhere := j
	elsewhere.Netns.Cookie++
	if err := elsewhere.write(b.spec.Instance.Journal); err != nil {
		t.Fatal(err)
	}
	if r, err := Cleanup(t.Context(), b.config(), b.spec.Instance); err != nil || !strings.Contains(r.Skipped, "namespace") {
		t.Errorf("another namespace: %+v, %v", r, err)
	}
	j.Netns.Boot = "earlier"
	if err := j.write(b.spec.Instance.Journal); err != nil {
		t.Fatal(err)
	}
	if r, err := Cleanup(t.Context(), b.config(), b.spec.Instance); err != nil || len(r.Removed) != 1 {
		t.Errorf("another boot: %+v, %v", r, err)
	}
	// Without any journal, what carries our number goes.
	if r, err := Cleanup(t.Context(), b.config(), b.spec.Instance); err != nil || len(r.Removed) < 10 {
		t.Errorf("no journal: %+v, %v", r, err)
	}
	if w := b.host.world(); strings.Contains(w, "proto 77") || strings.Contains(w, "inet mprox") {
		t.Errorf("left:\n%s", w)
	}
}

// TestSelectPID: rules before moves; idempotent; back when it is selected no more, and at the end.
func TestSelectPID(t *testing.T) {
	b := newBench(t)
	was := b.host.world()
	b.m.cfg.Marking = MarkingNFT
	b.spec.Contexts = []ContextSpec{{Name: "work", Mode: ModeProcess, TUN: "mprox0", Select: []Selector{{PIDs: []int{42, 4242}}}}}
	if err := b.m.Prepare(t.Context(), b.spec); err != nil {
		t.Fatal(err)
	}
	log := b.host.take()
	before(t, log, "mkdir /user.slice/session-1.scope/mprox-4026531840-select-42", "move 42 to mprox-4026531840-select-42")
	if i, j := slices.Index(log, "nft +mprox"), index(t, log, "move 42"); i < 0 || i > j {
		t.Errorf("moved before it is guarded:\n%s", strings.Join(log, "\n"))
	}
	if err := b.m.Apply(t.Context(), b.spec); err != nil {
		t.Fatal(err)
	}
	if log := strings.Join(b.host.take(), "\n"); strings.Contains(log, "move") || strings.Contains(log, "mkdir") {
		t.Errorf("moved again:\n%s", log)
	}
	b.spec.Contexts[0].Select = []Selector{{UIDs: []uint32{1}}}
	if err := b.m.Apply(t.Context(), b.spec); err != nil {
		t.Fatal(err)
	}
	before(t, b.host.take(), "nft +mprox", "move 42 to session-1.scope", "rmdir /user.slice/session-1.scope/mprox-4026531840-select-42")
	b.spec.Contexts[0].Select = []Selector{{PIDs: []int{42}}}
	if err := b.m.Apply(t.Context(), b.spec); err != nil {
		t.Fatal(err)
	}
	// A crash: the next instance finds it in the old cgroup, and knows where it came from.
	b.die()
	b.m = NewManager(b.config())
	if err := b.m.Prepare(t.Context(), b.spec); err != nil {
		t.Fatal(err)
	}
	if err := b.m.Close(t.Context(), StopConfigured); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(was, b.host.world()); diff != "" {
		t.Errorf("not as it was:\n%s", diff)
	}
}

// TestOwnersLater: programs that decide nothing do not hold up the start; those that do are there when it returns.
func TestOwnersLater(t *testing.T) {
	for _, k := range []struct {
		name           string
		change         func(*Spec)
		atOnce, settle bool
	}{
		{"owners", func(*Spec) {}, false, false},
		{"owners, settled", func(*Spec) {}, false, true},
		{"owners and who is left alone", func(s *Spec) { s.Contexts[0].Exclude = []Selector{{UIDs: []uint32{7}}} }, true, true},
	} {
		b := newBench(t)
		b.spec.Owners = true
		k.change(&b.spec)
		synctest.Test(t, func(t *testing.T) {
			if err := b.m.Prepare(t.Context(), b.spec); err != nil {
				t.Fatal(err)
			}
			if err := b.m.Apply(t.Context(), b.spec); err != nil {
				t.Fatal(err)
			}
			attached := func() bool {
				b.host.mu.Lock()
				defer b.host.mu.Unlock()
				return len(b.host.bpf) > 0
			}
			if got := attached(); got != k.atOnce {
				t.Errorf("%s: attached by Apply: %t", k.name, got)
			}
			if k.settle {
				if err := b.m.Settle(t.Context()); err != nil {
					t.Fatal(err)
				}
			} else {
				time.Sleep(2 * settle) //nolint:forbidigo // virtual time
				synctest.Wait()
			}
			if !attached() {
				t.Errorf("%s: not attached", k.name)
			}
			if n := b.m.Stats().Restored["bpf"]; n > 0 {
				t.Errorf("%s: counted as %d repairs", k.name, n)
			}
			if err := b.m.Close(t.Context(), StopOpen); err != nil {
				t.Fatal(err)
			}
			if attached() {
				t.Errorf("%s: left", k.name)
			}
		})
	}
}
