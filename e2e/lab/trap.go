// SPDX-License-Identifier: GPL-3.0-or-later

package lab

import (
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"

	"github.com/miekg/dns"
)

// TrapAnswer is what every trap answers an A query with: who sees it was answered by the trap.
var TrapAnswer = netip.MustParseAddr("192.0.2.66")

// Trap is a resolver that no captured query may reach. It answers, so that a leak is not hidden by a time-out, and notes the names.
type Trap struct {
	mu    sync.Mutex
	names []string
	where []string
	hosts map[string]netip.Addr
}

// NewTrap starts resolvers, over UDP and TCP, at the given addresses of a namespace.
func NewTrap(t *testing.T, n *NS, addrs ...netip.AddrPort) *Trap {
	t.Helper()
	tr := &Trap{hosts: map[string]netip.Addr{}}
	for _, a := range addrs {
		pc, err := n.ListenUDP("udp", a.String())
		if err != nil {
			t.Fatalf("trap: %v", err)
		}
		l, err := n.Listen("tcp", a.String())
		if err != nil {
			t.Fatalf("trap: %v", err)
		}
		h := dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) { tr.answer(a, w, q) })
		for _, s := range []*dns.Server{{PacketConn: pc, Handler: h}, {Listener: l, Handler: h}} {
			var wg sync.WaitGroup
			up := make(chan struct{})
			s.NotifyStartedFunc = func() { close(up) }
			wg.Go(func() {
				if err := s.ActivateAndServe(); err != nil && !errors.Is(err, net.ErrClosed) {
					t.Logf("trap: %v", err)
				}
			})
			<-up
			t.Cleanup(func() {
				_ = s.Shutdown()
				wg.Wait()
			})
		}
	}
	return tr
}

// Host makes the trap answer a name truly: the name of an upstream is resolved before anything is captured.
func (tr *Trap) Host(name string, a netip.Addr) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	tr.hosts[dns.Fqdn(name)] = a
}

func (tr *Trap) answer(at netip.AddrPort, w dns.ResponseWriter, q *dns.Msg) {
	m := new(dns.Msg).SetReply(q)
	if len(q.Question) == 1 {
		name := q.Question[0].Name
		tr.mu.Lock()
		tr.names = append(tr.names, name)
		tr.where = append(tr.where, at.String()+" "+name)
		a, known := tr.hosts[name]
		tr.mu.Unlock()
		if !known {
			a = TrapAnswer
		}
		if q.Question[0].Qtype == dns.TypeA {
			m.Answer = append(m.Answer, &dns.A{Hdr: dns.RR_Header{Name: name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 1}, A: a.AsSlice()})
		}
	}
	_ = w.WriteMsg(m)
}

// Names returns the names that were asked, without the final dot.
func (tr *Trap) Names() []string {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	var out []string
	for _, n := range tr.names {
		out = append(out, n[:len(n)-1])
	}
	return out
}

// Reset forgets the names.
func (tr *Trap) Reset() {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	tr.names, tr.where = nil, nil
}

// Check fails the test if a query other than for the given names was caught.
func (tr *Trap) Check(t *testing.T, allowed ...string) {
	t.Helper()
	tr.mu.Lock()
	defer tr.mu.Unlock()
	for i, n := range tr.names {
		if !slices.Contains(allowed, n[:len(n)-1]) {
			t.Errorf("leak: query reached %s", tr.where[i])
		}
	}
}
