// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"slices"
	"strings"
	"sync/atomic"
	"time"
)

const (
	// relearn is how long a "no" stands before one flow may ask again. Long enough that a browser opening a page over IPv6 is refused at
	// once nearly always, short enough that a restarted upstream is noticed.
	relearn = time.Minute
	// doubts is how many ambiguous answers in a row make a "no": an unreachable network may be that of the destination alone.
	doubts = 3
)

// capability is something an upstream can or cannot do, learned from its answers. The zero value, with now set, is unknown.
type capability struct {
	now     func() time.Time
	state   atomic.Uint32 // 0 unknown, 1 yes, 2 no
	strikes atomic.Uint32
	retryAt atomic.Int64 // Unix ns; with state no, the one who moves it may ask again
}

// allowed reports whether to try. While the answer is no, one caller every relearn is allowed, so that the answer can change.
func (c *capability) allowed() bool {
	if c.state.Load() != 2 {
		return true
	}
	at, now := c.retryAt.Load(), c.now().UnixNano()
	return now >= at && c.retryAt.CompareAndSwap(at, now+int64(relearn))
}

// can records that the upstream has done it.
func (c *capability) can() {
	if c.state.Load() != 1 || c.strikes.Load() != 0 {
		c.strikes.Store(0)
		c.state.Store(1)
	}
}

// cannot records that the upstream has said it will never do it.
func (c *capability) cannot() {
	c.retryAt.Store(c.now().UnixNano() + int64(relearn))
	c.state.Store(2)
}

// doubt records an answer that may mean it, and may mean only this destination.
func (c *capability) doubt() {
	if c.strikes.Add(1) >= doubts {
		c.cannot()
	}
}

// String returns yes, no or unknown.
func (c *capability) String() string {
	switch c.state.Load() {
	case 1:
		return yes
	case 2:
		return no
	}
	return unknown
}

// denied reports whether the answer is no, without taking the turn of the one who may ask again.
func (c *capability) denied() bool {
	return c.state.Load() == 2 && c.now().UnixNano() < c.retryAt.Load()
}

// The names of authentication that is asked for or taken.
const (
	authNone     = "none"
	authPassword = "password" // RFC 1929
	authBasic    = "basic"
	authDigest   = "digest"
	authBearer   = "bearer"
)

// authSchemes is how an upstream was last seen to authenticate its clients. The zero value is unknown.
type authSchemes struct{ known atomic.Pointer[string] } // in order, with spaces between

// are records what the server has asked for, in order.
func (s *authSchemes) are(names ...string) {
	all := strings.Join(names, " ")                             // of one name it is that name, without a copy
	if known := s.known.Load(); known == nil || *known != all { // no write to a line that all flows share
		stored := all // so that only what is stored is allocated
		s.known.Store(&stored)
	}
}

// asked records the challenges of a 407. Schemes that are none of ours are left out: they are the server's words.
func (s *authSchemes) asked(fields []string) {
	var names []string
	for _, f := range fields {
		for _, c := range ParseChallenges(f) {
			if slices.Contains([]string{authBasic, authDigest, authBearer, "negotiate", "ntlm"}, c.Scheme) && !slices.Contains(names, c.Scheme) {
				names = append(names, c.Scheme)
			}
		}
	}
	if slices.Sort(names); len(names) > 0 {
		s.are(names...)
	}
}

// took records that a request has passed with credentials of a scheme. It may be one of several that the server has asked for.
func (s *authSchemes) took(name string) {
	if known := s.known.Load(); known == nil || *known != name && !slices.Contains(strings.Fields(*known), name) {
		s.are(name)
	}
}

// String returns the names; "" if nothing is known.
func (s *authSchemes) String() string {
	if known := s.known.Load(); known != nil {
		return *known
	}
	return ""
}
