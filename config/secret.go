// SPDX-License-Identifier: GPL-3.0-or-later

package config

import (
	"fmt"
	"io"
	"strings"
)

// mask is what a secret prints as.
const mask = "***"

// Secret is a password or a token. However it is printed, logged or marshalled, *** comes out; Reveal is the only way to the text.
type Secret string

// Reveal returns the secret itself. The caller must not log, format or store it.
func (s Secret) Reveal() string { return string(s) }

// String returns ***, or nothing if there is no secret.
func (s Secret) String() string {
	if s == "" {
		return ""
	}
	return mask
}

// Format implements fmt.Formatter for every verb: without it, %x and wrong verbs would print the text.
func (s Secret) Format(w fmt.State, _ rune) { writeMasked(w, s.String()) }

// MarshalText implements encoding.TextMarshaler, which covers JSON and zap.
func (s Secret) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// ProxyURL is the URL of an upstream. However it is printed, its password is ***; Reveal is the only way to the text.
type ProxyURL string

// Reveal returns the URL with its password. The caller must not log, format or store it.
func (u ProxyURL) Reveal() string { return string(u) }

// String returns the URL with *** in place of the password and of the values of header options.
func (u ProxyURL) String() string {
	start, end := u.password()
	if start == end {
		return maskHeaders(string(u))
	}
	return string(u[:start]) + mask + maskHeaders(string(u[end:]))
}

// maskHeaders hides what is sent in header options: it may be a token.
func maskHeaders(s string) string {
	const option = "header="
	var b strings.Builder
	for {
		i := strings.Index(s, option)
		if i < 0 {
			return b.String() + s
		}
		i += len(option)
		b.WriteString(s[:i] + mask)
		_, rest, more := strings.Cut(s[i:], "&")
		if !more {
			return b.String()
		}
		s = "&" + rest
	}
}

// Format implements fmt.Formatter for every verb.
func (u ProxyURL) Format(w fmt.State, _ rune) { writeMasked(w, u.String()) }

// MarshalText implements encoding.TextMarshaler, which covers JSON and zap.
func (u ProxyURL) MarshalText() ([]byte, error) { return []byte(u.String()), nil }

func writeMasked(w io.Writer, s string) {
	// A fmt.State collects into memory: the write cannot fail.
	_, _ = io.WriteString(w, s)
}

// userinfo returns where the userinfo starts and ends: between :// and the last @ of the authority. It is deliberately more generous than
// RFC 3986 section 3.2 (a / or ? that someone forgot to encode inside a password), because what it misses is printed.
func (u ProxyURL) userinfo() (start, end int) {
	if i := strings.Index(string(u), "://"); i >= 0 {
		start = i + len("://")
	}
	rest := string(u[start:])
	at := strings.LastIndexByte(rest, '@')
	if at < 0 {
		return start, start
	}
	return start, start + at
}

// password returns where the password starts and ends; both are equal if there is none.
func (u ProxyURL) password() (start, end int) {
	start, end = u.userinfo()
	colon := strings.IndexByte(string(u[start:end]), ':')
	if colon < 0 {
		return start, start
	}
	return start + colon + 1, end
}
