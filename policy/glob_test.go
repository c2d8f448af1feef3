// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"path"
	"strings"
	"testing"
)

// ascii reports whether the automaton promises to be exact.
func ascii(s string) bool {
	return !strings.ContainsFunc(s, func(r rune) bool { return r >= 0x80 || r == 0 })
}

func checkGlob(t *testing.T, pattern, name string) {
	t.Helper()
	want, err := path.Match(pattern, name)
	if err != nil || !ascii(pattern) || !ascii(name) || strings.ContainsRune(pattern+name, '/') {
		return
	}
	g, err := newGlob(pattern)
	if err != nil {
		if len(pattern) <= maxGlobLength {
			t.Errorf("%q: %v", pattern, err)
		}
		return
	}
	if got := g.match(name); got != want {
		t.Errorf("%q matches %q: %v, want %v", pattern, name, got, want)
	}
}

func TestGlob(t *testing.T) {
	names := []string{"", "a", "web-1.service", "web-12.service", "web-a.service", "web-.service", "web-1-2.service", "a-b-c", "a]b", "a*b", "--", "web-1.servic", "aab", "abab"}
	for _, pattern := range []string{
		"", "*", "**", "?", "web-?.service", "web-*.service", "web-[0-9].service", "web-[^0-9].service", "web-*-*.service", "*-*-*", "a[]]b", `a\*b`, `[\]a]*`, "[a-c]*b", "*ab", "a*b*", "[^a]*",
	} {
		for _, name := range names {
			checkGlob(t, pattern, name)
		}
	}
	if _, err := newGlob(strings.Repeat("x", 64)); err == nil {
		t.Error("64 characters fit into 63 bits")
	}
	if g, err := newGlob("*" + strings.Repeat("x", 63)); err != nil || !g.match(strings.Repeat("x", 63)) {
		t.Errorf("63 characters do not fit: %v", err)
	}
}

func FuzzGlob(f *testing.F) {
	f.Add("web-[0-9]*.service", "web-1a.service")
	f.Add(`\[*?]`, "[abc]")
	f.Fuzz(checkGlob)
}
