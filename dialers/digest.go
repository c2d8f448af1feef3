// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"crypto/md5" //nolint:gosec // RFC 7616 has it, and servers that know nothing else
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"net/url"
	"strings"
	"sync"
)

// maxChallenges bounds the challenges of one reply, and the parameters of each.
const maxChallenges = 32

// Challenge is one challenge of Proxy-Authenticate, or one set of credentials: both are a scheme and parameters (RFC 9110 section 11.3).
type Challenge struct {
	Scheme string            // lower case
	Params map[string]string // names in lower case, values without quotes
}

// ParseChallenges reads the value of one Proxy-Authenticate or Proxy-Authorization field. Challenges after one that is malformed are lost;
// token68 data (Basic, Negotiate) is passed over.
func ParseChallenges(field string) []Challenge {
	var out []Challenge
	p := params{rest: field}
	for len(out) < maxChallenges {
		p.skip(" \t,")
		name := p.token()
		if name == "" {
			break
		}
		p.skip(" \t")
		if !p.take('=') { // a scheme, not a parameter of the last one
			out = append(out, Challenge{Scheme: strings.ToLower(name), Params: make(map[string]string)})
			p.token68()
			continue
		}
		p.skip(" \t")
		value, ok := p.value()
		if !ok || len(out) == 0 {
			break
		}
		last := out[len(out)-1].Params
		key := strings.ToLower(name)
		if _, twice := last[key]; twice || len(last) >= maxChallenges {
			return out[:len(out)-1] // RFC 9110 section 11.2: a name occurs once; which one counts would be a guess
		}
		last[key] = value
	}
	return out
}

// params is a cursor over a field.
type params struct{ rest string }

func (p *params) skip(set string) { p.rest = strings.TrimLeft(p.rest, set) }

func (p *params) take(c byte) bool {
	if p.rest == "" || p.rest[0] != c {
		return false
	}
	p.rest = p.rest[1:]
	return true
}

// token takes a token (RFC 9110 section 5.6.2); "" if there is none.
func (p *params) token() string {
	i := 0
	for i < len(p.rest) && tokenByte(p.rest[i]) {
		i++
	}
	t := p.rest[:i]
	p.rest = p.rest[i:]
	return t
}

func tokenByte(c byte) bool {
	return c > ' ' && c < 0x7f && strings.IndexByte(`()<>@,;:\"/[]?={}`, c) < 0
}

// token68 passes over the data of Basic and the like, which stands where the first parameter would.
func (p *params) token68() {
	p.skip(" \t")
	i := 0
	for i < len(p.rest) && (tokenByte(p.rest[i]) || p.rest[i] == '/') {
		i++
	}
	j := i
	for j < len(p.rest) && p.rest[j] == '=' {
		j++
	}
	if end := strings.TrimLeft(p.rest[j:], " \t"); i > 0 && (end == "" || end[0] == ',') {
		p.rest = p.rest[j:]
	}
}

// value takes a token or a quoted string (RFC 9110 section 5.6.4).
func (p *params) value() (string, bool) {
	if !p.take('"') {
		t := p.token()
		return t, t != ""
	}
	var b strings.Builder
	for i := 0; i < len(p.rest); i++ {
		switch c := p.rest[i]; c {
		case '"':
			p.rest = p.rest[i+1:]
			return b.String(), true
		case '\\':
			if i++; i < len(p.rest) {
				b.WriteByte(p.rest[i])
			}
		default:
			b.WriteByte(c)
		}
	}
	return "", false
}

// digestAlgorithm returns the hash of an algorithm of RFC 7616, its rank among them (0 = not known), and whether it is a -sess one.
func digestAlgorithm(name string) (h func() hash.Hash, rank int, sess bool) {
	name, sess = strings.CutSuffix(strings.ToUpper(name), "-SESS")
	switch name {
	case "SHA-512-256":
		return sha512.New512_256, 3, sess
	case "SHA-256":
		return sha256.New, 2, sess
	case "MD5", "":
		return md5.New, 1, sess
	}
	return nil, 0, false
}

// DigestInput is what a response of RFC 7616 section 3.4.1 is made from. QOP is "auth", or "" for the form of RFC 2069.
type DigestInput struct {
	Algorithm, User, Realm, Password, Nonce, CNonce, NC, QOP, Method, URI string
}

// Response returns the value of response, in hexadecimal; "" for an algorithm that is not known.
func (d *DigestInput) Response() string {
	algorithm, rank, sess := digestAlgorithm(d.Algorithm)
	if rank == 0 {
		return ""
	}
	sum := func(parts ...string) string {
		h := algorithm()
		for i, s := range parts {
			if i > 0 {
				h.Write([]byte{':'})
			}
			h.Write([]byte(s))
		}
		return hex.EncodeToString(h.Sum(nil))
	}
	a1 := sum(d.User, d.Realm, d.Password)
	if sess {
		a1 = sum(a1, d.Nonce, d.CNonce)
	}
	a2 := sum(d.Method, d.URI)
	if d.QOP == "" {
		return sum(a1, d.Nonce, a2)
	}
	return sum(a1, d.Nonce, d.NC, d.CNonce, d.QOP, a2)
}

// DigestUser returns what is sent in the place of the user name with userhash=true; "" for an algorithm that is not known.
func DigestUser(algorithm, user, realm string) string {
	h, rank, _ := digestAlgorithm(algorithm)
	if rank == 0 {
		return ""
	}
	sum := h()
	sum.Write([]byte(user + ":" + realm))
	return hex.EncodeToString(sum.Sum(nil))
}

// digestChallenge is a Digest challenge that can be answered, and how often its nonce has been used.
type digestChallenge struct {
	algorithm, realm, nonce, opaque, qop string
	hasOpaque, stale, userhash           bool
	nc                                   uint32 // guarded by digest.mu once it is shared
}

// errNoDigest is why a 407 cannot be answered with Digest.
var errNoDigest = errors.New("the proxy offers no Digest that can be answered (RFC 7616, qop=auth)")

// strongest returns the best of the Digest challenges in a reply.
func strongest(fields []string) (*digestChallenge, error) {
	var best *digestChallenge
	top := 0
	for _, f := range fields {
		for _, c := range ParseChallenges(f) {
			_, rank, sess := digestAlgorithm(c.Params["algorithm"])
			rank *= 2
			if sess {
				rank++
			}
			qop, asked := c.Params["qop"]
			if asked {
				if qop = hasAuth(qop); qop == "" {
					continue
				}
			}
			nonce, ok := c.Params["nonce"]
			if c.Scheme != "digest" || rank <= max(1, top) || !ok {
				continue
			}
			top = rank
			best = &digestChallenge{algorithm: c.Params["algorithm"], realm: c.Params["realm"], nonce: nonce, qop: qop}
			best.opaque, best.hasOpaque = c.Params["opaque"], has(c.Params, "opaque")
			best.stale, best.userhash = strings.EqualFold(c.Params["stale"], "true"), strings.EqualFold(c.Params["userhash"], "true")
		}
	}
	if best == nil {
		return nil, errNoDigest
	}
	return best, nil
}

func has(m map[string]string, key string) bool {
	_, ok := m[key]
	return ok
}

// hasAuth returns "auth" if it is one of a list of qop values.
func hasAuth(list string) string {
	for q := range strings.SplitSeq(list, ",") {
		if strings.EqualFold(strings.TrimSpace(q), "auth") {
			return "auth"
		}
	}
	return ""
}

// digest is what an upstream remembers of Digest: the challenge whose nonce has been accepted, so that the next flow needs no 407.
type digest struct {
	mu     sync.Mutex
	shared *digestChallenge // nil until one has been accepted
	always bool             // the proxy has refused Basic and taken Digest
}

// take returns the shared challenge with the number of this use of it, or nil.
func (d *digest) take() (*digestChallenge, uint32) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.shared == nil || d.shared.qop == "" && d.shared.nc > 0 {
		return nil, 0 // without qop there is no count: each nonce is used once
	}
	d.shared.nc++
	return d.shared, d.shared.nc
}

// accepted shares a challenge that one flow has answered with success, or the nonce that the proxy wants to be used next.
func (d *digest) accepted(c *digestChallenge, next string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.always = true
	if next != "" {
		fresh := *c
		fresh.nonce, fresh.nc, fresh.stale = next, 0, false
		c = &fresh
	}
	d.shared = c
}

// refused forgets a challenge whose nonce was not taken.
func (d *digest) refused(c *digestChallenge) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.shared == c {
		d.shared = nil
	}
}

// authorization returns the credentials that answer c, and the part of them that must not be shown.
func (c *digestChallenge) authorization(user string, password Secret, uri string, nc uint32) (field, secret string) {
	var random [16]byte
	_, _ = rand.Read(random[:]) // never fails: crypto/rand ends the program instead
	in := DigestInput{
		Algorithm: c.algorithm, User: user, Realm: c.realm, Password: password.Reveal(), Nonce: c.nonce, CNonce: hex.EncodeToString(random[:]),
		NC: fmt.Sprintf("%08x", nc), QOP: c.qop, Method: "CONNECT", URI: uri,
	}
	response := in.Response()
	var b strings.Builder
	b.WriteString("Digest ")
	switch {
	case c.userhash:
		fmt.Fprintf(&b, `username=%s, userhash=true`, quoted(DigestUser(c.algorithm, user, c.realm)))
	case printable(user):
		b.WriteString("username=" + quoted(user))
	default: // RFC 7616 section 3.4.4
		b.WriteString("username*=UTF-8''" + strings.ReplaceAll(url.QueryEscape(user), "+", "%20"))
	}
	fmt.Fprintf(&b, `, realm=%s, nonce=%s, uri=%s, response="%s"`, quoted(c.realm), quoted(c.nonce), quoted(uri), response)
	if c.algorithm != "" {
		b.WriteString(", algorithm=" + c.algorithm) // one of those we know: a token
	}
	_, _, sess := digestAlgorithm(c.algorithm)
	if c.qop != "" || sess {
		fmt.Fprintf(&b, `, cnonce="%s"`, in.CNonce)
	}
	if c.qop != "" {
		fmt.Fprintf(&b, `, qop=auth, nc=%s`, in.NC)
	}
	if c.hasOpaque {
		b.WriteString(", opaque=" + quoted(c.opaque))
	}
	return b.String(), response
}

// quoted is a quoted string. The values come out of header fields and have no line breaks; other control characters are what the proxy sent.
func quoted(s string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(s) + `"`
}

// printable reports whether a name can stand in a quoted string as it is.
func printable(s string) bool {
	for _, c := range []byte(s) {
		if c < ' ' || c >= 0x7f {
			return false
		}
	}
	return true
}
