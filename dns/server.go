// SPDX-License-Identifier: GPL-3.0-or-later

package dns

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
	"go.uber.org/zap"

	"github.com/mutex-proxy/mutex/flow"
)

// fakeTTL is the TTL of a fake answer in seconds: 0 makes some resolvers ask twice, more outlives the proxy.
const fakeTTL = 1

// Server is the DNS of one context. It is safe for concurrent use.
type Server struct {
	context string
	path    string // of the stored mapping
	log     *zap.Logger
	now     func() time.Time
	observe func(result string, d time.Duration)

	life context.Context // of everything the Server starts
	end  context.CancelFunc
	wg   sync.WaitGroup // listeners and retired profiles

	profile atomic.Pointer[profile]
	fake    atomic.Pointer[fakePool] // nil as long as the mode has never been fakeip
	names   *names
	history queryLog
	warned  sync.Once // that there are no servers
	busy    chan struct{}

	queries, hits, blocked, failures, malformed, dropped atomic.Uint64

	mu      sync.Mutex
	started bool
	closed  bool
	file    *fakeFile
	open    map[io.Closer]struct{} // listeners and connections of ServePacket and ServeStream
}

var _ flow.Names = (*Server)(nil)

// New checks the configuration and builds a Server. It touches nothing outside.
func New(cfg Config) (*Server, error) {
	s := &Server{
		context: cfg.Context, path: cfg.Fake.Path, log: cfg.Log, now: cfg.Now, observe: cfg.Observe,
		names: newNames(maxNames), busy: make(chan struct{}, maxQueries), open: map[io.Closer]struct{}{},
	}
	if s.log == nil {
		s.log = zap.NewNop()
	}
	if s.now == nil {
		s.now = time.Now
	}
	if s.observe == nil {
		s.observe = func(string, time.Duration) {}
	}
	s.log = s.log.Named("dns").With(zap.String("context", cfg.Context))
	s.life, s.end = context.WithCancel(context.Background())
	commit, err := s.Prepare(cfg)
	if err != nil {
		s.end()
		return nil, err
	}
	commit()
	return s, nil
}

// Prepare checks a new configuration and builds what it needs beside the old. commit swaps it in: queries under way are still answered by
// the old one, the mapping of fake IPs and the learned names stay, the cache starts empty. The fake ranges and Path cannot change any
// more once they are in use.
func (s *Server) Prepare(cfg Config) (commit func(), err error) {
	pool := s.fake.Load()
	if cfg.Mode == ModeFakeIP {
		fresh, err := newFakePool(cfg.Fake.V4, cfg.Fake.V6)
		if err != nil {
			return nil, fmt.Errorf("dns: %w", err)
		}
		switch {
		case pool == nil:
			pool = fresh
		case pool.v4 != fresh.v4 || pool.v6 != fresh.v6:
			return nil, fmt.Errorf("dns: the fake ranges are fixed at start: have %s and %s, want %s and %s", pool.v4, pool.v6, fresh.v4, fresh.v6)
		}
	}
	p, err := newProfile(&cfg, s.now)
	if err != nil {
		return nil, err
	}
	for _, srv := range p.all {
		if pool != nil && pool.contains(srv.addr.IP) {
			return nil, fmt.Errorf("dns: server %s lies in the fake range", srv.target)
		}
	}
	return func() { s.commit(p, pool) }, nil
}

func (s *Server) commit(p *profile, pool *fakePool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	p.life, p.end = context.WithCancel(s.life)
	if pool != nil && s.fake.Load() == nil {
		if s.started {
			s.keepLocked(pool)
		}
		s.fake.Store(pool)
	}
	if old := s.profile.Swap(p); old != nil {
		old.retire(&s.wg)
	}
}

// Start loads the stored mapping of fake IPs and begins to keep it. A mapping that cannot be loaded or kept is a warning: names then get
// new addresses after a restart.
func (s *Server) Start() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || s.started {
		return errors.New("dns: started before")
	}
	s.started = true
	if pool := s.fake.Load(); pool != nil {
		s.keepLocked(pool)
	}
	return nil
}

func (s *Server) keepLocked(pool *fakePool) {
	if s.path == "" || s.file != nil {
		return
	}
	f, err := openFakeFile(s.path, pool, s.log)
	if err != nil {
		s.log.Warn("fake ips will not be the same after a restart", zap.Error(err))
		return
	}
	s.file = f
}

// Close ends all queries and listeners, stores the mapping and waits for its goroutines. It is idempotent.
func (s *Server) Close() error {
	s.end() // before the listeners are closed, so that they know why
	s.mu.Lock()
	first := !s.closed
	s.closed = true
	for c := range s.open {
		c.Close()
	}
	file := s.file
	s.mu.Unlock()
	s.profile.Load().close()
	s.wg.Wait()
	if first && file != nil {
		file.close()
	}
	return nil
}

// Exchange answers one DNS message, from top to bottom: parse, hosts, rules, fake IP, cache, servers. f says who asks and how (nil: the
// daemon itself, without a limit to the size of the answer). It blocks until a server has answered, at most callTimeout.
func (s *Server) Exchange(ctx context.Context, f *flow.Flow, query []byte) ([]byte, error) {
	start := s.now()
	network, client := flow.TCP, netip.AddrPort{}
	if f != nil {
		network, client = f.Network, f.Src
	}
	r, rcode, err := parse(query, network)
	if err != nil {
		s.malformed.Add(1)
		return nil, err
	}
	s.queries.Add(1)
	var a answer
	if rcode != dns.RcodeSuccess {
		a = answer{rcode: rcode, result: resultMalformed}
	} else {
		a = s.answer(ctx, r)
	}
	took := s.now().Sub(start)
	s.count(a.result)
	s.observe(a.result, took)
	s.history.add(logged{start, client, r.host(), r.qtype, uint16(a.rcode), a.result, took})
	return r.reply(a), nil
}

func (s *Server) count(result string) {
	switch result {
	case resultCache, resultStale:
		s.hits.Add(1)
	case resultBlock:
		s.blocked.Add(1)
	case resultFailure:
		s.failures.Add(1)
	case resultMalformed:
		s.malformed.Add(1)
	}
}

// answer decides who answers a well-formed query.
func (s *Server) answer(ctx context.Context, r *request) answer {
	p, host := s.profile.Load(), r.host()
	if p.mode == ModeOff {
		return failure(errors.New("dns is off"))
	}
	if ips, ok := p.hosts[host]; ok {
		return r.addresses(ips, hostsTTL, resultHosts)
	}
	act := p.rule(host)
	if act.block {
		return answer{rcode: dns.RcodeNameError, ns: soa(), ede: dns.ExtendedErrorCodeBlocked, text: "blocked by rule", result: resultBlock}
	}
	faked := p.mode == ModeFakeIP && p.exclude.match(host) < 0
	if a, ok := s.local(r, host, faked || len(act.servers) > 0); ok {
		return a
	}
	if faked {
		switch r.qtype {
		case dns.TypeA, dns.TypeAAAA:
			return s.assign(r, host)
		case dns.TypeHTTPS, dns.TypeSVCB:
			// Their address hints would bypass the fake IP, and their ECH keys hide the name from rules that look at payload: there are
			// none, which every client takes as "use A and AAAA".
			return answer{ns: soa(), result: resultFake}
		}
	}
	m, result, err := s.ask(ctx, p, r.question, act.servers)
	if err != nil {
		return failure(err)
	}
	s.strip(m, faked)
	s.names.learn(host, m.Answer, s.now())
	a := answer{rcode: m.Rcode, ad: m.AuthenticatedData, rrs: m.Answer, ns: m.Ns, extra: m.Extra, result: result}
	if result == resultStale {
		a.ede, a.text = dns.ExtendedErrorCodeStaleAnswer, "no server answers"
	}
	return a
}

// assign answers with the fake IP of a name.
func (s *Server) assign(r *request, host string) answer {
	if !isHostname(host) { // could not be asked of an upstream
		return answer{rcode: dns.RcodeNameError, ns: soa(), result: resultFake}
	}
	v4, v6, ok := s.fake.Load().assign(host)
	if !ok {
		return failure(errors.New("every fake ip is in use"))
	}
	return r.addresses([]netip.Addr{v4, v6}, fakeTTL, resultFake)
}

// addresses answers with those of the family that was asked for; with none ("no data") for every other type.
func (r *request) addresses(ips []netip.Addr, ttl uint32, result string) answer {
	a := answer{result: result}
	for _, ip := range ips {
		if r.qtype == dns.TypeA && ip.Is4() || r.qtype == dns.TypeAAAA && ip.Is6() {
			a.rrs = append(a.rrs, addressRR(r.asked, ip, ttl))
		}
	}
	if a.rrs == nil {
		a.ns = soa()
	}
	return a
}

// ask has the profile look a name up; a profile that was retired in between is replaced by the new one.
func (s *Server) ask(ctx context.Context, p *profile, q question, servers group) (*dns.Msg, string, error) {
	l, err := p.start(q, servers)
	for errors.Is(err, errClosed) && s.life.Err() == nil {
		if p = s.profile.Load(); p.mode == ModeOff {
			break
		}
		l, err = p.start(q, p.rule(q.host()).servers)
	}
	if err != nil {
		if errors.Is(err, flow.ErrNoServers) {
			s.warned.Do(func() {
				s.log.Warn("no dns servers configured: queries that a fake ip cannot answer fail; set dns.servers",
					zap.String("first", q.host()), zap.String("type", dns.Type(q.qtype).String()))
			})
		}
		return nil, resultFailure, err
	}
	return l.wait(ctx)
}

// strip takes out of a server's answer what must not reach a client: addresses of our own fake ranges, which stand for other names here;
// and, where the names that the answer points to have fake IPs, their real addresses.
func (s *Server) strip(m *dns.Msg, faked bool) {
	m.Answer = slices.DeleteFunc(m.Answer, s.hasFake)
	m.Extra = slices.DeleteFunc(m.Extra, func(rr dns.RR) bool { return faked || s.hasFake(rr) })
}

func (s *Server) hasFake(rr dns.RR) bool {
	for ip := range addresses(rr) {
		if s.IsFake(ip) {
			return true
		}
	}
	return false
}

// failure answers SERVFAIL and tells a client that speaks EDNS why.
func failure(err error) answer {
	code := dns.ExtendedErrorCodeNetworkError
	text := "no server answered"
	switch {
	case errors.Is(err, flow.ErrNoServers):
		code, text = dns.ExtendedErrorCodeNotReady, err.Error()
	case errors.Is(err, errServer):
		code, text = dns.ExtendedErrorCodeNoReachableAuthority, "every server failed"
	case errors.Is(err, errBusy), errors.Is(err, errClosed):
		code, text = dns.ExtendedErrorCodeNotReady, err.Error()
	}
	return answer{rcode: dns.RcodeServerFailure, ede: code, text: text, result: resultFailure}
}

// HostOf implements flow.Names: the name that was handed out for the address. It does not allocate, and takes no lock for a fake IP.
func (s *Server) HostOf(ip netip.Addr) (host string, src flow.Source, ok bool) {
	ip = ip.Unmap()
	if pool := s.fake.Load(); pool != nil && pool.contains(ip) {
		if host, ok = pool.hostOf(ip); !ok {
			return "", flow.SourceNone, false
		}
		return host, flow.SourceFakeIP, true
	}
	if host, ok = s.names.hostOf(ip, s.now()); !ok {
		return "", flow.SourceNone, false
	}
	return host, flow.SourceDNS, true
}

// IsFake implements flow.Names. There are no fake ranges as long as the mode has never been fakeip.
func (s *Server) IsFake(ip netip.Addr) bool {
	pool := s.fake.Load()
	return pool != nil && pool.contains(ip.Unmap())
}

// Hold implements flow.Names. Call it before HostOf: what HostOf then returns stays true.
func (s *Server) Hold(ip netip.Addr) {
	if pool := s.fake.Load(); pool != nil {
		pool.hold(ip.Unmap())
	}
}

// Release implements flow.Names.
func (s *Server) Release(ip netip.Addr) {
	if pool := s.fake.Load(); pool != nil {
		pool.release(ip.Unmap())
	}
}

// Resolve implements flow.Names: both families at once, IPv4 first, from hosts, the cache or the servers, never a fake IP. A name that
// does not exist wraps flow.ErrHostUnreachable, a blocked one flow.ErrProhibited, servers that do not answer flow.ErrUpstream.
func (s *Server) Resolve(ctx context.Context, host string) ([]netip.Addr, error) {
	if ip, err := netip.ParseAddr(host); err == nil {
		return []netip.Addr{ip.Unmap()}, nil
	}
	host = canonical(host)
	for {
		p := s.profile.Load()
		ips, err := s.resolve(ctx, p, host)
		switch {
		case err == nil:
			return ips, nil
		case errors.Is(err, errClosed) && s.profile.Load() != p: // by a reload
		case errors.Is(err, flow.ErrNoServers):
			return nil, fmt.Errorf("resolve %s: %w", host, flow.ErrNoServers)
		default:
			return nil, fmt.Errorf("resolve %s: %w", host, err)
		}
	}
}

func (s *Server) resolve(ctx context.Context, p *profile, host string) ([]netip.Addr, error) {
	act := p.rule(host)
	switch {
	case !isHostname(host):
		return nil, fmt.Errorf("not a host name: %w", flow.ErrHostUnreachable)
	case len(p.hosts[host]) > 0:
		return slices.Clone(p.hosts[host]), nil
	case act.block:
		return nil, fmt.Errorf("blocked by a dns rule: %w", flow.ErrProhibited)
	case isLocalhost(host):
		return loopback(), nil
	case below(host, "invalid"):
		return nil, fmt.Errorf("no such name: %w", flow.ErrHostUnreachable)
	}
	var ips []netip.Addr
	var errs []error
	var lookups []lookup
	q := question{name: host + ".", local: p.named[host]}
	for _, q.qtype = range []uint16{dns.TypeA, dns.TypeAAAA} { // both are under way before either is waited for
		l, err := p.start(q, act.servers)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		lookups = append(lookups, l)
	}
	for _, l := range lookups {
		m, _, err := l.wait(ctx)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		s.strip(m, false)
		for _, rr := range m.Answer {
			ips = slices.AppendSeq(ips, addresses(rr))
		}
	}
	switch {
	case len(ips) > 0:
		return ips, nil
	case len(errs) > 0:
		return nil, fmt.Errorf("%w: %w", flow.ErrUpstream, errors.Join(errs...))
	}
	return nil, fmt.Errorf("no address: %w", flow.ErrHostUnreachable)
}

// Stats returns the counters.
func (s *Server) Stats() Stats {
	st := Stats{
		Queries: s.queries.Load(), CacheHits: s.hits.Load(), Blocked: s.blocked.Load(), Failures: s.failures.Load(),
		Malformed: s.malformed.Load(), Dropped: s.dropped.Load(), Cached: s.profile.Load().cache.len(), Names: s.names.len(),
	}
	if pool := s.fake.Load(); pool != nil {
		st.Fakes = pool.len()
	}
	return st
}

// Log returns the last queries, oldest first.
func (s *Server) Log() []LogEntry { return s.history.entries() }

// Flush empties the cache.
func (s *Server) Flush() { s.profile.Load().cache.flush() }
