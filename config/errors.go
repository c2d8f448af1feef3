// SPDX-License-Identifier: GPL-3.0-or-later

package config

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// maxErrors is how many errors are reported at once. Beyond that a file is not a configuration with mistakes but something else.
const maxErrors = 1000

// Error is one thing that is wrong with a configuration, and where.
type Error struct {
	File   string
	Line   int    // from 1; 0 when there is no position: the file itself is at fault, or there is no file
	Column int    // from 1, in characters
	Path   string // JSON path from $, "" when the text is not JSON at all
	Msg    string
	Hint   string // what to do: did you mean "x"?

	cause error
}

// Error returns FILE:LINE:COLUMN: PATH: message (hint), without the parts that are not known.
func (e *Error) Error() string {
	var b strings.Builder
	if e.File != "" {
		b.WriteString(e.File)
		b.WriteByte(':')
	}
	if e.Line > 0 {
		fmt.Fprintf(&b, "%d:%d:", e.Line, e.Column)
	}
	if e.Path != "" {
		if b.Len() > 0 {
			b.WriteByte(' ')
		}
		b.WriteString(e.Path)
		b.WriteByte(':')
	}
	if b.Len() > 0 {
		b.WriteByte(' ')
	}
	b.WriteString(e.Msg)
	if e.Hint != "" {
		b.WriteString(" (" + e.Hint + ")")
	}
	return b.String()
}

// Unwrap returns the cause, such as the error of opening the file.
func (e *Error) Unwrap() error { return e.cause }

// Errors is everything that is wrong with a configuration, in the order of the text. It is never empty when it is returned as an error.
type Errors []*Error

// Error returns one line an error.
func (es Errors) Error() string {
	lines := make([]string, len(es))
	for i, e := range es {
		lines[i] = e.Error()
	}
	return strings.Join(lines, "\n")
}

// Unwrap makes errors.Is and errors.As look at each error.
func (es Errors) Unwrap() []error {
	out := make([]error, len(es))
	for i, e := range es {
		out[i] = e
	}
	return out
}

// errorOrNil returns the errors sorted by position, without duplicates and bounded, or nil if there are none.
func (es Errors) errorOrNil() error {
	if len(es) == 0 {
		return nil
	}
	return es.sorted()
}

func (es Errors) sorted() Errors {
	out := slices.Clone(es)
	slices.SortStableFunc(out, func(a, b *Error) int {
		return cmp.Or(cmp.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column))
	})
	out = slices.CompactFunc(out, func(a, b *Error) bool { return a.Error() == b.Error() })
	if len(out) > maxErrors {
		last := out[maxErrors]
		out = append(out[:maxErrors:maxErrors], &Error{File: last.File, Line: last.Line, Column: last.Column, Msg: "and more errors"})
	}
	return out
}

// nearest returns the hint that names the candidate closest to the word, or "" if none is close enough to be meant.
func nearest(word string, candidates []string) string {
	best, bestDist := "", max(1, min(len(word), 24)/3)+1
	for _, c := range candidates {
		if d := editDistance(strings.ToLower(word), strings.ToLower(c)); d < bestDist || d == bestDist && best != "" && c < best {
			best, bestDist = c, d
		}
	}
	if best == "" {
		return ""
	}
	return "did you mean " + strconv.Quote(best) + "?"
}

// maxEditWord bounds the quadratic comparison: no known key is longer.
const maxEditWord = 64

// editDistance is the optimal string alignment distance: insertions, deletions, substitutions and swaps of neighbours cost 1 each.
func editDistance(a, b string) int {
	if len(a) > maxEditWord || len(b) > maxEditWord {
		return maxEditWord
	}
	var rows [3][maxEditWord + 1]int
	prev2, prev, cur := &rows[0], &rows[1], &rows[2]
	for j := range len(b) + 1 {
		prev[j] = j
	}
	for i := 1; i <= len(a); i++ {
		cur[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			cur[j] = min(prev[j]+1, cur[j-1]+1, prev[j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				cur[j] = min(cur[j], prev2[j-2]+1)
			}
		}
		prev2, prev, cur = prev, cur, prev2
	}
	return prev[len(b)]
}
