// SPDX-License-Identifier: GPL-3.0-or-later

package config

import (
	"errors"
	"fmt"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// decoder fills the structs from the tree and collects everything that is wrong on the way.
type decoder struct {
	errs   Errors
	getenv func(string) (string, bool)
	// secrets are the values that hold a secret in clear text: their files must not be readable by everyone.
	secrets []*node
}

func (d *decoder) fail(n *node, path string, err error) {
	if len(d.errs) > maxErrors {
		return
	}
	line, col := n.src.position(n.off)
	e := &Error{File: n.src.name, Line: line, Column: col, Path: path, Msg: err.Error()}
	if h, ok := errors.AsType[*hinted](err); ok {
		e.Hint = h.hint
	}
	d.errs = append(d.errs, e)
}

// value decodes n into v. f holds the bounds, which apply to each element of a list.
func (d *decoder) value(path string, n *node, v reflect.Value, f *field) {
	if n.kind == 'n' {
		d.fail(n, path, errors.New("null is only for removing a key in config.NAME.json; leave the key out"))
		return
	}
	switch {
	case isScalar(v.Type()):
		d.scalar(path, n, v, f)
	case v.Kind() == reflect.Pointer:
		p := reflect.New(v.Type().Elem())
		d.value(path, n, p.Elem(), f)
		v.Set(p)
	case v.Kind() == reflect.Slice:
		d.list(path, n, v, f)
	case v.Kind() == reflect.Map:
		d.table(path, n, v, f)
	default:
		d.object(path, n, v)
	}
}

func (d *decoder) list(path string, n *node, v reflect.Value, f *field) {
	elems := n.elems
	scalar := n.kind != '['
	if scalar {
		elems = []*node{n}
	}
	out := reflect.MakeSlice(v.Type(), len(elems), len(elems))
	for i, e := range elems {
		sub := path
		if !scalar {
			sub = joinIndex(path, i)
		}
		if e.kind == '[' {
			d.fail(e, sub, errors.New("a list inside a list"))
			continue
		}
		d.value(sub, e, out.Index(i), f)
	}
	v.Set(out)
}

func (d *decoder) table(path string, n *node, v reflect.Value, f *field) {
	if n.kind != '{' {
		d.fail(n, path, fmt.Errorf("want an object, got %s", n.describe()))
		return
	}
	out := reflect.MakeMapWithSize(v.Type(), len(n.members))
	for i := range n.members {
		m := &n.members[i]
		elem := reflect.New(v.Type().Elem()).Elem()
		d.value(joinKey(path, m.key), m.val, elem, f)
		out.SetMapIndex(reflect.ValueOf(m.key), elem)
	}
	v.Set(out)
}

func (d *decoder) object(path string, n *node, v reflect.Value) {
	withDefaults(v)
	if n.kind != '{' {
		d.fail(n, path, fmt.Errorf("want an object, got %s", n.describe()))
		return
	}
	fields := fieldsOf(v.Type())
	keys := make([]string, len(fields))
	byKey := make(map[string]*field, len(fields))
	for i := range fields {
		keys[i] = fields[i].key
		byKey[fields[i].key] = &fields[i]
	}
	seen := make(map[string]bool, len(n.members))
	for i := range n.members {
		m := &n.members[i]
		f := byKey[m.key]
		if f == nil && len(d.errs) > maxErrors {
			continue
		} else if f == nil {
			line, col := m.keySrc.position(m.keyOff)
			e := &Error{File: m.keySrc.name, Line: line, Column: col, Path: joinKey(path, m.key), Msg: "unknown key", Hint: nearest(m.key, keys)}
			d.errs = append(d.errs, e)
			// A misspelt key is one mistake: it does not also count as missing.
			if _, meant, ok := strings.Cut(e.Hint, `"`); ok {
				seen[strings.TrimSuffix(meant, `"?`)] = true
			}
			continue
		}
		seen[m.key] = true
		d.value(joinKey(path, m.key), m.val, v.FieldByIndex(f.index), f)
	}
	for i := range fields {
		if fields[i].required && !seen[fields[i].key] {
			d.fail(n, path, fmt.Errorf("%q is missing: %s", fields[i].key, fields[i].doc))
		}
	}
}

func (d *decoder) scalar(path string, n *node, v reflect.Value, f *field) {
	if n.kind == '"' {
		expanded, ok := d.expand(path, n, v)
		if !ok {
			return
		}
		// The copy keeps the position; the tree keeps what was written.
		c := *n
		c.text = expanded
		n = &c
	}
	if err := setScalar(v, n); err != nil {
		d.fail(n, path, err)
		return
	}
	if f == nil {
		return
	}
	if err := f.check(v); err != nil {
		d.fail(n, path, err)
	}
}

// check applies the bounds of the field's tags to one scalar.
func (f *field) check(v reflect.Value) error {
	if v.Kind() == reflect.String && len(f.enum) > 0 && !slices.Contains(f.enum, v.String()) {
		return &hinted{fmt.Sprintf("%q is not one of: %s", v.String(), strings.Join(f.enum, ", ")), nearest(v.String(), f.enum)}
	}
	if v.Kind() == reflect.String && f.pattern != "" {
		re, err := regexp.Compile(f.pattern)
		if err != nil {
			return err
		}
		if !re.MatchString(v.String()) {
			return fmt.Errorf("%q: want %s", v.String(), strings.ToLower(f.doc[:1])+strings.TrimSuffix(f.doc[1:], "."))
		}
	}
	if dur, ok := reflect.TypeAssert[Duration](v); ok {
		lo, hi := bound(f.min), bound(f.max)
		if f.min != "" && dur < lo || f.max != "" && dur > hi {
			return fmt.Errorf("%s is not between %s and %s", dur, lo, hi)
		}
		return nil
	}
	var val int64
	switch {
	case v.CanInt():
		val = v.Int()
	case v.CanUint():
		val = int64(min(v.Uint(), 1<<62))
	default:
		return nil
	}
	lo, loErr := strconv.ParseInt(f.min, 10, 64)
	hi, hiErr := strconv.ParseInt(f.max, 10, 64)
	switch {
	case loErr == nil && hiErr == nil && (val < lo || val > hi):
		return fmt.Errorf("%d is not between %d and %d", val, lo, hi)
	case loErr == nil && val < lo:
		return fmt.Errorf("%d is less than %d", val, lo)
	}
	return nil
}

// bound reads a duration of a tag; an absent one is 0.
func bound(s string) Duration {
	d, _ := parseDuration(s)
	return d
}

// expand replaces ${NAME} by the environment's value and $${ by ${. In the userinfo of a proxy URL the value is percent-encoded, so that a
// password may hold any character.
func (d *decoder) expand(path string, n *node, v reflect.Value) (string, bool) {
	_, isSecret := reflect.TypeAssert[Secret](v)
	_, isURL := reflect.TypeAssert[ProxyURL](v)
	userStart, userEnd := 0, 0
	if isURL {
		userStart, userEnd = ProxyURL(n.text).userinfo()
		from, to := ProxyURL(n.text).password()
		isSecret = from < to && hasLiteral(n.text[from:to])
	} else if isSecret {
		isSecret = hasLiteral(n.text)
	}
	if isSecret {
		d.secrets = append(d.secrets, n)
	}
	var b strings.Builder
	rest := n.text
	for {
		i := strings.Index(rest, "${")
		if i < 0 {
			b.WriteString(rest)
			return b.String(), true
		}
		if i > 0 && rest[i-1] == '$' {
			b.WriteString(rest[:i-1] + "${")
			rest = rest[i+2:]
			continue
		}
		b.WriteString(rest[:i])
		name, after, ok := strings.Cut(rest[i+2:], "}")
		if !ok || !isEnvName(name) {
			d.fail(n, path, &hinted{"${ is not followed by NAME}", "write $${ for the characters ${"})
			return "", false
		}
		val, ok := d.getenv(name)
		if !ok {
			d.fail(n, path, fmt.Errorf("environment variable %s is not set", name))
			return "", false
		}
		if at := len(n.text) - len(rest) + i; at >= userStart && at < userEnd {
			val = escapeUserinfo(val)
		}
		b.WriteString(val)
		rest = after
	}
}

// hasLiteral reports whether any of the text is not a reference to the environment.
func hasLiteral(s string) bool {
	for s != "" {
		if !strings.HasPrefix(s, "${") {
			return true
		}
		_, after, ok := strings.Cut(s, "}")
		if !ok {
			return true
		}
		s = after
	}
	return false
}

func isEnvName(s string) bool {
	for i, c := range s {
		if c != '_' && (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (i == 0 || c < '0' || c > '9') {
			return false
		}
	}
	return s != ""
}

// escapeUserinfo percent-encodes everything but the unreserved characters of RFC 3986 section 2.3.
func escapeUserinfo(s string) string {
	const hex = "0123456789ABCDEF"
	var b strings.Builder
	for i := range len(s) {
		c := s[i]
		if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("-._~", c) >= 0 {
			b.WriteByte(c)
			continue
		}
		b.WriteString(string([]byte{'%', hex[c>>4], hex[c&15]}))
	}
	return b.String()
}
