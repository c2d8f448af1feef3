// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"

	"github.com/mutex-proxy/mutex/flow"
)

const (
	// queryTimeout bounds one question to one name server; resolvers answer within a second or not at all.
	queryTimeout = 2 * time.Second
	// queryRounds is how often the list of name servers is gone through before giving up.
	queryRounds = 2
	// maxLookups bounds the cache of names; the oldest answers make room.
	maxLookups = 1024
	// minTTL and maxTTL bound how long an answer is believed: a TTL of 0 must not mean a query a connection.
	minTTL = 5 * time.Second
	maxTTL = time.Hour
	// maxAddrs bounds the addresses of one name that are kept.
	maxAddrs = 32
	// maxHostsFile bounds what is read of the hosts file.
	maxHostsFile = 1 << 20
)

var errNoSuchHost = errors.New("no such host")

// lookups caches answers by name.
type lookups struct {
	mu sync.Mutex
	m  map[string]answer
}

type answer struct {
	addrs   []netip.Addr
	expires time.Time
}

// LookupHost resolves a name: an IP literal, the hosts file, then the machine's name servers over marked sockets. It is for the names of
// upstreams, and for servers that are an exit; destinations of captured flows are resolved by dns. Addresses come IPv4 first. Errors wrap
// flow.ErrHostUnreachable, or flow.ErrTimeout if no name server answered.
func (n *Net) LookupHost(ctx context.Context, host string) ([]netip.Addr, error) {
	return n.lookup(ctx, host, false)
}

// lookup is LookupHost; fresh ignores the cache, because an address from it has just failed.
func (n *Net) lookup(ctx context.Context, host string, fresh bool) ([]netip.Addr, error) {
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	if ip, err := netip.ParseAddr(host); err == nil {
		return []netip.Addr{ip.Unmap()}, nil
	}
	if addrs := n.lookupLocal(host); len(addrs) > 0 {
		return addrs, nil
	}
	if _, ok := dns.IsDomainName(host); !ok || host == "" {
		return nil, fmt.Errorf("look up name: %w: not a domain name", flow.ErrHostUnreachable)
	}
	now := n.cfg.Now()
	if !fresh {
		if addrs, ok := n.lookups.get(host, now); ok {
			return addrs, nil
		}
	}
	addrs, ttl, err := n.query(ctx, host)
	if err != nil {
		return nil, fmt.Errorf("look up %s: %w", host, err)
	}
	n.lookups.put(host, answer{addrs, now.Add(min(max(ttl, minTTL), maxTTL))}, now)
	return addrs, nil
}

func (l *lookups) get(host string, now time.Time) ([]netip.Addr, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	a, ok := l.m[host]
	return a.addrs, ok && now.Before(a.expires)
}

func (l *lookups) put(host string, a answer, now time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.m == nil {
		l.m = make(map[string]answer)
	}
	if len(l.m) >= maxLookups {
		for k, v := range l.m {
			if now.After(v.expires) {
				delete(l.m, k)
			}
		}
	}
	for k := range l.m { // still full: any one makes room
		if len(l.m) < maxLookups {
			break
		}
		delete(l.m, k)
	}
	l.m[host] = a
}

// lookupLocal answers localhost (RFC 6761 section 6.3) and the hosts file, which is read each time: it is small, and may change.
func (n *Net) lookupLocal(host string) []netip.Addr {
	if f, err := os.Open(n.cfg.HostsFile); err == nil {
		defer f.Close()
		if addrs := readHosts(f, host); len(addrs) > 0 {
			return addrs
		}
	}
	if host == "localhost" || strings.HasSuffix(host, ".localhost") {
		return []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()}
	}
	return nil
}

// readHosts returns the addresses that a hosts file (hosts(5)) gives a name.
func readHosts(r io.Reader, host string) []netip.Addr {
	var v4, v6 []netip.Addr
	for sc := bufio.NewScanner(io.LimitReader(r, maxHostsFile)); sc.Scan(); {
		line, _, _ := strings.Cut(sc.Text(), "#")
		fields := strings.Fields(line)
		if len(fields) < 2 || len(v4)+len(v6) >= maxAddrs {
			continue
		}
		ip, err := netip.ParseAddr(fields[0])
		if err != nil {
			continue
		}
		for _, name := range fields[1:] {
			if !strings.EqualFold(strings.TrimSuffix(name, "."), host) {
				continue
			}
			if ip.Unmap().Is4() {
				v4 = append(v4, ip.Unmap())
			} else {
				v6 = append(v6, ip)
			}
			break
		}
	}
	return append(v4, v6...)
}

// query asks for A and AAAA at the same time. One of them is enough; the shorter TTL counts.
func (n *Net) query(ctx context.Context, host string) ([]netip.Addr, time.Duration, error) {
	if len(n.cfg.Nameservers) == 0 {
		return nil, 0, fmt.Errorf("%w: no name servers known", flow.ErrHostUnreachable)
	}
	type result struct {
		addrs []netip.Addr
		ttl   time.Duration
		err   error
	}
	types := [2]uint16{dns.TypeA, dns.TypeAAAA}
	var results [2]result
	var wg sync.WaitGroup
	for i, t := range types {
		wg.Go(func() {
			r := &results[i]
			r.addrs, r.ttl, r.err = n.queryType(ctx, host, t)
		})
	}
	wg.Wait()
	addrs := append(results[0].addrs, results[1].addrs...)
	if len(addrs) == 0 {
		if results[0].err != nil {
			return nil, 0, results[0].err
		}
		if results[1].err != nil {
			return nil, 0, results[1].err
		}
		return nil, 0, fmt.Errorf("%w: %w", flow.ErrHostUnreachable, errNoSuchHost)
	}
	ttl := maxTTL
	for _, r := range results {
		if len(r.addrs) > 0 {
			ttl = min(ttl, r.ttl)
		}
	}
	return addrs, ttl, nil
}

// queryType asks the name servers in turn. An answer that the name has no such address is an answer: nil, 0, nil.
func (n *Net) queryType(ctx context.Context, host string, qtype uint16) ([]netip.Addr, time.Duration, error) {
	m := new(dns.Msg)
	m.SetQuestion(dns.Fqdn(host), qtype)
	m.SetEdns0(1232, false) // DNS flag day 2020: fits every path without fragments
	last := fmt.Errorf("%w: no name server answered", flow.ErrTimeout)
	for range queryRounds {
		for _, server := range n.cfg.Nameservers {
			if ctx.Err() != nil {
				return nil, 0, ctx.Err()
			}
			m.Id = dns.Id()
			reply, err := n.exchange(ctx, m, server)
			if err != nil {
				n.cfg.Log.Debug("name server failed", logServer(server), logErr(err))
				if !timedOut(err) {
					last = fmt.Errorf("%w: %w", flow.ErrHostUnreachable, err)
				}
				continue
			}
			switch reply.Rcode {
			case dns.RcodeSuccess, dns.RcodeNameError:
				addrs, ttl := addresses(reply)
				return addrs, ttl, nil
			}
			last = fmt.Errorf("%w: name server said %s", flow.ErrHostUnreachable, dns.RcodeToString[reply.Rcode])
		}
	}
	return nil, 0, last
}

// exchange asks one name server over UDP, and over TCP when the answer did not fit.
func (n *Net) exchange(ctx context.Context, m *dns.Msg, server netip.AddrPort) (*dns.Msg, error) {
	ctx, cancel := context.WithTimeout(ctx, queryTimeout)
	defer cancel()
	udp, err := n.DialUDP(ctx, server)
	if err != nil {
		return nil, err
	}
	reply, err := exchangeOn(ctx, m, udp)
	if err != nil || !reply.Truncated {
		return reply, err
	}
	tcp, err := n.dialServer(ctx, server)
	if err != nil {
		return nil, err
	}
	return exchangeOn(ctx, m, tcp.TCPConn)
}

// exchangeOn asks over an open connection, which it closes. Over UDP, answers to other questions are passed over: they are forged or late.
func exchangeOn(ctx context.Context, m *dns.Msg, c net.Conn) (*dns.Msg, error) {
	defer c.Close()
	var reply *dns.Msg
	err := handshake(ctx, c, func() error {
		dc := &dns.Conn{Conn: c, UDPSize: 1232}
		if err := dc.WriteMsg(m); err != nil {
			return err
		}
		for {
			r, err := dc.ReadMsg()
			_, udp := c.(*net.UDPConn)
			switch {
			case err == nil && answers(r, m):
				reply = r
				return nil
			case err != nil && (r == nil || !udp):
				return err
			case !udp:
				return errors.New("answer to another question")
			}
		}
	})
	return reply, err
}

// answers reports whether r is the answer to m.
func answers(r, m *dns.Msg) bool {
	return r.Response && r.Id == m.Id && len(r.Question) == 1 && r.Question[0].Qtype == m.Question[0].Qtype &&
		strings.EqualFold(r.Question[0].Name, m.Question[0].Name)
}

// addresses returns the addresses in an answer. The resolver has followed the CNAMEs; which owner name they have does not matter.
func addresses(m *dns.Msg) ([]netip.Addr, time.Duration) {
	var out []netip.Addr
	ttl := maxTTL
	for _, rr := range m.Answer {
		var ip netip.Addr
		var ok bool
		switch rr := rr.(type) {
		case *dns.A:
			ip, ok = netip.AddrFromSlice(rr.A.To4())
		case *dns.AAAA:
			ip, ok = netip.AddrFromSlice(rr.AAAA)
		}
		if !ok || len(out) >= maxAddrs {
			continue
		}
		out = append(out, ip.Unmap())
		ttl = min(ttl, time.Duration(rr.Header().Ttl)*time.Second)
	}
	return out, ttl
}

// ReadNameservers returns the name servers of a resolv.conf(5). With none, it is 127.0.0.1, as for every resolver library.
func ReadNameservers(path string) ([]netip.AddrPort, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var out []netip.AddrPort
	for sc := bufio.NewScanner(io.LimitReader(f, maxHostsFile)); sc.Scan() && len(out) < 8; {
		fields := strings.Fields(sc.Text())
		if len(fields) < 2 || fields[0] != "nameserver" {
			continue
		}
		if ip, err := netip.ParseAddr(fields[1]); err == nil {
			out = append(out, netip.AddrPortFrom(ip.Unmap(), 53))
		}
	}
	if len(out) == 0 {
		out = append(out, netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), 53))
	}
	return out, nil
}
