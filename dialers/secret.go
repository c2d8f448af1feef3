// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"crypto/subtle"
	"fmt"
)

// redacted is what every secret looks like to whoever prints it.
const redacted = "***"

// Secret is a password or a token. It prints *** through every fmt verb, JSON, text marshalling and zap, so that a forgotten log line
// cannot leak it; Reveal is the one way to its value. Copies share their bytes: Wipe wipes them all.
//
// The bytes are behind a pointer because fmt prints what it cannot call a method of (an unexported field, the verb %p) by reflection.
type Secret struct{ p *[]byte }

// NewSecret returns a Secret that holds a copy of s.
func NewSecret(s string) Secret {
	b := []byte(s)
	return Secret{&b}
}

// bytes returns the value itself, not a copy.
func (s Secret) bytes() []byte {
	if s.p == nil {
		return nil
	}
	return *s.p
}

// Reveal returns the value. The caller must not put it into an error, a log line or anything that outlives the request it is for.
func (s Secret) Reveal() string { return string(s.bytes()) }

// IsZero reports whether the secret is empty.
func (s Secret) IsZero() bool { return len(s.bytes()) == 0 }

// Equal compares two secrets in constant time for a given length.
func (s Secret) Equal(o Secret) bool { return subtle.ConstantTimeCompare(s.bytes(), o.bytes()) == 1 }

// Wipe overwrites the value in memory, in all copies of s.
func (s Secret) Wipe() { clear(s.bytes()) }

// String returns ***.
func (Secret) String() string { return redacted }

// GoString returns ***, for %#v.
func (Secret) GoString() string { return redacted }

// Format prints *** whatever the verb and the flags.
func (Secret) Format(f fmt.State, _ rune) { fmt.Fprint(f, redacted) }

// MarshalText returns ***, for encoders of JSON, XML and YAML alike.
func (Secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }
