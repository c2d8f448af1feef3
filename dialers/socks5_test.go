// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/proxy"

	"github.com/mutex-proxy/mutex/dialers/dialertest"
	"github.com/mutex-proxy/mutex/flow"
)

var (
	_ proxy.ContextDialer = (*SOCKS5)(nil)
	_ proxy.ContextDialer = (*HTTP)(nil)
	_ proxy.ContextDialer = (*Direct)(nil)
	_ proxy.ContextDialer = (*Pool)(nil)
	_ proxy.ContextDialer = (*resolving)(nil)
)

const (
	noAuth  = "\x05\x01\x00"
	connect = "\x05\x01\x00"
	okReply = "\x05\x00\x00\x01\x0a\x00\x00\x01\x04\xd2" // 10.0.0.1:1234
)

// conversations are what a server may say, and what becomes of it. Each is tried with the replies split at every byte.
var conversations = []struct {
	name, url, dst string
	sent           string // what we say, all of it
	replies        string
	reason         flow.Reason
	upstream       bool
	ok             bool
	rest           string // what follows the last reply, and must stay unread
}{
	{
		name: "no authentication", url: "socks5h://h", dst: "203.0.113.1:80", ok: true,
		sent: noAuth + connect + "\x01\xcb\x00\x71\x01\x00\x50", replies: "\x05\x00" + okReply,
	},
	{
		name: "name", url: "socks5h://h", dst: "example.com:443", ok: true,
		sent: noAuth + connect + "\x03\x0bexample.com\x01\xbb", replies: "\x05\x00" + okReply,
	},
	{
		name: "ipv6", url: "socks5://h", dst: "[2001:db8::1]:1", ok: true,
		sent:    noAuth + connect + "\x04\x20\x01\x0d\xb8\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01\x00\x01",
		replies: "\x05\x00\x05\x00\x00\x04" + strings.Repeat("\x00", 18),
	},
	{
		name: "password", url: "socks5h://bob:pw@h", dst: "example.com:443", ok: true,
		sent:    "\x05\x02\x00\x02\x01\x03bob\x02pw" + connect + "\x03\x0bexample.com\x01\xbb",
		replies: "\x05\x02\x01\x00" + okReply,
	},
	{
		name: "password, not wanted", url: "socks5h://bob:pw@h", dst: "example.com:443", ok: true,
		sent: "\x05\x02\x00\x02" + connect + "\x03\x0bexample.com\x01\xbb", replies: "\x05\x00" + okReply,
	},
	{
		name: "empty password", url: "socks5h://bob:@h", dst: "a:1", ok: true,
		sent: "\x05\x02\x00\x02\x01\x03bob\x00" + connect + "\x03\x01a\x00\x01", replies: "\x05\x02\x01\x00" + okReply,
	},
	{
		name: "authentication version 5", url: "socks5h://bob:pw@h", dst: "a:1", ok: true,
		sent: "\x05\x02\x00\x02\x01\x03bob\x02pw" + connect + "\x03\x01a\x00\x01", replies: "\x05\x02\x05\x00" + okReply,
	},
	{
		name: "pipelined", url: "socks5h://bob:pw@h?pipeline=1", dst: "a:1", ok: true,
		sent: "\x05\x01\x02\x01\x03bob\x02pw" + connect + "\x03\x01a\x00\x01", replies: "\x05\x02\x01\x00" + okReply,
	},
	{
		name: "server speaks first", url: "socks5h://h", dst: "a:25", ok: true, sent: noAuth + connect + "\x03\x01a\x00\x19",
		replies: "\x05\x00" + okReply, rest: "220 mail ESMTP\r\n",
	},
	{
		name: "name in the reply", url: "socks5h://h", dst: "a:25", ok: true, sent: noAuth + connect + "\x03\x01a\x00\x19",
		replies: "\x05\x00\x05\x00\x00\x03\x04host\x00\x01", rest: "x",
	},
	{
		name: "empty name in the reply", url: "socks5h://h", dst: "a:25", ok: true, sent: noAuth + connect + "\x03\x01a\x00\x19",
		replies: "\x05\x00\x05\x00\x00\x03\x00\x00\x01", rest: "xyz",
	},
	{
		name: "longest name in the reply", url: "socks5h://h", dst: "a:25", ok: true, sent: noAuth + connect + "\x03\x01a\x00\x19",
		replies: "\x05\x00\x05\x00\x00\x03\xff" + strings.Repeat("a", 255) + "\x00\x01", rest: "x",
	},
	{name: "general failure", url: "socks5h://h", dst: "a:1", replies: "\x05\x00\x05\x01\x00\x01\x00\x00\x00\x00\x00\x00", reason: flow.ReasonHostUnreachable},
	{name: "ruleset", url: "socks5h://h", dst: "a:1", replies: "\x05\x00\x05\x02\x00\x01\x00\x00\x00\x00\x00\x00", reason: flow.ReasonProhibited},
	{name: "network", url: "socks5h://h", dst: "a:1", replies: "\x05\x00\x05\x03\x00\x01\x00\x00\x00\x00\x00\x00", reason: flow.ReasonNetUnreachable},
	{name: "host", url: "socks5h://h", dst: "a:1", replies: "\x05\x00\x05\x04\x00\x01\x00\x00\x00\x00\x00\x00", reason: flow.ReasonHostUnreachable},
	{name: "refused", url: "socks5h://h", dst: "a:1", replies: "\x05\x00\x05\x05\x00\x01\x00\x00\x00\x00\x00\x00", reason: flow.ReasonRefused},
	{name: "ttl", url: "socks5h://h", dst: "a:1", replies: "\x05\x00\x05\x06\x00\x01\x00\x00\x00\x00\x00\x00", reason: flow.ReasonTimeout},
	{name: "command", url: "socks5h://h", dst: "a:1", replies: "\x05\x00\x05\x07\x00\x01\x00\x00\x00\x00\x00\x00", reason: flow.ReasonHostUnreachable},
	{name: "address type", url: "socks5h://h", dst: "a:1", replies: "\x05\x00\x05\x08\x00\x01\x00\x00\x00\x00\x00\x00", reason: flow.ReasonNetUnreachable},
	{name: "tor's own code", url: "socks5h://h", dst: "a:1", replies: "\x05\x00\x05\xf0\x00\x01\x00\x00\x00\x00\x00\x00", reason: flow.ReasonHostUnreachable},
	{name: "refused, cut short", url: "socks5h://h", dst: "a:1", replies: "\x05\x00\x05\x05", reason: flow.ReasonRefused},
	{name: "closed at once", url: "socks5h://h", dst: "a:1", replies: "", reason: flow.ReasonHostUnreachable, upstream: true},
	{name: "closed in the greeting", url: "socks5h://h", dst: "a:1", replies: "\x05", reason: flow.ReasonHostUnreachable, upstream: true},
	{name: "closed without a reply", url: "socks5h://h", dst: "a:1", replies: "\x05\x00", reason: flow.ReasonHostUnreachable},
	{name: "closed in the reply", url: "socks5h://h", dst: "a:1", replies: "\x05\x00" + okReply[:9], reason: flow.ReasonHostUnreachable, upstream: true},
	{name: "closed early in the reply", url: "socks5h://h", dst: "a:1", replies: "\x05\x00\x05\x00\x00", reason: flow.ReasonHostUnreachable, upstream: true},
	{name: "http server", url: "socks5h://h", dst: "a:1", replies: "HTTP/1.1 400 Bad Request\r\n\r\n", reason: flow.ReasonHostUnreachable, upstream: true},
	{name: "socks4 reply", url: "socks5h://h", dst: "a:1", replies: "\x00\x5b\x00\x00\x00\x00\x00\x00", reason: flow.ReasonHostUnreachable, upstream: true},
	{name: "garbage reply", url: "socks5h://h", dst: "a:1", replies: "\x05\x00garbage", reason: flow.ReasonHostUnreachable, upstream: true},
	{name: "unknown address type", url: "socks5h://h", dst: "a:1", replies: "\x05\x00\x05\x00\x00\x09\x00\x00\x00\x00\x00\x00", upstream: true},
	{name: "wants a password", url: "socks5h://h", dst: "a:1", replies: "\x05\x02", upstream: true},
	{name: "accepts nothing", url: "socks5h://h", dst: "a:1", replies: "\x05\xff", upstream: true},
	{name: "accepts nothing of ours", url: "socks5h://bob:pw@h", dst: "a:1", replies: "\x05\xff", upstream: true},
	{name: "gssapi", url: "socks5h://h", dst: "a:1", replies: "\x05\x01", upstream: true},
	{name: "wrong password", url: "socks5h://bob:pw@h", dst: "a:1", replies: "\x05\x02\x01\x01", upstream: true},
	{name: "garbage for a password", url: "socks5h://bob:pw@h", dst: "a:1", replies: "\x05\x02AB", upstream: true},
}

func TestSOCKS5Conversations(t *testing.T) {
	for _, tt := range conversations {
		t.Run(tt.name, func(t *testing.T) {
			d := dialer(t, tt.url).(*SOCKS5)
			stream := tt.replies + tt.rest
			conns := []*dialertest.Conn{dialertest.Bytewise(stream)}
			for i := range len(stream) + 1 {
				conns = append(conns, dialertest.Split(stream, i))
			}
			for i, c := range conns {
				dst, err := d.target(addr(t, tt.dst))
				if err != nil {
					t.Fatal(err)
				}
				_, err = d.request(c, cmdConnect, dst)
				if tt.ok {
					if err != nil {
						t.Fatalf("split %d: %v", i, err)
					}
					if c.Written.String() != tt.sent {
						t.Fatalf("split %d: sent %q, want %q", i, c.Written.String(), tt.sent)
					}
					if c.Rest() != tt.rest {
						t.Fatalf("split %d: left %q, want %q", i, c.Rest(), tt.rest)
					}
					continue
				}
				wantError(t, err, tt.reason, tt.upstream)
				if t.Failed() {
					t.Fatalf("split %d", i)
				}
			}
		})
	}
}

func FuzzReadReply(f *testing.F) {
	for _, tt := range conversations {
		f.Add([]byte(strings.TrimPrefix(tt.replies, "\x05\x00") + tt.rest))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		r := bytes.NewReader(in)
		a, err := readReply(r)
		if err != nil {
			return
		}
		used := len(in) - r.Len()
		back := appendSOCKSAddr([]byte{5, 0, in[2]}, a)
		if a.Host == "" && !a.IP.IsValid() { // an empty name
			return
		}
		// A v4-mapped address comes back as IPv4, a name as it was.
		if in[3] != atypIPv6 && !bytes.Equal(back, in[:used]) {
			t.Errorf("%x read as %v, which is %x", in[:used], a, back)
		}
	})
}

func TestSOCKS5Hostile(t *testing.T) {
	for _, tt := range []struct {
		name     string
		steps    []dialertest.Step
		reason   flow.Reason
		upstream bool
	}{
		{"never replies", []dialertest.Step{dialertest.Silent()}, flow.ReasonTimeout, true},
		{"never replies to the password", []dialertest.Step{dialertest.Read(4), dialertest.Send("\x05\x02"), dialertest.Silent()}, flow.ReasonTimeout, true},
		{"never replies to the request", []dialertest.Step{dialertest.Read(4), dialertest.Send("\x05\x00"), dialertest.Silent()}, flow.ReasonTimeout, false},
		{"half a reply", []dialertest.Step{dialertest.Read(4), dialertest.Send("\x05\x00\x05\x00\x00"), dialertest.Silent()}, flow.ReasonTimeout, false},
		{"resets at once", []dialertest.Step{dialertest.Reset()}, flow.ReasonHostUnreachable, true},
		{"resets after the request", []dialertest.Step{dialertest.Expect("\x05\x02\x00\x02"), dialertest.Send("\x05\x00"), dialertest.Read(10), dialertest.Reset()}, flow.ReasonHostUnreachable, false},
		{"endless garbage", []dialertest.Step{dialertest.Endless("A")}, flow.ReasonHostUnreachable, true},
		{"endless greetings", []dialertest.Step{dialertest.Endless("\x05")}, flow.ReasonHostUnreachable, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := dialertest.Start(t, tt.steps...)
			d := dialer(t, "socks5h://bob:"+testSecret[:7]+"@"+s.Addr.String())
			_, err := d.Dial(hostileContext(t, tt.reason), addr(t, "192.0.2.1:80"))
			wantError(t, err, tt.reason, tt.upstream)
			if err != nil && strings.Contains(err.Error(), testSecret[:7]) {
				t.Errorf("the error has the password: %v", err)
			}
			if st := StatusOf(d); st.Active != 0 || st.Total != 1 || st.Up == tt.upstream {
				t.Errorf("%+v", st)
			}
		})
	}
}

func TestSOCKS5Down(t *testing.T) {
	s := dialertest.Start(t)
	s.Close()
	d := dialer(t, "socks5h://"+s.Addr.String())
	_, err := d.Dial(testContext(t), addr(t, "192.0.2.1:80"))
	wantError(t, err, flow.ReasonHostUnreachable, true)
	_, err = d.ListenPacket(testContext(t), nil)
	wantError(t, err, flow.ReasonHostUnreachable, true)
}

// A server may say yes before it knows (ss-local, stunnel). What follows is what the application gets: an end of file is one, since a
// destination may well send it first (nc -N), and a reset is one.
func TestSOCKS5SuccessThenClose(t *testing.T) {
	for name, tt := range map[string]struct {
		end  dialertest.Step
		want func(error) bool
	}{
		"fin": {func(c *dialertest.Conv) error { return c.CloseWrite() }, func(err error) bool { return errors.Is(err, io.EOF) }},
		"rst": {dialertest.Reset(), func(err error) bool { return err != nil && !errors.Is(err, io.EOF) }},
	} {
		t.Run(name, func(t *testing.T) {
			s := dialertest.Start(t, dialertest.Read(3), dialertest.Send("\x05\x00"), dialertest.Read(10), dialertest.Send(okReply), tt.end)
			d := dialer(t, "socks5h://"+s.Addr.String())
			c, err := d.Dial(testContext(t), addr(t, "192.0.2.1:80"))
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if _, err := c.Read(make([]byte, 1)); !tt.want(err) {
				t.Errorf("read: %v", err)
			}
		})
	}
}

func TestSOCKS5Slow(t *testing.T) {
	s := dialertest.Start(t, dialertest.Read(3), dialertest.SendSlowly("\x05\x00"), dialertest.Read(10), dialertest.SendSlowly(okReply+"hello"), dialertest.Echo())
	d := dialer(t, "socks5h://"+s.Addr.String())
	c, err := d.(proxy.ContextDialer).DialContext(testContext(t), "tcp", "192.0.2.1:80")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	got := make([]byte, 5)
	if _, err := io.ReadFull(c, got); err != nil || string(got) != "hello" {
		t.Errorf("%q, %v", got, err)
	}
	if st := StatusOf(d); st.Active != 1 || st.Latency == 0 || st.IPv6 != unknown || st.RemoteDNS != yes {
		t.Errorf("%+v", st)
	}
	c.(flow.Conn).Abort()
	c.(flow.Conn).Abort()
	if st := StatusOf(d); st.Active != 0 {
		t.Errorf("%+v", st)
	}
}

func TestSOCKS5Cancel(t *testing.T) {
	s := dialertest.Start(t, dialertest.Silent())
	d := dialer(t, "socks5h://"+s.Addr.String())
	gone := errors.New("the application has gone")
	ctx, cancel := context.WithCancelCause(t.Context())
	done := make(chan error, 1)
	go func() {
		_, err := d.Dial(ctx, addr(t, "192.0.2.1:80"))
		done <- err
	}()
	waitFor(t, "the connection", func() bool { return s.Accepted() == 1 })
	cancel(gone)
	if err := <-done; !errors.Is(err, gone) || errors.Is(err, flow.ErrUpstream) {
		t.Errorf("%v", err)
	}
	if st := StatusOf(d); st.Errors != 0 || !st.Up {
		t.Errorf("a caller that gave up was held against the upstream: %+v", st)
	}
}

func TestSOCKS5NoIPv6(t *testing.T) {
	now := time.Unix(1000, 0)
	s := dialertest.Start(t, dialertest.Read(3), dialertest.Send("\x05\x00"), dialertest.Read(22), dialertest.Send("\x05\x08\x00\x01\x00\x00\x00\x00\x00\x00"))
	d, err := New("up", spec(t, "socks5h://"+s.Addr.String()), NewNet(NetConfig{Now: func() time.Time { return now }}))
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []int{1, 1, 1} {
		_, err := d.Dial(testContext(t), addr(t, "[2001:db8::1]:80"))
		wantError(t, err, flow.ReasonNetUnreachable, false)
		if got := s.Accepted(); got != want {
			t.Errorf("try %d: asked %d times, want %d", i, got, want)
		}
	}
	if st := StatusOf(d); st.IPv6 != no || !st.Up {
		t.Errorf("%+v", st)
	}
	if _, err := d.ListenPacket(testContext(t), &flow.Flow{Dst: addr(t, "[2001:db8::1]:80")}); flow.ReasonOf(err) != flow.ReasonNetUnreachable {
		t.Errorf("udp: %v", err)
	}
	now = now.Add(relearn)
	_, _ = d.Dial(testContext(t), addr(t, "[2001:db8::1]:80"))
	_, _ = d.Dial(testContext(t), addr(t, "[2001:db8::1]:80"))
	if got := s.Accepted(); got != 2 {
		t.Errorf("after a while: asked %d times, want one more", got)
	}
}

func TestSOCKS5Names(t *testing.T) {
	both := flow.Addr{Host: "example.com", IP: netip.MustParseAddr("192.0.2.1"), Port: 1}
	for raw, want := range map[string]string{"socks5://h": "192.0.2.1:1", "socks5h://h": "example.com:1"} {
		got, err := dialer(t, raw).(*SOCKS5).target(both)
		if err != nil || got.String() != want {
			t.Errorf("%s: %v, %v", raw, got, err)
		}
	}
	for _, a := range []flow.Addr{{}, {Host: "a\r\nb", Port: 1}, {Host: strings.Repeat("a", 254), Port: 1}, {Host: "a b"}} {
		_, err := dialer(t, "socks5h://127.0.0.1:1").Dial(testContext(t), a)
		wantError(t, err, flow.ReasonHostUnreachable, false)
	}
	_, err := dialer(t, "socks5://127.0.0.1:1").Dial(testContext(t), flow.Addr{Host: "example.com", Port: 1})
	wantError(t, err, flow.ReasonHostUnreachable, false)
}

func TestDialContextErrors(t *testing.T) {
	d := dialer(t, "socks5h://127.0.0.1:1").(proxy.ContextDialer)
	if _, err := d.DialContext(t.Context(), "udp", "a:1"); !errors.Is(err, net.UnknownNetworkError("udp")) {
		t.Errorf("udp: %v", err)
	}
	for _, a := range []string{"a", ":1", "a:x", "a:65536"} {
		if _, err := d.DialContext(t.Context(), "tcp", a); err == nil {
			t.Errorf("%q was dialled", a)
		}
	}
}

func TestNewUnsupported(t *testing.T) {
	for _, raw := range []string{"reject://", "drop://"} {
		if _, err := New("up", spec(t, raw), NewNet(NetConfig{})); err == nil || !strings.Contains(err.Error(), "upstream up: ") {
			t.Errorf("%s: %v", raw, err)
		}
	}
}
