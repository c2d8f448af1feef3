// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"cmp"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/mutex-proxy/mutex/flow"
)

// The strategies of a pool.
const (
	RoundRobin       = "round-robin"
	Weighted         = "weighted"          // round-robin by weight, spread evenly
	Random           = "random"            // of two at random, the one with fewer connections
	LeastConnections = "least-connections" // by weight
	LeastLatency     = "least-latency"     // by the time the server takes to accept, and its connections
	Failover         = "failover"          // by priority, then in the order of the configuration
	Hash             = "hash"              // the same for the same destination, or source, or both; see HashBy
)

// strategies are those that NewPool knows.
func strategies() []string {
	return []string{RoundRobin, Weighted, Random, LeastConnections, LeastLatency, Failover, Hash}
}

// Least-connections and least-latency compare all members of pools of up to wholly, and of larger ones a sample, which costs the same however
// many there are: the best of four at random is nearly as good as the best of all (the power of choices), and that flows cannot all see the
// same best member and flood it is worth more than the rest.
const (
	wholly = 6
	sample = 4
)

// maxSchedule bounds the sequence of turns of a weighted pool; weights are scaled down to fit.
const maxSchedule = 4096

// gauged is implemented by the upstreams of this package.
type gauged interface {
	// gauge returns how many connections are open, and the time in ns that the server takes to accept one; 0 if not known yet. now is Unix ns.
	gauge(now int64) (active, latency int64)
}

// latencyHalf is how long it takes until what is known of an idle server's latency counts half. A server that was slow once must be asked
// again some time, and only a flow can.
const latencyHalf = int64(time.Minute)

// gauge lets the latency decay while nobody asks the server.
func (s *stats) gauge(now int64) (active, latency int64) {
	active, latency = max(0, s.active.Load()), s.latency.Load()
	seen := s.observed.Load()
	if idle := (now - seen) / latencyHalf; seen != 0 && idle > 0 && latency > 0 {
		latency = max(1, latency>>min(idle, 62)) // never 0: that would mean unknown
	}
	return active, latency
}

// gauge of a pool is the sum of its members' connections, and the latency of its fastest.
func (p *poolState) gauge(now int64) (active, latency int64) {
	for _, m := range p.members {
		a, l := m.gauge(now)
		active += a
		if l > 0 && (latency == 0 || l < latency) {
			latency = l
		}
	}
	return active, latency
}

func (m *member) gauge(now int64) (active, latency int64) {
	if m.gauged == nil {
		return 0, 0
	}
	return m.gauged.gauge(now)
}

func newMember(d flow.Dialer) *member {
	m := &member{Dialer: d, weight: 1}
	m.gauged, _ = d.(gauged)
	m.switched, _ = d.(switched)
	m.limited, _ = d.(limited)
	if s, ok := d.(interface{ Spec() Spec }); ok {
		m.weight, m.priority = max(1, s.Spec().Weight), s.Spec().Priority
	}
	return m
}

// arrange returns the order in which members are gone through, and for a weighted pool the turns.
func arrange(strategy string, members []*member) (order []int, turns []uint16) {
	for i := range members {
		order = append(order, i)
	}
	switch strategy {
	case Failover:
		slices.SortStableFunc(order, func(a, b int) int { return cmp.Compare(members[a].priority, members[b].priority) })
	case Weighted:
		turns = schedule(members)
	}
	return order, turns
}

// schedule spreads the turns of members evenly over one round (smooth weighted round-robin, as nginx has it). It is made once, so that a
// turn costs an increment however many members there are.
func schedule(members []*member) []uint16 {
	weights := make([]int, len(members))
	div, total := 0, 0
	for i, m := range members {
		weights[i] = m.weight
		total += m.weight
		div = gcd(div, m.weight)
	}
	scaled := 0
	for i := range weights {
		if weights[i] /= div; total/div > maxSchedule {
			weights[i] = max(1, weights[i]*maxSchedule/(total/div))
		}
		scaled += weights[i]
	}
	turns := make([]uint16, 0, scaled)
	current := make([]int, len(weights))
	for range scaled {
		best := 0
		for i, w := range weights {
			if current[i] += w; current[i] > current[best] {
				best = i
			}
		}
		current[best] -= scaled
		turns = append(turns, uint16(best))
	}
	return turns
}

func gcd(a, b int) int {
	for b != 0 {
		a, b = b, a%b
	}
	return a
}

// first returns the place in the order at which the strategy starts; for hash, the place on the ring.
func (p *poolState) first(by carriage, now int64, key uint64, tried []int) int {
	n := len(p.members)
	switch p.strategy {
	case RoundRobin:
		return int((p.next.Add(1) - 1) % uint64(n))
	case Weighted:
		return int(p.turns[(p.next.Add(1)-1)%uint64(len(p.turns))])
	case Random:
		a, b := rand.IntN(n), rand.IntN(n)
		ca, cb := p.candidate(by, a, now, tried), p.candidate(by, b, now, tried)
		if p.better(&cb, &ca) {
			return b
		}
		return a
	case LeastConnections, LeastLatency:
		start := rand.IntN(n) // among equals, not always the same
		best := p.candidate(by, start, now, tried)
		others := n
		if n > wholly {
			others = sample
		}
		for k := 1; k < others; k++ {
			i := start + k
			if n > wholly {
				i = rand.IntN(n)
			} else if i >= n {
				i -= n
			}
			if c := p.candidate(by, i, now, tried); p.better(&c, &best) {
				best = c
			}
		}
		return best.i
	case Hash:
		return p.ring.at(key)
	}
	return 0
}

// candidate is what members are compared by.
type candidate struct {
	i               int
	fit             bool
	weight          int64
	active, latency int64
}

func (p *poolState) candidate(by carriage, i int, now int64, tried []int) candidate {
	m := p.members[i]
	c := candidate{i: i, fit: p.fit(by, i, now, tried), weight: int64(m.weight)}
	c.active, c.latency = m.gauge(now)
	return c
}

// better reports whether a is to be preferred to b.
func (p *poolState) better(a, b *candidate) bool {
	if a.fit != b.fit {
		return a.fit
	}
	if p.strategy == LeastLatency {
		return a.latency*(a.active+1) < b.latency*(b.active+1) // one that is not known yet comes first, and is known then
	}
	return a.active*b.weight < b.active*a.weight
}

// fit reports whether a member can be tried now.
func (p *poolState) fit(by carriage, i int, now int64, tried []int) bool {
	m := p.members[i]
	return m.conditions[by].ejectedUntil.Load() <= now && !m.off() && !slices.Contains(tried, i)
}
