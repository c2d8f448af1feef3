// SPDX-License-Identifier: GPL-3.0-or-later

package main

import "fmt"

// target is a figure the engine is held to: what it must reach at least, and what it aims for.
type target struct {
	what       string
	unit       string
	least, aim float64
	more       bool // more is better
	of         func(*report) (float64, bool)
}

func targets() []target {
	var all []target
	cost := func(row string, least float64) {
		all = append(all, target{what: row + ": CPU", unit: "CPU-s/GB", least: least, aim: least, of: engineCost(row)})
	}
	floor := func(row string, least float64) {
		all = append(all, target{what: row + ": CPU against the copying floor", unit: "×", least: least, aim: 1.2, of: costAgainst(row, subFloor)})
	}
	cost("tcp-up-1", .50)
	cost("tcp-down-1", .60)
	cost("tcp-up-8", .50)
	cost("tcp-down-8", .65)
	floor("tcp-up-1", 1.6)
	floor("tcp-down-1", 1.9)
	floor("tcp-up-8", 1.6)
	floor("tcp-down-8", 1.9)
	for _, row := range []string{"tcp-up-1", "tcp-down-1", "tcp-up-8", "tcp-down-8"} {
		all = append(all, target{what: row + ": throughput against REDIRECT + splice", unit: "×", least: .85, aim: 1, more: true, of: against(row, subSplice)})
	}
	for _, row := range []string{"tcp-up-1", "tcp-down-1", "tcp-up-8", "tcp-down-8"} {
		all = append(all,
			target{what: row + ": CPU against TPROXY + splice", unit: "×", least: 1.15, aim: 1, of: costAgainst(row, subTPROXY)},
			target{what: row + ": throughput against TPROXY + splice", unit: "×", least: .95, aim: 1, more: true, of: against(row, subTPROXY)})
	}
	for _, row := range []string{"up-1", "down-1", "up-8", "down-8"} {
		all = append(all, target{what: "tcp6-" + row + ": throughput against IPv4", unit: "×", least: .9, aim: 1, more: true, of: families("tcp6-"+row, "tcp-"+row)})
	}
	for _, row := range []string{"udp-64", "udp-1200"} {
		all = append(all,
			target{what: row + ": echoes against the upstream alone", unit: "×", least: .77, aim: .81, more: true, of: against(row, subUpstream)},
			target{what: row + ": CPU an echo", unit: "µs", least: 4.5, aim: 3.5, of: engineCost(row)})
	}
	for _, link := range linkNames()[1:] {
		for _, load := range []string{"up-1", "down-1", "up-8", "down-8"} {
			row := link + "-" + load
			all = append(all, target{what: row + ": throughput against the upstream alone", unit: "×", least: .9, aim: 1, more: true, of: against(row, subUpstream)})
		}
	}
	return append(all,
		target{what: "conns: connections against the upstream alone", unit: "×", least: .85, aim: .95, more: true, of: against("conns", subUpstream)},
		target{what: "conns: connections against netstack", unit: "×", least: 1, aim: 1, more: true, of: against("conns", subNetstack)},
		target{what: "conns: CPU a connection", unit: "µs", least: 95, aim: 70, of: engineCost("conns")},
		target{what: "first-byte: added to the upstream alone", unit: "µs", least: 90, aim: 50, of: added("first-byte", subUpstream)},
		target{what: "first-byte: added to netstack", unit: "µs", least: 60, aim: 0, of: added("first-byte", subNetstack)},
		target{what: "request-response: added to the upstream alone", unit: "µs", least: 25, aim: 5, of: added("request-response", subUpstream)},
		target{what: "fairness: the least of 64 connections against their mean", unit: "×", least: .8, aim: 1, more: true, of: value("fairness")},
		target{what: "memory of an idle daemon", unit: "MB", least: 20, aim: 20, of: value("memory-idle")},
		target{what: "memory of an idle connection", unit: "KB", least: 16, aim: 10, of: value("memory-connection")},
		target{what: "memory 30 s after all were closed", unit: "MB", least: 40, aim: 40, of: value("memory-after")},
		target{what: "start to first byte", unit: "ms", least: 30, aim: 15, of: value("start")},
	)
}

func engineCost(row string) func(*report) (float64, bool) {
	return func(r *report) (float64, bool) {
		c := r.row(row).cell(subEngine)
		if c == nil {
			return 0, false
		}
		return median(c.Cost), len(c.Cost) > 0
	}
}

func costAgainst(row, base string) func(*report) (float64, bool) {
	return func(r *report) (float64, bool) {
		a, b := r.row(row).cell(subEngine), r.row(row).cell(base)
		if a == nil || b == nil {
			return 0, false
		}
		x := ratio(a.Cost, b.Cost)
		return x, x > 0
	}
}

func against(row, base string) func(*report) (float64, bool) {
	return func(r *report) (float64, bool) {
		a, b := r.row(row).cell(subEngine), r.row(row).cell(base)
		if a == nil || b == nil {
			return 0, false
		}
		x := ratio(a.Value, b.Value)
		return x, x > 0
	}
}

// families compares two rows, which were not measured in turns.
func families(row, base string) func(*report) (float64, bool) {
	return func(r *report) (float64, bool) {
		a, b := r.row(row).cell(subEngine), r.row(base).cell(subEngine)
		if a == nil || b == nil || median(b.Value) == 0 {
			return 0, false
		}
		return median(a.Value) / median(b.Value), true
	}
}

func added(row, base string) func(*report) (float64, bool) {
	return func(r *report) (float64, bool) {
		a, b := r.row(row).cell(subEngine), r.row(row).cell(base)
		if a == nil || b == nil {
			return 0, false
		}
		return difference(a.Value, b.Value), true
	}
}

func value(row string) func(*report) (float64, bool) {
	return func(r *report) (float64, bool) {
		c := r.row(row).cell(subEngine)
		if c == nil {
			return 0, false
		}
		return median(c.Value), true
	}
}

// verdicts compares what was measured with the targets.
func (r *report) verdicts() [][]string {
	out := [][]string{{"figure", "measured", "at least", "aim", "reached"}}
	for _, t := range targets() {
		got, ok := t.of(r)
		if !ok {
			continue
		}
		sign := "≤"
		if t.more {
			sign = "≥"
		}
		reached := "no"
		switch {
		case t.met(got, t.aim):
			reached = "aim"
		case t.met(got, t.least):
			reached = "yes"
		}
		out = append(out, []string{
			t.what, fmt.Sprintf("%s %s", figure(got), t.unit), fmt.Sprintf("%s %s", sign, figure(t.least)), fmt.Sprintf("%s %s", sign, figure(t.aim)), reached,
		})
	}
	return out
}

func (t *target) met(got, want float64) bool {
	if t.more {
		return got >= want
	}
	return got <= want
}
