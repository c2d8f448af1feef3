// SPDX-License-Identifier: GPL-3.0-or-later

package config

import (
	"maps"
	"reflect"
)

// Overlay is what has been changed on top of a configuration while it is in force: by name, what takes the place of what the file says.
type Overlay struct {
	Upstreams map[string]Upstream
	Pools     map[string]Pool
	Contexts  map[string]Context
	Removed   map[string]bool // contexts that are gone
}

// ParseContext reads one context, as it would stand at contexts.NAME of a file, strictly. ${NAME} is not expanded: the text need not come
// from someone who may know this process's environment. The error is an Errors.
func ParseContext(name string, data []byte) (Context, error) {
	var out Context
	tree, errs := parseTree(newSource("", data))
	if tree == nil {
		return out, errs
	}
	path := joinKey("$.contexts", name)
	d := &decoder{getenv: func(string) (string, bool) { return "", false }}
	d.object(path, tree, reflect.ValueOf(&out).Elem())
	if out.TUN.Name == "" {
		out.TUN.Name = defaultDevice(name)
	}
	return out, pathsOnly(d.errs).errorOrNil()
}

// ParseSelector reads one entry of a context's select, strictly, as ParseContext does.
func ParseSelector(data []byte) (Selector, error) {
	var out Selector
	tree, errs := parseTree(newSource("", data))
	if tree == nil {
		return out, errs
	}
	d := &decoder{getenv: func(string) (string, bool) { return "", false }}
	d.object("$", tree, reflect.ValueOf(&out).Elem())
	return out, pathsOnly(d.errs).errorOrNil()
}

// pathsOnly takes lines and columns out: the text is a request, which nobody has in an editor.
func pathsOnly(es Errors) Errors {
	for _, e := range es {
		e.File, e.Line, e.Column = "", 0, 0
	}
	return es
}

// With returns a copy of c with the overlay on top, checked as Load checks a file. c itself stays as it is.
func (c *Config) With(o Overlay, checks ...Check) (*Config, error) {
	out := *c
	out.Upstreams, out.Pools, out.Contexts = maps.Clone(c.Upstreams), maps.Clone(c.Pools), maps.Clone(c.Contexts)
	put(&out.Upstreams, o.Upstreams)
	put(&out.Pools, o.Pools)
	put(&out.Contexts, o.Contexts)
	for name := range o.Removed {
		delete(out.Contexts, name)
	}
	if len(o.Contexts)+len(o.Removed)+len(o.Upstreams)+len(o.Pools) == 0 {
		return &out, nil
	}
	if len(out.Contexts) == 0 {
		return &out, nil // a file must have one; whoever removes the last one means it
	}
	out.tree = nil // its positions are those of another text
	if err := out.checkAll(nil, checks).errorOrNil(); err != nil {
		return nil, err
	}
	out.tree = c.tree
	return &out, nil
}

func put[V any](into *map[string]V, from map[string]V) {
	if len(from) > 0 && *into == nil {
		*into = make(map[string]V, len(from))
	}
	maps.Copy(*into, from)
}
