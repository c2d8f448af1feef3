// SPDX-License-Identifier: GPL-3.0-or-later

package server

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"strconv"
	"sync"
	"time"

	"github.com/mutex-proxy/mutex/dialers"
)

const (
	// realm is part of what clients hash: changing it changes every response.
	realm = "mprox"
	// nonceLife is how long a nonce can be used. Within it, a client needs one round trip for credentials however many requests it makes.
	nonceLife = 5 * time.Minute
	// maxNonces bounds the nonces whose use is remembered. When there are more, the older half becomes stale early.
	maxNonces = 4096
	// nonceWindow is how far out of order requests with one nonce may arrive: as many as bits of the window.
	nonceWindow = 64
)

// digestAuth checks Digest (RFC 7616). A nonce says itself when it was made, and that it was made here; it takes memory only after the first
// request with the right password. The count of each request must be new, so that a request that was overheard cannot be sent again.
type digestAuth struct {
	key   [sha256.Size]byte
	users map[string]string
	decoy string // the password of users that do not exist

	mu     sync.Mutex
	used   map[string]*nonceUse
	oldest time.Time // nonces from before are stale: what had been done with them has been forgotten
}

// nonceUse is which counts of a nonce have been seen.
type nonceUse struct {
	made time.Time
	high uint32 // the highest
	seen uint64 // bit i: high-i
}

func newDigestAuth(users map[string]string) *digestAuth {
	d := &digestAuth{users: users, used: make(map[string]*nonceUse)}
	_, _ = rand.Read(d.key[:]) // never fails: crypto/rand ends the program instead
	d.decoy = rand.Text()
	return d
}

// challenge returns the fields of a 407. SHA-256 comes first; MD5 is for clients that know nothing else.
func (d *digestAuth) challenge(now time.Time, stale bool) string {
	suffix := "\r\n"
	if stale {
		suffix = ", stale=true\r\n"
	}
	var out []byte
	for _, algorithm := range []string{"SHA-256", "MD5"} {
		out = fmt.Appendf(out, "Proxy-Authenticate: Digest realm=\"%s\", qop=\"auth\", algorithm=%s, nonce=\"%s\", charset=UTF-8%s",
			realm, algorithm, d.nonce(now), suffix)
	}
	return string(out)
}

// nonce is a time, something random, and a keyed hash over both.
func (d *digestAuth) nonce(now time.Time) string {
	b := binary.BigEndian.AppendUint64(make([]byte, 0, 8+8+16), uint64(now.UnixNano()))
	b = b[:16]
	_, _ = rand.Read(b[8:])
	return base64.RawURLEncoding.EncodeToString(append(b, d.sign(b)...))
}

func (d *digestAuth) sign(b []byte) []byte {
	h := hmac.New(sha256.New, d.key[:])
	h.Write(b)
	return h.Sum(nil)[:16]
}

// made returns when we made a nonce.
func (d *digestAuth) made(nonce string) (time.Time, bool) {
	b, err := base64.RawURLEncoding.DecodeString(nonce)
	if err != nil || len(b) != 32 || !hmac.Equal(d.sign(b[:16]), b[16:]) {
		return time.Time{}, false
	}
	return time.Unix(0, int64(binary.BigEndian.Uint64(b))), true
}

// check returns the user that a request's credentials belong to, or "". Everything is calculated for users that do not exist too.
func (d *digestAuth) check(now time.Time, r *request) (user string, stale bool) {
	list := dialers.ParseChallenges(r.auth)
	if len(list) != 1 {
		return "", false
	}
	p := list[0].Params
	name := p["username"]
	password, known := d.users[name]
	if !known {
		password = d.decoy
	}
	in := dialers.DigestInput{
		Algorithm: p["algorithm"], User: name, Realm: realm, Password: password, Nonce: p["nonce"], CNonce: p["cnonce"], NC: p["nc"], QOP: p["qop"],
		Method: r.method, URI: r.target,
	}
	want := in.Response()
	right := subtle.ConstantTimeCompare([]byte(want), []byte(p["response"])) == 1
	nc, err := strconv.ParseUint(p["nc"], 16, 32)
	if !right || !known || name == "" || want == "" || p["qop"] != "auth" || p["realm"] != realm || p["uri"] != r.target || err != nil || len(p["nc"]) != 8 {
		return "", false
	}
	made, ours := d.made(p["nonce"])
	if !ours || now.Sub(made) > nonceLife || now.Before(made) || !d.use(now, p["nonce"], made, uint32(nc)) {
		return "", true
	}
	return name, false
}

// use records a count of a nonce, and reports whether it is the first time.
func (d *digestAuth) use(now time.Time, nonce string, made time.Time, nc uint32) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !made.After(d.oldest) || nc == 0 {
		return false
	}
	u := d.used[nonce]
	if u == nil {
		if len(d.used) >= maxNonces {
			d.forgetLocked(now)
		}
		if !made.After(d.oldest) {
			return false
		}
		d.used[nonce] = &nonceUse{made: made, high: nc, seen: 1}
		return true
	}
	switch {
	case nc > u.high:
		if u.seen <<= min(nc-u.high, nonceWindow); nc-u.high >= nonceWindow {
			u.seen = 0
		}
		u.high, u.seen = nc, u.seen|1
		return true
	case u.high-nc >= nonceWindow || u.seen>>(u.high-nc)&1 == 1:
		return false
	}
	u.seen |= 1 << (u.high - nc)
	return true
}

// forgetLocked makes room: nonces whose time is over, or, if they are not half of all, those of the older half of the time.
func (d *digestAuth) forgetLocked(now time.Time) {
	limit := now.Add(-nonceLife)
	for range 2 {
		first := now
		for n, u := range d.used {
			if !u.made.After(limit) {
				delete(d.used, n)
			} else if u.made.Before(first) {
				first = u.made
			}
		}
		d.oldest = limit
		if len(d.used) <= maxNonces/2 {
			return
		}
		limit = first.Add(now.Sub(first) / 2)
	}
}
