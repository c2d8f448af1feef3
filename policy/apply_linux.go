// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// owns reports whether a rule or route is this instance's: it carries our protocol number and lies in a block of one of the slots.
type owns struct {
	spec   Spec
	slots  map[int]bool
	global bool
}

func ownsOf(s Spec) owns {
	o := owns{spec: s, slots: map[int]bool{}}
	for _, c := range s.Contexts {
		o.slots[c.Slot] = true
		o.global = o.global || c.Mode == ModeGlobal
	}
	return o
}

func (o owns) rule(r Rule) bool {
	off := r.Priority - o.spec.RulePriority
	if r.Protocol != Protocol || off < 0 || off >= ruleBlock {
		return false
	}
	switch {
	case off >= prioBypass:
		return o.global
	case off >= prioAccel:
		return o.slots[off-prioAccel]
	}
	return o.slots[off/rulesPerSlot]
}

func (o owns) route(r Route) bool {
	off := r.Table - o.spec.TableBase
	return r.Protocol == Protocol && off >= 0 && off < tablesPerSlot*MaxContexts && o.slots[off%MaxContexts]
}

// applier brings the kernel from whatever it is to a plan. Order matters: what closes comes before what opens, in both directions.
type applier struct {
	host Host
	// warn logs once an object: what cannot be done is tried again with every event.
	warn  func(object, msg string, fields ...zap.Field)
	snap  Snapshot
	owns  owns
	plan  *Plan
	count func(object string, n int)
	// replacing is called before tables are replaced or removed: their counters go with them.
	replacing func(tables []string)

	nftText  map[string]string // identities of the tables as last installed
	nftPrint map[string]string // and what they looked like in the kernel then
}

// run applies everything: settings, guard, closed routes, devices, open routes, rules.
func (a *applier) run(ctx context.Context) error {
	for _, step := range []func() error{a.sysctls, a.nft, a.closedRoutes, a.links, a.routes, a.rules} {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

func (a *applier) sysctls() error {
	for _, s := range a.plan.Sysctls {
		have, err := a.host.Sysctl(s.Key)
		if err == nil && have == s.Value {
			continue
		}
		if err == nil {
			err = a.host.SetSysctl(s.Key, s.Value)
		}
		switch {
		case err == nil:
			a.count("sysctl", 1)
		case errors.Is(err, os.ErrNotExist), errors.Is(err, unix.EROFS), errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
			// /proc/sys is read-only in containers. Nothing leaks without them: with strict rp_filter replies may be lost, and inbound
			// connections are answered only while the daemon lives.
			a.warn(s.Key, "setting cannot be changed", zap.String("sysctl", s.Key), zap.String("value", s.Value), zap.Error(err))
		default:
			return fmt.Errorf("sysctl %s=%s: %w", s.Key, s.Value, err)
		}
	}
	return nil
}

// nft swaps in one transaction the tables that differ from the plan in text, or in the kernel from what was installed.
func (a *applier) nft() error {
	base := a.owns.spec.Instance.tableName()
	there, err := a.host.NFTables(base)
	if err != nil {
		return err
	}
	text := map[string]string{}
	var inet, devices []NFTable
	var names []string
	for _, t := range a.plan.Tables {
		text[t.Name] = t.identity()
		if a.nftText[t.Name] == text[t.Name] {
			if a.nftPrint[t.Name] == there[t.Name] {
				continue
			}
			a.count("nft", 1)
		}
		names = append(names, t.Name)
		if ofNetdev(t.Name) { // apart from the rest: a device that has just vanished must not keep the guard out
			devices = append(devices, t)
		} else {
			inet = append(inet, t)
		}
	}
	var remove []string
	for _, name := range tableNames(base) {
		if _, ok := there[name]; ok && text[name] == "" {
			remove = append(remove, name)
		}
	}
	if len(names)+len(remove) == 0 {
		return nil
	}
	a.replacing(slices.Concat(names, remove))
	if err := a.host.ApplyNFT(inet, remove); err != nil {
		return err
	}
	if len(devices) > 0 {
		if err := a.host.ApplyNFT(devices, nil); err != nil {
			a.warn(devices[0].Name, "packet sockets are not guarded until the next change of a device", zap.Error(err))
			delete(text, devices[0].Name)
		}
	}
	gone := func(name, _ string) bool { return text[name] == "" || slices.Contains(names, name) }
	maps.DeleteFunc(a.nftText, gone)
	maps.DeleteFunc(a.nftPrint, gone)
	if there, err = a.host.NFTables(base); err != nil {
		return err
	}
	for _, name := range names {
		if text[name] != "" {
			a.nftText[name], a.nftPrint[name] = text[name], there[name]
		}
	}
	return nil
}

// closedRoutes adds the unreachable and throw routes: before any rule leads to them.
func (a *applier) closedRoutes() error {
	return a.addRoutes(func(r Route) bool { return r.Type != RouteUnicast })
}

// routes removes what is not in the plan, then adds what is missing. In between the unreachable route answers.
func (a *applier) routes() error {
	for _, r := range a.snap.Routes {
		if a.owns.route(r) && !slices.Contains(a.plan.Routes, r) {
			if err := a.host.DeleteRoute(r); err != nil {
				return err
			}
		}
	}
	return a.addRoutes(func(r Route) bool { return r.Type == RouteUnicast })
}

func (a *applier) addRoutes(which func(Route) bool) error {
	for _, r := range a.plan.Routes {
		if !which(r) || slices.Contains(a.snap.Routes, r) {
			continue
		}
		err := a.host.AddRoute(r)
		switch {
		case err == nil:
			a.count("route", 1)
		case a.toDirect(r), r.Type == RouteLocal, r.V6() && errors.Is(err, unix.EACCES):
			// A link that has just gone down or lost its address; or IPv6 switched off by sysctl. The next event brings the next try;
			// until then that destination is closed, by the route behind this one or by the guard. The same with lo, which may be down.
			a.warn(r.String(), "route cannot be added", zap.Stringer("route", r), zap.Error(err))
		default:
			return err
		}
	}
	return nil
}

// toDirect reports whether the route is in a table of direct routes, which only opens.
func (a *applier) toDirect(r Route) bool {
	return r.Table >= a.owns.spec.TableBase+MaxContexts && r.Type == RouteUnicast
}

func (a *applier) links() error {
	for _, l := range a.plan.Links {
		changed, err := a.host.SetLink(l)
		if err != nil {
			return err
		}
		if changed {
			a.count("link", 1)
		}
	}
	return nil
}

// rules adds what is missing, the last resort first, then removes what is not in the plan.
func (a *applier) rules() error {
	add := slices.Clone(a.plan.Rules)
	slices.SortStableFunc(add, func(x, y Rule) int { return y.Priority - x.Priority })
	// The jump's target is the highest; then capture, so that at no moment a direct route is asked without capture behind it. The
	// privileged marks are passed before that.
	slices.SortStableFunc(add, func(x, y Rule) int { return ruleRank(x) - ruleRank(y) })
	for _, r := range add {
		if slices.Contains(a.snap.Rules, r) {
			continue
		}
		if err := a.host.AddRule(r); err != nil {
			return err
		}
		a.count("rule", 1)
	}
	for _, r := range a.snap.Rules {
		if a.owns.rule(r) && !slices.Contains(a.plan.Rules, r) {
			if err := a.host.DeleteRule(r); err != nil {
				return err
			}
		}
	}
	return nil
}

func ruleRank(r Rule) int {
	switch {
	case r.Nop:
		return 0
	case r.Goto != 0:
		return 1
	}
	return 2
}

// teardown removes everything a journal stands for, capture first and guard last, so that it opens in one moment and never half way. It goes
// on after an error.
type teardown struct {
	host    Host
	log     *zap.Logger
	journal journal
	removed []string
	errs    []error
}

func (t *teardown) did(err error, format string, args ...any) {
	if err != nil {
		t.errs = append(t.errs, err)
		return
	}
	t.removed = append(t.removed, fmt.Sprintf(format, args...))
}

func (t *teardown) run(ctx context.Context) error {
	j := &t.journal
	spec := j.spec()
	snap, err := t.host.Snapshot(ctx, j.TableBase)
	if err != nil {
		return err
	}
	own := ownsOf(spec)
	for _, r := range snap.Rules {
		if own.rule(r) {
			t.did(t.host.DeleteRule(r), "rule %s", r)
		}
	}
	if j.BPF != nil {
		t.did(t.host.RemoveBPF(j.BPF.Dir), "bpf programs %s", j.BPF.Dir)
	}
	var marks []uint32
	for _, c := range j.Contexts {
		if c.Mode != ModeGlobal {
			marks = append(marks, ContextMark(j.Mask, c.Slot))
		}
	}
	// The kernel would go on to send what they still hold, now past us.
	if err := t.host.DestroySockets(marks, j.Mask); err != nil {
		t.log.Debug("captured connections not ended", zap.Error(err))
	}
	there, err := t.host.NFTables(j.NFT)
	if err != nil {
		t.errs = append(t.errs, err)
	}
	var tables []string
	for _, name := range tableNames(j.NFT) {
		if _, ok := there[name]; ok {
			tables = append(tables, name)
		}
	}
	if len(tables) > 0 {
		t.did(t.host.ApplyNFT(nil, tables), "nftables %v", tables)
	}
	for _, r := range snap.Routes {
		if own.route(r) {
			t.did(t.host.DeleteRoute(r), "route %s", r)
		}
	}
	t.restore()
	t.cgroups()
	return errors.Join(t.errs...)
}

// restore puts the settings back, unless somebody has changed them since.
func (t *teardown) restore() {
	for key, old := range t.journal.Sysctls {
		have, err := t.host.Sysctl(key)
		if errors.Is(err, os.ErrNotExist) || err == nil && have != "1" { // 1 is what a plan sets, all of them
			continue
		}
		if err == nil {
			err = t.host.SetSysctl(key, old)
		}
		if err != nil {
			err = fmt.Errorf("restore sysctl %s=%s: %w", key, old, err)
		}
		t.did(err, "sysctl %s (again %s)", key, old)
	}
}

// cgroups puts processes back where they were, and what else is in a cgroup of ours into its parent.
func (t *teardown) cgroups() {
	for _, m := range t.journal.Moved {
		if at, err := t.host.Cgroup(m.PID); err == nil && at == m.To {
			t.did(t.host.MoveProcess(m.PID, m.From), "process %d from cgroup %s", m.PID, m.To)
		}
	}
	for _, path := range slices.Backward(t.journal.Cgroups) {
		pids, err := t.host.CgroupProcs(path)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.errs = append(t.errs, err)
			continue
		}
		for _, pid := range pids {
			t.did(t.host.MoveProcess(pid, parentCgroup(path)), "process %d from cgroup %s", pid, path)
		}
		t.did(t.host.RemoveCgroup(path), "cgroup %s", path)
	}
}
