// SPDX-License-Identifier: GPL-3.0-or-later

package dns

import (
	"fmt"
	"net/netip"
	"strings"
)

// matcher finds the first of a list of rules that has a pattern for a name: one map look-up a label, whatever the number of rules.
type matcher struct {
	exact  map[string]int // x
	suffix map[string]int // x and below
	below  map[string]int // below x
	single int            // "*", -1 if there is none
}

func newMatcher() *matcher {
	return &matcher{exact: map[string]int{}, suffix: map[string]int{}, below: map[string]int{}, single: -1}
}

// addDomain adds a pattern of Rule.Domain.
func (m *matcher) addDomain(pattern string, rule int) error {
	into, name := m.exact, pattern
	switch {
	case pattern == "*":
		if m.single < 0 {
			m.single = rule
		}
		return nil
	case strings.HasPrefix(pattern, "*."):
		into, name = m.below, pattern[2:]
	case strings.HasPrefix(pattern, "+."):
		into, name = m.suffix, pattern[2:]
	}
	return addPattern(into, name, pattern, rule)
}

// addSuffix adds a pattern of Rule.DomainSuffix.
func (m *matcher) addSuffix(pattern string, rule int) error {
	if name, ok := strings.CutPrefix(pattern, "."); ok {
		return addPattern(m.below, name, pattern, rule)
	}
	return addPattern(m.suffix, pattern, pattern, rule)
}

func addPattern(into map[string]int, name, pattern string, rule int) error {
	name = canonical(name)
	if !isHostname(name) {
		return fmt.Errorf("domain pattern %q: not a host name (names in other scripts are written as xn--…)", pattern)
	}
	if _, ok := into[name]; !ok { // the first rule decides
		into[name] = rule
	}
	return nil
}

// match returns the lowest rule that has a pattern for host (in canonical form), -1 if none has. It does not allocate.
func (m *matcher) match(host string) int {
	best := -1
	take := func(rule int, ok bool) {
		if ok && (best < 0 || rule < best) {
			best = rule
		}
	}
	rule, ok := m.exact[host]
	take(rule, ok)
	take(m.single, m.single >= 0 && host != "" && strings.IndexByte(host, '.') < 0)
	rule, ok = m.suffix[host]
	take(rule, ok)
	if len(m.suffix) == 0 && len(m.below) == 0 {
		return best
	}
	for rest := host; ; {
		i := strings.IndexByte(rest, '.')
		if i < 0 {
			return best
		}
		rest = rest[i+1:]
		rule, ok = m.suffix[rest]
		take(rule, ok)
		rule, ok = m.below[rest]
		take(rule, ok)
	}
}

// canonical returns the form names have inside this program: lower case, without the trailing dot.
func canonical(name string) string {
	return strings.ToLower(strings.TrimSuffix(name, "."))
}

// isHostname reports whether a canonical name may be sent to an upstream as a destination: letters, digits, hyphens and underscores in
// labels of 1 to 63 bytes, 253 in all, and not an IP literal. Anything else (spaces, line breaks, NUL are legal in DNS) has no business
// in a SOCKS or HTTP request.
func isHostname(host string) bool {
	if host == "" || len(host) > 253 {
		return false
	}
	label := 0
	for i := range len(host) {
		switch c := host[i]; {
		case c >= 'a' && c <= 'z', c >= '0' && c <= '9', c == '-', c == '_':
			if label++; label > 63 {
				return false
			}
		case c == '.' && label > 0:
			label = 0
		default:
			return false
		}
	}
	if label == 0 {
		return false
	}
	if c := host[len(host)-1]; c < '0' || c > '9' { // no IPv4 literal ends in anything but a digit, and IPv6 needs colons
		return true
	}
	_, err := netip.ParseAddr(host)
	return err != nil
}
