// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"bytes"
	"errors"
	"io"
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/net/proxy"

	"github.com/mutex-proxy/mutex/dialers/dialertest"
	"github.com/mutex-proxy/mutex/flow"
)

var _ proxy.ContextDialer = (*SOCKS4)(nil)

func TestSOCKS4Request(t *testing.T) {
	both := flow.Addr{Host: "example.com", IP: netip.MustParseAddr("192.0.2.1"), Port: 80}
	for _, tt := range []struct {
		url  string
		dst  flow.Addr
		want string
		err  error
	}{
		{"socks4://h", both, "\x04\x01\x00\x50\xc0\x00\x02\x01\x00", nil},
		{"socks4://bob@h", addr(t, "[::ffff:192.0.2.1]:80"), "\x04\x01\x00\x50\xc0\x00\x02\x01bob\x00", nil},
		{"socks4a://bob:pw@h", both, "\x04\x01\x00\x50\x00\x00\x00\x01bob\x00example.com\x00", nil},
		{"socks4a://h", addr(t, "192.0.2.1:80"), "\x04\x01\x00\x50\xc0\x00\x02\x01\x00", nil},
		{"socks4://h", addr(t, "[2001:db8::1]:80"), "", flow.ErrNetUnreachable},
		{"socks4a://h", addr(t, "[2001:db8::1]:80"), "", flow.ErrNetUnreachable},
		{"socks4://h", addr(t, "example.com:80"), "", flow.ErrHostUnreachable},
		{"socks4a://h", flow.Addr{Host: "a\x00b", Port: 1}, "", flow.ErrHostUnreachable},
		{"socks4a://a%00b@h", both, "", flow.ErrUpstream},
	} {
		got, err := dialer(t, tt.url).(*SOCKS4).request(cmdConnect, tt.dst)
		if string(got) != tt.want || !errors.Is(err, tt.err) {
			t.Errorf("%s %v: %q, %v", tt.url, tt.dst, got, err)
		}
	}
}

// replies4 are what a server may answer, tried split at every byte.
var replies4 = []struct {
	name, reply, rest string
	ok                bool
	reason            flow.Reason
	upstream          bool
}{
	{name: "granted", reply: "\x00\x5a\x00\x00\x00\x00\x00\x00", rest: "220 mail", ok: true},
	{name: "granted, version 4", reply: "\x04\x5a\x00\x00\x00\x00\x00\x00", ok: true},
	{name: "rejected", reply: "\x00\x5b\x00\x00\x00\x00\x00\x00", reason: flow.ReasonHostUnreachable},
	{name: "rejected, cut short", reply: "\x00\x5b", reason: flow.ReasonHostUnreachable},
	{name: "no identd", reply: "\x00\x5c\x00\x00\x00\x00\x00\x00", upstream: true},
	{name: "wrong user", reply: "\x00\x5d\x00\x00\x00\x00\x00\x00", upstream: true},
	{name: "unknown code", reply: "\x00\x00\x00\x00\x00\x00\x00\x00", upstream: true},
	{name: "closed", reply: "", reason: flow.ReasonHostUnreachable},
	{name: "closed in the reply", reply: "\x00\x5a\x00\x00", upstream: true},
	{name: "socks5 server", reply: "\x05\xff", upstream: true},
	{name: "http server", reply: "HTTP/1.1 400 Bad Request", upstream: true},
}

func TestSOCKS4Replies(t *testing.T) {
	for _, tt := range replies4 {
		t.Run(tt.name, func(t *testing.T) {
			stream := tt.reply + tt.rest
			conns := []*dialertest.Conn{dialertest.Bytewise(stream)}
			for i := range len(stream) + 1 {
				conns = append(conns, dialertest.Split(stream, i))
			}
			for i, c := range conns {
				_, err := readReply4(c)
				if tt.ok {
					if err != nil || c.Rest() != tt.rest {
						t.Fatalf("split %d: left %q, %v", i, c.Rest(), err)
					}
					continue
				}
				wantError(t, err, tt.reason, tt.upstream)
			}
		})
	}
}

func TestSOCKS4Dial(t *testing.T) {
	s := dialertest.Start(t, dialertest.Expect("\x04\x01\x00\x50\x00\x00\x00\x01bob\x00example.com\x00"), dialertest.SendSlowly(replies4[0].reply+"220 mail"))
	d := dialer(t, "socks4a://bob@"+s.Addr.String())
	c, err := d.Dial(testContext(t), addr(t, "example.com:80"))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(c); err != nil || string(got) != "220 mail" {
		t.Errorf("%q, %v", got, err)
	}
	c.Close()
	if _, err := d.ListenPacket(t.Context(), nil); !errors.Is(err, errors.ErrUnsupported) {
		t.Error(err)
	}
	if st := StatusOf(d); st.Active != 0 || st.Total != 1 || st.IPv6 != no || st.UDP != no || st.RemoteDNS != yes {
		t.Errorf("%+v", st)
	}
	if WithNames(dialer(t, "socks4://h"), &fakeNames{}).(*resolving) == nil || WithNames(d, &fakeNames{}) != d {
		t.Error("names")
	}
}

func TestSOCKS4Hostile(t *testing.T) {
	for name, tt := range map[string]struct {
		steps    []dialertest.Step
		reason   flow.Reason
		upstream bool
	}{
		"silent":         {[]dialertest.Step{dialertest.Silent()}, flow.ReasonTimeout, false},
		"half a reply":   {[]dialertest.Step{dialertest.Send("\x00\x5a"), dialertest.Silent()}, flow.ReasonTimeout, false},
		"reset":          {[]dialertest.Step{dialertest.Reset()}, flow.ReasonHostUnreachable, true},
		"endless":        {[]dialertest.Step{dialertest.Endless("A")}, flow.ReasonHostUnreachable, true},
		"closes at once": {[]dialertest.Step{dialertest.Read(17)}, flow.ReasonHostUnreachable, false},
	} {
		t.Run(name, func(t *testing.T) {
			s := dialertest.Start(t, tt.steps...)
			_, err := dialer(t, "socks4a://"+s.Addr.String()).Dial(hostileContext(t, tt.reason), addr(t, "abcdefg:80"))
			wantError(t, err, tt.reason, tt.upstream)
		})
	}
}

func FuzzReadReply4(f *testing.F) {
	for _, tt := range replies4 {
		f.Add([]byte(tt.reply + tt.rest))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		r := bytes.NewReader(in)
		if _, err := readReply4(r); err == nil && len(in)-r.Len() != 8 {
			t.Errorf("%x: took %d bytes", in, len(in)-r.Len())
		} else if err != nil && strings.Contains(err.Error(), "\n") {
			t.Error(err)
		}
	})
}
