// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mutex-proxy/mutex/dialers/dialertest"
	"github.com/mutex-proxy/mutex/flow"
)

// warmDialer is a dialer that keeps connections ready until the test ends.
func warmDialer(t *testing.T, raw string) flow.Dialer {
	t.Helper()
	d := dialer(t, raw)
	t.Cleanup(func() { _ = d.(io.Closer).Close() })
	return d
}

// ready waits until n connections are ready.
func ready(t *testing.T, d flow.Dialer, n int) {
	t.Helper()
	waitFor(t, "connections to be ready", func() bool { return StatusOf(d).Warm == n })
}

func mustDial(t *testing.T, d flow.Dialer) flow.Conn {
	t.Helper()
	c, err := d.Dial(testContext(t), flow.Addr{IP: loopback, Port: 21})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Abort)
	return c
}

// TestWarm: what follows the first flow finds connections ready, of every protocol, and nothing is lost behind the reply.
func TestWarm(t *testing.T) {
	cert, _ := certificate(t, "proxy.example")
	overTLS := func(steps ...func(io.ReadWriter) error) dialertest.Step {
		return func(c *dialertest.Conv) error {
			tc := tls.Server(c.TCPConn, &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12, NextProtos: []string{protoH1}})
			for _, s := range steps {
				if err := s(tc); err != nil {
					return err
				}
			}
			_, err := io.Copy(io.Discard, tc)
			return err
		}
	}
	read := func(n int64) func(io.ReadWriter) error {
		return func(c io.ReadWriter) error { _, err := io.CopyN(io.Discard, c, n); return err }
	}
	send := func(s string) func(io.ReadWriter) error {
		return func(c io.ReadWriter) error { _, err := io.WriteString(c, s); return err }
	}
	for _, tt := range []struct {
		name, url string
		script    []dialertest.Step
	}{
		{"socks4", "socks4://%s?warm=3", []dialertest.Step{dialertest.Read(9), dialertest.SendSlowly(first4 + "220 hi"), dialertest.Silent()}},
		{"socks5", "socks5://%s?warm=3", []dialertest.Step{dialertest.Read(3), dialertest.Send(greet5), dialertest.Read(10), dialertest.SendSlowly(first5 + "220 hi"), dialertest.Silent()}},
		{"socks5 with password", "socks5://bob:secret@%s?warm=3", []dialertest.Step{
			dialertest.Read(4), dialertest.Send("\x05\x02"), dialertest.Read(12), dialertest.Send("\x01\x00"), dialertest.Read(10), dialertest.Send(first5 + "220 hi"), dialertest.Silent(),
		}},
		{"socks5s", "socks5s://%s?warm=3&insecure=1", []dialertest.Step{overTLS(read(3), send(greet5), read(10), send(first5+"220 hi"))}},
		{"http", "http://%s?warm=3", []dialertest.Step{dialertest.ReadHead(), dialertest.SendSlowly("HTTP/1.1 200 OK\r\n\r\n220 hi"), dialertest.Silent()}},
		{"https", "https://%s?warm=3&insecure=1&http=1.1", []dialertest.Step{overTLS(read(int64(len("CONNECT 127.0.0.1:21 HTTP/1.1\r\nHost: 127.0.0.1:21\r\n\r\n"))), send("HTTP/1.1 200 OK\r\n\r\n220 hi"))}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := dialertest.Start(t, tt.script...)
			before, after, _ := cutFormat(tt.url)
			d := warmDialer(t, before+s.Addr.String()+after)
			for i := range 5 {
				c := mustDial(t, d)
				b := make([]byte, 6)
				if _, err := io.ReadFull(c, b); err != nil || string(b) != "220 hi" {
					t.Fatalf("flow %d reads %q, %v", i, b, err)
				}
				ready(t, d, 3)
				// Each flow but the first found one ready: none was opened beside those that took its place.
				waitFor(t, "the server to see them", func() bool { return s.Accepted() >= 4+i })
				if got := s.Accepted(); got != 4+i {
					t.Errorf("after flow %d the server has seen %d connections, want %d", i, got, 4+i)
				}
			}
			if st := StatusOf(d); st.Active != 5 || st.Total != 5 || st.Errors != 0 {
				t.Errorf("%+v", st)
			}
		})
	}
}

func cutFormat(url string) (before, after string, ok bool) {
	i := slices.Index([]byte(url), '%')
	return url[:i], url[i+2:], true
}

// TestWarmEnded: connections that the server ends while they wait are no flow's, and one that wants no idle clients is left alone.
func TestWarmEnded(t *testing.T) {
	s := dialertest.Start(t, dialertest.Read(3), dialertest.Send(greet5), dialertest.Read(10), dialertest.Send(first5), dialertest.Silent())
	d := warmDialer(t, "socks5://"+s.Addr.String()+"?warm=4")
	mustDial(t, d)
	ready(t, d, 4)
	s.Drop()
	ready(t, d, 0)
	for range 3 {
		mustDial(t, d)
	}
	if got := s.Accepted(); got != 5+3 { // within the pause none was made
		t.Errorf("%d connections", got)
	}
	w := d.(*SOCKS5).warm
	w.mu.Lock()
	w.until = time.Time{}
	w.mu.Unlock()
	mustDial(t, d)
	ready(t, d, 4)
	s.Close()
	ready(t, d, 0)
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.pause != 2*warmPause {
		t.Errorf("the pause is %v", w.pause)
	}
}

// TestWarmLost: a connection that is found dead when it is used is replaced before the flow learns of it; a refusal is believed.
func TestWarmLost(t *testing.T) {
	for name, bad := range map[string]dialertest.Step{
		"closed": func(*dialertest.Conv) error { return io.EOF }, "reset": dialertest.Reset(), "garbage": dialertest.Send("HTTP/1.1 408 Timeout\r\n\r\n"),
	} {
		t.Run(name, func(t *testing.T) {
			var lost atomic.Bool
			s := dialertest.Start(t, dialertest.Read(3), dialertest.Send(greet5), dialertest.Read(10), func(c *dialertest.Conv) error {
				if lost.CompareAndSwap(true, false) {
					_ = bad(c)
					return io.EOF
				}
				return nil
			}, dialertest.Send(first5), dialertest.Silent())
			d := warmDialer(t, "socks5://"+s.Addr.String()+"?warm=1")
			mustDial(t, d)
			ready(t, d, 1)
			lost.Store(true)
			mustDial(t, d)
			if lost.Load() {
				t.Error("the one that was ready was not used")
			}
			if st := StatusOf(d); !st.Up || st.Errors != 0 || st.Active != 2 {
				t.Errorf("%+v", st)
			}
		})
	}
	t.Run("refused", func(t *testing.T) {
		var no atomic.Bool
		s := dialertest.Start(t, dialertest.Read(3), dialertest.Send(greet5), dialertest.Read(10), func(c *dialertest.Conv) error {
			if no.Load() {
				_, _ = io.WriteString(c, "\x05\x05\x00\x01\x00\x00\x00\x00\x00\x00")
				return io.EOF
			}
			return nil
		}, dialertest.Send(first5), dialertest.Silent())
		d := warmDialer(t, "socks5://"+s.Addr.String()+"?warm=1")
		mustDial(t, d)
		ready(t, d, 1)
		no.Store(true)
		if _, err := d.Dial(testContext(t), addr(t, "192.0.2.7:21")); !errors.Is(err, flow.ErrRefused) {
			t.Errorf("%v", err)
		}
		ready(t, d, 1)
		if got := s.Accepted(); got != 3 {
			t.Errorf("asked twice: %d connections", got)
		}
	})
}

// TestWarmAge: what waits too long is replaced while there are flows, and not when there have been none for a while.
func TestWarmAge(t *testing.T) {
	s := dialertest.Start(t, dialertest.Read(9), dialertest.Send(first4), dialertest.Silent())
	d := warmDialer(t, "socks4://"+s.Addr.String()+"?warm=2")
	w := d.(*SOCKS4).warm
	w.idleTime, w.rest = 5*time.Millisecond, time.Hour
	mustDial(t, d)
	waitFor(t, "new ones in the place of the old", func() bool { return s.Accepted() > 7 })
	w.mu.Lock()
	w.rest = 0
	w.mu.Unlock()
	waitFor(t, "none to be ready", func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		return len(w.idle)+w.making == 0
	})
}

// TestWarmBounds: what waits and what has flows are together no more than max_flows, and what takes no flows keeps nothing ready.
func TestWarmBounds(t *testing.T) {
	s := dialertest.Start(t, dialertest.Read(9), dialertest.Send(first4), dialertest.Silent())
	d := warmDialer(t, "socks4://"+s.Addr.String()+"?warm=8&max_flows=3")
	first := mustDial(t, d)
	ready(t, d, 2)
	mustDial(t, d)
	mustDial(t, d)
	ready(t, d, 0)
	if _, err := d.Dial(testContext(t), addr(t, "192.0.2.7:21")); !errors.Is(err, errFull) {
		t.Errorf("%v", err)
	}
	first.Abort()
	mustDial(t, d)
	for _, state := range []State{Draining, Disabled} {
		d := warmDialer(t, "socks4://"+s.Addr.String()+"?warm=4")
		mustDial(t, d)
		ready(t, d, 4)
		SetState(d, state)
		ready(t, d, 0)
		if _, err := d.Dial(testContext(t), addr(t, "192.0.2.7:21")); !errors.Is(err, errOff) {
			t.Errorf("%v: %v", state, err)
		}
		ready(t, d, 0)
		SetState(d, Enabled)
		mustDial(t, d)
		ready(t, d, 4)
		_ = d.(io.Closer).Close()
		_ = d.(io.Closer).Close()
		ready(t, d, 0)
		mustDial(t, d) // a flow that was being decided is still served
		ready(t, d, 0)
	}
}

// TestWarmAuto: what was found out keeps connections ready too.
func TestWarmAuto(t *testing.T) {
	s := new(speaks)
	s.kind.Store("4")
	up := dialertest.Start(t, s.step)
	d := warmDialer(t, "auto://"+up.Addr.String()+"?warm=2")
	c, err := d.Dial(testContext(t), addr(t, "example.com:443"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Abort()
	ready(t, d, 2)
}

// TestWarmConcurrent: many flows at once, each on a connection of its own.
func TestWarmConcurrent(t *testing.T) {
	s := dialertest.Start(t, dialertest.Read(3), dialertest.Send(greet5), dialertest.Read(10), dialertest.Send(first5), dialertest.Echo())
	d := warmDialer(t, "socks5://"+s.Addr.String()+"?warm=16")
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			for j := range 20 {
				c, err := d.Dial(t.Context(), flow.Addr{IP: loopback, Port: 21})
				if err != nil {
					t.Error(err)
					return
				}
				want := []byte{byte(i), byte(j)}
				got := make([]byte, 2)
				if _, err := c.Write(want); err != nil {
					t.Error(err)
				}
				if _, err := io.ReadFull(c, got); err != nil || string(got) != string(want) {
					t.Errorf("%v instead of %v: %v", got, want, err)
				}
				c.Abort()
			}
		})
	}
	wg.Wait()
	if st := StatusOf(d); st.Active != 0 || st.Errors != 0 || st.Total != 320 {
		t.Errorf("%+v", st)
	}
}

// BenchmarkWarm is how long a flow waits for its connection, by a server that takes the given time for each answer.
func BenchmarkWarm(b *testing.B) {
	for _, rtt := range []time.Duration{0, 5 * time.Millisecond} {
		for _, option := range []string{"", "?warm=1"} {
			b.Run(rtt.String()+"/"+map[string]string{"": "cold", "?warm=1": "warm"}[option], func(b *testing.B) {
				wait := func(*dialertest.Conv) error {
					if rtt > 0 {
						<-time.After(rtt)
					}
					return nil
				}
				s := dialertest.Start(b, dialertest.Read(4), wait, dialertest.Send("\x05\x02"), dialertest.Read(12), wait, dialertest.Send("\x01\x00"),
					dialertest.Read(10), wait, dialertest.Send(first5), dialertest.Silent())
				spec, err := ParseURL("socks5://bob:secret@" + s.Addr.String() + option)
				if err != nil {
					b.Fatal(err)
				}
				d, err := New("up", spec, NewNet(NetConfig{}))
				if err != nil {
					b.Fatal(err)
				}
				defer d.(io.Closer).Close()
				dst := flow.Addr{IP: loopback, Port: 21}
				dial := func() {
					c, err := d.Dial(context.Background(), dst)
					if err != nil {
						b.Fatal(err)
					}
					c.Abort()
				}
				for range aheadAfter + 1 { // the last of them finds out whether requests may be sent ahead, which takes a while
					dial()
				}
				var took time.Duration // of the flows alone
				for b.Loop() {
					for option != "" && StatusOf(d).Warm == 0 {
						<-time.After(100 * time.Microsecond)
					}
					begin := time.Now()
					dial()
					took += time.Since(begin)
				}
				b.ReportMetric(float64(took.Microseconds())/float64(b.N), "µs/dial")
			})
		}
	}
}
