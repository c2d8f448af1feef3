// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"fmt"
	"path"
	"strings"
)

// glob is a pattern of names (path.Match) as an automaton that a BPF program can run: bit i of its state says that what has been read so far
// may be the pattern's first i characters. A name of ASCII characters is matched exactly; for others ? and classes stand for one byte.
type glob struct {
	next [256]uint64 // by byte: the bits whose character it may be, which move on
	stay uint64      // the bits before a *, which need not
	end  uint64      // the bit of the whole pattern
}

// maxGlobLength bounds a pattern's characters: there are 64 bits.
const maxGlobLength = 63

// exactName reports whether a pattern is a name, without any wildcard.
func exactName(pattern string) bool { return !strings.ContainsAny(pattern, `*?[\`) }

// newGlob compiles a pattern that path.Match takes.
func newGlob(pattern string) (*glob, error) {
	if _, err := path.Match(pattern, ""); err != nil {
		return nil, fmt.Errorf("pattern %q: %w", pattern, err)
	}
	g := &glob{}
	n := 0
	for p := pattern; p != ""; {
		if p[0] == '*' {
			g.stay |= 1 << n
			p = p[1:]
			continue
		}
		if n == maxGlobLength {
			return nil, fmt.Errorf("%w: pattern %q is longer than %d characters", ErrConflict, pattern, maxGlobLength)
		}
		one := p[:tokenLength(p)]
		p = p[len(one):]
		for c := 1; c < 256; c++ {
			if c == '/' {
				continue // no name has it
			}
			// Each byte as the character of its number: path.Match reads runes.
			if ok, err := path.Match(one, string(rune(c))); ok && err == nil {
				g.next[c] |= 1 << n
			}
		}
		n++
	}
	g.end = 1 << n
	return g, nil
}

// tokenLength is the length of the pattern's first character, escaped character, or class.
func tokenLength(p string) int {
	switch p[0] {
	case '\\':
		return min(2, len(p))
	case '[':
		i := 1
		if i < len(p) && p[i] == '^' {
			i++
		}
		for first := true; i < len(p) && (p[i] != ']' || first); first = false {
			if p[i] == '\\' {
				i++
			}
			i++
		}
		return min(i+1, len(p))
	}
	return 1
}

// match runs the automaton, as the programs do.
func (g *glob) match(name string) bool {
	state := uint64(1)
	for i := range len(name) {
		state = state&g.next[name[i]]<<1 | state&g.stay
	}
	return state&g.end != 0
}
