// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// world is what a machine looks like: what cleanup must leave as it was.
func (h *fakeHost) world() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	var b strings.Builder
	rules, routes := slices.Clone(h.snap.Rules), slices.Clone(h.snap.Routes)
	slices.SortFunc(rules, compareRules)
	slices.SortFunc(routes, compareRoutes)
	for _, r := range rules {
		fmt.Fprintln(&b, family46(r.V6)+r.String())
	}
	for _, r := range routes {
		fmt.Fprintln(&b, r)
	}
	for _, m := range []map[string]string{h.tables, h.sysctl} {
		for _, k := range slices.Sorted(maps.Keys(m)) {
			fmt.Fprintln(&b, k, m[k])
		}
	}
	for _, k := range slices.Sorted(maps.Keys(h.cgroups)) {
		pids := slices.Clone(h.cgroups[k])
		slices.Sort(pids)
		fmt.Fprintln(&b, k, pids)
	}
	return b.String()
}

type bench struct {
	t    *testing.T
	dir  string
	host *fakeHost
	m    *Manager
	spec Spec
}

func newBench(t *testing.T) *bench {
	t.Helper()
	b := &bench{t: t, dir: t.TempDir(), host: newFakeHost()}
	b.m = NewManager(Config{Host: b.host, LockDir: b.dir})
	b.spec = globalSpec()
	b.spec.Instance = InstanceFor(filepath.Join(b.dir, "mprox.sock"))
	return b
}

func (b *bench) config() Config { return Config{Host: b.host, LockDir: b.dir} }

// die lets go of the locks as the kernel does.
func (b *bench) die() {
	b.t.Helper()
	if b.m.stopWatch != nil {
		b.m.stopWatch()
		b.m.watching.Wait()
	}
	if b.m.locks != nil {
		b.m.locks.slots.Close()
		b.m.locks.journal.Close()
		if b.m.locks.daemon != nil {
			b.m.locks.daemon.Close()
		}
	}
	b.host.mu.Lock() // the owner's table dies with it, as does the device with its routes
	delete(b.host.tables, "mprox-dns")
	b.host.snap.Routes = slices.DeleteFunc(b.host.snap.Routes, func(r Route) bool { return r.Dev == "mprox0" })
	b.host.mu.Unlock()
}

func index(t *testing.T, log []string, what string) int {
	t.Helper()
	i := slices.IndexFunc(log, func(s string) bool { return strings.Contains(s, what) })
	if i < 0 {
		t.Fatalf("no %q in\n%s", what, strings.Join(log, "\n"))
	}
	return i
}

// before checks the order of changes.
func before(t *testing.T, log []string, order ...string) {
	t.Helper()
	for i := 1; i < len(order); i++ {
		if index(t, log, order[i-1]) >= index(t, log, order[i]) {
			t.Errorf("%q is not before %q:\n%s", order[i-1], order[i], strings.Join(log, "\n"))
		}
	}
}

func TestOrder(t *testing.T) {
	b := newBench(t)
	was := b.host.world()
	if err := b.m.Prepare(t.Context(), b.spec); err != nil {
		t.Fatal(err)
	}
	log := b.host.take()
	before(t, log, "mkdir", "move self") // which goes on beside the rest
	before(t, log, "mkdir", "sysctl net/ipv4/tcp_fwmark_accept=1", "add route unreachable default table 19760", "8859: from all nop", "8800", "8813", "8812", "8810")
	if i := index(t, log, "nft +mprox"); i > index(t, log, "sysctl net/ipv4/tcp_fwmark_accept=1") {
		t.Error("conntrack is not switched on first")
	}
	if s := strings.Join(log, "\n"); strings.Contains(s, "dev mprox0") {
		t.Errorf("opened by Prepare:\n%s", s)
	}
	if err := b.m.Apply(t.Context(), b.spec); err != nil {
		t.Fatal(err)
	}
	before(t, b.host.take(), "src_valid_mark", "nft +mprox +mprox-dns", "link mprox0", "add route default dev mprox0")
	if err := b.m.Apply(t.Context(), b.spec); err != nil {
		t.Fatal(err)
	}
	if log := b.host.take(); len(log) > 0 && !onlySysctls(log) {
		t.Errorf("not idempotent: %v", log)
	}
	if err := b.m.Close(t.Context(), StopConfigured); err != nil {
		t.Fatal(err)
	}
	before(t, b.host.take(), "del rule", "nft -mprox-dns -mprox", "del route", "move self", "rmdir")
	if diff := cmp.Diff(was, b.host.world()); diff != "" {
		t.Errorf("not as it was:\n%s", diff)
	}
	if entries, _ := os.ReadDir(b.dir); len(entries) > 0 {
		t.Errorf("left: %v", entries)
	}
	if err := b.m.Close(t.Context(), StopConfigured); err != nil {
		t.Errorf("second Close: %v", err)
	}
}

// onlySysctls: the fake keeps nothing of devices.
func onlySysctls(log []string) bool {
	return !slices.ContainsFunc(log, func(s string) bool {
		return s != "link mprox0" && !strings.HasPrefix(s, "sysctl net/ipv4/conf/mprox0") && !strings.HasPrefix(s, "sysctl net/ipv6/conf/mprox0")
	})
}

// steps are all changes of a start, in order.
func steps(t *testing.T) []string {
	t.Helper()
	b := newBench(t)
	if err := b.m.Prepare(t.Context(), b.spec); err != nil {
		t.Fatal(err)
	}
	if err := b.m.Apply(t.Context(), b.spec); err != nil {
		t.Fatal(err)
	}
	log := b.host.take()
	if err := b.m.Close(t.Context(), StopOpen); err != nil {
		t.Fatal(err)
	}
	return log
}

// TestFailAnywhere: whatever change fails, the machine is left as it was, and closed while it is not.
func TestFailAnywhere(t *testing.T) {
	for i, step := range steps(t) {
		t.Run(fmt.Sprintf("%03d", i), func(t *testing.T) {
			b := newBench(t)
			was := b.host.world()
			b.host.fail = step
			err := b.m.Prepare(t.Context(), b.spec)
			if err == nil {
				err = b.m.Apply(t.Context(), b.spec)
			}
			if cerr := b.m.Close(t.Context(), StopOpen); cerr != nil {
				t.Fatal(cerr)
			}
			if err == nil && !strings.HasPrefix(step, "mkdir") && !strings.HasPrefix(step, "move") && !strings.Contains(step, "19920") {
				t.Errorf("%s: failed silently", step)
			}
			if err != nil && !errors.Is(err, errFake) {
				t.Errorf("%s: %v", step, err)
			}
			if diff := cmp.Diff(was, b.host.world()); diff != "" {
				t.Errorf("%s: not as it was:\n%s", step, diff)
			}
		})
	}
}

// TestKillAnywhere: killed after any change, cleanup and the next start leave the machine as it was.
func TestKillAnywhere(t *testing.T) {
	all := steps(t)
	for i := range all {
		for _, then := range []string{"cleanup", "start"} {
			t.Run(fmt.Sprintf("%03d %s", i, then), func(t *testing.T) {
				b := newBench(t)
				was := b.host.world()
				killed := &killedHost{fakeHost: b.host}
				killed.left.Store(int32(i))
				b.m = NewManager(Config{Host: killed, LockDir: b.dir})
				if err := b.m.Prepare(t.Context(), b.spec); err == nil {
					_ = b.m.Apply(t.Context(), b.spec)
				}
				b.die()
				if then == "start" {
					b.m = NewManager(b.config())
					if err := b.m.Prepare(t.Context(), b.spec); err != nil {
						t.Fatal(err)
					}
					if err := b.m.Apply(t.Context(), b.spec); err != nil {
						t.Fatal(err)
					}
					if err := b.m.Close(t.Context(), StopOpen); err != nil {
						t.Fatal(err)
					}
				} else if _, err := Cleanup(t.Context(), b.config(), b.spec.Instance); err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(was, b.host.world()); diff != "" {
					t.Errorf("after %q: not as it was:\n%s", all[i], diff)
				}
			})
		}
	}
}

// killedHost does nothing any more after some changes: its process is dead.
type killedHost struct {
	*fakeHost
	left atomic.Int32 // the daemon's own move goes on beside the rest
}

var errKilled = errors.New("killed")

func (h *killedHost) do(f func() error) error {
	if h.left.Add(-1) < 0 {
		return errKilled
	}
	return f()
}

func (h *killedHost) AddRule(r Rule) error {
	return h.do(func() error { return h.fakeHost.AddRule(r) })
}

func (h *killedHost) DeleteRule(r Rule) error {
	return h.do(func() error { return h.fakeHost.DeleteRule(r) })
}

func (h *killedHost) AddRoute(r Route) error {
	return h.do(func() error { return h.fakeHost.AddRoute(r) })
}

func (h *killedHost) DeleteRoute(r Route) error {
	return h.do(func() error { return h.fakeHost.DeleteRoute(r) })
}

func (h *killedHost) SetSysctl(k, v string) error {
	return h.do(func() error { return h.fakeHost.SetSysctl(k, v) })
}

func (h *killedHost) RemoveCgroup(p string) error {
	return h.do(func() error { return h.fakeHost.RemoveCgroup(p) })
}

func (h *killedHost) MoveProcess(pid int, p string) error {
	return h.do(func() error { return h.fakeHost.MoveProcess(pid, p) })
}

func (h *killedHost) ApplyNFT(r []NFTable, d []string) error {
	return h.do(func() error { return h.fakeHost.ApplyNFT(r, d) })
}

func (h *killedHost) SetLink(l LinkSpec) (ok bool, err error) {
	err = h.do(func() error { ok, err = h.fakeHost.SetLink(l); return err })
	return ok, err
}

func (h *killedHost) MakeCgroup(p string) (ref CgroupRef, err error) {
	err = h.do(func() error { ref, err = h.fakeHost.MakeCgroup(p); return err })
	return ref, err
}

// TestReconcile: events bring a repair, and only what was missing is put back and counted.
func TestReconcile(t *testing.T) {
	b := newBench(t)
	synctest.Test(t, func(t *testing.T) {
		if err := b.m.Prepare(t.Context(), b.spec); err != nil {
			t.Fatal(err)
		}
		if err := b.m.Apply(t.Context(), b.spec); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		whole := b.host.world()
		b.host.take()
		b.host.mu.Lock()
		b.host.snap.Rules = slices.DeleteFunc(b.host.snap.Rules, func(r Rule) bool { return r.Priority == 8813 })
		delete(b.host.tables, "mprox")
		// Somebody else moves into our block: no reason to leave our own broken.
		foreign := Rule{Priority: 8999, Table: 7}
		b.host.snap.Rules = append(b.host.snap.Rules, foreign)
		changed := b.host.changed
		b.host.mu.Unlock()
		changed()
		time.Sleep(time.Second) //nolint:forbidigo // virtual time: synctest waits for nothing real
		synctest.Wait()
		if err := b.host.DeleteRule(foreign); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(whole, b.host.world()); diff != "" {
			t.Errorf("not repaired:\n%s", diff)
		}
		want := Stats{GuardActive: true, GuardDropped: b.m.Stats().GuardDropped, Restored: map[string]uint64{"rule": 2, "nft": 1}}
		got := b.m.Stats()
		delete(got.Restored, "sysctl") // the fake forgets a device's
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
		if err := b.m.Close(t.Context(), StopOpen); err != nil {
			t.Fatal(err)
		}
	})
}

// TestPrune: sockets older than the start are forgotten when they have been closed, and none is ever added.
func TestPrune(t *testing.T) {
	b := newBench(t)
	synctest.Test(t, func(t *testing.T) {
		if err := b.m.Prepare(t.Context(), b.spec); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		b.host.mu.Lock()
		now := Sockets{Inbound: slices.Clone(b.host.snap.Sockets.Inbound[1:]), Clients: []uint16{50000}}
		b.host.snap.Sockets = now
		b.host.mu.Unlock()
		time.Sleep(2 * recheck) //nolint:forbidigo // virtual time: synctest waits for nothing real
		synctest.Wait()
		table, _ := b.host.NFTables("mprox")
		for text, want := range map[string]bool{"192.168.1.20 . 22": false, "2001:db8:1::20 . 22": true, "40123": false, "50000": false} {
			if got := strings.Contains(table["mprox"], text); got != want {
				t.Errorf("%q in the table: %v, want %v", text, got, want)
			}
		}
		if j, err := readJournal(b.spec.Instance.Journal); err != nil || len(j.Sockets.Inbound) != 1 || len(j.Sockets.Clients) != 0 {
			t.Errorf("journal: %+v, %v", j.Sockets, err)
		}
		if err := b.m.Close(t.Context(), StopOpen); err != nil {
			t.Fatal(err)
		}
	})
}

// TestConflictsWithInstances: locks of instances and slots.
func TestConflictsWithInstances(t *testing.T) {
	b := newBench(t)
	if err := b.m.Prepare(t.Context(), b.spec); err != nil {
		t.Fatal(err)
	}
	other := NewManager(b.config())
	spec := b.spec
	spec.Instance = InstanceFor(filepath.Join(b.dir, "x", "y.sock"))
	if err := other.Prepare(t.Context(), spec); !errors.Is(err, ErrConflict) || !strings.Contains(err.Error(), "mprox.sock") {
		t.Errorf("second daemon: %v", err)
	}
	run := NewManager(b.config())
	if err := run.Prepare(t.Context(), Spec{Instance: InstanceFor(filepath.Join(b.dir, "run-5.sock")), Contexts: []ContextSpec{{Name: "r", Mode: ModeCgroup}}}); !errors.Is(err, ErrConflict) {
		t.Errorf("slot of the daemon: %v", err)
	}
	run = NewManager(b.config())
	if err := run.Prepare(t.Context(), Spec{Instance: InstanceFor(filepath.Join(b.dir, "run-5.sock"))}); err != nil {
		t.Fatal(err)
	}
	got := map[int]bool{}
	for range 3 {
		for _, m := range []*Manager{b.m, run} {
			slot, err := m.AcquireSlot(t.Context())
			if err != nil || got[slot] || slot == 0 {
				t.Errorf("slot %d: %v", slot, err)
			}
			got[slot] = true
		}
	}
	for _, m := range []*Manager{run, b.m} {
		if err := m.Close(t.Context(), StopOpen); err != nil {
			t.Fatal(err)
		}
	}
	if entries, _ := os.ReadDir(b.dir); len(entries) > 1 { // x
		t.Errorf("left: %v", entries)
	}
}
