// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"path"
	"path/filepath"
)

// expandDir is expand for all but the last element.
func expandDir(pattern string) []string {
	var out []string
	for _, d := range expand(path.Dir(pattern)) {
		out = append(out, path.Join(d, path.Base(pattern)))
	}
	return out
}

// resolved is where the symbolic links of what a pattern means lead to: the kernel knows the end only.
func resolved(pattern string) []string {
	var out []string
	for _, p := range expand(pattern) {
		if real, err := filepath.EvalSymlinks(p); err == nil && real != p && exactName(real) {
			out = append(out, real)
		}
	}
	return out
}
