// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"strings"
	"testing"
)

func TestTakeArgsHidesPasswords(t *testing.T) {
	for _, tt := range []struct{ arg, want string }{
		{"socks5h://u:secret@192.0.2.1:1080", "socks5h://u:******@192.0.2.1:1080"},
		{"--proxy=http://u:p@ss@h", "--proxy=http://u:****@h"},
		{"http://u@h:80", "http://u@h:80"},
		{"http://h:80", "http://h:80"},
		{"a:b@c", "a:b@c"},
		{"socks5://u:@h", "socks5://u:@h"},
	} {
		original := strings.Clone(tt.arg) // in memory of its own, which may be written to
		got := takeArgs([]string{original})
		if got[0] != tt.arg {
			t.Errorf("%s: the copy is %s", tt.arg, got[0])
		}
		if original != tt.want {
			t.Errorf("%s: left in place: %s, want %s", tt.arg, original, tt.want)
		}
	}
}
