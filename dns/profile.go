// SPDX-License-Identifier: GPL-3.0-or-later

package dns

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"github.com/miekg/dns"

	"github.com/mutex-proxy/mutex/flow"
)

const (
	// maxCalls bounds the questions that are being asked of servers at a time. A page load is a hundred; beyond the bound: SERVFAIL.
	maxCalls = 1024
	// callTimeout is how long servers are asked in all. glibc and dig stop listening for an answer after 5 s: a SERVFAIL later than that
	// would be silence to them.
	callTimeout = 4 * time.Second
	// staleAfter is how long someone waits for a server while a stale answer lies ready (RFC 8767 section 5).
	staleAfter = 1800 * time.Millisecond
	// hostsTTL is short, since a reload can change hosts.
	hostsTTL = 60
)

var (
	errClosed = errors.New("dns is closed")
	errBusy   = errors.New("too many questions at a time")
)

// profile is one configuration of a Server, with its cache and its connections. It is swapped whole; the old one ends when the questions
// it is asking are answered.
type profile struct {
	mode    Mode
	hosts   map[string][]netip.Addr
	rules   *matcher
	actions []action // by rule
	exclude *matcher // from fake IPs
	servers group    // where no rule says otherwise
	all     []*server
	named   map[string]bool // the servers' own names
	cache   *cache
	now     func() time.Time

	// life is that of the connections, which outlive the query that opened them. It begins when the profile is put to use.
	life context.Context
	end  context.CancelFunc
	wg   sync.WaitGroup // calls and connections

	mu     sync.Mutex
	calls  map[question]*call // one a question at a time, at most maxCalls
	closed bool               // no new calls
	ended  bool               // nor connections
}

type action struct {
	block   bool
	servers group // nil: the profile's
}

// call is one question being asked. msg and err are set when done is closed, and not changed after.
type call struct {
	done chan struct{}
	msg  *dns.Msg
	err  error
}

// newProfile checks a configuration and builds what it needs. All errors are reported at once.
func newProfile(cfg *Config, now func() time.Time) (*profile, error) {
	p := &profile{
		mode: cfg.Mode, hosts: make(map[string][]netip.Addr, len(cfg.Hosts)), rules: newMatcher(), exclude: newMatcher(),
		named: map[string]bool{}, cache: newCache(cfg.Cache), now: now, calls: map[question]*call{},
	}
	var errs []error
	fail := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if cfg.Mode > ModeOff {
		fail("unknown mode %d", cfg.Mode)
	}
	for name, ips := range cfg.Hosts {
		host := canonical(name)
		if !isHostname(host) {
			fail("hosts: %q is not a host name", name)
		}
		for _, ip := range ips {
			if !ip.IsValid() {
				fail("hosts: %s has an invalid address", name)
			}
			p.hosts[host] = append(p.hosts[host], ip.Unmap().WithZone(""))
		}
	}
	exclude := cfg.Fake.Exclude
	if exclude == nil {
		exclude = []string{"*.local"}
	}
	for i, pattern := range exclude {
		if err := p.exclude.addDomain(pattern, i); err != nil {
			fail("fake.exclude[%d]: %w", i, err)
		}
	}
	made := map[string]*server{}
	servers := func(path string, urls []string, via flow.Dialer) (g group) {
		for i, raw := range urls {
			s, err := p.server(made, cfg, raw, via)
			if err != nil {
				fail("%s[%d]: %w", path, i, err)
				continue
			}
			g = append(g, s)
		}
		return g
	}
	p.servers = servers("servers", cfg.Servers, cfg.Via)
	for i, r := range cfg.Rules {
		for _, pattern := range r.Domain {
			if err := p.rules.addDomain(pattern, i); err != nil {
				fail("rules[%d]: %w", i, err)
			}
		}
		for _, pattern := range r.DomainSuffix {
			if err := p.rules.addSuffix(pattern, i); err != nil {
				fail("rules[%d]: %w", i, err)
			}
		}
		via := r.Via
		if via == nil {
			via = cfg.Via
		}
		urls := r.Servers
		if len(urls) == 0 && r.Via != nil {
			urls = cfg.Servers
		}
		p.actions = append(p.actions, action{r.Block, servers(fmt.Sprintf("rules[%d].servers", i), urls, via)})
	}
	if len(errs) > 0 {
		return nil, fmt.Errorf("dns: %w", errors.Join(errs...))
	}
	return p, nil
}

// server returns the server of a URL, the same one for the same URL and upstream.
func (p *profile) server(made map[string]*server, cfg *Config, raw string, via flow.Dialer) (*server, error) {
	t, err := parseServer(raw)
	if err != nil {
		return nil, err
	}
	if via == nil {
		return nil, fmt.Errorf("%s: no upstream to reach it through", t)
	}
	id := raw + " " + via.Name()
	if s := made[id]; s != nil {
		return s, nil
	}
	s := newServer(t, p, cfg, via)
	made[id], p.all = s, append(p.all, s)
	if t.addr.IsName() {
		p.named[t.addr.Host] = true
	}
	return s, nil
}

// rule returns what the first matching rule says.
func (p *profile) rule(host string) action {
	a := action{}
	if i := p.rules.match(host); i >= 0 {
		a = p.actions[i]
	}
	if a.servers == nil {
		a.servers = p.servers
	}
	return a
}

// lookup is a question that has been answered by the cache or is being asked.
type lookup struct {
	p    *profile
	q    question
	have found
	call *call // nil: have.msg is the answer
}

// start looks in the cache and, if need be, has a server asked, once for all who ask the same. It does not wait.
func (p *profile) start(q question, servers group) (lookup, error) {
	l := lookup{p: p, q: q, have: p.cache.get(q, p.now())}
	if l.have.msg != nil && (!l.have.stale || l.have.wait) {
		if l.have.refresh {
			_, _ = p.begin(q, servers, maxCalls/2) // best effort: the answer is good as it is
		}
		return l, nil
	}
	var err error
	if l.call, err = p.begin(q, servers, maxCalls); err != nil && l.have.msg != nil {
		return l, nil
	}
	return l, err
}

// begin joins the call that asks q, or starts it.
func (p *profile) begin(q question, servers group, limit int) (*call, error) {
	if q.local {
		servers = servers.byAddress()
	}
	if len(servers) == 0 {
		return nil, flow.ErrNoServers
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, errClosed
	}
	if c := p.calls[q]; c != nil {
		return c, nil
	}
	if len(p.calls) >= limit {
		return nil, errBusy
	}
	c := &call{done: make(chan struct{})}
	p.calls[q] = c
	p.wg.Go(func() { p.ask(c, q, servers) })
	return c, nil
}

func (p *profile) ask(c *call, q question, servers group) {
	ctx, cancel := context.WithTimeout(p.life, callTimeout)
	defer cancel()
	c.msg, c.err = servers.ask(ctx, &p.wg, q)
	if c.err == nil {
		p.cache.put(q, c.msg, p.now())
	}
	if c.err != nil {
		p.cache.failed(q, p.now())
	}
	p.mu.Lock()
	delete(p.calls, q)
	p.mu.Unlock()
	close(c.done)
}

// wait returns the answer, which is the caller's to change, and how it was come by.
func (l lookup) wait(ctx context.Context) (*dns.Msg, string, error) {
	if l.call == nil {
		if l.have.stale {
			return l.have.msg, resultStale, nil
		}
		return l.have.msg, resultCache, nil
	}
	var patience <-chan time.Time
	if l.have.msg != nil {
		t := time.NewTimer(staleAfter)
		defer t.Stop()
		patience = t.C
	}
	select {
	case <-l.call.done:
		if l.have.msg != nil && l.call.err != nil {
			return l.have.msg, resultStale, nil
		}
		if l.call.err != nil {
			return nil, resultFailure, l.call.err
		}
		return l.call.msg.Copy(), resultUpstream, nil
	case <-patience:
		return l.have.msg, resultStale, nil
	case <-ctx.Done():
		return nil, resultFailure, context.Cause(ctx)
	}
}

// retire lets the questions that are being asked end, then closes the connections. It does not wait; wg tells.
func (p *profile) retire(wg *sync.WaitGroup) {
	p.mu.Lock()
	p.closed = true
	calls := make([]*call, 0, len(p.calls))
	for _, c := range p.calls {
		calls = append(calls, c)
	}
	p.mu.Unlock()
	wg.Go(func() {
		for _, c := range calls {
			select {
			case <-c.done:
			case <-p.life.Done():
			}
		}
		p.close()
	})
}

// close ends everything at once and waits for it.
func (p *profile) close() {
	p.mu.Lock()
	p.closed, p.ended = true, true
	p.mu.Unlock()
	p.end()
	for _, s := range p.all {
		s.close()
	}
	p.wg.Wait()
}
