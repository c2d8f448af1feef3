// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/mutex-proxy/mutex/e2e/delay"
)

// profileOverlay is the source file that is put into the program for profiling, and only then: the product has no profiler to turn on.
const profileOverlay = "e2e/bench/testdata/profile.go.txt"

// runProfile measures nothing: it puts each load on the engine and lets it write profiles.
func runProfile(ctx context.Context, o options) error {
	if os.Geteuid() != 0 {
		return errors.New("namespaces need root")
	}
	dir, err := filepath.Abs(o.profile)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	o.profile = dir
	o.skip = []string{subPlain, subUpstream, subFloor, subSplice, subTPROXY}
	o.peer = ""
	if o.binary == "" {
		o.binary = filepath.Join(dir, "mprox")
		if err := buildProfiled(ctx, dir, o.binary); err != nil {
			return err
		}
	}
	l, err := newLab(ctx, o, delay.Link{})
	defer l.close()
	if err != nil {
		return err
	}
	for _, r := range rows() {
		if r.special != nil || r.link != "" || !selected(o.rows, r.name) {
			continue
		}
		if err := l.profileRow(ctx, &r, l.subjects[0]); err != nil {
			return fmt.Errorf("%s: %w", r.name, err)
		}
	}
	fmt.Printf("look at them with: go tool pprof -top %s/ROW.cpu.pprof\n", o.profile)
	return nil
}

func buildProfiled(ctx context.Context, dir, out string) error {
	from, err := filepath.Abs(profileOverlay)
	if err != nil {
		return err
	}
	to, err := filepath.Abs("cmd/mprox/bench_profile.go")
	if err != nil {
		return err
	}
	b, err := json.Marshal(map[string]map[string]string{"Replace": {to: from}})
	if err != nil {
		return err
	}
	overlay := filepath.Join(dir, "overlay.json")
	if err := os.WriteFile(overlay, b, 0o600); err != nil {
		return err
	}
	return build(ctx, out, "-overlay", overlay)
}

// profileEnv tells the engine where to write profiles.
func (l *lab) profileEnv() []string {
	if l.o.profile == "" {
		return nil
	}
	return []string{"BENCH_PROFILE=" + l.o.profile}
}

// profileRow runs one load between two signals.
func (l *lab) profileRow(ctx context.Context, r *row, s *subject) error {
	spec := r.spec
	spec.Seconds = l.o.seconds
	if err := syscall.Kill(s.proc.pid(), syscall.SIGUSR1); err != nil {
		return err
	}
	settle(ctx, 100*time.Millisecond)
	res, err := l.load(ctx, s, spec)
	if err != nil {
		return err
	}
	if err := syscall.Kill(s.proc.pid(), syscall.SIGUSR1); err != nil {
		return err
	}
	done := filepath.Join(l.o.profile, "done")
	err = until(startTimeout, "the profile is written", func() bool {
		_, err := os.Stat(done)
		return err == nil
	})
	if err != nil {
		return err
	}
	_ = os.Remove(done)
	for _, kind := range []string{"cpu", "allocs"} {
		file := filepath.Join(l.o.profile, kind+".pprof")
		if err := os.Rename(file, filepath.Join(l.o.profile, strings.Join([]string{r.name, kind, "pprof"}, "."))); err != nil {
			return err
		}
	}
	fmt.Printf("%s: %s %s\n", r.name, figure(r.value(res)), r.unit)
	return nil
}
