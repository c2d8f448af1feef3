// SPDX-License-Identifier: GPL-3.0-or-later

package config

import (
	"net/netip"
	"reflect"
	"strings"
)

// field is one key of the schema, as its struct tags describe it.
type field struct {
	key      string
	index    []int
	typ      reflect.Type
	doc      string
	def      string
	hasDef   bool
	min, max string
	pattern  string
	enum     []string
	required bool
	fixed    bool // cannot change while the daemon runs
}

// fieldsOf returns the keys of a struct in the order of the source, embedded structs flattened.
func fieldsOf(t reflect.Type) []field {
	var out []field
	for _, sf := range reflect.VisibleFields(t) {
		key := sf.Tag.Get("json")
		if key == "" {
			continue
		}
		f := field{
			key: key, index: sf.Index, typ: sf.Type,
			doc: sf.Tag.Get("doc"), min: sf.Tag.Get("min"), max: sf.Tag.Get("max"), pattern: sf.Tag.Get("pattern"),
			required: sf.Tag.Get("required") == "true",
			fixed:    sf.Tag.Get("fixed") == "true",
		}
		f.def, f.hasDef = sf.Tag.Lookup("default")
		if e := sf.Tag.Get("enum"); e != "" {
			f.enum = strings.Split(e, ",")
		}
		out = append(out, f)
	}
	return out
}

// isScalar reports whether the type is written as one string, number or boolean although it is a struct or has an underlying type of its
// own.
func isScalar(t reflect.Type) bool {
	switch reflect.Zero(t).Interface().(type) {
	case Duration, Bandwidth, Mark, PortRange, Secret, ProxyURL, netip.Prefix, netip.Addr:
		return true
	}
	return t.Kind() != reflect.Struct && t.Kind() != reflect.Map && t.Kind() != reflect.Slice && t.Kind() != reflect.Pointer
}

// withDefaults sets every field of the struct v that has a default, nested structs included.
func withDefaults(v reflect.Value) {
	for _, f := range fieldsOf(v.Type()) {
		fv := v.FieldByIndex(f.index)
		switch {
		case f.hasDef && fv.Kind() == reflect.Slice:
			for item := range strings.SplitSeq(f.def, ",") {
				elem := reflect.New(fv.Type().Elem()).Elem()
				setText(elem, item)
				fv.Set(reflect.Append(fv, elem))
			}
		case f.hasDef:
			setText(fv, f.def)
		case fv.Kind() == reflect.Struct && !isScalar(fv.Type()):
			withDefaults(fv)
		}
	}
}

// setText sets a scalar from the text of a default. A test parses every default, so that the error cannot happen.
func setText(v reflect.Value, text string) {
	n := &node{kind: '"', text: text}
	switch {
	case isTextual(v.Type()):
	case v.Kind() == reflect.Bool:
		n.kind = hujsonKind(text)
	default:
		n.kind = '0'
	}
	_ = setScalar(v, n)
}
