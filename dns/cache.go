// SPDX-License-Identifier: GPL-3.0-or-later

package dns

import (
	"sync"
	"time"

	"github.com/miekg/dns"
)

const (
	defaultEntries = 10000
	defaultMaxTTL  = 24 * time.Hour
	// maxNegativeTTL is the upper end of what RFC 2308 section 5 calls sensible.
	maxNegativeTTL = 3 * time.Hour
	// maxCachedSize bounds one entry, so that 10000 of them stay below 50 MB whatever servers send. Larger answers are rare (DNSSEC keys)
	// and are asked for each time.
	maxCachedSize = 4096
	// staleTTL is the TTL of a stale answer, and how long no new attempt is made after a failed one (RFC 8767 sections 4 and 5).
	staleTTL = 30 * time.Second
	// An answer that is asked for in the last tenth of its life is refreshed, unless it was to live too short for that to pay.
	prefetchPart   = 10
	prefetchMinTTL = 10 * time.Second
)

// cache keeps answers by question. Expired ones stay for Stale longer, for when no server answers.
type cache struct {
	cfg CacheConfig

	mu sync.Mutex
	m  *lru[question, *cached]
}

type cached struct {
	msg     *dns.Msg // never changed; TTLs as at stored
	stored  time.Time
	expires time.Time
	retry   time.Time // while stale: when a server may be asked again
	fetched bool      // a refresh was asked for
}

// found is what the cache says about a question.
type found struct {
	msg     *dns.Msg // a copy, with the TTLs that are left; nil if there is none
	stale   bool     // expired: only good if no server answers ...
	wait    bool     // ... and none is to be asked now
	refresh bool     // good, but a new one should be fetched
}

func newCache(cfg CacheConfig) *cache {
	if cfg.Entries == 0 {
		cfg.Entries = defaultEntries
	}
	if cfg.MaxTTL == 0 {
		cfg.MaxTTL = defaultMaxTTL
	}
	cfg.MinTTL = min(cfg.MinTTL, cfg.MaxTTL)
	return &cache{cfg: cfg, m: newLRU[question, *cached](cfg.Entries)}
}

func (c *cache) get(q question, now time.Time) found {
	c.mu.Lock()
	defer c.mu.Unlock()
	e, ok := c.m.get(q)
	if !ok {
		return found{}
	}
	left := e.expires.Sub(now)
	if left > 0 {
		f := found{msg: aged(e.msg, now.Sub(e.stored))}
		life := e.expires.Sub(e.stored)
		if c.cfg.Prefetch && !e.fetched && life >= prefetchMinTTL && left <= life/prefetchPart {
			f.refresh, e.fetched = true, true
		}
		return f
	}
	if -left >= c.cfg.Stale {
		c.m.remove(q)
		return found{}
	}
	m := e.msg.Copy()
	for rr := range records(m) {
		rr.Header().Ttl = uint32(staleTTL / time.Second)
	}
	return found{msg: m, stale: true, wait: now.Before(e.retry)}
}

// put stores an answer if it may be, and gives its records the TTLs that the configuration allows.
func (c *cache) put(q question, m *dns.Msg, now time.Time) {
	ttl, ok := c.limit(m)
	if !ok || ttl <= 0 || m.Len() > maxCachedSize {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.m.put(q, &cached{msg: m.Copy(), stored: now, expires: now.Add(ttl)})
}

// failed notes that the servers did not answer: a stale entry is given at once for a while.
func (c *cache) failed(q question, now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e, ok := c.m.peek(q); ok {
		e.retry = now.Add(staleTTL)
		e.fetched = false
	}
}

func (c *cache) len() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.m.len()
}

func (c *cache) flush() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.m.clear()
}

// limit brings the TTLs of m between the bounds and returns how long m may be kept: as long as its shortest-lived answer, or, if it says
// that there is none, as long as its SOA says (RFC 2308 section 5). ok is false for failures, and for "none" without an SOA.
func (c *cache) limit(m *dns.Msg) (ttl time.Duration, ok bool) {
	if m.Rcode != dns.RcodeSuccess && m.Rcode != dns.RcodeNameError {
		return 0, false
	}
	ttl = c.cfg.MaxTTL
	for rr := range records(m) {
		h := rr.Header()
		if h.Ttl > 1<<31-1 { // RFC 2181 section 8
			h.Ttl = 0
		}
		h.Ttl = uint32(c.clamp(time.Duration(h.Ttl)*time.Second) / time.Second)
	}
	for _, rr := range m.Answer {
		ttl = min(ttl, time.Duration(rr.Header().Ttl)*time.Second)
	}
	if m.Rcode == dns.RcodeSuccess && hasAnswer(m) {
		return ttl, true
	}
	for _, rr := range m.Ns {
		if soa, isSOA := rr.(*dns.SOA); isSOA {
			ttl = c.clamp(min(ttl, maxNegativeTTL, time.Duration(min(soa.Hdr.Ttl, soa.Minttl))*time.Second))
			soa.Hdr.Ttl = uint32(ttl / time.Second)
			return ttl, true
		}
	}
	return 0, false
}

func (c *cache) clamp(ttl time.Duration) time.Duration {
	return max(min(ttl, c.cfg.MaxTTL), c.cfg.MinTTL)
}

// hasAnswer reports whether the answer ends in what was asked for, and not in a CNAME to nothing.
func hasAnswer(m *dns.Msg) bool {
	for _, rr := range m.Answer {
		if len(m.Question) == 1 && rr.Header().Rrtype == m.Question[0].Qtype {
			return true
		}
	}
	return false
}

func aged(m *dns.Msg, by time.Duration) *dns.Msg {
	m = m.Copy()
	age := uint32(by / time.Second)
	for rr := range records(m) {
		h := rr.Header()
		h.Ttl -= min(h.Ttl, age)
	}
	return m
}

func records(m *dns.Msg) func(yield func(dns.RR) bool) {
	return func(yield func(dns.RR) bool) {
		for _, section := range [][]dns.RR{m.Answer, m.Ns, m.Extra} {
			for _, rr := range section {
				if !yield(rr) {
					return
				}
			}
		}
	}
}
