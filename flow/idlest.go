// SPDX-License-Identifier: GPL-3.0-or-later

package flow

import (
	"cmp"
	"slices"
)

// aged is something that had moved last at a time, on the table's clock, when a scan looked.
type aged[E any] struct {
	e    E
	last int64
}

// idlest finds the longest idle of many, time and again, without looking at all of them each time.
//
// A scan keeps more candidates than it needs now. While nothing but time has passed, the first of them that has not moved since is
// still exactly the longest idle: things only ever become younger, and what came later is younger than all candidates. So one scan of n
// pays for n/64 answers.
type idlest[E interface{ last() int64 }] struct {
	left []aged[E] // longest idle last
}

// take returns the longest idle that ok does not refuse, of those of the last scan; false if there is none left.
func (x *idlest[E]) take(ok func(E) bool) (e E, found bool) {
	for n := len(x.left); n > 0; n = len(x.left) {
		c := x.left[n-1]
		x.left[n-1] = aged[E]{}
		x.left = x.left[:n-1]
		if c.e.last() == c.last && ok(c.e) {
			return c.e, true
		}
	}
	return e, false
}

// scanned takes the result of a scan, which it may reorder.
func (x *idlest[E]) scanned(all []aged[E]) {
	slices.SortFunc(all, func(a, b aged[E]) int { return cmp.Compare(a.last, b.last) })
	x.left = slices.Clone(all[:min(len(all), max(1, len(all)/64))])
	slices.Reverse(x.left)
}
