// SPDX-License-Identifier: GPL-3.0-or-later

package config

import (
	"bytes"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/tailscale/hujson"
)

// source is one file that a configuration was read from.
type source struct {
	name  string
	data  []byte
	lines []int // offsets of the lines
}

func newSource(name string, data []byte) *source {
	s := &source{name: name, data: data, lines: []int{0}}
	for i, c := range data {
		if c == '\n' {
			s.lines = append(s.lines, i+1)
		}
	}
	return s
}

// position returns line and column, both from 1, of a byte offset. Columns count characters, as editors do.
func (s *source) position(off int) (line, col int) {
	off = min(max(off, 0), len(s.data))
	line, exact := slices.BinarySearch(s.lines, off)
	if exact {
		line++
	}
	return line, 1 + utf8.RuneCount(s.data[s.lines[line-1]:off])
}

// node is a JSON value that knows where it was written. After a merge the nodes of one tree come from several files.
type node struct {
	src  *source
	off  int
	kind hujson.Kind // { [ " 0 t f n
	text string      // the string's value, or the literal of a number, boolean or null

	members []member
	elems   []*node
}

type member struct {
	key    string
	keySrc *source
	keyOff int
	val    *node
}

// describe names the kind of value for error messages.
func (n *node) describe() string {
	switch n.kind {
	case '{':
		return "an object"
	case '[':
		return "a list"
	case '"':
		return "a string"
	case '0':
		return "a number"
	case 'n':
		return "null"
	}
	return "a boolean"
}

func (n *node) member(key string) *member {
	for i := range n.members {
		if n.members[i].key == key {
			return &n.members[i]
		}
	}
	return nil
}

// parseTree parses one file. The error is an Errors: a syntax error ends parsing, duplicate keys are all reported.
func parseTree(src *source) (*node, Errors) {
	if len(src.data) > MaxSize {
		return nil, Errors{{File: src.name, Msg: fmt.Sprintf("the file is larger than %d MiB", MaxSize>>20)}}
	}
	if off, ok := tooDeep(src.data); ok {
		line, col := src.position(off)
		return nil, Errors{{File: src.name, Line: line, Column: col, Msg: fmt.Sprintf("nested deeper than %d levels", maxDepth)}}
	}
	// hujson wants a newline after a comment that ends the file; people's editors do not always write one.
	v, err := hujson.Parse(append(bytes.Clone(src.data), '\n'))
	if err != nil {
		return nil, Errors{syntaxError(src, err)}
	}
	var errs Errors
	root := build(src, &v, "$", &errs)
	return root, errs
}

// syntaxError turns hujson's error, which carries the position only as text, into ours.
func syntaxError(src *source, err error) *Error {
	e := &Error{File: src.name, Line: 1, Column: 1, Msg: err.Error()}
	var line, col int
	if n, _ := fmt.Sscanf(e.Msg, "hujson: line %d, column %d:", &line, &col); n != 2 {
		return e
	}
	_, after, _ := strings.Cut(e.Msg, ": ")
	_, e.Msg, _ = strings.Cut(after, ": ")
	// hujson repeats the literal, which may be a password.
	switch literal, found := strings.CutPrefix(e.Msg, "invalid literal: "); {
	case found && strings.HasPrefix(literal, `"`):
		e.Msg = "invalid string: a control character or a backslash is not escaped"
	case found:
		e.Msg = "invalid literal: not a number, true or false; strings need quotes"
	}
	e.Msg = strings.Replace(e.Msg, "unexpected EOF", "unexpected end of file", 1)
	// hujson counts bytes, and the newline that parseTree has added.
	off := len(src.data)
	if line <= len(src.lines) {
		off = src.lines[line-1] + col - 1
	}
	line, col = src.position(off)
	e.Line, e.Column = line, col
	return e
}

func build(src *source, v *hujson.Value, path string, errs *Errors) *node {
	n := &node{src: src, off: v.StartOffset, kind: v.Value.Kind()}
	switch t := v.Value.(type) {
	case *hujson.Object:
		seen := make(map[string]int, len(t.Members))
		for i := range t.Members {
			m := &t.Members[i]
			key := literal(m.Name.Value)
			sub := joinKey(path, key)
			val := build(src, &m.Value, sub, errs)
			if first, dup := seen[key]; dup && len(*errs) > maxErrors {
				continue
			} else if dup {
				line, col := src.position(m.Name.StartOffset)
				firstLine, _ := src.position(first)
				*errs = append(*errs, &Error{File: src.name, Line: line, Column: col, Path: sub, Msg: fmt.Sprintf("duplicate key, first given in line %d", firstLine)})
				continue
			}
			seen[key] = m.Name.StartOffset
			n.members = append(n.members, member{key: key, keySrc: src, keyOff: m.Name.StartOffset, val: val})
		}
	case *hujson.Array:
		for i := range t.Elements {
			n.elems = append(n.elems, build(src, &t.Elements[i], joinIndex(path, i), errs))
		}
	case hujson.Literal:
		n.text = t.String()
	}
	return n
}

func literal(v hujson.ValueTrimmed) string {
	l, _ := v.(hujson.Literal)
	return l.String()
}

// tooDeep finds the first bracket that opens a level beyond maxDepth, outside strings and comments.
func tooDeep(data []byte) (off int, found bool) {
	depth := 0
	for i := 0; i < len(data); i++ {
		switch c := data[i]; c {
		case '{', '[':
			if depth++; depth > maxDepth {
				return i, true
			}
		case '}', ']':
			depth--
		case '"':
			for i++; i < len(data) && data[i] != '"'; i++ {
				if data[i] == '\\' {
					i++
				}
			}
		case '/':
			i += commentLen(data[i:])
		}
	}
	return 0, false
}

// commentLen returns how many bytes after the first the comment at the start of data goes on; 0 if it is none.
func commentLen(data []byte) int {
	var end string
	switch {
	case bytes.HasPrefix(data, []byte("//")):
		end = "\n"
	case bytes.HasPrefix(data, []byte("/*")):
		end = "*/"
	default:
		return 0
	}
	i := bytes.Index(data[2:], []byte(end))
	if i < 0 {
		return len(data) - 1
	}
	return 2 + i + len(end) - 1
}

// merge applies patch to target by JSON Merge Patch (RFC 7396) and returns the result. Neither argument is changed; each value keeps the
// position of the file that it came from.
func merge(target, patch *node) *node {
	if patch.kind != '{' {
		return patch
	}
	out := &node{src: patch.src, off: patch.off, kind: '{'}
	patches := make(map[string]*member, len(patch.members))
	for i := range patch.members {
		patches[patch.members[i].key] = &patch.members[i]
	}
	if target != nil && target.kind == '{' {
		out.src, out.off = target.src, target.off
		for _, m := range target.members {
			p := patches[m.key]
			delete(patches, m.key)
			switch {
			case p == nil:
				out.members = append(out.members, m)
			case p.val.kind == 'n':
			default:
				// The key's position is the patch's: that is the line which has to be changed.
				out.members = append(out.members, member{m.key, p.keySrc, p.keyOff, merge(m.val, p.val)})
			}
		}
	}
	for _, p := range patch.members {
		if p.val.kind == 'n' || patches[p.key] == nil {
			continue
		}
		out.members = append(out.members, member{p.key, p.keySrc, p.keyOff, merge(nil, p.val)})
	}
	return out
}

// joinKey extends a JSON path by a member. Keys that are not plain words are quoted: $.upstreams["a.b"].
func joinKey(path, key string) string {
	if isPlainKey(key) {
		return path + "." + key
	}
	return path + "[" + strconv.Quote(key) + "]"
}

func joinIndex(path string, i int) string { return path + "[" + strconv.Itoa(i) + "]" }

func isPlainKey(key string) bool {
	for _, c := range key {
		if c != '_' && c != '-' && c != '$' && (c < '0' || c > '9') && (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') {
			return false
		}
	}
	return key != ""
}

// step is one element of a JSON path: an index, or a key if the index is negative.
type step struct {
	key   string
	index int
}

// splitPath reads a JSON path as joinKey and joinIndex write it. What it cannot read it leaves out, so that the nearest ancestor is found.
func splitPath(path string) []step {
	rest := strings.TrimPrefix(path, "$")
	var steps []step
	for rest != "" {
		switch {
		case strings.HasPrefix(rest, `["`):
			quoted, err := strconv.QuotedPrefix(rest[1:])
			if err != nil {
				return steps
			}
			key, err := strconv.Unquote(quoted)
			if err != nil {
				return steps
			}
			steps = append(steps, step{key: key, index: -1})
			rest = strings.TrimPrefix(rest[1+len(quoted):], "]")
		case rest[0] == '[':
			num, after, ok := strings.Cut(rest[1:], "]")
			i, err := strconv.Atoi(num)
			if !ok || err != nil || i < 0 {
				return steps
			}
			steps = append(steps, step{index: i})
			rest = after
		default:
			rest = strings.TrimPrefix(rest, ".")
			end := strings.IndexAny(rest, ".[")
			if end < 0 {
				end = len(rest)
			}
			if end == 0 {
				return steps
			}
			steps = append(steps, step{key: rest[:end], index: -1})
			rest = rest[end:]
		}
	}
	return steps
}

// find returns the value at the path or, if there is none, its nearest ancestor, and the member that holds it, if one does. An index into
// a value that is not a list is the value itself: a scalar is accepted where a list is expected.
func (n *node) find(path string) (*node, *member) {
	var holder *member
	for _, s := range splitPath(path) {
		switch {
		case s.index < 0:
			m := n.member(s.key)
			if m == nil {
				return n, holder
			}
			n, holder = m.val, m
		case n.kind != '[' && s.index == 0:
		case s.index < len(n.elems):
			n, holder = n.elems[s.index], nil
		default:
			return n, holder
		}
	}
	return n, holder
}

// Locate returns the line and the column, both from 1, of the value at a JSON path such as $.contexts.default.rules[2].port. If there is
// no such value (a key that is missing), the position is that of its nearest ancestor; 1, 1 if data cannot be parsed at all.
func Locate(data []byte, jsonPath string) (line, col int) {
	root, _ := parseTree(newSource("", data))
	if root == nil {
		return 1, 1
	}
	n, _ := root.find(jsonPath)
	return n.src.position(n.off)
}
