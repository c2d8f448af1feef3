// SPDX-License-Identifier: GPL-3.0-or-later

// Package dns answers every DNS query of a captured process: from hosts, rules, fake IPs, the cache, or the profile's own servers asked
// through the profile's dialer, and from nothing else. Any failure is SERVFAIL, never another resolver.
//
// It is not a recursive resolver and does not validate DNSSEC. It opens no socket: every byte to a server goes through a flow.Dialer.
// flow calls it as flow.Names, the daemon feeds it the port-53 traffic that was sent to loopback (ServePacket, ServeStream).
package dns

import (
	"crypto/x509"
	"errors"
	"net/netip"
	"time"

	"go.uber.org/zap"

	"github.com/mutex-proxy/mutex/flow"
)

// Mode says how address queries are answered.
type Mode uint8

// The modes. The zero value is the one that sends no query anywhere.
const (
	// ModeFakeIP answers A and AAAA at once with an address that stands for the name.
	ModeFakeIP Mode = iota
	// ModeReal asks the servers, and remembers which name each address was the answer to.
	ModeReal
	// ModeOff answers SERVFAIL to everything. A context whose dns is off normally has no Server at all (flow.Names is nil).
	ModeOff
)

// String returns the name used in the configuration.
func (m Mode) String() string {
	switch m {
	case ModeFakeIP:
		return "fakeip"
	case ModeReal:
		return "real"
	}
	return "off"
}

// Config is what a Server is made of. It is read by New and Prepare, and not kept.
type Config struct {
	Context string
	Mode    Mode
	// Servers are udp://, tcp://, tls:// or https:// URLs (a bare host means udp), asked in this order; the next one is asked as well
	// when one fails or is slow. A host name is sent to the dialer as a name.
	Servers []string
	// Via is the upstream the servers are asked through. nil: none, which is an error as soon as there are Servers.
	Via flow.Dialer
	// Rules are tried in order, the first that matches a name decides.
	Rules []Rule
	// Hosts are answered before everything else, fake IPs included. Flows to these addresses have no name, so that the address given
	// here is the one an upstream is asked for.
	Hosts map[string][]netip.Addr
	Fake  FakeConfig
	Cache CacheConfig
	// RootCAs verify tls:// and https:// servers; nil means the system's.
	RootCAs *x509.CertPool
	Log     *zap.Logger      // nil = none
	Now     func() time.Time // nil = time.Now
	// Observe is called once a query with its result (LogEntry.Result) and how long it took. It must not block. nil = none.
	Observe func(result string, d time.Duration)
}

// Rule says what happens to names that match one of its patterns.
//
// A pattern in Domain is an exact name, "*.x" (every name below x, however deep), "+.x" (x and every name below) or "*" (every name of one
// label). A pattern in DomainSuffix is "x" (x and every name below) or ".x" (every name below).
type Rule struct {
	Domain       []string
	DomainSuffix []string
	// Servers are asked for these names instead of Config.Servers; empty means those.
	Servers []string
	// Via is the upstream to the servers, also to Config.Servers where the rule has none of its own; nil means Config.Via.
	Via flow.Dialer
	// Block answers NXDOMAIN.
	Block bool
}

// FakeConfig says which addresses stand for names.
type FakeConfig struct {
	V4      netip.Prefix // zero = DefaultFakeV4. At most a /29 is left of it: 198.18.0.0/15 has room for 65536 names
	V6      netip.Prefix // zero = DefaultFakeV6. At most a /112
	Exclude []string     // names (patterns of Rule.Domain) that get real addresses; nil = "*.local"
	Path    string       // where the mapping is kept, one file a context; "" = in memory only
}

// CacheConfig bounds the answers kept. Zero values mean the defaults.
type CacheConfig struct {
	Entries  int           // default 10000; negative = no cache
	MinTTL   time.Duration // answers live at least this long (negative ones too); default 0
	MaxTTL   time.Duration // and at most this long; default 24h
	Stale    time.Duration // an expired answer is given for this long after when no server answers; default 0, never
	Prefetch bool          // refresh an answer in use shortly before it expires
}

// Default fake ranges: the benchmarking range of RFC 2544, which is never routed, and a unique local /64 of ours (RFC 4193).
const (
	DefaultFakeV4 = "198.18.0.0/15"
	DefaultFakeV6 = "fd4d:5554:4558::/64"
)

// ErrNotDNS is returned by Exchange for bytes that are not a DNS query. The caller drops them: an answer could start a loop.
var ErrNotDNS = errors.New("not a dns query")

// Stats are counters since New.
type Stats struct {
	Queries   uint64 // all that were DNS queries
	CacheHits uint64 // answered from the cache, stale answers included
	Blocked   uint64 // by rule
	Failures  uint64 // answered SERVFAIL
	Malformed uint64 // not a DNS query, or one that breaks the protocol
	Dropped   uint64 // not read or not answered because a bound was reached
	Fakes     int    // names that have a fake IP now
	Cached    int    // answers in the cache now
	Names     int    // real addresses whose name is known
}

// LogEntry is one answered query.
type LogEntry struct {
	Time     time.Time
	Client   netip.AddrPort
	Name     string
	Type     string
	Rcode    string
	Result   string // local hosts block fake cache stale upstream failure malformed
	Duration time.Duration
}
