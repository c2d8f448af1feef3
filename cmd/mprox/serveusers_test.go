// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestReadUsers(t *testing.T) {
	for _, tt := range []struct {
		name, user, text string
		mode             os.FileMode
		want             map[string]string
		wrong            string // what the error says
		readable         bool
	}{
		{"several", "", "# comment\nalice:p@ss:w/rd#1\r\n\nbob:#x\n", 0o600, map[string]string{"alice": "p@ss:w/rd#1", "bob": "#x"}, "", false},
		{"no line end", "", "a:b", 0o640, map[string]string{"a": "b"}, "", false},
		{"readable", "", "a:b\n", 0o644, map[string]string{"a": "b"}, "", true},
		{"one user", "alice", "se:cret\nmore\n", 0o600, map[string]string{"alice": "se:cret"}, "", false},
		{"writable by the group", "", "a:b\n", 0o620, nil, "chmod 600", false},
		{"writable by all", "alice", "secret\n", 0o602, nil, "chmod 600", false},
		{"nobody", "", "# none\n", 0o600, nil, "no user", false},
		{"no colon", "", "a:b\nsecret\n", 0o600, nil, "line 2", false},
		{"no name", "", ":secret\n", 0o600, nil, "line 1", false},
		{"no password", "", "alice:\n", 0o600, nil, "line 1", false},
		{"twice", "", "a:b\na:secret\n", 0o600, nil, "line 2", false},
		{"long", "", "a:" + strings.Repeat("x", 256), 0o600, nil, "255", false},
		{"many", "", manyUsers(maxUsers + 1), 0o600, nil, "more than", false},
		{"large", "", strings.Repeat("#", maxUserFile+1), 0o600, nil, "too large", false},
	} {
		path := writeFile(t, filepath.Join(t.TempDir(), "users"), tt.text)
		if err := os.Chmod(path, tt.mode); err != nil {
			t.Fatal(err)
		}
		got, readable, err := readUsers(path, tt.user)
		if !maps.Equal(got, tt.want) || readable != tt.readable || (err != nil) != (tt.wrong != "") {
			t.Errorf("%s: got %v %v %v", tt.name, got, readable, err)
		}
		if err != nil && (!strings.Contains(err.Error(), tt.wrong) || strings.Contains(err.Error(), "secret")) {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}

func manyUsers(n int) string {
	var b strings.Builder
	for i := range n {
		b.WriteString(strings.Repeat("u", 1+i%200) + string(rune('a'+i%26)) + strings.Repeat("v", i/200) + ":x\n")
	}
	return b.String()
}
