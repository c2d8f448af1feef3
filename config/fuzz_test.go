// SPDX-License-Identifier: GPL-3.0-or-later

package config

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func seed(f *testing.F) {
	f.Helper()
	for _, dir := range []string{"testdata", "templates"} {
		paths, err := filepath.Glob(dir + "/*.json")
		if err != nil {
			f.Fatal(err)
		}
		for _, p := range paths {
			data, err := os.ReadFile(p)
			if err != nil {
				f.Fatal(err)
			}
			if len(data) < 8<<10 {
				f.Add(data)
			}
		}
	}
	f.Add([]byte("{\"a\": [1, /* x */ 2,], // y\n}"))
	f.Add([]byte("\xef\xbb\xbf{}"))
	f.Add([]byte(`{"upstreams":{"a":{"url":"a://:@"}},"contexts":{"x":{"default":"a"}}}`))
}

// FuzzParse: no text makes Parse panic, every error has a position inside the text, and what is accepted can be written out and compared.
func FuzzParse(f *testing.F) {
	seed(f)
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := parse("f", data, testEnv, nil)
		if err != nil {
			var errs Errors
			if !errors.As(err, &errs) || len(errs) == 0 || c != nil {
				t.Fatalf("config %v, error %v", c, err)
			}
			lines := bytes.Count(data, []byte("\n")) + 1
			for _, e := range errs {
				if e.Line > lines+1 || e.Line > 0 && e.Column < 1 || e.Msg == "" {
					t.Fatalf("%d lines: %+v", lines, e)
				}
			}
			return
		}
		if _, err := json.Marshal(c); err != nil {
			t.Fatal(err)
		}
		if changes := Diff(c, c); len(changes) != 0 {
			t.Fatalf("differs from itself: %+v", changes)
		}
		if err := c.Validate(); err != nil {
			t.Fatalf("accepted once, then refused: %v", err)
		}
		c.Warnings()
	})
}

// FuzzFormat: formatting is idempotent and changes neither the meaning nor the comments.
func FuzzFormat(f *testing.F) {
	seed(f)
	f.Fuzz(func(t *testing.T, data []byte) {
		once, err := Format(data)
		if err != nil {
			return
		}
		twice, err := Format(once)
		if err != nil || !bytes.Equal(once, twice) {
			t.Fatalf("%v\n%q\nonce  %q\ntwice %q", err, data, once, twice)
		}
		a, _ := parseTree(newSource("", data))
		b, _ := parseTree(newSource("", once))
		if a == nil || b == nil || !same(a, b) {
			t.Fatalf("the meaning changed: %q -> %q", data, once)
		}
		if diff := cmp.Diff(comments(data), comments(once)); diff != "" {
			t.Fatalf("comments changed: %q -> %q\n%s", data, once, diff)
		}
	})
}

// comments returns the comments of a valid text, without their white space.
func comments(data []byte) []string {
	var out []string
	for i := 0; i < len(data); i++ {
		switch data[i] {
		case '"':
			for i++; data[i] != '"'; i++ {
				if data[i] == '\\' {
					i++
				}
			}
		case '/':
			n := commentLen(data[i:])
			out = append(out, strings.Join(strings.Fields(string(data[i:i+n+1])), ""))
			i += n
		}
	}
	return out
}

func same(a, b *node) bool {
	if a.kind != b.kind || len(a.members) != len(b.members) || len(a.elems) != len(b.elems) || a.kind != '{' && a.kind != '[' && a.text != b.text {
		return false
	}
	for i := range a.members {
		if a.members[i].key != b.members[i].key || !same(a.members[i].val, b.members[i].val) {
			return false
		}
	}
	for i := range a.elems {
		if !same(a.elems[i], b.elems[i]) {
			return false
		}
	}
	return true
}

// FuzzMerge: a merge follows RFC 7396, as a direct transcription of its pseudocode does.
func FuzzMerge(f *testing.F) {
	f.Add([]byte(`{"a":"b","c":{"d":1}}`), []byte(`{"a":null,"c":{"e":{"f":null,"g":1}}}`))
	f.Add([]byte(`["a"]`), []byte(`{"a":[null]}`))
	f.Add([]byte(`{"a":{"b":1}}`), []byte(`{"a":5,"x":{"y":null}}`))
	f.Fuzz(func(t *testing.T, target, patch []byte) {
		a, aErrs := parseTree(newSource("", target))
		b, bErrs := parseTree(newSource("", patch))
		if a == nil || b == nil || len(aErrs)+len(bErrs) > 0 {
			return
		}
		got, err := json.Marshal(plain(merge(a, b)))
		if err != nil {
			t.Fatal(err)
		}
		want, err := json.Marshal(mergePatch(plain(a), plain(b)))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Fatalf("%s + %s: got %s, want %s", target, patch, got, want)
		}
	})
}

// mergePatch is RFC 7396 section 2.
func mergePatch(target, patch any) any {
	p, ok := patch.(map[string]any)
	if !ok {
		return patch
	}
	t, ok := target.(map[string]any)
	if !ok {
		t = map[string]any{}
	}
	for name, value := range p {
		if value == nil {
			delete(t, name)
		} else {
			t[name] = mergePatch(t[name], value)
		}
	}
	return t
}

func plain(n *node) any {
	switch n.kind {
	case '{':
		m := make(map[string]any)
		for i := range n.members {
			m[n.members[i].key] = plain(n.members[i].val)
		}
		return m
	case '[':
		list := []any{}
		for _, e := range n.elems {
			list = append(list, plain(e))
		}
		return list
	case 'n':
		return nil
	}
	return string(n.kind) + n.text
}
