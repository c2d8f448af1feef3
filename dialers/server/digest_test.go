// SPDX-License-Identifier: GPL-3.0-or-later

package server

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/mutex-proxy/mutex/dialers"
	"github.com/mutex-proxy/mutex/dialers/dialertest"
	"github.com/mutex-proxy/mutex/flow"
)

// digestField answers a nonce.
func digestField(nonce, user, password, algorithm, uri string, nc int) string {
	in := dialers.DigestInput{
		Algorithm: algorithm, User: user, Realm: realm, Password: password, Nonce: nonce, CNonce: "c", NC: fmt.Sprintf("%08x", nc), QOP: "auth",
		Method: "CONNECT", URI: uri,
	}
	return fmt.Sprintf(`Digest username="%s", realm="mprox", nonce="%s", uri="%s", cnonce=c, nc=%s, qop=auth, algorithm=%s, response=%s`,
		user, nonce, uri, in.NC, algorithm, in.Response())
}

func TestDigestCheck(t *testing.T) {
	d := newDigestAuth(map[string]string{"bob": secret, "empty": ""})
	now := time.Unix(1_700_000_000, 0)
	nonce := d.nonce(now)
	other := newDigestAuth(nil).nonce(now)
	const uri = "a:80"
	for _, tt := range []struct {
		name, field string
		at          time.Time
		user        string
		stale       bool
	}{
		{"right", digestField(nonce, "bob", secret, "SHA-256", uri, 1), now, "bob", false},
		{"again", digestField(nonce, "bob", secret, "SHA-256", uri, 1), now, "", true},
		{"md5", digestField(nonce, "bob", secret, "MD5", uri, 3), now, "bob", false},
		{"out of order", digestField(nonce, "bob", secret, "SHA-256-sess", uri, 2), now, "bob", false},
		{"that one again", digestField(nonce, "bob", secret, "SHA-256", uri, 2), now, "", true},
		{"far ahead", digestField(nonce, "bob", secret, "SHA-256", uri, 1000), now, "bob", false},
		{"far behind", digestField(nonce, "bob", secret, "SHA-256", uri, 4), now, "", true},
		{"just behind", digestField(nonce, "bob", secret, "SHA-256", uri, 1000-nonceWindow+1), now, "bob", false},
		{"empty password", digestField(nonce, "empty", "", "SHA-256", uri, 2000), now, "empty", false},
		{"count zero", digestField(nonce, "bob", secret, "SHA-256", uri, 0), now, "", true},
		{"wrong password", digestField(nonce, "bob", "x", "SHA-256", uri, 3000), now, "", false},
		{"unknown user", digestField(nonce, "eve", "", "SHA-256", uri, 3000), now, "", false},
		{"no user", digestField(nonce, "", "", "SHA-256", uri, 3000), now, "", false},
		{"other target", digestField(nonce, "bob", secret, "SHA-256", "b:80", 3000), now, "", false},
		{"unknown algorithm", digestField(nonce, "bob", secret, "SHA-9", uri, 3000), now, "", false},
		{"nonce of another", digestField(other, "bob", secret, "SHA-256", uri, 1), now, "", true},
		{"forged nonce", digestField("AAAA", "bob", secret, "SHA-256", uri, 1), now, "", true},
		{"too late", digestField(nonce, "bob", secret, "SHA-256", uri, 3000), now.Add(nonceLife + 1), "", true},
		{"too early", digestField(nonce, "bob", secret, "SHA-256", uri, 3000), now.Add(-1), "", true},
		{"nothing", "Digest", now, "", false},
		{"rfc 2069", strings.Replace(digestField(nonce, "bob", secret, "SHA-256", uri, 3000), "qop=auth", "qop=x", 1), now, "", false},
	} {
		user, stale := d.check(tt.at, &request{method: "CONNECT", target: uri, auth: tt.field})
		if user != tt.user || stale != tt.stale {
			t.Errorf("%s: %q %v, want %q %v", tt.name, user, stale, tt.user, tt.stale)
		}
	}
}

// What is remembered of nonces is bounded, and forgetting never lets one be used twice.
func TestDigestForgets(t *testing.T) {
	d := newDigestAuth(map[string]string{"bob": secret})
	now := time.Unix(1_700_000_000, 0)
	first := d.nonce(now)
	for i := range 3 * maxNonces {
		at := now.Add(time.Duration(i) * time.Millisecond)
		nonce := first
		if i > 0 {
			nonce = d.nonce(at)
		}
		r := request{method: "CONNECT", target: "a:80", auth: digestField(nonce, "bob", secret, "SHA-256", "a:80", 1)}
		if user, _ := d.check(at, &r); user != "bob" {
			t.Fatalf("nonce %d is refused", i)
		}
		if len(d.used) > maxNonces {
			t.Fatalf("%d nonces are kept", len(d.used))
		}
	}
	r := request{method: "CONNECT", target: "a:80", auth: digestField(first, "bob", secret, "SHA-256", "a:80", 1)}
	if user, stale := d.check(now.Add(time.Minute), &r); user != "" || !stale {
		t.Error("a request can be replayed")
	}
}

func TestDigestTransfer(t *testing.T) {
	_, at := start(t, Config{Users: map[string]string{"bob": secret}, Allow: func(netip.AddrPort) bool { return true }})
	origin := dialertest.Start(t, dialertest.Echo())
	d := dialer(t, "http://bob:"+strings.ReplaceAll(secret, "+", "%2B")+"@"+at.String()+"?auth=digest")
	for range 3 {
		c, err := d.Dial(t.Context(), flow.AddrFrom(origin.Addr))
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
	}
	if _, err := dialer(t, "http://bob:x@"+at.String()+"?auth=digest").Dial(t.Context(), flow.AddrFrom(origin.Addr)); err == nil {
		t.Error("a wrong password is accepted")
	}
}
