// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"bufio"
	"errors"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mutex-proxy/mutex/dialers/dialertest"
	"github.com/mutex-proxy/mutex/flow"
)

// speaks is a server of one protocol that may change: "5", "h", "4", or "" for one that takes everything in silence.
type speaks struct {
	kind atomic.Value
	mu   sync.Mutex
	got  []string // what it was sent, protocol by protocol
}

func (s *speaks) step(c *dialertest.Conv) error {
	r := bufio.NewReader(c)
	first, err := r.ReadByte()
	if err != nil {
		return err
	}
	read := func(n int) string {
		b := make([]byte, n)
		_, _ = io.ReadFull(r, b)
		return string(b)
	}
	switch kind := s.kind.Load().(string); {
	case kind == "5" && first == 5:
		s.note("5 " + read(int(read(1)[0])))
		if _, err = io.WriteString(c, "\x05\x00"); err == nil && len(read(4+1+11+2)) > 0 {
			_, err = io.WriteString(c, "\x05\x00\x00\x01\x00\x00\x00\x00\x00\x00")
		}
	case kind == "h" && first >= 'A':
		line, _ := r.ReadString('\n')
		s.note("h " + string(first) + line[:len(line)-2])
		for line != "\r\n" && err == nil {
			line, err = r.ReadString('\n')
			if strings.HasPrefix(line, "Proxy-Auth") {
				s.note(line[:24])
			}
		}
		if first == 'O' {
			_, _ = io.WriteString(c, "HTTP/1.1 400 What\r\n\r\n")
			return io.EOF
		}
		_, err = io.WriteString(c, ok200)
	case kind == "4" && first == 4:
		head := read(7)
		user, _ := r.ReadString(0)
		s.note("4 " + user)
		if head[3:] == "\x00\x00\x00\x00" {
			_, _ = io.WriteString(c, "\x00\x5b\x00\x00\x00\x00\x00\x00")
			return io.EOF
		}
		if _, err = r.ReadString(0); err == nil {
			_, err = io.WriteString(c, "\x00\x5a\x00\x00\x00\x00\x00\x00")
		}
	case kind == "":
		_, err = io.Copy(io.Discard, c)
	default:
		return io.EOF
	}
	return err
}

func (s *speaks) note(what string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.got = append(s.got, what)
}

func TestAuto(t *testing.T) {
	for kind, want := range map[string]struct {
		scheme string
		got    string
	}{
		"5": {SchemeSOCKS5h, "5 \x00\x02|5 \x00\x02"},
		"h": {SchemeHTTP, "h OPTIONS * HTTP/1.1|h CONNECT example.com:443 HTTP/1.1|Proxy-Authorization: Bas"},
		"4": {SchemeSOCKS4a, "4 \x00|4 u\x00"},
	} {
		t.Run(want.scheme, func(t *testing.T) {
			var s speaks
			s.kind.Store(kind)
			srv := dialertest.Start(t, s.step)
			d := dialer(t, "auto://u:p@"+srv.Addr.String())
			c, err := d.Dial(testContext(t), addr(t, "example.com:443"))
			if err != nil {
				t.Fatal(err)
			}
			c.Close()
			if got := d.(*Auto).Protocol(); got != want.scheme {
				t.Errorf("found out %q", got)
			}
			// Nothing but the last conversation has credentials in it.
			if got := strings.Join(s.got, "|"); got != want.got {
				t.Errorf("the server heard %q, want %q", got, want.got)
			}
			before := srv.Accepted()
			if c, err = d.Dial(testContext(t), addr(t, "example.com:443")); err != nil {
				t.Fatal(err)
			}
			c.Close()
			if n := srv.Accepted() - before; n != 1 {
				t.Errorf("%d connections for the second flow", n)
			}
			if st := StatusOf(d); !st.Up || st.URL != "auto://u:***@"+srv.Addr.String() || st.Total != 3 || st.RemoteDNS != yes {
				t.Errorf("%+v", st)
			}
		})
	}
}

// What an upstream speaks is asked again after it has failed, not before, and not at every flow.
func TestAutoRelearns(t *testing.T) {
	var s speaks
	s.kind.Store("5")
	srv := dialertest.Start(t, s.step)
	now := time.Now()
	var shift atomic.Int64
	d, err := New("up", spec(t, "auto://"+srv.Addr.String()), NewNet(NetConfig{Now: func() time.Time { return now.Add(time.Duration(shift.Load())) }}))
	if err != nil {
		t.Fatal(err)
	}
	dial := func() error {
		c, err := d.Dial(testContext(t), addr(t, "example.com:443"))
		if err == nil {
			c.Close()
		}
		return err
	}
	if err := dial(); err != nil {
		t.Fatal(err)
	}
	s.kind.Store("h")
	if err := dial(); !errors.Is(err, flow.ErrUpstream) { // it is believed until it fails
		t.Fatal(err)
	}
	shift.Store(int64(reprobe))
	if err := dial(); err != nil || d.(*Auto).Protocol() != SchemeHTTP {
		t.Fatal(err, d.(*Auto).Protocol())
	}
	srv.Close()
	if err := dial(); !errors.Is(err, flow.ErrUpstream) {
		t.Fatal(err)
	}
	shift.Add(int64(reprobe))
	if err := dial(); !errors.Is(err, flow.ErrUpstream) || !strings.Contains(err.Error(), "detect") || strings.Contains(err.Error(), "\n") {
		t.Fatal(err)
	}
	if d.(*Auto).Protocol() != SchemeHTTP {
		t.Error("forgotten because it was down")
	}
}

// Many flows at once ask once; a caller that gives up does not spoil it for the others.
func TestAutoOnce(t *testing.T) {
	var s speaks
	s.kind.Store("h")
	srv := dialertest.Start(t, s.step)
	d := dialer(t, "auto://"+srv.Addr.String())
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			c, err := d.Dial(t.Context(), addr(t, "example.com:443"))
			if err != nil {
				t.Error(err)
				return
			}
			c.Close()
		})
	}
	wg.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, g := range s.got {
		if strings.HasPrefix(g, "h OPTIONS") {
			n++
		}
	}
	if n != 1 {
		t.Errorf("asked %d times", n)
	}
}

// Switching off reaches the connections of what was found, and a trial finds out all the same.
func TestAutoState(t *testing.T) {
	var s speaks
	s.kind.Store("h")
	srv := dialertest.Start(t, s.step, dialertest.Echo())
	d := dialer(t, "auto://"+srv.Addr.String())
	c, err := d.Dial(testContext(t), addr(t, "example.com:443"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	SetState(d, Draining)
	if _, err := d.Dial(testContext(t), addr(t, "example.com:443")); !errors.Is(err, errOff) || StatusOf(d).State != Draining || StatusOf(d).Active != 1 {
		t.Errorf("%v %+v", err, StatusOf(d))
	}
	SetState(d, Disabled)
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Error("disabling left a connection")
	}
	SetState(d, Enabled)
	c2, err := d.Dial(testContext(t), addr(t, "example.com:443"))
	if err != nil {
		t.Fatal(err)
	}
	c2.Close()
	fresh := dialer(t, "auto://"+srv.Addr.String())
	SetState(fresh, Disabled)
	if steps := Trial(testContext(t), fresh, addr(t, "example.com:443")); steps[0].Says != SchemeHTTP || steps[len(steps)-1].Err != nil {
		t.Errorf("%+v", steps)
	}
	if _, err := fresh.ListenPacket(testContext(t), nil); !errors.Is(err, errOff) {
		t.Error(err)
	}
}
