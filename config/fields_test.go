// SPDX-License-Identifier: GPL-3.0-or-later

package config

import (
	"iter"
	"reflect"
	"slices"
	"strings"
)

func sortedLines(lines []string) []string {
	slices.Sort(lines)
	return lines
}

// allFields walks every key of the schema, as docs/config.md writes it: contexts.NAME.rules[].port. Match nests in itself: and, or, not are
// keys, what is inside them is not walked again.
func allFields() iter.Seq2[string, field] {
	return func(yield func(string, field) bool) {
		walkFields(reflect.TypeFor[Config](), "", yield)
	}
}

func walkFields(t reflect.Type, prefix string, yield func(string, field) bool) bool {
	for _, f := range fieldsOf(t) {
		path := prefix + f.key
		if !yield(path, f) {
			return false
		}
		inner, sub := f.typ, path
		switch {
		case isScalar(inner):
			continue
		case inner.Kind() == reflect.Slice:
			inner, sub = inner.Elem(), path+"[]"
		case inner.Kind() == reflect.Map:
			inner, sub = inner.Elem(), path+".NAME"
		}
		if inner.Kind() != reflect.Struct || isScalar(inner) || inner == reflect.TypeFor[Match]() {
			continue
		}
		if !walkFields(inner, sub+".", yield) {
			return false
		}
	}
	return true
}

// checkDefault decodes a default and checks it against the bounds of its own field.
func checkDefault(f *field, value string) error {
	tree, errs := parseTree(newSource("default", []byte(value)))
	if len(errs) > 0 {
		return errs
	}
	d := &decoder{getenv: testEnv}
	v := reflect.New(f.typ).Elem()
	d.value("$", tree, v, f)
	if err := d.errs.errorOrNil(); err != nil {
		return err
	}
	want := reflect.New(f.typ).Elem()
	for text := range strings.SplitSeq(f.def, ",") {
		target := want
		if f.typ.Kind() == reflect.Slice {
			target = reflect.New(f.typ.Elem()).Elem()
		}
		setText(target, text)
		if f.typ.Kind() == reflect.Slice {
			want.Set(reflect.Append(want, target))
		}
	}
	if !reflect.DeepEqual(v.Interface(), want.Interface()) {
		return &Error{Msg: "setText and the decoder disagree"}
	}
	return nil
}
