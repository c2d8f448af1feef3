// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// What stands between these lines of the page is written by the program; the rest by hand.
const (
	docBegin = "<!-- figures: written by go run ./e2e/bench -doc -->"
	docEnd   = "<!-- end of figures -->"
)

// writeDoc puts the figures of a JSON file into a page, and a chart beside it.
func writeDoc(page, figures string) error {
	r, err := loadReport(figures)
	if err != nil {
		return err
	}
	b, err := os.ReadFile(page)
	if err != nil {
		return err
	}
	head, rest, ok := strings.Cut(string(b), docBegin)
	_, tail, ok2 := strings.Cut(rest, docEnd)
	if !ok || !ok2 {
		return fmt.Errorf("%s has no lines %q and %q", page, docBegin, docEnd)
	}
	svg := strings.TrimSuffix(page, filepath.Ext(page)) + ".svg"
	if err := os.WriteFile(svg, []byte(r.chart()), 0o644); err != nil {
		return err
	}
	return os.WriteFile(page, []byte(head+docBegin+"\n"+r.markdown(filepath.Base(svg))+docEnd+tail), 0o644)
}

func (r *report) markdown(svg string) string {
	var w strings.Builder
	fmt.Fprintf(&w, "\nMeasured %s on %d cores (%s, %s), Linux %s, %s, TCP %s, SOCKS5 server: `%s`; %d repetitions of %g s, all subjects in turns.\n",
		r.Time.Format("2006-01-02"), r.Host.CPUs, r.Host.CPU, r.Host.Arch, r.Host.Kernel, r.Host.Go, r.Host.Congestion, serverName(r.Server), r.Reps, r.Seconds)
	fmt.Fprintf(&w, "\n![throughput and CPU](%s)\n\n### Against what is wanted\n\n", svg)
	markdownTable(&w, r.verdicts())
	w.WriteString("\n### All figures\n\n")
	markdownTable(&w, r.table())
	w.WriteString("\n")
	return w.String()
}

func serverName(s string) string {
	if s == "mprox" {
		return "mprox serve"
	}
	return s
}

func markdownTable(w *strings.Builder, lines [][]string) {
	for i, line := range lines {
		w.WriteString("| " + strings.Join(line, " | ") + " |\n")
		if i == 0 {
			w.WriteString(strings.Repeat("|---", len(line)) + "|\n")
		}
	}
}
