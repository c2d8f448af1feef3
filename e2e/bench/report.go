// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"
)

// report is what a run has measured; it is the JSON file.
type report struct {
	Time    time.Time
	Host    host
	Server  string // the SOCKS5 server
	Reps    int
	Seconds float64
	Rows    []*result
}

type host struct {
	Kernel, Arch, CPU, Go, Congestion string
	CPUs                              int
}

// result is one row.
type result struct {
	Row, Unit, CostUnit string
	Cells               []*cell
}

// cell is one subject in one row: a figure a repetition.
type cell struct {
	Subject string
	Value   []float64
	Cost    []float64 `json:",omitempty"` // CPU of the engine
	P99     []float64 `json:",omitempty"` // µs, of latencies
	Count   uint64    `json:",omitempty"`
	Errors  uint64    `json:",omitempty"` // failed connections, lost datagrams
	Error   string    `json:",omitempty"`
}

func hostOf(l *lab) host {
	h := host{Arch: runtime.GOARCH, CPUs: runtime.NumCPU(), Go: runtime.Version(), Congestion: l.cc}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		h.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	b, _ := os.ReadFile("/proc/cpuinfo")
	for line := range bytes.Lines(b) {
		if k, v, ok := bytes.Cut(line, []byte(":")); ok && bytes.HasPrefix(k, []byte("model name")) {
			h.CPU = string(bytes.TrimSpace(v))
			break
		}
	}
	return h
}

func (r *report) row(name string) *result {
	for _, x := range r.Rows {
		if x.Row == name {
			return x
		}
	}
	return nil
}

func (r *result) cell(subject string) *cell {
	if r == nil {
		return nil
	}
	for _, c := range r.Cells {
		if c.Subject == subject {
			return c
		}
	}
	return nil
}

func (r *report) cell(row, unit, costUnit, subject string) *cell {
	x := r.row(row)
	if x == nil {
		x = &result{Row: row, Unit: unit, CostUnit: costUnit}
		r.Rows = append(r.Rows, x)
	}
	c := x.cell(subject)
	if c == nil {
		c = &cell{Subject: subject}
		x.Cells = append(x.Cells, c)
		order := []string{subPlain, subUpstream, subSplice, subTPROXY, subFloor, subEngine, subNetstack, subOther, subPeer}
		slices.SortFunc(x.Cells, func(a, b *cell) int { return slices.Index(order, a.Subject) - slices.Index(order, b.Subject) })
	}
	return c
}

func (r *report) add(row, unit, subject string, value float64) {
	c := r.cell(row, unit, "", subject)
	c.Value = append(c.Value, value)
}

// median of the figures, 0 of none.
func median(x []float64) float64 {
	if len(x) == 0 {
		return 0
	}
	x = slices.Sorted(slices.Values(x))
	n := len(x)
	return (x[n/2] + x[(n-1)/2]) / 2
}

// spread is half of the distance between the least and the largest, relative to the median.
func spread(x []float64) float64 {
	m := median(x)
	if m == 0 {
		return 0
	}
	return (slices.Max(x) - slices.Min(x)) / 2 / m
}

// ratio is the median of the ratios of the repetitions, which were measured one after the other; 0 if there is nothing to compare.
func ratio(a, b []float64) float64 {
	var all []float64
	for i := range min(len(a), len(b)) {
		if b[i] != 0 {
			all = append(all, a[i]/b[i])
		}
	}
	return median(all)
}

// difference is the median of the differences of the repetitions.
func difference(a, b []float64) float64 {
	var all []float64
	for i := range min(len(a), len(b)) {
		all = append(all, a[i]-b[i])
	}
	return median(all)
}

func figure(x float64) string {
	switch {
	case x == 0:
		return ""
	case x >= 100 || x <= -100:
		return fmt.Sprintf("%.0f", x)
	case x >= 10 || x <= -10:
		return fmt.Sprintf("%.1f", x)
	}
	return fmt.Sprintf("%.2f", x)
}

func times(x float64) string {
	if x == 0 {
		return ""
	}
	return figure(x) + " ×"
}

// table returns the header and the lines of all rows.
func (r *report) table() [][]string {
	out := [][]string{{"row", "subject", "median", "unit", "±", "/ upstream", "/ splice", "CPU", "unit", "/ floor", "p99 µs", "errors"}}
	for _, x := range r.Rows {
		up, sp, fl := x.cell(subUpstream), x.cell(subSplice), x.cell(subFloor)
		name := x.Row
		for _, c := range x.Cells {
			line := []string{name, c.Subject, figure(median(c.Value)), x.Unit, fmt.Sprintf("%.0f %%", 100*spread(c.Value)), "", "", "", "", "", "", ""}
			if up != nil && up != c {
				line[5] = times(ratio(c.Value, up.Value))
			}
			if sp != nil && sp != c {
				line[6] = times(ratio(c.Value, sp.Value))
			}
			if len(c.Cost) > 0 {
				line[7], line[8] = figure(median(c.Cost)), x.CostUnit
				if fl != nil && fl != c {
					line[9] = times(ratio(c.Cost, fl.Cost))
				}
			}
			line[10] = figure(median(c.P99))
			if c.Errors > 0 {
				line[11] = fmt.Sprintf("%d %s", c.Errors, c.Error)
			}
			out = append(out, line)
			name = ""
		}
	}
	return out
}

func (r *report) print(w io.Writer) {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, line := range r.table() {
		_, _ = fmt.Fprintln(tw, strings.Join(line, "\t"))
	}
	_, _ = fmt.Fprintln(tw)
	for _, line := range r.verdicts() {
		_, _ = fmt.Fprintln(tw, strings.Join(line, "\t"))
	}
	_ = tw.Flush()
}

func (r *report) save(path string) error {
	b, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(b, '\n'), 0o644)
}

func loadReport(path string) (*report, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	r := &report{}
	return r, json.Unmarshal(b, r)
}

// lineWaiter says when the first line was written to it, and keeps the rest.
type lineWaiter struct {
	mu   sync.Mutex
	buf  bytes.Buffer
	seen bool
	line chan struct{}
}

func (w *lineWaiter) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.buf.Write(b)
	if !w.seen && bytes.IndexByte(b, '\n') >= 0 {
		w.seen = true
		close(w.line)
	}
	return len(b), nil
}

// errors reads the load's result, which follows the first line.
func (w *lineWaiter) errors() (uint64, string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	_, rest, _ := bytes.Cut(w.buf.Bytes(), []byte("\n"))
	var r loadResult
	if err := json.Unmarshal(rest, &r); err != nil {
		return 1, err.Error()
	}
	return r.Errors, r.Error
}
