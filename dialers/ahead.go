// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"context"
	"errors"
	"io"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/mutex-proxy/mutex/flow"
)

const (
	// aheadAfter is how many connections an upstream has to have opened before it pays to find out whether it takes requests ahead.
	aheadAfter = 16
	// aheadEvery is how long a "no" stands: servers are replaced seldom, and the question costs a flow up to aheadTime.
	aheadEvery = time.Hour
	// aheadTime, and four times the latency of the server, is how long its answer may take: it need not ask anybody.
	aheadTime = 250 * time.Millisecond
)

// sendAhead is whether a SOCKS5 server takes the request together with the greeting, which saves a round trip a connection. Nothing but a
// server's answer to such a request says so: it is asked once, for something that cannot be had (0.0.0.0:0) and on a connection of its
// own, so that no flow hangs with a server that loses what it reads beyond the greeting.
type sendAhead struct {
	now     func() time.Time
	state   atomic.Uint32 // 0 unknown, 1 yes, 2 no or being asked
	dials   atomic.Uint32 // connections opened
	again   atomic.Int64  // Unix ns; when a "no" is asked again
	method  atomic.Uint32 // 1 + the method the server has chosen; 0 = none yet
	strikes atomic.Uint32 // replies in a row that did not come
}

// known reports whether the server takes it.
func (a *sendAhead) known() bool { return a.state.Load() == 1 }

// chose notes the server's choice of method.
func (a *sendAhead) chose(method byte) {
	if m := uint32(method) + 1; a.method.Load() != m {
		a.method.Store(m)
	}
}

// failed notes that a request sent ahead was not answered well: the server may be another one now. A reply that does not come may be the destination's
// fault, and so counts only the third time in a row.
func (a *sendAhead) failed(err error) {
	var rep replyError
	switch {
	case errors.As(err, &rep), errors.Is(err, context.Canceled):
		a.strikes.Store(0)
	case errors.Is(err, errGreeting), a.strikes.Add(1) >= doubts:
		a.strikes.Store(0)
		a.no()
	}
}

func (a *sendAhead) no() {
	a.again.Store(a.now().Add(aheadEvery).UnixNano())
	a.state.Store(2)
}

// turn reports whether the caller is to ask the server.
func (a *sendAhead) turn() bool {
	switch a.state.Load() {
	case 0:
		return a.dials.Add(1) > aheadAfter && a.state.CompareAndSwap(0, 2)
	case 2:
		at, now := a.again.Load(), a.now().UnixNano()
		return at != 0 && now >= at && a.again.CompareAndSwap(at, now+int64(aheadEvery))
	}
	return false
}

// findAhead asks the server beside a connection that is being opened, if it is time to. The returned function waits for the answer, and must be
// called.
func (s *SOCKS5) findAhead(ctx context.Context) func() {
	if s.spec.Pipeline || s.warm != nil || s.spec.HasUser && s.ahead.method.Load() == 1+methodNone || !s.ahead.turn() {
		return func() {}
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), aheadTime+4*time.Duration(s.latency.Load()))
	done := make(chan struct{})
	go func() {
		defer close(done)
		if s.takesAhead(ctx) {
			s.ahead.state.Store(1)
		} else {
			s.ahead.no()
		}
	}()
	return func() {
		<-done
		cancel()
	}
}

// takesAhead sends greeting and request together, and reports whether both are answered.
func (s *SOCKS5) takesAhead(ctx context.Context) bool {
	tcp, err := s.host.dial(ctx, s.net, s.spec.Port)
	if err != nil {
		return false
	}
	defer tcp.Abort()
	nowhere := flow.Addr{IP: netip.IPv4Unspecified()}
	err = handshake(ctx, tcp, func() error {
		c, err := secure(ctx, tcp, s.tls)
		if err == nil {
			_, err = s.ask(c.(io.ReadWriter), cmdConnect, nowhere, true)
		}
		return err
	})
	var rep replyError
	return err == nil || errors.As(err, &rep)
}
