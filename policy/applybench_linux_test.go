// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"context"
	"fmt"
	"path/filepath"
	"testing"
)

// benchContexts is a spec of n contexts, each of a user.
func benchContexts(dir string, n int) Spec {
	s := Spec{Instance: InstanceFor(filepath.Join(dir, "mprox.sock")), Owners: true}
	for i := range n {
		s.Contexts = append(s.Contexts, ContextSpec{
			Name: fmt.Sprintf("c%d", i), Mode: ModeProcess, Slot: i, Select: []Selector{{UIDs: []uint32{uint32(70000 + i)}}},
		})
	}
	return s
}

// BenchmarkApply applies a plan of many contexts from nothing, adds one context to as many, and applies what is there already.
func BenchmarkApply(b *testing.B) {
	for _, n := range []int{10, 100, MaxContexts - 1} {
		manager := func(b *testing.B) (*Manager, string) {
			b.Helper()
			dir := b.TempDir()
			m := NewManager(Config{Host: benchHost(b), LockDir: dir})
			b.Cleanup(func() {
				if err := m.Close(context.Background(), StopOpen); err != nil {
					b.Error(err)
				}
			})
			if err := m.Prepare(b.Context(), benchContexts(dir, 1)); err != nil {
				b.Fatal(err)
			}
			return m, dir
		}
		apply := func(b *testing.B, m *Manager, s Spec) {
			b.Helper()
			if err := m.Apply(b.Context(), s); err != nil {
				b.Fatal(err)
			}
		}
		b.Run(fmt.Sprintf("plan/contexts=%d", n), func(b *testing.B) {
			m, dir := manager(b)
			for b.Loop() {
				apply(b, m, benchContexts(dir, n))
				b.StopTimer()
				apply(b, m, benchContexts(dir, 1))
				b.StartTimer()
			}
		})
		b.Run(fmt.Sprintf("add/contexts=%d", n), func(b *testing.B) {
			m, dir := manager(b)
			apply(b, m, benchContexts(dir, n))
			for b.Loop() {
				apply(b, m, benchContexts(dir, n+1))
				b.StopTimer()
				apply(b, m, benchContexts(dir, n))
				b.StartTimer()
			}
		})
		b.Run(fmt.Sprintf("again/contexts=%d", n), func(b *testing.B) {
			m, dir := manager(b)
			apply(b, m, benchContexts(dir, n))
			for b.Loop() {
				apply(b, m, benchContexts(dir, n))
			}
		})
	}
}
