// SPDX-License-Identifier: GPL-3.0-or-later

package dns

import (
	"net/netip"
	"sync"
	"time"

	"github.com/miekg/dns"
)

const (
	// maxNames bounds the table of learned names: as many as there can be flows in a context, about 10 MB when full.
	maxNames = 65536
	// namesGrace is how long a name is known beyond its record's TTL: browsers and libraries keep addresses longer than they are told
	// (a minute is common), and a flow without its name is routed by address alone.
	namesGrace = 5 * time.Minute
)

// names remembers which name a real address was the answer to. Where several names share an address (a CDN), the one asked last wins: no
// one can know better before payload is seen.
type names struct {
	mu sync.RWMutex
	m  *lru[netip.Addr, learned]
}

type learned struct {
	host    string
	expires time.Time
}

func newNames(limit int) *names {
	return &names{m: newLRU[netip.Addr, learned](limit)}
}

// hostOf returns the name that was asked for the address. It does not allocate.
func (n *names) hostOf(ip netip.Addr, now time.Time) (string, bool) {
	n.mu.RLock()
	l, ok := n.m.peek(ip)
	n.mu.RUnlock()
	if !ok || now.After(l.expires) {
		return "", false
	}
	return l.host, true
}

// learn remembers host, the name that was asked, for every address in the answer: also behind CNAMEs, and the hints of HTTPS records,
// which clients connect to without asking again.
func (n *names) learn(host string, answer []dns.RR, now time.Time) {
	if !isHostname(host) {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, rr := range answer {
		expires := now.Add(time.Duration(rr.Header().Ttl)*time.Second + namesGrace)
		for ip := range addresses(rr) {
			n.m.put(ip, learned{host, expires})
		}
	}
}

func (n *names) len() int {
	n.mu.RLock()
	defer n.mu.RUnlock()
	return n.m.len()
}
