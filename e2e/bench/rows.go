// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
)

// The subjects.
const (
	subPlain    = "plain"    // no proxy
	subUpstream = "upstream" // the client asks the SOCKS5 server itself
	subFloor    = "floor"    // REDIRECT and a copy through 64 KiB, same server
	subSplice   = "splice"   // REDIRECT and splice, same server
	subTPROXY   = "tproxy"   // TPROXY and splice, same server
	subEngine   = "mprox"
	subNetstack = "netstack" // the same with offload off
	subOther    = "other"    // another build of it
	subPeer     = "peer"
)

// row is one line of figures: a load, and what is read off it.
type row struct {
	name     string
	unit     string
	costUnit string // of the engine's CPU
	spec     loadSpec
	link     string // slowLinks; "" = veth
	udp      bool   // not for the relays that only know TCP
	value    func(loadResult) float64
	per      func(loadResult) float64 // what the CPU is divided by
	scale    float64                  // of the CPU
	atLeast  float64                  // seconds
	special  func(context.Context, *lab, *subject, *report) error
}

const giga = 1e9

func rows() []row {
	gbit := func(r loadResult) float64 { return float64(r.Bytes) * 8 / r.Seconds / giga }
	gbytes := func(r loadResult) float64 { return float64(r.Bytes) / giga }
	rate := func(r loadResult) float64 { return float64(r.Count) / r.Seconds / 1000 }
	count := func(r loadResult) float64 { return float64(r.Count) }
	p50 := func(r loadResult) float64 { return r.P50 }
	var all []row
	for _, v6 := range []bool{false, true} {
		for _, kind := range []string{kindUp, kindDown} {
			for _, streams := range []int{1, 8} {
				name := "tcp"
				if v6 {
					name = "tcp6"
				}
				all = append(all, row{
					name: fmt.Sprintf("%s-%s-%d", name, kind, streams), unit: "Gbit/s", costUnit: "CPU-s/GB",
					spec: loadSpec{Kind: kind, V6: v6, Streams: streams}, value: gbit, per: gbytes, scale: 1,
				})
			}
		}
	}
	for _, size := range []int{64, 1200} {
		all = append(all, row{
			name: fmt.Sprintf("udp-%d", size), unit: "k echoes/s", costUnit: "µs/echo", udp: true,
			spec: loadSpec{Kind: kindUDP, Streams: 8, Outstanding: 16, Size: size}, value: rate, per: count, scale: 1e6,
		})
	}
	// The same with an application that hands its 16 datagrams to the kernel as one (UDP_SEGMENT), as QUIC libraries do.
	for _, size := range []int{64, 1200} {
		all = append(all, row{
			name: fmt.Sprintf("udp-gso-%d", size), unit: "k echoes/s", costUnit: "µs/echo", udp: true,
			spec: loadSpec{Kind: kindUDP, Streams: 8, Outstanding: 16, Size: size, Train: 16}, value: rate, per: count, scale: 1e6,
		})
	}
	for _, link := range linkNames()[1:] {
		for _, kind := range []string{kindUp, kindDown} {
			for _, streams := range []int{1, 8} {
				all = append(all, row{
					name: fmt.Sprintf("%s-%s-%d", link, kind, streams), link: link, unit: "Mbit/s", costUnit: "CPU-s/GB",
					spec:  loadSpec{Kind: kind, Streams: streams},
					value: func(r loadResult) float64 { return 1000 * gbit(r) }, per: gbytes, scale: 1,
					atLeast: 8, // the first seconds are slow start
				})
			}
		}
	}
	return append(all,
		row{name: "conns", unit: "k conn/s", costUnit: "µs/conn", spec: loadSpec{Kind: kindConns, Streams: 64}, value: rate, per: count, scale: 1e6},
		row{name: "first-byte", unit: "µs p50", costUnit: "µs/conn", spec: loadSpec{Kind: kindFirst}, value: p50, per: count, scale: 1e6},
		row{name: "request-response", unit: "µs p50", costUnit: "µs/request", spec: loadSpec{Kind: kindRR}, value: p50, per: count, scale: 1e6},
		// The least of 64 connections against their mean.
		row{name: "fairness", unit: "× of mean", costUnit: "CPU-s/GB", spec: loadSpec{Kind: kindDown, Streams: 64}, value: leastOfMean, per: gbytes, scale: 1, atLeast: 4},
		row{name: "start", unit: "ms", special: startToFirstByte},
		row{name: "memory", special: memory},
	)
}

func leastOfMean(r loadResult) float64 {
	if len(r.Streams) == 0 || r.Bytes == 0 {
		return 0
	}
	return slices.Min(r.Streams) * float64(len(r.Streams)) / float64(r.Bytes)
}

func rowNames() []string {
	var names []string
	for _, r := range rows() {
		names = append(names, r.name)
	}
	return names
}

// takes says whether the subject can carry the row's load at all.
func (r *row) takes(s *subject) bool {
	switch s.name {
	case subFloor, subSplice, subTPROXY:
		return !r.udp
	}
	return true
}

// measure runs rows. In each repetition of a row all subjects have their turn, in another order each time: what changes on the
// machine meanwhile (noise of neighbours, heat) meets all of them.
func (l *lab) measure(ctx context.Context, wanted []row, rep *report) error {
	for _, r := range wanted {
		if r.special != nil {
			for _, s := range l.subjects {
				if s.name != subEngine && s.name != subNetstack && s.name != subOther && s.name != subPeer {
					continue
				}
				if err := r.special(ctx, l, s, rep); err != nil {
					return fmt.Errorf("%s: %s: %w", r.name, s.name, err)
				}
			}
			continue
		}
		for i := range l.o.reps {
			for _, k := range rand.Perm(len(l.subjects)) {
				if s := l.subjects[k]; r.takes(s) {
					if err := l.once(ctx, &r, s, rep); err != nil {
						return err
					}
				}
			}
			fmt.Fprintf(os.Stderr, "%s %d/%d\n", r.name, i+1, l.o.reps)
		}
	}
	return nil
}

// once is one measurement.
func (l *lab) once(ctx context.Context, r *row, s *subject, rep *report) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	spec := r.spec
	spec.Seconds = max(l.o.seconds, r.atLeast)
	before, err := s.cpu()
	if err != nil {
		return err
	}
	res, err := l.load(ctx, s, spec)
	if err != nil {
		return err
	}
	after, err := s.cpu()
	if err != nil {
		return err
	}
	c := rep.cell(r.name, r.unit, r.costUnit, s.name)
	c.Value = append(c.Value, r.value(res))
	if s.proc != nil && r.per(res) > 0 {
		c.Cost = append(c.Cost, (after-before).Seconds()*r.scale/r.per(res))
	}
	c.Count += res.Count
	c.P99 = append(c.P99, res.P99)
	c.Errors += res.Errors
	if res.Error != "" {
		c.Error = res.Error
	}
	return nil
}

// ticks is USER_HZ, the unit of /proc/PID/stat, the same on all machines Linux runs on today.
const ticks = 100

// cpu is what the subject's engine and its children have used, user and system.
func (s *subject) cpu() (time.Duration, error) {
	if s.proc == nil {
		return 0, nil
	}
	select {
	case <-s.proc.done:
		b, _ := os.ReadFile(s.proc.log.Name())
		return 0, fmt.Errorf("%s has ended:\n%s", s.name, b)
	default:
	}
	total := time.Duration(0)
	for _, pid := range tree(s.proc.pid()) {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			continue
		}
		f := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
		for _, n := range f[11:13] { // utime and stime
			t, err := strconv.ParseInt(string(n), 10, 64)
			if err != nil {
				return 0, err
			}
			total += time.Duration(t) * time.Second / ticks
		}
	}
	return total, nil
}

// tree returns a process and its descendants.
func tree(pid int) []int {
	pids := []int{pid}
	for i := 0; i < len(pids); i++ {
		threads, _ := os.ReadDir(fmt.Sprintf("/proc/%d/task", pids[i]))
		for _, t := range threads {
			b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%s/children", pids[i], t.Name()))
			for f := range strings.FieldsSeq(string(b)) {
				if child, err := strconv.Atoi(f); err == nil {
					pids = append(pids, child)
				}
			}
		}
	}
	return pids
}

// rss is the resident memory of the subject's engine in bytes.
func (s *subject) rss() float64 {
	total := 0.0
	for _, pid := range tree(s.proc.pid()) {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
		if f := bytes.Fields(b); len(f) > 1 {
			pages, _ := strconv.Atoi(string(f[1]))
			total += float64(pages * os.Getpagesize())
		}
	}
	return total
}

// startToFirstByte measures from the start of the program to the first byte that came through it.
func startToFirstByte(ctx context.Context, l *lab, s *subject, rep *report) error {
	for range l.o.reps {
		s.proc.stop()
		cmd, err := l.loadCommand(s, loadSpec{Kind: kindWho, Seconds: startTimeout.Seconds()})
		if err != nil {
			return err
		}
		if err := cmd.Start(); err != nil { // it asks before the engine starts, and goes on asking
			return err
		}
		done := make(chan error, 1)
		go func() { done <- cmd.Wait() }()
		settle(ctx, 200*time.Millisecond)
		begin := time.Now()
		if s.proc, err = l.startCold(s); err == nil {
			err = <-done
		}
		if err != nil {
			return err
		}
		c := rep.cell("start", "ms", "", s.name)
		c.Value = append(c.Value, float64(time.Since(begin))/float64(time.Millisecond))
		if err := s.restart(); err != nil {
			return err
		}
	}
	return nil
}

// startCold starts the engine without waiting for it; a peer is routed to first.
func (l *lab) startCold(s *subject) (*process, error) {
	if s.name != subPeer {
		return l.spawn(s.ns, nil, l.engineArgs(s)...)
	}
	return s.start()
}

// Connections held open for the memory row, and how long an engine has to give the memory back.
const (
	idleConns  = 10_000
	settleTime = 30 * time.Second
)

// memory measures a fresh engine that does nothing, one with idle connections, and one after they have been closed.
func memory(ctx context.Context, l *lab, s *subject, rep *report) (err error) {
	l.port = idlePort
	defer func() {
		l.port = socksPort
		err = errors.Join(err, s.restart())
	}()
	if err := s.restart(); err != nil {
		return err
	}
	settle(ctx, 500*time.Millisecond)
	idle := s.rss()
	rep.add("memory-idle", "MB", s.name, idle/1e6)
	cmd, err := l.loadCommand(s, loadSpec{Kind: kindIdle, Streams: idleConns})
	if err != nil {
		return err
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	out := &lineWaiter{line: make(chan struct{})}
	cmd.Stdout = out
	if err := cmd.Start(); err != nil {
		return err
	}
	select {
	case <-out.line:
	case <-ctx.Done():
		err = ctx.Err()
	case <-time.After(2 * time.Minute):
		err = errors.New("the connections did not open")
	}
	if err != nil {
		_ = cmd.Process.Kill() // it waits for its connections before it looks whether it is to end
	}
	settle(ctx, 2*time.Second)
	open := s.rss()
	_ = in.Close()
	if err = errors.Join(err, cmd.Wait()); err != nil {
		return err
	}
	rep.add("memory-connection", "KB", s.name, (open-idle)/idleConns/1e3)
	c := rep.cell("memory-connection", "KB", "", s.name)
	c.Errors, c.Error = out.errors()
	if l.o.warm {
		settle(ctx, settleTime)
	}
	rep.add("memory-after", "MB", s.name, s.rss()/1e6)
	return nil
}

// settle waits, or until the run is interrupted.
func settle(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
