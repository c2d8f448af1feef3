// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/mutex-proxy/mutex/e2e/lab"
)

// resolvers are the addresses that a program may ask: none of them may ever hear of it.
func resolvers() []string {
	return []string{lab.LANV4.String(), lab.LANULA.String(), lab.GatewayV4.String(), lab.OriginV4.String(), lab.OriginV6.String(), "127.0.0.53", "127.0.0.11", "::1"}
}

// dig asks a resolver and returns the short answer.
func dig(t *testing.T, l *lab.Lab, args ...string) string {
	t.Helper()
	r := lab.Exec(t, l.Client.Command(append([]string{"dig", "+short", "+tries=1", "+time=5"}, args...)...))
	return strings.TrimSpace(r.Stdout)
}

// digStatus asks a resolver and returns the status of the answer.
func digStatus(t *testing.T, l *lab.Lab, args ...string) string {
	t.Helper()
	r := lab.Exec(t, l.Client.Command(append([]string{"dig", "+tries=1", "+time=8"}, args...)...))
	_, rest, ok := strings.Cut(r.Stdout, "status: ")
	if !ok {
		return "no answer"
	}
	status, _, _ := strings.Cut(rest, ",")
	return status
}

// allTraps puts resolvers that answer wrongly wherever a query could go on the client and on the LAN.
func allTraps(t *testing.T, l *lab.Lab) []*lab.Trap {
	t.Helper()
	return []*lab.Trap{
		lab.NewTrap(t, l.Client, lab.LoopbackResolvers()...),
		lab.NewTrap(t, l.LAN, netip.AddrPortFrom(lab.LANV4, 53), netip.AddrPortFrom(lab.LANULA, 53)),
		lab.NewTrap(t, l.Router, netip.AddrPortFrom(lab.GatewayV4, 53)),
	}
}

// TestDNSFakeIP asks every resolver address, over UDP and TCP: dns answers, with a fake IP, and nobody else hears of it.
func TestDNSFakeIP(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	l.Unbound(t)
	s := l.Dante(t, 1080, false)
	traps := allTraps(t, l)
	m := l.Mprox(t)
	cp := l.Capture(t)
	m.UpConfig(globalConfig(s, `"dns": { "mode": "fakeip" },`))
	cp.Reset()
	fake4, fake6 := netip.MustParsePrefix("198.18.0.0/15"), netip.MustParsePrefix("fd4d:5554:4558::/64")
	seen := map[string]string{}
	for i, at := range resolvers() {
		name := fmt.Sprintf("n%d.example.test", i)
		for _, transport := range []string{"+notcp", "+tcp"} {
			for qtype, prefix := range map[string]netip.Prefix{"A": fake4, "AAAA": fake6} {
				got := dig(t, l, "@"+at, transport, name, qtype)
				a, err := netip.ParseAddr(got)
				if err != nil || !prefix.Contains(a) {
					t.Errorf("%s %s at %s %s: %q", name, qtype, at, transport, got)
					continue
				}
				if old, ok := seen[name+qtype]; ok && old != got {
					t.Errorf("%s %s: first %s, now %s", name, qtype, old, got)
				}
				seen[name+qtype] = got
				if b := a.As4; a.Is4() && (b()[3] == 0 || b()[3] == 255) {
					t.Errorf("%s: %s", name, got)
				}
			}
		}
	}
	if out := lab.Exec(t, l.Client.Command("dig", "@127.0.0.53", "n0.example.test")).Stdout; !strings.Contains(out, "\t1\tIN\tA") {
		t.Errorf("TTL is not 1:\n%s", out)
	}
	upstreamOnly(s).Check(t, cp.Packets())
	for _, tr := range traps {
		tr.Check(t)
	}

	// Other queries, without servers: SERVFAIL, and one warning.
	for _, q := range [][]string{{"example.test", "MX"}, {"txt.example.test", "TXT"}, {"example.test", "NS"}} {
		if st := digStatus(t, l, append([]string{"@127.0.0.53"}, q...)...); st != "SERVFAIL" {
			t.Errorf("%v without servers: %s", q, st)
		}
	}
	if n := strings.Count(strings.ToLower(m.Log.String()), "dns.servers"); n != 1 {
		t.Errorf("%d warnings about missing dns.servers", n)
	}

	// The mapping is stable over a restart, and over a crash.
	for _, end := range []func(){func() { m.Stop() }, func() { m.Kill() }} {
		end()
		m.Up("-c", m.ConfigPath())
		for key, want := range seen {
			qtype := "A"
			name, ok := strings.CutSuffix(key, "AAAA")
			if ok {
				qtype = "AAAA"
			} else {
				name = strings.TrimSuffix(key, "A")
			}
			if got := dig(t, l, "@127.0.0.53", name, qtype); got != want {
				t.Errorf("after a restart %s %s is %s, was %s", name, qtype, got, want)
			}
		}
	}

	// While the daemon is dead nobody answers.
	m.Kill()
	for _, tr := range traps {
		tr.Reset()
	}
	for _, at := range resolvers() {
		for _, transport := range []string{"+notcp", "+tcp"} {
			r := lab.Exec(t, l.Client.Command("dig", "+short", "+tries=1", "+time=1", "@"+at, transport, "dead.example.test"))
			if r.Code == 0 {
				t.Errorf("answered while the daemon is dead, at %s %s: %v", at, transport, r)
			}
		}
	}
	for _, tr := range traps {
		tr.Check(t)
	}
}

// TestDNSReal resolves through the proxy, over TCP and over DoH.
func TestDNSReal(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	ca := l.Unbound(t)
	s := l.Dante(t, 1080, false)
	for name, server := range map[string]string{
		"tcp": "tcp://" + lab.OriginV4.String(),
		"udp": "udp://[" + lab.OriginV6.String() + "]",
		"doh": "https://" + lab.OriginV4.String() + ":8443/dns-query",
	} {
		t.Run(name, func(t *testing.T) {
			traps := allTraps(t, l)
			m := l.Mprox(t)
			m.Env = []string{"SSL_CERT_FILE=" + ca}
			cp := l.Capture(t)
			m.UpConfig(globalConfig(s, fmt.Sprintf(`"dns": { "mode": "real", "servers": [%q] },`, server)))
			cp.Reset()
			for _, at := range resolvers() {
				for _, transport := range []string{"+notcp", "+tcp"} {
					for q, want := range map[string]string{
						"www.example.test A": lab.OriginV4.String(), "www.example.test AAAA": lab.OriginV6.String(),
						"example.test MX": "10 mail.example.test.", "txt.example.test TXT": `"hello"`, "_xmpp._tcp.example.test SRV": "0 0 5222 www.example.test.",
					} {
						if got := dig(t, l, append([]string{"@" + at, transport}, strings.Fields(q)...)...); got != want {
							t.Errorf("%s at %s %s: %q", q, at, transport, got)
						}
					}
				}
			}
			if st := digStatus(t, l, "@127.0.0.53", "no-such-name.example.test"); st != "NXDOMAIN" {
				t.Errorf("a name that does not exist: %s", st)
			}
			// The name that was resolved is what the flow is known by.
			l.Origin.Forget()
			c := dialOrigin(t, l, lab.OriginV4, lab.PortHold)
			found := false
			for _, f := range m.Flows() {
				found = found || f.Network == "tcp" && f.Host == "www.example.test" && f.HostSource == "dns"
			}
			if !found {
				t.Errorf("no flow is known as www.example.test: %+v", m.Flows())
			}
			c.Close()
			if st := m.Status(); st.DNS.Queries == 0 || st.DNS.CacheHits == 0 {
				t.Errorf("status: %+v", st.DNS)
			}
			upstreamOnly(s).Check(t, cp.Packets())
			for _, tr := range traps {
				tr.Check(t)
			}
			m.Stop()
		})
	}
}

// TestDNSFailure shows that a failure is SERVFAIL and never another resolver.
func TestDNSFailure(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	l.Unbound(t)
	s := l.Dante(t, 1080, false)
	traps := allTraps(t, l)
	for name, servers := range map[string]string{
		"refused": `["tcp://198.51.100.80:9099"]`,
		"silent":  `["udp://203.0.113.200"]`,
		"dead":    `["tcp://203.0.113.200"]`,
		"not dns": `["tcp://198.51.100.80:2222"]`,
		"bad tls": `["https://198.51.100.80:8443/dns-query"]`, // its CA is not trusted here
	} {
		t.Run(name, func(t *testing.T) {
			m := l.Mprox(t)
			cp := l.Capture(t)
			m.UpConfig(globalConfig(s, fmt.Sprintf(`"dns": { "mode": "real", "servers": %s },`, servers)))
			cp.Reset()
			for _, at := range []string{"127.0.0.53", lab.LANV4.String()} {
				// Later than 5 s it would not be heard: so long does a stub resolver wait. A machine that stands still for a while is asked again.
				best := time.Hour
				for try := 0; try < 3 && best > 5*time.Second; try++ {
					began := time.Now()
					if st := digStatus(t, l, "@"+at, "www.example.test"); st != "SERVFAIL" {
						t.Errorf("at %s: %s", at, st)
					}
					best = min(best, time.Since(began))
				}
				if best > 5*time.Second {
					t.Errorf("at %s: the failure took %v", at, best)
				}
			}
			if n := m.Status().DNS.Failures; n == 0 {
				t.Error("no failure is counted")
			}
			upstreamOnly(s).Check(t, cp.Packets())
			for _, tr := range traps {
				tr.Check(t)
			}
			m.Stop()
		})
	}
}

// TestDNSName shows that the upstream is asked for the name, over each kind of upstream, also by `direct` through dns.
func TestDNSName(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	l.Unbound(t)
	dante, squid := l.Dante(t, 1080, false), l.Squid(t, 3128)
	for name, c := range map[string]struct {
		url  string
		more string
	}{
		"socks5h":         {dante.URL(), `"dns": { "mode": "fakeip" },`},
		"socks5, real IP": {dante.URLAs("socks5"), `"dns": { "mode": "fakeip", "servers": ["tcp://198.51.100.80"] },`},
		"http":            {squid.URL(), `"dns": { "mode": "fakeip" },`},
	} {
		t.Run(name, func(t *testing.T) {
			m := l.Mprox(t)
			m.UpConfig(fmt.Sprintf(`{ "upstreams": { "p": { "url": %q } }, "contexts": { "default": { "mode": "global", %s "default": "p" } } }`, c.url, c.more))
			for _, flag := range []string{"-4", "-6"} {
				if out := mustCurl(t, l, flag, "http://www.example.test/"); !strings.Contains(out, "this is www.example.test") {
					t.Errorf("curl %s: %q", flag, out)
				}
			}
			if r := curl(t, l, "http://no-such-name.example.test/"); r.Code == 0 {
				t.Errorf("a name that does not exist: %v", r)
			}
			m.Stop()
		})
	}
}
