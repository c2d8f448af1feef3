// SPDX-License-Identifier: GPL-3.0-or-later

package config

import (
	"fmt"
	"maps"
	"net"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// Check is a check of another package (routing.Compile, dialers.ParseURL ...) that Load and Parse run together with their own, so that
// everything wrong is reported at once. The Config may be incomplete: values that were wrong are zero. Errors at a position that has one
// already are left out. Make them with Config.ErrorAt.
type Check func(c *Config) []*Error

// Validate checks what one value alone cannot show: references between parts, names, ranges that collide. Load and Parse have done it;
// a Config that was put together by hand needs it. The error is an Errors.
func (c *Config) Validate() error { return c.validate().errorOrNil() }

// validator collects errors of the stage after decoding.
type validator struct {
	c    *Config
	errs Errors
	refs []string // every name that a flow can be sent to
}

func (c *Config) validate() Errors {
	v := &validator{c: c, refs: []string{"direct", "drop", "reject"}}
	v.refs = append(v.refs, slices.Sorted(maps.Keys(c.Upstreams))...)
	v.refs = append(v.refs, slices.Sorted(maps.Keys(c.Pools))...)
	v.top()
	for _, name := range slices.Sorted(maps.Keys(c.Upstreams)) {
		u := c.Upstreams[name]
		v.upstream(joinKey("$.upstreams", name), name, &u)
	}
	for _, name := range slices.Sorted(maps.Keys(c.Pools)) {
		p := c.Pools[name]
		v.pool(joinKey("$.pools", name), name, &p)
	}
	v.poolCycles()
	v.contexts()
	return v.errs
}

// without returns the errors that stand at no position of the earlier ones: what follows from a mistake is not a mistake of its own.
func (es Errors) without(earlier Errors) Errors {
	at := func(e *Error) string {
		if e.Line == 0 {
			return e.Path
		}
		return e.File + ":" + strconv.Itoa(e.Line) + ":" + strconv.Itoa(e.Column)
	}
	seen := make(map[string]bool, len(earlier))
	for _, e := range earlier {
		seen[at(e)] = true
	}
	return slices.DeleteFunc(slices.Clone(es), func(e *Error) bool { return seen[at(e)] })
}

func (v *validator) add(path, format string, args ...any) {
	v.addHint(path, "", format, args...)
}

func (v *validator) addHint(path, hint, format string, args ...any) {
	if len(v.errs) <= maxErrors {
		v.errs = append(v.errs, v.c.errorAt(path, fmt.Sprintf(format, args...), hint))
	}
}

func (v *validator) addKey(path, format string, args ...any) {
	if len(v.errs) <= maxErrors {
		v.errs = append(v.errs, v.c.errorAtKey(path, fmt.Sprintf(format, args...), ""))
	}
}

// name checks the name of an upstream, pool or context: it becomes part of paths, metrics and interface names.
func (v *validator) name(path, name string) {
	if ok, err := regexp.MatchString(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$`, name); err != nil || !ok {
		v.addKey(path, "a name has 1 to 63 letters, digits, _ . - and starts with a letter or digit")
	}
}

// ref checks the name of an upstream or pool; accept lists the built-in ones that make sense there.
func (v *validator) ref(path, name string, accept ...string) {
	switch {
	case isBuiltin(name) && !slices.Contains(accept, name):
		v.add(path, "%q cannot be used here", name)
	case !slices.Contains(v.refs, name) && !v.c.broken("upstreams") && !v.c.broken("pools"):
		v.addHint(path, nearest(name, v.refs), "unknown upstream or pool %q", name)
	}
}

// given reports whether a required key is there, so that its value can be at fault; the decoder has reported those that are not. A
// Config without text is held to have all.
func (v *validator) given(path, key string) bool {
	if v.c.tree == nil {
		return true
	}
	n, _ := v.c.tree.find(path)
	return n.member(key) != nil
}

// broken reports whether a key of the top level is not an object: names inside it are not known then.
func (c *Config) broken(key string) bool {
	if c.tree == nil {
		return false
	}
	m := c.tree.member(key)
	return m != nil && m.val.kind != '{'
}

func (v *validator) absolute(path, file string) {
	if file != "" && !filepath.IsAbs(file) {
		v.add(path, "%q is not an absolute path", file)
	}
}

// empty reports lists that are given without a member: nothing could match them.
func (v *validator) empty(path, key string, given bool, length int) {
	if given && length == 0 {
		v.add(joinKey(path, key), "the list is empty")
	}
}

func (v *validator) top() {
	c := v.c
	v.absolute("$.control.socket", c.Control.Socket)
	// sun_path holds 108 bytes with the terminating zero, unix(7).
	switch n := len(c.Control.Socket); {
	case n == 0:
		v.add("$.control.socket", "the path is empty")
	case n > 107:
		v.add("$.control.socket", "the path has %d bytes, a socket's path at most 107", n)
	}
	v.absolute("$.audit.file", c.Audit.File)
	if l := c.HTTP.Listen; l != "" {
		if err := checkHostPort(l, true); err != nil {
			v.add("$.http.listen", "%v", err)
		}
	}
	if !c.Kernel.MarkMask.contiguous() {
		v.add("$.kernel.mark_mask", "%s is not one run of at least 8 bits, such as 0xff000000", c.Kernel.MarkMask)
	}
	condition := regexp.MustCompile(`^[a-z_][a-z0-9_]*(\{[^{}]*\})? *(==|!=|<=|>=|<|>) *-?[0-9.]+(e-?[0-9]+)?$`)
	seen := make(map[string]bool)
	for i, a := range c.Alerts {
		path := joinIndex("$.alerts", i)
		if seen[a.Name] && a.Name != "" {
			v.add(path+".name", "the name %q is used twice", a.Name)
		}
		seen[a.Name] = true
		if !condition.MatchString(a.When) {
			v.add(path+".when", "%q is not METRIC{LABEL=\"VALUE\"} compared with a number", a.When)
		}
		for j, n := range a.Notify {
			if !strings.HasPrefix(n, "webhook:http://") && !strings.HasPrefix(n, "webhook:https://") && n != "log" {
				v.add(joinIndex(path+".notify", j), "want log or webhook:URL")
			}
		}
	}
}

func (v *validator) upstream(path, name string, u *Upstream) {
	v.name(path, name)
	if isBuiltin(name) {
		v.addKey(path, "%q is built in: use another name", name)
	}
	if u.URL == "" && v.given(path, "url") {
		v.add(path+".url", "the url is empty")
	}
	a, at := &u.Auth, path+".auth"
	start, end := u.URL.userinfo()
	inURL := start < end
	v.absolute(at+".password_file", a.PasswordFile)
	v.absolute(at+".token_file", a.TokenFile)
	password, token := a.Password != "" || a.PasswordFile != "", a.Token != "" || a.TokenFile != ""
	switch {
	case !a.fromFile && a.Password != "" && a.PasswordFile != "":
		v.add(at+".password_file", "password and password_file are both given")
	case !a.fromFile && a.Token != "" && a.TokenFile != "":
		v.add(at+".token_file", "token and token_file are both given")
	case inURL && (a.Username != "" || password || token):
		v.add(at, "credentials are given in the url and here")
	case a.Type == "bearer" && !token:
		v.add(at, "bearer needs token or token_file")
	case a.Type == "bearer" && (password || a.Username != ""):
		v.add(at, "bearer takes a token, no username and password")
	case a.Type != "bearer" && token:
		v.add(at, "a token needs \"type\": \"bearer\"")
	case a.Username == "" && password:
		v.add(at, "a password needs a username")
	case (a.Type == "basic" || a.Type == "digest") && a.Username == "" && !inURL:
		v.add(at, "%s needs a username", a.Type)
	}
}

func (v *validator) pool(path, name string, p *Pool) {
	v.name(path, name)
	if isBuiltin(name) {
		v.addKey(path, "%q is built in: use another name", name)
	}
	if _, taken := v.c.Upstreams[name]; taken {
		v.addKey(path, "an upstream has the name %q too", name)
	}
	v.empty(path, "members", p.Members != nil, len(p.Members))
	for i, m := range p.Members {
		at := joinIndex(path+".members", i)
		v.ref(at, m, "direct")
		if slices.Index(p.Members, m) < i {
			v.add(at, "%q is a member twice: use weight", m)
		}
	}
	// dialers reads URLs.
	if t := p.Health.Target; t != "" && !strings.HasPrefix(t, "http://") && !strings.HasPrefix(t, "https://") {
		if err := checkHostPort(p.Health.Target, false); err != nil {
			v.add(path+".health.target", "%v", err)
		}
	}
	if p.Health.Timeout > p.Health.Interval {
		v.add(path+".health.timeout", "%s is longer than the interval of %s", p.Health.Timeout, p.Health.Interval)
	}
}

// poolCycles reports each pool that contains itself, once a cycle.
func (v *validator) poolCycles() {
	const (
		active = iota + 1
		done
	)
	state := make(map[string]int)
	var stack []string
	var visit func(name string)
	visit = func(name string) {
		state[name] = active
		stack = append(stack, name)
		for i, m := range v.c.Pools[name].Members {
			if _, isPool := v.c.Pools[m]; !isPool {
				continue
			}
			switch state[m] {
			case 0:
				visit(m)
			case active:
				cycle := append(slices.Clone(stack[slices.Index(stack, m):]), m)
				v.add(joinIndex(joinKey("$.pools", name)+".members", i), "the pool contains itself: %s", strings.Join(cycle, " → "))
			}
		}
		stack = stack[:len(stack)-1]
		state[name] = done
	}
	for _, name := range slices.Sorted(maps.Keys(v.c.Pools)) {
		if state[name] == 0 {
			visit(name)
		}
	}
}

// checkHostPort checks host:port; to listen on, the host may be empty.
func checkHostPort(s string, listen bool) error {
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return fmt.Errorf("%q is not host:port", s)
	}
	if host == "" && !listen {
		return fmt.Errorf("%q: the host is empty", s)
	}
	_, err = parsePort(port)
	return err
}
