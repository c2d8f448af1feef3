// SPDX-License-Identifier: GPL-3.0-or-later

package config

import (
	"encoding/json"
	"maps"
	"reflect"
	"slices"
)

// Change is one value that differs between two configurations. Secrets are masked; a changed secret is a change all the same.
type Change struct {
	Path         string // JSON path
	Old, New     string // JSON; "" when there is none
	FixedAtStart bool   // cannot change while the daemon runs
}

// Diff returns what differs between two configurations, in the order of the schema. Lists are compared whole. Contexts, upstreams and
// pools that exist on one side only are one change each.
func Diff(old, current *Config) []Change {
	var out []Change
	diffStruct("$", reflect.ValueOf(old).Elem(), reflect.ValueOf(current).Elem(), &out)
	return out
}

func diffStruct(path string, a, b reflect.Value, out *[]Change) {
	for _, f := range fieldsOf(a.Type()) {
		diffValue(joinKey(path, f.key), a.FieldByIndex(f.index), b.FieldByIndex(f.index), f.fixed, out)
	}
}

func diffValue(path string, a, b reflect.Value, fixed bool, out *[]Change) {
	switch {
	case a.Kind() == reflect.Struct && !isScalar(a.Type()):
		diffStruct(path, a, b, out)
	case a.Kind() == reflect.Map && a.Type().Elem().Kind() == reflect.Struct:
		keys := make(map[string]bool)
		for _, m := range []reflect.Value{a, b} {
			for _, k := range m.MapKeys() {
				keys[k.String()] = true
			}
		}
		for _, k := range slices.Sorted(maps.Keys(keys)) {
			key := reflect.ValueOf(k)
			av, bv, sub := a.MapIndex(key), b.MapIndex(key), joinKey(path, k)
			if av.IsValid() && bv.IsValid() {
				diffStruct(sub, av, bv, out)
				continue
			}
			*out = append(*out, Change{Path: sub, Old: render(av), New: render(bv)})
		}
	case a.Kind() == reflect.Slice && a.Len() == 0 && b.Len() == 0:
		// An absent list and an empty one mean the same.
	case !reflect.DeepEqual(a.Interface(), b.Interface()):
		*out = append(*out, Change{Path: path, Old: render(a), New: render(b), FixedAtStart: fixed})
	}
}

// render returns the value as JSON, in which secrets mask themselves.
func render(v reflect.Value) string {
	if !v.IsValid() {
		return ""
	}
	data, err := json.Marshal(v.Interface())
	if err != nil {
		return ""
	}
	return string(data)
}
