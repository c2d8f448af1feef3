// SPDX-License-Identifier: GPL-3.0-or-later

package flow

import (
	"context"
	"errors"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// Reason is why an application is told no, and so what it is told. The stack turns it into RST, ICMP or silence.
type Reason uint8

// The reasons, and what an application's connect() returns for each (IPv4 / IPv6).
const (
	// ReasonHostUnreachable: EHOSTUNREACH. It is the zero value: an unknown cause is an unreachable host, never a refusal that nobody sent.
	ReasonHostUnreachable Reason = iota
	// ReasonRefused: RST, ECONNREFUSED; ICMP port unreachable for UDP.
	ReasonRefused
	// ReasonNetUnreachable: ENETUNREACH.
	ReasonNetUnreachable
	// ReasonTimeout: the upstream or the destination did not answer in time. EHOSTUNREACH (ICMP host unreachable).
	ReasonTimeout
	// ReasonProhibited: a policy of the upstream forbids it. EHOSTUNREACH / EACCES (ICMP code 13, ICMPv6 code 1).
	ReasonProhibited
	// ReasonDrop: silence, only ever by rule.
	ReasonDrop
)

// String returns the label used in logs and in the reason label of metrics.
func (r Reason) String() string {
	switch r {
	case ReasonRefused:
		return "refused"
	case ReasonNetUnreachable:
		return "net_unreachable"
	case ReasonTimeout:
		return "timeout"
	case ReasonProhibited:
		return "prohibited"
	case ReasonDrop:
		return "drop"
	}
	return "host_unreachable"
}

// What a Dialer's error wraps when the cause is known.
var (
	// ErrRefused: the destination itself refused (SOCKS5 REP 5).
	ErrRefused = errors.New("connection refused by destination")
	// ErrHostUnreachable: the upstream cannot reach the host, or cannot resolve it (SOCKS5 REP 1, 4).
	ErrHostUnreachable = errors.New("host unreachable")
	// ErrNetUnreachable: no route, or an address family the upstream does not have (SOCKS5 REP 3, 8).
	ErrNetUnreachable = errors.New("network unreachable")
	// ErrTimeout: no answer in time (SOCKS5 REP 6, HTTP 504, the dial time-out).
	ErrTimeout = errors.New("timed out")
	// ErrProhibited: the upstream's rules forbid it (SOCKS5 REP 2, HTTP 403).
	ErrProhibited = errors.New("not allowed by the upstream")
	// ErrUpstream: the upstream itself is at fault (down, wrong credentials, protocol error). It outranks the cause it wraps: a proxy that
	// refuses connections must not look like a destination that does.
	ErrUpstream = errors.New("upstream failed")
	// ErrNotSupported: a valid configuration asks for what no code does yet. Refusing is safe, ignoring is not.
	ErrNotSupported = errors.New("not supported yet")
	// ErrNoServers: dns has no servers configured, so it cannot resolve.
	ErrNoServers = errors.New("no dns servers configured")
)

// ReasonOf maps a Dial error to what the application is told.
func ReasonOf(err error) Reason {
	switch {
	case errors.Is(err, ErrUpstream):
		if isTimeout(err) {
			return ReasonTimeout
		}
		return ReasonHostUnreachable
	case errors.Is(err, ErrRefused), errors.Is(err, unix.ECONNREFUSED):
		return ReasonRefused
	case errors.Is(err, ErrProhibited):
		return ReasonProhibited
	case errors.Is(err, ErrNetUnreachable), errors.Is(err, unix.ENETUNREACH):
		return ReasonNetUnreachable
	case errors.Is(err, ErrTimeout), isTimeout(err):
		return ReasonTimeout
	}
	return ReasonHostUnreachable
}

// OutOfDescriptors reports whether this machine, not an upstream, has failed: the process, or all of them, have too many files open. It is over
// when a flow ends.
func OutOfDescriptors(err error) bool {
	return errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE)
}

func isTimeout(err error) bool {
	var ne net.Error
	return errors.Is(err, context.DeadlineExceeded) || errors.Is(err, os.ErrDeadlineExceeded) || errors.As(err, &ne) && ne.Timeout()
}
