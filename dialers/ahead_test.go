// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mutex-proxy/mutex/flow"
)

// recvServer is a SOCKS5 server that takes one recv(2) for one message. A tolerant one goes on with what it has read beyond it; another
// (microsocks) loses that.
type recvServer struct {
	addr     netip.AddrPort
	tolerant atomic.Bool
	refuse   atomic.Bool // answers no request at all
	together atomic.Int64
	apart    atomic.Int64
	wg       sync.WaitGroup
}

func newRecvServer(t *testing.T) *recvServer {
	t.Helper()
	var lc net.ListenConfig
	l, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &recvServer{addr: l.Addr().(*net.TCPAddr).AddrPort()}
	s.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			s.wg.Go(func() {
				defer c.Close()
				s.serve(c)
			})
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		s.wg.Wait()
	})
	return s
}

func (s *recvServer) serve(c net.Conn) {
	buf := make([]byte, 512)
	n, err := c.Read(buf)
	if err != nil {
		return
	}
	if n > 3 && s.refuse.Load() {
		return
	}
	_, _ = c.Write([]byte{5, 0})
	if n > 3 && s.tolerant.Load() {
		s.together.Add(1)
		if buf[3+3] == 1 && buf[3+4] == 0 { // 0.0.0.0
			_, _ = io.WriteString(c, "\x05\x05\x00\x01\x00\x00\x00\x00\x00\x00")
			return
		}
	} else {
		if _, err := c.Read(buf); err != nil {
			return
		}
		s.apart.Add(1)
	}
	_, _ = io.WriteString(c, okReply)
	_, _ = io.Copy(io.Discard, c)
}

func dialTimes(t *testing.T, d flow.Dialer, n int) {
	t.Helper()
	for range n {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		c, err := d.Dial(ctx, flow.Addr{IP: netip.MustParseAddr("203.0.113.1"), Port: 80})
		cancel()
		if err != nil {
			t.Fatal(err)
		}
		c.Abort()
	}
}

// A server that is seen to take the request with the greeting gets it so; one that loses it never does but once, on a connection of no flow.
func TestSendAhead(t *testing.T) {
	t.Run("takes it", func(t *testing.T) {
		s := newRecvServer(t)
		s.tolerant.Store(true)
		d := newSOCKS5("up", Spec{Scheme: SchemeSOCKS5h, Host: "127.0.0.1", Port: s.addr.Port()}, NewNet(NetConfig{}))
		dialTimes(t, d, aheadAfter)
		if s.together.Load() != 0 {
			t.Fatal("sent ahead before it was known that the server takes it")
		}
		dialTimes(t, d, 11)
		if got := s.together.Load(); got != 1+10 && got != 1+11 { // the question, and all after it; perhaps already the one beside it
			t.Errorf("%d requests sent ahead, want 11", got)
		}
	})
	t.Run("loses it", func(t *testing.T) {
		s := newRecvServer(t)
		d := newSOCKS5("up", Spec{Scheme: SchemeSOCKS5h, Host: "127.0.0.1", Port: s.addr.Port()}, NewNet(NetConfig{}))
		begin := time.Now()
		dialTimes(t, d, 2*aheadAfter)
		if got := s.apart.Load(); got != 2*aheadAfter {
			t.Errorf("%d of %d requests arrived", got, 2*aheadAfter)
		}
		if d.ahead.known() {
			t.Error("the server is taken for one that takes it")
		}
		if took := time.Since(begin); took > 3*time.Second {
			t.Errorf("the question was asked more than once: %v", took)
		}
	})
	t.Run("replaced by one that does not", func(t *testing.T) {
		s := newRecvServer(t)
		s.tolerant.Store(true)
		d := newSOCKS5("up", Spec{Scheme: SchemeSOCKS5h, Host: "127.0.0.1", Port: s.addr.Port()}, NewNet(NetConfig{}))
		dialTimes(t, d, aheadAfter+2)
		s.refuse.Store(true)
		dialTimes(t, d, 3) // the flow that finds out is tried again, the others know
		if d.ahead.known() {
			t.Error("goes on sending ahead to a server that hangs up on it")
		}
	})
}

func TestSendAheadForgets(t *testing.T) {
	now := time.Unix(1000, 0)
	a := sendAhead{now: func() time.Time { return now }}
	a.state.Store(1)
	for range doubts - 1 {
		a.failed(flow.ErrTimeout)
	}
	a.failed(replyError(5)) // it has answered
	for range doubts - 1 {
		a.failed(flow.ErrTimeout)
	}
	if !a.known() {
		t.Fatal("silences with an answer between them were held against the server")
	}
	a.failed(errors.Join(flow.ErrTimeout))
	if a.known() || a.turn() {
		t.Fatal("silences in a row were not, or it is asked again at once")
	}
	now = now.Add(aheadEvery)
	if !a.turn() || a.turn() {
		t.Error("it is not asked again after a while, by one")
	}
}
