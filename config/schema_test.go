// SPDX-License-Identifier: GPL-3.0-or-later

package config

import (
	"encoding/json"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/tailscale/hujson"
)

func decodedSchema(t *testing.T) map[string]any {
	t.Helper()
	var s map[string]any
	if err := json.Unmarshal(Schema(), &s); err != nil {
		t.Fatal(err)
	}
	return s
}

// TestSchemaAcceptsWhatParseAccepts: the valid inputs and the templates pass the schema, and each key of the schema has a description.
func TestSchemaAcceptsWhatParseAccepts(t *testing.T) {
	t.Parallel()
	root := decodedSchema(t)
	inputs, err := filepath.Glob("testdata/*.json")
	if err != nil {
		t.Fatal(err)
	}
	more, err := filepath.Glob("templates/*.json")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range append(inputs, more...) {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		std, err := hujson.Standardize(append(data, '\n'))
		if err != nil {
			continue // the schema is asked about JSON only
		}
		var v any
		if err := json.Unmarshal(std, &v); err != nil {
			t.Fatal(err)
		}
		problem := validateSchema(root, root, v, "$")
		_, parseErr := parse(path, data, testEnv, nil)
		if parseErr == nil && problem != "" {
			t.Errorf("%s is valid, but the schema says: %s", path, problem)
		}
	}
	for _, bad := range []string{
		`{"contrl": {}}`, `{"log": {"level": "x"}}`, `{"log": 5}`, `{"upstreams": {"a": {}}}`, `{"upstreams": {"a": {"url": 5}}}`,
		`{"kernel": {"table_base": 1}}`, `{"kernel": {"mark_mask": "x"}}`, `{"contexts": {"a": {"default": "x", "tun": {"mtu": 1}}}}`,
		`{"contexts": {"a": {"default": "x", "rules": {"upstream": "x", "port": 0}}}}`, `{"contexts": {"a": {"default": "x", "rules": [{"port": 1}]}}}`,
		`{"contexts": {"a": {"default": "x", "rules": [{"upstream": "x", "or": {"upstream": "y"}}]}}}`, `{"contexts": {"a": {"default": "x", "dial_timeout": 5}}}`,
		`{"contexts": {"a": {"default": "x", "bypass": {"network": ["sctp"]}}}}`, `{"contexts": {"a": {"default": "x", "limits": {"bandwidth": 5}}}}`,
	} {
		var v any
		if err := json.Unmarshal([]byte(bad), &v); err != nil {
			t.Fatal(err)
		}
		if validateSchema(root, root, v, "$") == "" {
			t.Errorf("the schema accepts %s", bad)
		}
		if _, err := Parse("x", []byte(bad)); err == nil {
			t.Errorf("Parse accepts %s", bad)
		}
	}
}

// validateSchema knows the part of JSON schema that Schema uses, and reports anything else.
func validateSchema(root, s map[string]any, v any, at string) string {
	for key, arg := range s {
		problem := ""
		switch key {
		case "$schema", "title", "$defs", "description", "default", "properties":
		case "$ref":
			def := root["$defs"].(map[string]any)[strings.TrimPrefix(arg.(string), "#/$defs/")]
			problem = validateSchema(root, def.(map[string]any), v, at)
		case "type":
			if got := jsonType(v); got != arg && (arg != "number" || got != "integer") {
				problem = fmt.Sprintf("%s: want %v, got %s", at, arg, got)
			}
		case "const":
			if !reflect.DeepEqual(arg, v) {
				problem = fmt.Sprintf("%s: want %v", at, arg)
			}
		case "enum":
			if !slices.Contains(arg.([]any), v) {
				problem = fmt.Sprintf("%s: %v is not in %v", at, v, arg)
			}
		case "pattern":
			if s, ok := v.(string); ok && !regexp.MustCompile(arg.(string)).MatchString(s) {
				problem = fmt.Sprintf("%s: %q does not match %s", at, s, arg)
			}
		case "minimum":
			if f, ok := v.(float64); ok && f < arg.(float64) {
				problem = fmt.Sprintf("%s: %v is too small", at, f)
			}
		case "maximum":
			if f, ok := v.(float64); ok && f > arg.(float64) {
				problem = fmt.Sprintf("%s: %v is too large", at, f)
			}
		case "required":
			for _, k := range arg.([]any) {
				if m, ok := v.(map[string]any); ok && m[k.(string)] == nil {
					problem = fmt.Sprintf("%s: %s is missing", at, k)
				}
			}
		case "items":
			list, _ := v.([]any)
			for i, e := range list {
				if problem == "" {
					problem = validateSchema(root, arg.(map[string]any), e, joinIndex(at, i))
				}
			}
		case "additionalProperties":
			problem = validateMembers(root, s, v, at)
		case "anyOf":
			problem = validateAny(root, arg.([]any), v, at)
		default:
			problem = "the test does not know the keyword " + key
		}
		if problem != "" {
			return problem
		}
	}
	return ""
}

func validateMembers(root, s map[string]any, v any, at string) string {
	m, _ := v.(map[string]any)
	props, _ := s["properties"].(map[string]any)
	for k, e := range m {
		sub, known := props[k].(map[string]any)
		if !known {
			if sub, known = s["additionalProperties"].(map[string]any); !known {
				return joinKey(at, k) + ": unknown"
			}
		}
		if problem := validateSchema(root, sub, e, joinKey(at, k)); problem != "" {
			return problem
		}
	}
	return ""
}

func validateAny(root map[string]any, options []any, v any, at string) string {
	var problems []string
	for _, o := range options {
		p := validateSchema(root, o.(map[string]any), v, at)
		if p == "" {
			return ""
		}
		problems = append(problems, p)
	}
	return strings.Join(problems, " / ")
}

func jsonType(v any) string {
	switch v := v.(type) {
	case string:
		return "string"
	case bool:
		return "boolean"
	case float64:
		if v == math.Trunc(v) {
			return "integer"
		}
		return "number"
	case []any:
		return "array"
	case map[string]any:
		return "object"
	}
	return "null"
}

// docRow is a line of a reference table: | `key` | type | default | meaning |.
var docRow = regexp.MustCompile("(?m)^\\| `([a-zA-Z$][^`]*)` \\| ([^|]*) \\| ([^|]*) \\| (.+) \\|$")

// TestDocumentation: docs/config.md, the schema and the structs name the same keys, with the same types and defaults.
func TestDocumentation(t *testing.T) {
	t.Parallel()
	data, err := os.ReadFile("../docs/config.md")
	if err != nil {
		t.Fatal(err)
	}
	rows := make(map[string][]string)
	for _, m := range docRow.FindAllStringSubmatch(string(data), -1) {
		if rows[m[1]] != nil {
			t.Errorf("%s is documented twice", m[1])
		}
		rows[m[1]] = m[2:]
	}
	schema := decodedSchema(t)
	for path, f := range allFields() {
		row := rows[path]
		delete(rows, path)
		want := []string{docType(&f), docDefault(&f)}
		switch {
		case f.doc == "":
			t.Errorf("%s has no description", path)
		case row == nil:
			t.Errorf("not documented: | `%s` | %s | %s | %s |", path, want[0], want[1], f.doc+docBounds(&f))
		case strings.TrimSpace(row[0]) != want[0] || strings.TrimSpace(row[1]) != want[1]:
			t.Errorf("%s: documented as %q, want %q", path, row[:2], want)
		case !strings.HasSuffix(row[2], docBounds(&f)):
			t.Errorf("%s: the description does not end with%s", path, docBounds(&f))
		}
		prop := schemaProperty(schema, path)
		if prop == nil || prop["description"] != f.doc {
			t.Errorf("%s: not in the schema, or not described there: %v", path, prop)
		}
	}
	for path := range rows {
		t.Errorf("documented, but there is no such key: %s", path)
	}
}

// schemaProperty follows a path of the documentation through the schema.
func schemaProperty(root map[string]any, path string) map[string]any {
	cur := root
	for part := range strings.SplitSeq(path, ".") {
		for cur["$ref"] != nil || cur["anyOf"] != nil {
			if ref, ok := cur["$ref"].(string); ok {
				cur = root["$defs"].(map[string]any)[strings.TrimPrefix(ref, "#/$defs/")].(map[string]any)
				continue
			}
			cur = cur["anyOf"].([]any)[0].(map[string]any)
		}
		if part == "NAME" {
			cur, _ = cur["additionalProperties"].(map[string]any)
		} else {
			props, _ := cur["properties"].(map[string]any)
			cur, _ = props[strings.TrimSuffix(part, "[]")].(map[string]any)
		}
		if cur == nil {
			return nil
		}
	}
	return cur
}

// docType names the type of a key as the documentation does.
func docType(f *field) string {
	t, list := f.typ, ""
	if t.Kind() == reflect.Slice {
		t, list = t.Elem(), "list of "
	}
	if t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if list == "" {
		return typeName(t)
	}
	return list + plural(typeName(t))
}

func typeName(t reflect.Type) string {
	switch {
	case t == reflect.TypeFor[ProxyURL]():
		return "url"
	case t.PkgPath() != "" && isScalar(t):
		return map[string]string{"PortRange": "port", "Prefix": "cidr", "Addr": "address"}[t.Name()] + map[string]string{
			"Duration": "duration", "Bandwidth": "bandwidth", "Mark": "mask", "Secret": "secret",
		}[t.Name()]
	case t.Kind() == reflect.Map:
		return "object of " + plural(typeName(t.Elem()))
	case t.Kind() == reflect.Slice:
		return "list of " + plural(typeName(t.Elem()))
	case t.Kind() == reflect.Struct:
		return "object"
	case t.Kind() == reflect.Bool:
		return "boolean"
	case t.Kind() == reflect.String:
		return "string"
	}
	return "integer"
}

func plural(s string) string {
	switch {
	case strings.HasPrefix(s, "list of "):
		return "lists of " + strings.TrimPrefix(s, "list of ")
	case strings.HasSuffix(s, "s"):
		return s + "es"
	}
	return s + "s"
}

func docDefault(f *field) string {
	switch {
	case f.required:
		return "required"
	case f.hasDef:
		return "`" + f.def + "`"
	}
	return "–"
}

// docBounds is how the description of a key ends: with its values or its range.
func docBounds(f *field) string {
	switch {
	case len(f.enum) > 0:
		return " Values: `" + strings.Join(f.enum, "` `") + "`."
	case f.min != "" && f.max != "":
		return " " + f.min + " to " + f.max + "."
	case f.min != "":
		return " At least " + f.min + "."
	case f.max != "":
		return " At most " + f.max + "."
	}
	return ""
}

func TestDocumentationExamplesAreValid(t *testing.T) {
	t.Parallel()
	data, err := os.ReadFile("../docs/config.md")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, block := range regexp.MustCompile("(?s)```jsonc\n(.*?)```").FindAllStringSubmatch(string(data), -1) {
		text := block[1]
		if !strings.Contains(text, `"upstreams"`) {
			text = `"upstreams": { "paris": { "url": "socks5h://192.0.2.1:1080" }, "berlin": { "url": "http://192.0.2.2:3128" } },` + "\n" + text
		}
		if !strings.Contains(text, `"contexts"`) {
			text += `, "contexts": { "default": { "default": "paris" } }`
		}
		if strings.HasPrefix(strings.TrimSpace(text), `"`) {
			text = "{" + text + "}"
		}
		n++
		if _, err := parse("example", []byte(text), testEnv, nil); err != nil {
			t.Errorf("%v\n%s", err, text)
		}
	}
	if n < 8 {
		t.Errorf("only %d examples", n)
	}
}
