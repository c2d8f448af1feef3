// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"context"
	"errors"
	"io"
	"net/netip"
	"testing"

	"github.com/mutex-proxy/mutex/dialers/dialertest"
	"github.com/mutex-proxy/mutex/flow"
)

// What servers say to a BIND for 192.0.2.7, and what comes of it. The fake is on loopback, so that it may mean loopback and private addresses.
const (
	greet5 = "\x05\x00"
	first5 = "\x05\x00\x00\x01\xc6\x33\x64\x01\x04\xd2" // 198.51.100.1:1234
	peer5  = "\x05\x00\x00\x01\xc0\x00\x02\x07\x00\x14" // 192.0.2.7:20
	first4 = "\x00\x5a\x04\xd2\xc6\x33\x64\x01"
	peer4  = "\x00\x5a\x00\x14\xc0\x00\x02\x07"
)

func TestBind(t *testing.T) {
	for _, tt := range []struct {
		name, url string
		script    []dialertest.Step
		addr      string
		peer      string // of Accept; "" = it fails
		reason    flow.Reason
		upstream  bool
	}{
		{"socks5", "socks5://", []dialertest.Step{dialertest.Expect("\x05\x01\x00"), dialertest.Send(greet5), dialertest.Expect("\x05\x02\x00\x01\xc0\x00\x02\x07\x00\x15"), dialertest.Send(first5), dialertest.SendSlowly(peer5 + "220 hi")}, "198.51.100.1:1234", "192.0.2.7:20", 0, false},
		{"socks4", "socks4://bob@", []dialertest.Step{dialertest.Expect("\x04\x02\x00\x15\xc0\x00\x02\x07bob\x00"), dialertest.Send(first4), dialertest.SendSlowly(peer4 + "220 hi")}, "198.51.100.1:1234", "192.0.2.7:20", 0, false},
		{"both replies at once", "socks5://", []dialertest.Step{dialertest.Read(3), dialertest.Send(greet5), dialertest.Read(10), dialertest.Send(first5 + peer5 + "220 hi")}, "198.51.100.1:1234", "192.0.2.7:20", 0, false},
		{"the server's own address", "socks5://", []dialertest.Step{dialertest.Read(3), dialertest.Send(greet5), dialertest.Read(10), dialertest.Send("\x05\x00\x00\x01\x00\x00\x00\x00\x04\xd2" + peer5 + "220 hi")}, "127.0.0.1:1234", "192.0.2.7:20", 0, false},
		{"the server's own address, socks4", "socks4://", []dialertest.Step{dialertest.Read(9), dialertest.Send("\x00\x5a\x04\xd2\x00\x00\x00\x00" + peer4 + "220 hi")}, "127.0.0.1:1234", "192.0.2.7:20", 0, false},
		{"nobody came", "socks5://", []dialertest.Step{dialertest.Read(3), dialertest.Send(greet5), dialertest.Read(10), dialertest.Send(first5), dialertest.Send("\x05\x06\x00\x01\x00\x00\x00\x00\x00\x00")}, "198.51.100.1:1234", "", flow.ReasonTimeout, false},
		{"nobody came, socks4", "socks4://", []dialertest.Step{dialertest.Read(9), dialertest.Send(first4), dialertest.Send("\x00\x5b\x00\x00\x00\x00\x00\x00")}, "198.51.100.1:1234", "", flow.ReasonHostUnreachable, false},
		{"closed while waiting", "socks5://", []dialertest.Step{dialertest.Read(3), dialertest.Send(greet5), dialertest.Read(10), dialertest.Send(first5)}, "198.51.100.1:1234", "", flow.ReasonHostUnreachable, false},
		{"reset while waiting", "socks4://", []dialertest.Step{dialertest.Read(9), dialertest.Send(first4), dialertest.Reset()}, "198.51.100.1:1234", "", flow.ReasonHostUnreachable, true},
		{"garbage in the second reply", "socks5://", []dialertest.Step{dialertest.Read(3), dialertest.Send(greet5), dialertest.Read(10), dialertest.Send(first5 + "HTTP/1.1 200 OK")}, "198.51.100.1:1234", "", flow.ReasonHostUnreachable, true},
		{"half a second reply", "socks5://", []dialertest.Step{dialertest.Read(3), dialertest.Send(greet5), dialertest.Read(10), dialertest.Send(first5 + peer5[:7])}, "198.51.100.1:1234", "", flow.ReasonHostUnreachable, true},
		{"silence", "socks5://", []dialertest.Step{dialertest.Read(3), dialertest.Send(greet5), dialertest.Read(10), dialertest.Send(first5), dialertest.Silent()}, "198.51.100.1:1234", "", flow.ReasonTimeout, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := dialertest.Start(t, tt.script...)
			d := dialer(t, tt.url+s.Addr.String())
			b, err := d.(Binder).Bind(testContext(t), addr(t, "192.0.2.7:21"))
			if err != nil {
				t.Fatal(err)
			}
			defer b.Close()
			if b.Addr().String() != tt.addr {
				t.Errorf("listens on %v", b.Addr())
			}
			ctx, cancel := context.WithTimeout(t.Context(), 5*short)
			defer cancel()
			c, peer, err := b.Accept(ctx)
			if tt.peer == "" {
				wantError(t, err, tt.reason, tt.upstream)
			} else if err != nil || peer.String() != tt.peer {
				t.Fatal(peer, err)
			} else if got, err := io.ReadAll(c); err != nil || string(got) != "220 hi" {
				t.Errorf("after the reply came %q, %v", got, err)
			}
			if c != nil {
				c.Close()
			}
			if st := StatusOf(d); st.Active != 0 || st.Bind != yes {
				t.Errorf("%+v", st)
			}
		})
	}
}

func TestBindRefused(t *testing.T) {
	for _, tt := range []struct {
		name, url string
		script    []dialertest.Step
		learned   string
		is        error
	}{
		{"command not supported", "socks5://", []dialertest.Step{dialertest.Read(3), dialertest.Send(greet5), dialertest.Read(10), dialertest.Send("\x05\x07\x00\x01\x00\x00\x00\x00\x00\x00")}, no, errors.ErrUnsupported},
		{"not allowed", "socks5://", []dialertest.Step{dialertest.Read(3), dialertest.Send(greet5), dialertest.Read(10), dialertest.Send("\x05\x02\x00\x01\x00\x00\x00\x00\x00\x00")}, unknown, flow.ErrProhibited},
		{"closed", "socks5://", []dialertest.Step{dialertest.Read(3), dialertest.Send(greet5), dialertest.Read(10)}, unknown, flow.ErrHostUnreachable},
		{"port 0", "socks5://", []dialertest.Step{dialertest.Read(3), dialertest.Send(greet5), dialertest.Read(10), dialertest.Send("\x05\x00\x00\x01\xc6\x33\x64\x01\x00\x00")}, unknown, flow.ErrUpstream},
		{"rejected", "socks4://", []dialertest.Step{dialertest.Read(9), dialertest.Send("\x00\x5b\x00\x00\x00\x00\x00\x00")}, unknown, flow.ErrHostUnreachable},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := dialertest.Start(t, tt.script...)
			d := dialer(t, tt.url+s.Addr.String())
			if _, err := d.(Binder).Bind(testContext(t), addr(t, "192.0.2.7:21")); !errors.Is(err, tt.is) {
				t.Errorf("%v", err)
			}
			if st := StatusOf(d); st.Active != 0 || st.Bind != tt.learned {
				t.Errorf("%+v", st)
			}
			if tt.learned != no {
				return
			}
			if _, err := d.(Binder).Bind(testContext(t), addr(t, "192.0.2.7:21")); !errors.Is(err, errors.ErrUnsupported) || s.Accepted() != 1 {
				t.Errorf("asked again (%d): %v", s.Accepted(), err)
			}
		})
	}
}

// TestBindGivenUp: a caller that goes away ends the wait, and the server learns it.
func TestBindGivenUp(t *testing.T) {
	gone := make(chan struct{})
	s := dialertest.Start(t, dialertest.Read(3), dialertest.Send(greet5), dialertest.Read(10), dialertest.Send(first5), dialertest.Silent(),
		func(*dialertest.Conv) error { return nil })
	d := dialer(t, "socks5://"+s.Addr.String())
	b, err := d.(Binder).Bind(testContext(t), addr(t, "192.0.2.7:21"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	go func() {
		defer close(gone)
		_, _, err := b.Accept(ctx)
		if !errors.Is(err, errGone) || errors.Is(err, flow.ErrUpstream) {
			t.Error(err)
		}
	}()
	cancel(errGone)
	<-gone
	if st := StatusOf(d); st.Active != 0 {
		t.Errorf("%+v", st)
	}
}

var errGone = errors.New("the application has gone")

// TestBound: a connection knows the way for what belongs to it.
func TestBound(t *testing.T) {
	s := dialertest.Start(t, dialertest.Read(3), dialertest.Send(greet5), dialertest.Read(10), dialertest.Send(first5), dialertest.Silent())
	c, err := dialer(t, "socks5://"+s.Addr.String()).Dial(testContext(t), addr(t, "192.0.2.7:21"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	b, err := c.(flow.Bound).Bind(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	b.Close()
	plain, err := NewNet(NetConfig{}).DialTCP(testContext(t), netip.AddrPortFrom(s.Addr.Addr(), s.Addr.Port()))
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Close()
	if _, err := plain.(flow.Bound).Bind(testContext(t)); !errors.Is(err, errors.ErrUnsupported) {
		t.Error(err)
	}
	direct, err := dialer(t, "direct://").Dial(testContext(t), flow.AddrFrom(s.Addr))
	if err != nil {
		t.Fatal(err)
	}
	defer direct.Close()
	if c.(flow.Bound).Direct() || !direct.(flow.Bound).Direct() {
		t.Error("what is direct is not told from what is not")
	}
}

// TestBindFamily: a server that listens for a name in another family than it has connected in is asked for the wildcard of that one; one that
// takes the name as it should is not, nor one that has not said from where it has connected.
func TestBindFamily(t *testing.T) {
	const (
		v4     = "\x05\x00\x00\x01\xc6\x33\x64\x01\x04\xd2" // 198.51.100.1:1234
		v6     = "\x05\x00\x00\x04\x20\x01\x0d\xb8\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01\x04\xd2"
		silent = "\x05\x00\x00\x01\x00\x00\x00\x00\x00\x00"
		no     = "\x05\x02\x00\x01\x00\x00\x00\x00\x00\x00"
		named  = "\x03\x0bexample.com\x00\x15"
		any4   = "\x01\x00\x00\x00\x00\x00\x00"
	)
	any6 := "\x04" + string(make([]byte, 18))
	for _, tt := range []struct {
		name, connect, bind, wildcard string // what the server answers
		asked                         []string
		at                            string // "" = it fails
		anybody                       bool
		is                            error
	}{
		{"the same family", v4, v4, no, []string{named}, "198.51.100.1:1234", false, nil},
		{"IPv4 instead of IPv6", v6, v4, v6, []string{named, any6}, "[2001:db8::1]:1234", true, nil},
		{"IPv6 instead of IPv4", v4, v6, v4, []string{named, any4}, "198.51.100.1:1234", true, nil},
		{"unknown", silent, v6, no, []string{named}, "[2001:db8::1]:1234", false, nil},
		{"refused", v4, no, v4, []string{named}, "", false, flow.ErrProhibited},
		{"no wildcard", v4, v6, no, []string{named, any4}, "", false, flow.ErrProhibited},
		{"the wrong one again", v4, v6, v6, []string{named, any4}, "", false, flow.ErrNetUnreachable},
	} {
		t.Run(tt.name, func(t *testing.T) {
			asked := make(chan string, 8)
			s := dialertest.Start(t, dialertest.Read(3), dialertest.Send(greet5), func(c *dialertest.Conv) error {
				req := make([]byte, 300)
				n, err := c.Read(req)
				if err != nil {
					return err
				}
				answer := tt.connect
				if req[1] == cmdBind {
					asked <- string(req[3:n])
					if answer = tt.wildcard; req[3] == atypDomain {
						answer = tt.bind
					}
				}
				_, err = io.WriteString(c, answer)
				return err
			}, dialertest.Silent())
			d := dialer(t, "socks5h://"+s.Addr.String())
			c, err := d.Dial(testContext(t), addr(t, "example.com:21"))
			if err != nil {
				t.Fatal(err)
			}
			defer c.Abort()
			b, err := c.(flow.Bound).Bind(testContext(t))
			switch {
			case tt.at == "" && !errors.Is(err, tt.is):
				t.Error(err)
			case tt.at != "" && err != nil:
				t.Fatal(err)
			case err == nil:
				if b.Addr().String() != tt.at || b.Anybody() != tt.anybody {
					t.Errorf("listens at %v, for anybody: %v", b.Addr(), b.Anybody())
				}
				_ = b.Close()
			}
			for _, want := range tt.asked {
				if got := <-asked; got != want {
					t.Errorf("asked for %q, want %q", got, want)
				}
			}
			if len(asked) != 0 || StatusOf(d).Active != 1 {
				t.Errorf("asked for %q too; %+v", <-asked, StatusOf(d))
			}
		})
	}
}
