// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/mutex-proxy/mutex/e2e/lab"
)

// column is a server in the matrix: how it is reached, and what is true of it.
type column struct {
	name, url string
	wrong     string // the URL with a wrong password; "" = it asks for none
	tls       bool
	mutual    string // the URL of a port that wants a client certificate, without one
	certified string // with one
	socks     bool   // it may know BIND
	from      [2]netip.Addr
	variants  map[string][2]netip.Addr // by the row that uses them
}

// row is a capability. try returns the word for what happened.
type row struct {
	name string
	try  func(t *testing.T, m *matrix, c *column) string
}

// matrix is what the rows share.
type matrix struct {
	l     *lab.Lab
	p     *lab.Mprox
	names map[string]netip.Addr // fake addresses of www.example.test, by family
}

// docPath is where the table is kept.
const docPath = "../docs/interop.md"

// TestInterop drives every server through the program and compares what works with the table in docs/interop.md. With MPROX_INTEROP set
// it writes that table.
func TestInterop(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	l.Unbound(t)
	columns := startColumns(t, l)
	m := &matrix{l: l, p: l.Mprox(t), names: map[string]netip.Addr{}}
	m.p.UpConfig(m.config(t, columns))
	for family, typ := range map[string]string{"v4": "A", "v6": "AAAA"} {
		m.names[family] = netip.MustParseAddr(dig(t, l, typ, "www.example.test"))
	}
	rows := interopRows()
	got := make([][]string, len(rows))
	for i := range got {
		got[i] = make([]string, len(columns))
	}
	var wg sync.WaitGroup
	for j := range columns {
		wg.Go(func() {
			for i := range rows {
				got[i][j] = rows[i].try(t, m, columns[j])
			}
		})
	}
	wg.Wait()
	table := renderMatrix(rows, columns, got)
	t.Logf("\n%s", table)
	checkDoc(t, table)
	if bad := l.Origin.AllFrom(lab.ExitV4, lab.ExitV6); len(bad) > 0 {
		t.Errorf("reached the origin without a proxy: %v", bad)
	}
}

// startColumns starts all servers at once on the proxy host.
func startColumns(t *testing.T, l *lab.Lab) []*column {
	t.Helper()
	pki := l.PKI(t)
	dante, auth := l.Dante(t, 1080, false), l.Dante(t, 1081, true)
	open := l.Serve(t, 1086)
	own := l.Serve(t, 1087, "--user", lab.User, "--password-file", l.File("serve.pass", lab.Password+"\n"))
	own.Pass = lab.Password
	stunnel, squidTLS := l.Stunnel(t, 1084, pki), l.SquidTLS(t, 3129, pki)
	apache, apacheDigest, apacheTLS := l.Apache(t, 8081, pki)
	squidDigest := l.SquidDigest(t, 3132)
	for _, s := range []*lab.Server{squidDigest, apacheDigest} {
		s.Options = "auth=digest"
	}
	list := []*column{
		newColumn("dante", dante), newColumn("dante, password", auth),
		{name: "dante, SOCKS4", url: dante.URLAs("socks4"), socks: true},
		newColumn("microsocks", l.Microsocks(t, 1082)), newColumn("ssh -D", l.SSHDynamic(t, 1090)), newColumn("ss-local", l.Shadowsocks(t, 1083)),
		newColumn("stunnel", stunnel).withTLS(stunnel, pki), newColumn("serve", own), newColumn("serve, no password", open),
		{name: "serve, SOCKS4a", url: open.URLAs("socks4a"), socks: true},
		newColumn("squid, Basic", l.Squid(t, 3128)), newColumn("squid, Digest", squidDigest), newColumn("squid, TLS", squidTLS).withTLS(squidTLS, pki),
		newColumn("apache, Basic", apache), newColumn("apache, Digest", apacheDigest), newColumn("apache, TLS", apacheTLS).withTLS(apacheTLS, pki),
		newColumn("tinyproxy", l.Tinyproxy(t, 8888)), newColumn("privoxy", l.Privoxy(t, 8118)),
		newColumn("serve, Basic", withScheme(own, "http", "auth=basic")), newColumn("serve, Digest", withScheme(own, "http", "auth=digest")),
	}
	next := byte(100)
	address := func() [2]netip.Addr {
		next++
		v4, v6 := lab.ClientV4.As4(), lab.ClientV6.As16()
		v4[3], v6[15] = next, next
		a := [2]netip.Addr{netip.AddrFrom4(v4), netip.AddrFrom16(v6)}
		l.Client.IP(t, "addr add "+a[0].String()+"/24 dev eth0", "addr add "+a[1].String()+"/64 dev eth0 nodad")
		return a
	}
	for _, c := range list {
		c.from, c.variants = address(), map[string][2]netip.Addr{}
		for what := range c.urls() {
			c.variants[what] = address()
		}
	}
	return list
}

func withScheme(s *lab.Server, scheme, options string) *lab.Server {
	c := *s
	c.Scheme, c.Options = scheme, options
	return &c
}

func newColumn(name string, s *lab.Server) *column {
	c := &column{name: name, url: s.URL(), socks: strings.HasPrefix(s.Scheme, "socks")}
	if s.Pass != "" {
		w := *s
		w.Pass = "wrong"
		c.wrong = w.URL()
	}
	return c
}

func (c *column) withTLS(s *lab.Server, p lab.PKI) *column {
	next := *s
	next.Addr = netip.AddrPortFrom(s.Addr.Addr(), s.Addr.Port()+1)
	next.Options = p.Options()
	c.tls, c.mutual = true, next.URL()
	next.Options = p.ClientOptions()
	c.certified = next.URL()
	return c
}

// urls are the other ways in which a row reaches a server.
func (c *column) urls() map[string]string {
	out := map[string]string{}
	if c.wrong != "" {
		out["wrong password"] = c.wrong
	}
	if c.tls {
		base, options, _ := strings.Cut(c.url, "?")
		ca, _, _ := strings.Cut(options, "&")
		out["unknown CA"] = base + "?sni=" + lab.TLSName
		out["other name"] = base + "?" + ca
		out["insecure"] = base + "?insecure=1"
		out["no certificate"], out["certificate"] = c.mutual, c.certified
	}
	return out
}

// config sends the flows of each source address to a server of its own.
func (m *matrix) config(t *testing.T, columns []*column) string {
	t.Helper()
	var ups, rules []string
	add := func(name, url string, from [2]netip.Addr) {
		ups = append(ups, fmt.Sprintf("%q: { \"url\": %q }", name, url))
		rules = append(rules, fmt.Sprintf("{ \"source_cidr\": [%q, %q], \"upstream\": %q }", from[0], from[1], name))
	}
	for i, c := range columns {
		add(fmt.Sprintf("p%d", i), c.url, c.from)
		k := 0
		for what, url := range c.urls() {
			k++
			add(fmt.Sprintf("p%d-%d", i, k), url, c.variants[what])
		}
	}
	return fmt.Sprintf(`{ "upstreams": { %s }, "contexts": { "default": { "mode": "global", "default": "reject", "dial_timeout": "3s",
  "rules": [ %s ], "dns": { "mode": "fakeip", "servers": ["tcp://%s"], "via": "p0" } } } }`,
		strings.Join(ups, ",\n"), strings.Join(rules, ",\n"), lab.OriginV4)
}

// renderMatrix writes the table: SOCKS servers first, then HTTP.
func renderMatrix(rows []row, columns []*column, got [][]string) string {
	var b strings.Builder
	for _, socks := range []bool{true, false} {
		head, line := "| |", "|---|"
		for _, c := range columns {
			if c.socks == socks {
				head, line = head+" "+c.name+" |", line+"---|"
			}
		}
		fmt.Fprintf(&b, "%s\n%s\n", head, line)
		for i, r := range rows {
			var cells strings.Builder
			empty := true
			for j, c := range columns {
				if c.socks == socks {
					fmt.Fprintf(&cells, " %s |", got[i][j])
					empty = empty && got[i][j] == none
				}
			}
			if !empty {
				fmt.Fprintf(&b, "| %s |%s\n", r.name, cells.String())
			}
		}
		b.WriteString("\n")
	}
	return strings.TrimSpace(b.String()) + "\n"
}

// The table in the document stands between these lines.
const (
	tableBegin = "<!-- made by `make interop` -->\n"
	tableEnd   = "<!-- end -->\n"
)

// checkDoc compares the table with the document's, line by line, or puts it there.
func checkDoc(t *testing.T, table string) {
	t.Helper()
	doc, err := os.ReadFile(docPath)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := bytes.Cut(doc, []byte(tableBegin))
	want, after, ok2 := bytes.Cut(rest, []byte(tableEnd))
	if !ok || !ok2 {
		t.Fatalf("%s has no place for the table", docPath)
	}
	if os.Getenv("MPROX_INTEROP") != "" {
		if err := os.WriteFile(docPath, []byte(string(before)+tableBegin+table+tableEnd+string(after)), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	wants, gots := strings.Split(string(want), "\n"), strings.Split(table, "\n")
	for i := range max(len(wants), len(gots)) {
		var w, g string
		if i < len(wants) {
			w = wants[i]
		}
		if i < len(gots) {
			g = gots[i]
		}
		if w != g {
			t.Errorf("the table has changed (make interop, and look at the difference):\n got %s\nwant %s", g, w)
		}
	}
}
