// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"bytes"
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/mutex-proxy/mutex/dialers/dialertest"
	"github.com/mutex-proxy/mutex/flow"
)

// The examples of RFC 7616 section 3.9, its user hash as erratum 4897 has it.
func TestDigestResponse(t *testing.T) {
	mufasa := DigestInput{
		User: "Mufasa", Realm: "http-auth@example.org", Password: "Circle of Life", Nonce: "7ypf/xlj9XXwfDPEoM4URrv/xwf94BcCAzFZH4GiTo0v",
		CNonce: "f2/wE4q74E6zIJEtWaHKaf5wv/H5QzzpXusqGemxURZJ", NC: "00000001", QOP: "auth", Method: "GET", URI: "/dir/index.html",
	}
	rfc2069 := DigestInput{ // with its erratum 749
		User: "Mufasa", Realm: "testrealm@host.com", Password: "CircleOfLife", Nonce: "dcd98b7102dd2f0e8b11d0f600bfb0c093", Method: "GET", URI: "/dir/index.html",
	}
	for _, tt := range []struct {
		algorithm string
		in        DigestInput
		want      string
	}{
		{"MD5", mufasa, "8ca523f5e9506fed4657c9700eebdbec"},
		{"", mufasa, "8ca523f5e9506fed4657c9700eebdbec"},
		{"SHA-256", mufasa, "753927fa0e85d155564e2e272a28d1802ca10daf4496794697cf8db5856cb6c1"},
		{"md5", rfc2069, "1949323746fe6a43ef61f9606e7febea"},
		{"SHA-3", mufasa, ""},
	} {
		tt.in.Algorithm = tt.algorithm
		if got := tt.in.Response(); got != tt.want {
			t.Errorf("%s: %s, want %s", tt.algorithm, got, tt.want)
		}
	}
	if got := DigestUser("SHA-512-256", "J\u00e4s\u00f8n Doe", "api@example.org"); got != "793263caabb707a56211940d90411ea4a575adeccb7e360aeb624ed06ece9b0b" {
		t.Errorf("user hash %s", got)
	}
	one, two := mufasa, mufasa
	one.Algorithm, two.Algorithm = "MD5-sess", "MD5-sess"
	if two.CNonce = "x"; one.Response() == mufasa.Response() || one.Response() == two.Response() {
		t.Error("-sess does nothing")
	}
}

func TestParseChallenges(t *testing.T) {
	type m = map[string]string
	for _, tt := range []struct {
		field string
		want  []Challenge
	}{
		{`Basic realm="a, b\"c\\"`, []Challenge{{"basic", m{"realm": `a, b"c\`}}}},
		{`Negotiate, NTLM TlRM==, Digest realm="x",nonce=abc , qop = "auth,auth-int", Basic realm=y`, []Challenge{
			{"negotiate", m{}},
			{"ntlm", m{}},
			{"digest", m{"realm": "x", "nonce": "abc", "qop": "auth,auth-int"}},
			{"basic", m{"realm": "y"}},
		}},
		{`Basic dXNlcjpwYXNz/+`, []Challenge{{"basic", m{}}}},
		{`Digest realm="never ends`, []Challenge{{"digest", m{}}}},
		{`Digest nonce="a", Nonce="b"`, nil},
		{`realm="x"`, nil},
		{`, ,`, nil},
		{"", nil},
	} {
		got := ParseChallenges(tt.field)
		if len(got) == 0 {
			got = nil
		}
		if d := cmp.Diff(tt.want, got); d != "" {
			t.Errorf("%s: %s", tt.field, d)
		}
	}
}

func FuzzParseChallenges(f *testing.F) {
	for _, s := range []string{`Basic realm="a"`, `Digest realm="x", nonce="y", qop="auth", algorithm=SHA-256, Basic realm=z`, `NTLM TlRM==`, `a=b`, `Digest a="\`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if n := len(ParseChallenges(s)); n > maxChallenges {
			t.Fatal(n)
		}
		if c, err := strongest([]string{s}); err == nil {
			field, _ := c.authorization("u", NewSecret("p"), "a:1", 1)
			back := ParseChallenges(field)
			if len(back) != 1 || back[0].Params["nonce"] != c.nonce || back[0].Params["realm"] != c.realm {
				t.Fatalf("%q does not come back from %q", s, field)
			}
		}
	})
}

// digestProxy checks Digest as a server does. It counts how it was asked.
type digestProxy struct {
	t         *testing.T
	challenge string // parameters beside realm and nonce
	before    string // challenges before it
	close     bool   // after a 407
	rude      bool   // closes after a 407 although it says that it does not
	http10    bool
	password  string // "p" if empty
	next      bool   // Proxy-Authentication-Info

	mu       sync.Mutex
	nonce    int
	requests []string          // what each was: plain, basic, or the nc of digest
	oldest   int               // the first nonce that is good
	used     map[string]string // the last nc of each nonce
}

func (p *digestProxy) start() *dialertest.Server {
	p.used = make(map[string]string)
	return dialertest.Start(p.t, func(c *dialertest.Conv) error {
		for {
			var head []byte
			for b := make([]byte, 1); !bytes.HasSuffix(head, []byte("\r\n\r\n")); head = append(head, b[0]) {
				if _, err := io.ReadFull(c, b); err != nil {
					return err
				}
			}
			reply, ok := p.judge(string(head))
			if _, err := io.WriteString(c, reply); err != nil {
				return err
			}
			if ok {
				return nil
			}
			if p.close || p.rude {
				return io.EOF
			}
		}
	}, dialertest.Echo())
}

func (p *digestProxy) judge(head string) (reply string, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	_, field, asked := strings.Cut(head, "Proxy-Authorization: ")
	field, _, _ = strings.Cut(field, "\r\n")
	extra := ""
	switch {
	case !asked:
		p.requests = append(p.requests, "plain")
	case strings.HasPrefix(field, "Basic"):
		p.requests = append(p.requests, "basic")
	default:
		c := ParseChallenges(field)[0].Params
		p.requests = append(p.requests, c["nc"])
		user, want := c["username"], "u"
		if c["userhash"] == "true" {
			want = DigestUser(c["algorithm"], "u", c["realm"])
		}
		in := DigestInput{
			Algorithm: c["algorithm"], User: "u", Realm: c["realm"], Password: "p", Nonce: c["nonce"], CNonce: c["cnonce"], NC: c["nc"], QOP: c["qop"],
			Method: "CONNECT", URI: c["uri"],
		}
		if p.password != "" {
			in.Password = p.password
		}
		right := in.Response() == c["response"] && user == want && c["opaque"] == "o" && strings.HasPrefix(head, "CONNECT "+c["uri"]+" ")
		n, _ := strconv.Atoi(strings.TrimPrefix(c["nonce"], "n"))
		fresh := n >= p.oldest && (c["nc"] > p.used[c["nonce"]] || c["nc"] == "" && !has(p.used, c["nonce"])) // as strict as squid
		if right && fresh {
			p.used[c["nonce"]] = c["nc"]
			next := ""
			if p.next {
				p.nonce++
				next = fmt.Sprintf("Proxy-Authentication-Info: nextnonce=\"n%d\"\r\n", p.nonce)
			}
			return "HTTP/1.1 200 OK\r\n" + next + "\r\n", true
		}
		if right {
			extra = ", stale=true"
		}
	}
	p.nonce++
	version, conn := "1.1", ""
	if p.http10 {
		version = "1.0"
	}
	if p.close {
		conn = "Connection: close\r\n"
	}
	return fmt.Sprintf("HTTP/%s 407 X\r\n%sContent-Length: 4\r\n%sProxy-Authenticate: Digest realm=\"r\", nonce=\"n%d\", opaque=\"o\"%s%s\r\n\r\nbody",
		version, conn, p.before, p.nonce, p.challenge, extra), false
}

// expire makes every nonce stale.
func (p *digestProxy) expire() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.oldest = p.nonce + 1
}

func TestDigest(t *testing.T) {
	const sha = `, qop="auth-int, auth", algorithm=SHA-256`
	weak := "Proxy-Authenticate: Digest realm=\"r\", nonce=\"bad\", algorithm=MD5, qop=\"auth\", Digest realm=r, nonce=bad, algorithm=SHA-9\r\n"
	for _, tt := range []struct {
		name  string
		auth  string
		p     *digestProxy
		conns int
		want  string // of two flows and one after the nonce has expired
		fails bool
	}{
		{name: "sha-256", auth: "digest", p: &digestProxy{challenge: sha}, want: "plain 1 2 3 1", conns: 3},
		{name: "md5", auth: "digest", p: &digestProxy{challenge: `, qop="auth"`}, want: "plain 1 2 3 1", conns: 3},
		{name: "sess", auth: "digest", p: &digestProxy{challenge: sha + "-sess"}, want: "plain 1 2 3 1", conns: 3},
		{name: "userhash", auth: "digest", p: &digestProxy{challenge: sha + ", userhash=true"}, want: "plain 1 2 3 1", conns: 3},
		{name: "without qop", auth: "digest", p: &digestProxy{challenge: ", algorithm=MD5"}, want: "plain - plain - plain -", conns: 3},
		{name: "strongest", auth: "digest", p: &digestProxy{challenge: sha, before: weak}, want: "plain 1 2 3 1", conns: 3},
		{name: "closes", auth: "digest", p: &digestProxy{challenge: sha, close: true}, want: "plain 1 2 3 1", conns: 5},
		{name: "http/1.0", auth: "digest", p: &digestProxy{challenge: sha, http10: true}, want: "plain 1 2 3 1", conns: 5},
		{name: "closes without a word", auth: "digest", p: &digestProxy{challenge: sha, rude: true}, want: "plain 1 2 3 1", conns: 5},
		{name: "next nonce", auth: "digest", p: &digestProxy{challenge: sha, next: true}, want: "plain 1 1 1 1", conns: 3},
		{name: "basic first", p: &digestProxy{challenge: sha}, want: "basic 1 2 3 1", conns: 3},
		{name: "basic only", auth: "basic", p: &digestProxy{challenge: sha}, want: "basic", conns: 1, fails: true},
		{name: "basic refused", p: &digestProxy{challenge: sha, before: "Proxy-Authenticate: Basic realm=x\r\n"}, want: "basic", conns: 1, fails: true},
		{name: "wrong password", auth: "digest", p: &digestProxy{challenge: sha, password: "q"}, want: "plain 1", conns: 1, fails: true},
		{name: "auth-int alone", auth: "digest", p: &digestProxy{challenge: `, qop="auth-int"`}, want: "plain", conns: 1, fails: true},
		{name: "unknown algorithm", auth: "digest", p: &digestProxy{challenge: `, qop="auth", algorithm=SHA-9`}, want: "plain", conns: 1, fails: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := tt.p
			p.t = t
			s := p.start()
			option := ""
			if tt.auth != "" {
				option = "?auth=" + tt.auth
			}
			d := dialer(t, "http://u:p@"+s.Addr.String()+option)
			for i := range 3 {
				if i == 2 {
					p.expire()
				}
				c, err := d.Dial(testContext(t), addr(t, "example.com:443"))
				if tt.fails {
					wantError(t, err, flow.ReasonHostUnreachable, true)
					break
				}
				if err != nil {
					t.Fatalf("flow %d: %v (%v)", i, err, p.requests)
				}
				if _, err := io.WriteString(c, "ping"); err != nil {
					t.Fatal(err)
				}
				got := make([]byte, 4)
				if _, err := io.ReadFull(c, got); err != nil || string(got) != "ping" {
					t.Fatalf("%q %v", got, err)
				}
				c.Close()
			}
			var asked []string
			for _, r := range p.requests {
				if r = strings.TrimLeft(r, "0"); r == "" {
					r = "-"
				}
				asked = append(asked, r)
			}
			if got := strings.Join(asked, " "); got != tt.want || s.Accepted() != tt.conns {
				t.Errorf("asked %q over %d connections, want %q over %d", got, s.Accepted(), tt.want, tt.conns)
			}
		})
	}
}

// Flows that share a nonce reach the proxy in any order; one that comes too late is told stale, and still gets through.
func TestDigestConcurrent(t *testing.T) {
	p := &digestProxy{t: t, challenge: `, qop="auth", algorithm=SHA-256`}
	s := p.start()
	d := dialer(t, "http://u:p@"+s.Addr.String()+"?auth=digest")
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			c, err := d.Dial(t.Context(), addr(t, "example.com:443"))
			if err == nil {
				c.Close()
			} else {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

// A user name that cannot stand in a header is sent encoded, and nothing of it ends the line.
func TestDigestUserName(t *testing.T) {
	c := &digestChallenge{realm: "r\"\\", nonce: "n", qop: "auth"}
	for user, want := range map[string]string{
		`a"b\`:      `username="a\"b\\", `,
		"a\r\nX: y": `username*=UTF-8''a%0D%0AX%3A%20y, `,
		"J\u00e4n+": `username*=UTF-8''J%C3%A4n%2B, `,
	} {
		field, _ := c.authorization(user, NewSecret("p"), "a:1", 1)
		if !strings.HasPrefix(field, "Digest "+want+`realm="r\"\\"`) || strings.ContainsAny(field, "\r\n") {
			t.Errorf("%q: %s", user, field)
		}
	}
}
