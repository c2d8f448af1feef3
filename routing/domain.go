// SPDX-License-Identifier: GPL-3.0-or-later

package routing

import (
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"strings"
)

// Bounds of names (RFC 1035 section 2.3.4) and of regular expressions (ours: compiling is not linear in the length).
const (
	maxName  = 253
	maxLabel = 63
	maxRegex = 4096
)

// domainSet is a set of names and of whole domains: a trie by labels, from the right. A look-up costs one map access a label, however
// many names there are.
type domainSet struct{ root domainNode }

type domainNode struct {
	children map[string]*domainNode
	self     bool // the name that ends here is in the set
	below    bool // every name below is in the set
}

func (s *domainSet) add(name string, self, below bool) {
	n := &s.root
	for name != "" {
		label := name
		if i := strings.LastIndexByte(name, '.'); i >= 0 {
			name, label = name[:i], name[i+1:]
		} else {
			name = ""
		}
		child := n.children[label]
		if child == nil {
			child = &domainNode{}
			if n.children == nil {
				n.children = make(map[string]*domainNode)
			}
			n.children[label] = child
		}
		n = child
	}
	n.self = n.self || self
	n.below = n.below || below
}

// contains reports whether the name, lower case and without trailing dot, is in the set.
func (s *domainSet) contains(name string) bool {
	n := &s.root
	for {
		i := strings.LastIndexByte(name, '.')
		n = n.children[name[i+1:]]
		switch {
		case n == nil:
			return false
		case i < 0:
			return n.self
		case n.below:
			return true
		}
		name = name[:i]
	}
}

// addPattern adds what the key domain accepts: a name, *.name (every name below it) or +.name (the name and every name below it).
func (s *domainSet) addPattern(p string) error {
	prefix, rest := "", p
	if len(p) > 2 && p[1] == '.' && (p[0] == '*' || p[0] == '+') {
		prefix, rest = p[:1], p[2:]
	}
	if strings.ContainsAny(rest, "*+") {
		return fmt.Errorf("%q: wildcards are only *.name and +.name", p)
	}
	name, err := normalName(rest)
	if err != nil {
		return err
	}
	s.add(name, prefix != "*", prefix != "")
	return nil
}

// addSuffix adds what the key domain_suffix accepts: name (itself and below) or .name (only below).
func (s *domainSet) addSuffix(p string) error {
	rest, dotted := strings.CutPrefix(p, ".")
	name, err := normalName(rest)
	if err != nil {
		return err
	}
	s.add(name, !dotted, true)
	return nil
}

// normalName returns the name as flows carry it: lower case, without the trailing dot.
func normalName(s string) (string, error) {
	name := strings.ToLower(strings.TrimSuffix(s, "."))
	if name == "" {
		return "", errors.New("the name is empty")
	}
	if len(name) > maxName {
		return "", fmt.Errorf("%.32q...: a name has at most %d characters", s, maxName)
	}
	if _, err := netip.ParseAddr(name); err == nil {
		return "", fmt.Errorf("%q is an address: use ip_cidr", s)
	}
	for label := range strings.SplitSeq(name, ".") {
		if label == "" || len(label) > maxLabel {
			return "", fmt.Errorf("%q: each label of a name has 1 to %d characters", s, maxLabel)
		}
		for i := range len(label) {
			c := label[i]
			switch {
			case c >= 0x80:
				return "", fmt.Errorf("%q: write international names in their ASCII form (xn--...)", s)
			case c != '-' && c != '_' && (c < 'a' || c > 'z') && (c < '0' || c > '9'):
				return "", fmt.Errorf("%q: %q cannot occur in a name", s, c)
			}
		}
	}
	return name, nil
}

func compileRegex(s string) (*regexp.Regexp, error) {
	if len(s) > maxRegex {
		return nil, fmt.Errorf("a regular expression has at most %d characters", maxRegex)
	}
	if s == "" {
		return nil, errors.New("the regular expression is empty: it would match everything")
	}
	re, err := regexp.Compile(s)
	if err != nil {
		// regexp's own text starts with "error parsing regexp: ".
		return nil, fmt.Errorf("%s", strings.TrimPrefix(err.Error(), "error parsing regexp: "))
	}
	return re, nil
}
