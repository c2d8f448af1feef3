// SPDX-License-Identifier: GPL-3.0-or-later

package dns

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"

	"github.com/mutex-proxy/mutex/flow"
)

const (
	// stagger is how long a server is given before the next one is asked as well; the first good answer wins.
	stagger = 1500 * time.Millisecond
	// dialTimeout bounds opening a connection to a server, TLS included. It outlives the query that wanted it: the next one will.
	dialTimeout = 10 * time.Second
	// idleTimeout closes connections that are not used (RFC 7766 section 6.2.3 asks for a few seconds; a proxy makes new ones dear).
	idleTimeout = 30 * time.Second
)

// errServer is a reply that says that the server cannot or will not answer.
var errServer = errors.New("server failed")

// target is where a server is and how it is spoken to.
type target struct {
	scheme string
	addr   flow.Addr
	path   string // https only, with its query
}

// String returns the URL, without the path: with some services it names the customer.
func (t target) String() string { return t.scheme + "://" + t.addr.String() }

// parseServer reads a server's URL.
func parseServer(raw string) (target, error) {
	if !strings.Contains(raw, "://") {
		if ip, err := netip.ParseAddr(raw); err == nil && ip.Is6() {
			raw = "[" + raw + "]"
		}
		raw = "udp://" + raw
	}
	u, err := url.Parse(raw)
	if err != nil {
		// url.Error repeats the whole input, which may hold a secret by mistake.
		return target{}, errors.New("server: not a url")
	}
	t := target{scheme: u.Scheme}
	port := map[string]uint16{"udp": 53, "tcp": 53, "tls": 853, "https": 443}[u.Scheme]
	switch {
	case port == 0:
		return target{}, fmt.Errorf("server %q: scheme %q is not one of udp, tcp, tls, https", u.Redacted(), u.Scheme)
	case u.User != nil || u.Fragment != "":
		return target{}, fmt.Errorf("server %q: takes no user and no fragment", u.Redacted())
	case u.Scheme != "https" && (u.Path != "" && u.Path != "/" || u.RawQuery != ""):
		return target{}, fmt.Errorf("server %q: only https servers have a path", u.Redacted())
	}
	if s := u.Port(); s != "" {
		n, err := strconv.ParseUint(s, 10, 16)
		if err != nil || n == 0 {
			return target{}, fmt.Errorf("server %q: port %q is not between 1 and 65535", u.Redacted(), s)
		}
		port = uint16(n)
	}
	t.addr.Port = port
	if ip, err := netip.ParseAddr(u.Hostname()); err == nil {
		if ip.Zone() != "" || ip.IsUnspecified() || ip.IsMulticast() {
			return target{}, fmt.Errorf("server %q: %s is not the address of a server", u.Redacted(), ip)
		}
		t.addr.IP = ip.Unmap()
	} else if t.addr.Host = canonical(u.Hostname()); !isHostname(t.addr.Host) {
		return target{}, fmt.Errorf("server %q: %q is not a host", u.Redacted(), u.Hostname())
	}
	if u.Scheme == "https" {
		if t.path = u.RequestURI(); t.path == "/" {
			t.path = "/dns-query" // RFC 8484 leaves it open; everyone has this one
		}
	}
	return t, nil
}

// transport asks one server. Implementations are safe for concurrent use, and end with the profile's life.
type transport interface {
	ask(ctx context.Context, q question) (*dns.Msg, error)
	close()
}

// server is one configured server.
type server struct {
	target
	transport
}

func newServer(t target, p *profile, cfg *Config, via flow.Dialer) *server {
	s := &server{target: t}
	switch t.scheme {
	case "udp":
		s.transport = newDatagrams(p, via, t.addr, cfg.Context)
	case "tcp":
		s.transport = newStreams(p, via, t.addr, nil)
	case "tls":
		s.transport = newStreams(p, via, t.addr, tlsConfig(t.addr, cfg.RootCAs, "dot"))
	default:
		s.transport = newHTTPS(p, via, t, cfg.RootCAs)
	}
	return s
}

// group is the servers for a name, in order.
type group []*server

// byAddress returns those whose address is known.
func (g group) byAddress() group {
	return slices.DeleteFunc(slices.Clone(g), func(s *server) bool { return s.addr.IsName() })
}

type reply struct {
	msg *dns.Msg
	err error
}

// ask asks the servers, each when the one before has failed or is slow, and returns the first good reply, which is the caller's. The
// goroutines are counted in wg; they end with ctx.
func (g group) ask(ctx context.Context, wg *sync.WaitGroup, q question) (*dns.Msg, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	replies := make(chan reply, len(g))
	next, pending := 0, 0
	start := func() {
		s := g[next]
		next, pending = next+1, pending+1
		wg.Go(func() {
			m, err := s.ask(ctx, q)
			switch {
			case err != nil:
				err = fmt.Errorf("dns server %s: %w", s.target, err)
			case m.Truncated: // where nothing limits the size
				err = fmt.Errorf("dns server %s: %w: truncated", s.target, errMalformed)
			case m.Rcode != dns.RcodeSuccess && m.Rcode != dns.RcodeNameError:
				err = fmt.Errorf("dns server %s: %w: %s", s.target, errServer, rcodeName(uint16(m.Rcode)))
			}
			replies <- reply{m, err}
		})
	}
	start()
	timer := time.NewTimer(stagger)
	defer timer.Stop()
	var errs []error
	for {
		select {
		case r := <-replies:
			if r.err == nil {
				return r.msg, nil
			}
			errs = append(errs, r.err)
			if pending--; next < len(g) {
				start()
				timer.Reset(stagger)
			} else if pending == 0 {
				return nil, errors.Join(errs...)
			}
		case <-timer.C:
			if next < len(g) {
				start()
				timer.Reset(stagger)
			}
		case <-ctx.Done():
			return nil, errors.Join(append(errs, context.Cause(ctx))...)
		}
	}
}
