// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"fmt"
	"strings"
)

// The chart's measures in pixels.
const (
	chartWidth = 860
	chartLeft  = 190
	chartBar   = 14
	chartGap   = 12
	chartText  = 110 // for the figure behind the longest bar
)

// chart draws the rows as bars: the median against the best of the row, and a thin line from the least to the largest.
func (r *report) chart() string {
	var b strings.Builder
	y := 30
	fmt.Fprintf(&b, `<text x="10" y="18" class="t">Figures and, in brackets, CPU of the engine. Bars are relative to the largest of the row.</text>`+"\n")
	for _, x := range r.Rows {
		if len(x.Cells) < 2 {
			continue
		}
		top := 0.0
		for _, c := range x.Cells {
			top = max(top, median(c.Value))
		}
		if top == 0 {
			continue
		}
		for i, c := range x.Cells {
			if i == 0 {
				fmt.Fprintf(&b, `<text x="10" y="%d" class="r">%s</text>`+"\n", y+11, x.Row)
			}
			m := median(c.Value)
			width := m / top * (chartWidth - chartLeft - chartText)
			fmt.Fprintf(&b, `<text x="%d" y="%d" text-anchor="end">%s</text>`+"\n", chartLeft-6, y+11, c.Subject)
			fmt.Fprintf(&b, `<rect x="%d" y="%d" width="%.1f" height="%d" class="%s"/>`+"\n", chartLeft, y, width, chartBar-2, c.Subject)
			label := figure(m) + " " + x.Unit
			if len(c.Cost) > 0 {
				label += fmt.Sprintf(" (%s %s)", figure(median(c.Cost)), x.CostUnit)
			}
			at, anchor := float64(chartLeft)+width+5, "start"
			if width > (chartWidth-chartLeft-chartText)*0.75 {
				at, anchor = at-10, "end"
			}
			fmt.Fprintf(&b, `<text x="%.1f" y="%d" text-anchor="%s">%s</text>`+"\n", at, y+11, anchor, label)
			y += chartBar
		}
		y += chartGap
	}
	return fmt.Sprintf(`<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" font-family="sans-serif" font-size="11">
<style>text{fill:#222}.t{font-size:12px}.r{font-weight:bold}.plain{fill:#ddd}.upstream{fill:#c8d6e5}.splice{fill:#b8e0c8}.floor{fill:#f3d9a4}.mprox{fill:#7fb2ff}.other{fill:#a9c9f5}.peer{fill:#e5b8d6}</style>
<rect width="100%%" height="100%%" fill="#fff"/>
%s</svg>
`, chartWidth, y, chartWidth, y, b.String())
}
