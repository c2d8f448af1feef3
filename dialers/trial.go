// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/mutex-proxy/mutex/flow"
)

// maxSaid bounds what a trial keeps of a server's words.
const maxSaid = 512

// Step is one step of a trial.
type Step struct {
	Upstream string // whose; of a pool its members'
	Name     string // resolve, connect, tls, detect, greeting, authentication, request, udp
	Took     time.Duration
	Says     string // what the server said, or what was found out; safe to show
	Err      error
}

// Trial goes through a connection to dst step by step, and closes it. Of a pool every member is tried, one after the other. It counts as no flow,
// and what is switched off is tried all the same. A failed step is the last of its upstream.
func Trial(ctx context.Context, d flow.Dialer, dst flow.Addr) []Step {
	t := &trial{ctx: ctx, dst: dst, name: d.Name()}
	switch d := d.(type) {
	case *Pool:
		var all []Step
		for _, m := range d.members {
			all = append(all, Trial(ctx, m.Dialer, dst)...)
		}
		return all
	case *Auto:
		begin := time.Now()
		k, err := d.find(ctx)
		says := ""
		if err == nil {
			says = k.scheme
		}
		if t.add("detect", begin, says, err) {
			return append(t.steps, Trial(ctx, k.Dialer, dst)...)
		}
	case *SOCKS5:
		t.proxy(&d.upstream, d.tls, t.socks5(d))
		t.udp(d)
	case *SOCKS4:
		t.proxy(&d.upstream, nil, t.socks4(d))
	case *HTTP:
		t.proxy(&d.upstream, d.tls, t.http(d))
	default:
		begin := time.Now()
		c, err := d.Dial(ctx, dst)
		if t.add("connect", begin, "", err) {
			c.Abort()
		}
	}
	return t.steps
}

// trial is one upstream's.
type trial struct {
	ctx   context.Context //nolint:containedctx // lives as long as the one call
	dst   flow.Addr
	name  string
	steps []Step
}

// add notes a step that began at begin and ended now. It reports whether it went well.
func (t *trial) add(name string, begin time.Time, says string, err error) bool {
	t.steps = append(t.steps, Step{Upstream: t.name, Name: name, Took: time.Since(begin), Says: says, Err: err})
	return err == nil
}

// proxy connects to a proxy and has a conversation with it, on as many connections as that takes.
func (t *trial) proxy(u *upstream, cfg *tls.Config, talk func(c *transcript) error) {
	begin := time.Now()
	ips, err := u.host.addrs(t.ctx, u.net)
	if !t.add("resolve", begin, strings.Trim(fmt.Sprint(ips), "[]"), err) {
		return
	}
	for again := true; again; {
		begin = time.Now()
		tcp, err := u.host.dial(t.ctx, u.net, u.spec.Port)
		if err != nil {
			t.add("connect", begin, "", err)
			return
		}
		t.add("connect", begin, tcp.RemoteAddr().String(), nil)
		var conn flow.Conn = tcp
		again = false
		_ = handshake(t.ctx, tcp, func() error {
			if cfg != nil {
				begin = time.Now()
				conn, err = secure(t.ctx, tcp, cfg)
				if !t.add("tls", begin, describeTLS(conn, err), err) {
					return err
				}
			}
			said := &transcript{Conn: conn}
			err := talk(said)
			again = errors.Is(err, errReconnect)
			t.exchanges(u, said, err)
			return err
		})
		tcp.Abort()
	}
}

func describeTLS(c flow.Conn, err error) string {
	tc, ok := c.(*tlsConn)
	if err != nil || !ok {
		return ""
	}
	st := tc.ConnectionState()
	text := tls.VersionName(st.Version)
	if chosenH2(c) != nil {
		text += ", HTTP/2"
	}
	if len(st.PeerCertificates) > 0 {
		text += ", certificate of " + quote(st.PeerCertificates[0].Subject.String())
	}
	return text
}

// exchanges turns a conversation into steps; the last one has the error.
func (t *trial) exchanges(u *upstream, said *transcript, err error) {
	for i, e := range said.list {
		name, says := describe(u.spec.Scheme, e.sent, e.got)
		s := Step{Upstream: t.name, Name: name, Took: e.end.Sub(e.begin), Says: quote(says, u.spec.Password.Reveal(), u.spec.Token.Reveal())}
		if i == len(said.list)-1 {
			if e.end.IsZero() {
				s.Took = time.Since(e.begin)
			}
			if s.Err = err; errors.Is(err, errReconnect) {
				s.Err = nil // the next connection is part of the conversation
			}
		}
		t.steps = append(t.steps, s)
	}
	if len(said.list) == 0 && err != nil {
		t.add("request", time.Now(), "", err)
	}
}

func (t *trial) socks5(d *SOCKS5) func(*transcript) error {
	return func(c *transcript) error {
		dst, err := d.target(t.dst)
		if err == nil {
			_, err = d.request(c, cmdConnect, dst)
		}
		return err
	}
}

func (t *trial) socks4(d *SOCKS4) func(*transcript) error {
	return func(c *transcript) error {
		req, err := d.request(cmdConnect, t.dst)
		if err != nil {
			return err
		}
		_, err = ask4(c, req)
		return err
	}
}

func (t *trial) http(d *HTTP) func(*transcript) error {
	l := new(login) // over all connections
	return func(c *transcript) error {
		if tc := chosenH2(c.Conn); tc != nil {
			t.http2(d, tc, l)
			return nil // it is in the steps
		}
		return d.converse(c, &streamHead{r: c}, t.dst, l)
	}
}

// http2 asks on streams of a connection of the trial's own.
func (t *trial) http2(d *HTTP, tc *tls.Conn, l *login) {
	begin := time.Now()
	c, err := newH2Conn(t.ctx, tc, nil) // the TCP connection is only for streams that are kept
	if err != nil {
		t.add("request", begin, "", err)
		return
	}
	defer func() { _ = c.Close() }()
	a := &h2Asker{h: d, c: c, dst: t.dst, ctx: t.ctx, first: true}
	defer a.give()
	if err := d.logIn(&notingAsker{a, t}, l); err != nil {
		t.steps[len(t.steps)-1].Err = err
	}
}

// notingAsker makes a step of each request.
type notingAsker struct {
	asker
	t *trial
}

func (n *notingAsker) ask(l *login) (*response, []string, error) {
	begin := time.Now()
	r, secrets, err := n.asker.ask(l)
	says := ""
	if err == nil {
		says = quote(fmt.Sprintf("HTTP/2 %d %s", r.status, r.reason), secrets...)
	}
	n.t.add("request", begin, says, err)
	return r, secrets, err
}

// udp asks for an association. That there is none is no failure.
func (t *trial) udp(d *SOCKS5) {
	if t.steps[len(t.steps)-1].Err != nil || d.spec.UDP == UDPOff || d.off() {
		return
	}
	begin := time.Now()
	pc, err := d.ListenPacket(t.ctx, nil)
	switch {
	case err == nil:
		_ = pc.Close()
		t.add("udp", begin, "associated", nil)
	case errors.Is(err, errors.ErrUnsupported):
		t.add("udp", begin, "not carried", nil)
	default:
		t.add("udp", begin, "", err)
	}
}

// transcript is a connection that remembers what was said, exchange by exchange.
type transcript struct {
	flow.Conn
	list []*exchanged
}

type exchanged struct {
	sent, got  []byte // the first bytes of each
	begin, end time.Time
}

func (t *transcript) Write(p []byte) (int, error) {
	if n := len(t.list); n == 0 || len(t.list[n-1].got) > 0 {
		t.list = append(t.list, &exchanged{begin: time.Now()})
	}
	e := t.list[len(t.list)-1]
	e.sent = append(e.sent, p[:min(len(p), 16)]...) // what kind of message it is; further in there may be a secret
	return t.Conn.Write(p)
}

func (t *transcript) Read(p []byte) (int, error) {
	n, err := t.Conn.Read(p)
	if len(t.list) > 0 {
		e := t.list[len(t.list)-1]
		e.end = time.Now()
		e.got = append(e.got, p[:min(n, max(0, maxSaid-len(e.got)))]...)
	}
	return n, err
}

// describe names an exchange and says in words what the server said.
func describe(scheme string, sent, got []byte) (name, says string) {
	name = "request"
	switch {
	case scheme == SchemeHTTP || scheme == SchemeHTTPS:
		line, rest, _ := strings.Cut(string(got), "\n")
		for strings.HasPrefix(line, "HTTP/1.") && len(line) > 9 && line[9] == '1' { // interim (RFC 9110 section 15.2): the answer comes behind
			_, rest, _ = strings.Cut(strings.ReplaceAll(rest, "\r\n", "\n"), "\n\n")
			if rest == "" {
				break
			}
			line, rest, _ = strings.Cut(rest, "\n")
		}
		return name, strings.TrimSpace(line)
	case len(got) < 2:
		return name, ""
	case scheme == SchemeSOCKS4 || scheme == SchemeSOCKS4a:
		if got[1] == socks4Granted {
			return name, "granted"
		}
		return name, strings.TrimPrefix(reply4Error(got[1]).Error(), "server says: ")
	case sent[0] == authVersion:
		if got[1] == 0 {
			return "authentication", "accepted"
		}
		return "authentication", "refused"
	case len(sent) >= 2 && len(sent) == 2+int(sent[1]):
		switch got[1] {
		case methodNone:
			return "greeting", "no authentication"
		case methodPassword:
			return "greeting", "user and password"
		case methodRefused:
			return "greeting", "none of the methods offered"
		}
		return "greeting", fmt.Sprintf("method %#02x", got[1])
	}
	return name, strings.TrimPrefix(replyError(got[1]).Error(), "server says: ")
}
