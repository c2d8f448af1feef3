// SPDX-License-Identifier: GPL-3.0-or-later

package config

import (
	"encoding/json"
	"net/netip"
	"reflect"
	"strconv"
	"strings"
)

// object is one JSON schema.
type object map[string]any

// Schema returns the JSON schema (draft 2020-12) of the configuration, for editors. It is made from the structs, and knows what one value
// alone can show; Parse knows the rest.
func Schema() []byte {
	defs := object{}
	root := structSchema(reflect.TypeFor[Config](), defs)
	root["$schema"] = "https://json-schema.org/draft/2020-12/schema"
	root["title"] = "mprox configuration"
	root["$defs"] = defs
	data, err := json.MarshalIndent(root, "", "  ")
	if err != nil {
		// Maps of strings, numbers and slices of them always marshal.
		return nil
	}
	return append(data, '\n')
}

func structSchema(t reflect.Type, defs object) object {
	props, required := object{}, []string{}
	for _, f := range fieldsOf(t) {
		s := typeSchema(f.typ, &f, defs)
		s["description"] = f.doc
		if f.hasDef {
			s["default"] = defaultValue(&f)
		}
		props[f.key] = s
		if f.required {
			required = append(required, f.key)
		}
	}
	out := object{"type": "object", "properties": props, "additionalProperties": false}
	if len(required) > 0 {
		out["required"] = required
	}
	return out
}

func typeSchema(t reflect.Type, f *field, defs object) object {
	switch {
	case isScalar(t):
		return scalarSchema(t, f)
	case t.Kind() == reflect.Pointer:
		return typeSchema(t.Elem(), f, defs)
	case t.Kind() == reflect.Slice:
		item := typeSchema(t.Elem(), f, defs)
		return object{"anyOf": []object{item, {"type": "array", "items": item}}}
	case t.Kind() == reflect.Map:
		return object{"type": "object", "additionalProperties": typeSchema(t.Elem(), f, defs)}
	}
	if _, known := defs[t.Name()]; !known {
		defs[t.Name()] = object{} // ends the recursion of Match
		defs[t.Name()] = structSchema(t, defs)
	}
	return object{"$ref": "#/$defs/" + t.Name()}
}

func scalarSchema(t reflect.Type, f *field) object {
	switch reflect.Zero(t).Interface().(type) {
	case Duration:
		return object{"type": "string", "pattern": `^([0-9]+(\.[0-9]+)?(ns|us|µs|ms|s|m|h))+$|^0$|\$\{`}
	case Bandwidth:
		return object{"anyOf": []object{{"const": 0}, {"type": "string", "pattern": `^0$|^[0-9]+(\.[0-9]+)? *([kmg]?bit|[kKMG]?B|[KMG]iB)(/s)?$|\$\{`}}}
	case Mark:
		return object{"anyOf": []object{{"type": "integer", "minimum": 0, "maximum": 1<<32 - 1}, {"type": "string", "pattern": `^0x[0-9A-Fa-f]{1,8}$|^[0-9]+$|\$\{`}}}
	case PortRange:
		return object{"anyOf": []object{{"type": "integer", "minimum": 1, "maximum": 65535}, {"type": "string", "pattern": `^[0-9]+$|^[0-9]*[-:][0-9]*$|\$\{`}}}
	case netip.Prefix, netip.Addr:
		return object{"type": "string", "pattern": `^[0-9A-Fa-f.:]+(/[0-9]{1,3})?$|\$\{`}
	}
	switch t.Kind() {
	case reflect.Bool:
		return object{"type": "boolean"}
	case reflect.String:
		s := object{"type": "string"}
		if len(f.enum) > 0 {
			s["enum"] = f.enum
		}
		if f.pattern != "" {
			s["pattern"] = f.pattern
		}
		return s
	}
	s := object{"type": "integer"}
	if lo, err := strconv.ParseInt(f.min, 10, 64); err == nil {
		s["minimum"] = lo
	} else if t.Kind() == reflect.Uint32 {
		s["minimum"] = 0
	}
	if hi, err := strconv.ParseInt(f.max, 10, 64); err == nil {
		s["maximum"] = hi
	} else if t.Kind() == reflect.Uint32 {
		s["maximum"] = int64(1<<32 - 1)
	}
	return s
}

// defaultValue returns the default in the type that it has in the configuration.
func defaultValue(f *field) any {
	t := f.typ
	if t.Kind() == reflect.Slice {
		return strings.Split(f.def, ",")
	}
	if t.Kind() == reflect.Bool {
		return f.def == "true"
	}
	if i, err := strconv.ParseInt(f.def, 10, 64); err == nil && !isTextual(t) {
		return i
	}
	return f.def
}
