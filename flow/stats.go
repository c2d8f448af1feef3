// SPDX-License-Identifier: GPL-3.0-or-later

package flow

import "sync/atomic"

// TableStats is what a table has seen, live flows included. The counters never go back.
type TableStats struct {
	Active  map[Network]int // flows alive now, those being ended included
	Flows   uint64          // flows that got a slot
	Evicted uint64          // ended because the table was full
	Refused uint64          // not taken because the table was full and nothing could be ended

	BytesUp, BytesDown, PacketsUp, PacketsDown uint64

	Upstreams map[string]UpstreamStats // "reject", "drop" and "dns" are among them
	Results   map[ResultKey]uint64     // of the flows that have ended
	Dropped   map[string]uint64        // datagrams that were not passed on, by reason
	Watchers  int                      // subscribers now
	Missed    uint64                   // events that a subscriber was too slow for
}

// UpstreamStats are the totals of one upstream in this context.
type UpstreamStats struct {
	Active                                     int
	Flows                                      uint64 // decided for it, live ones included
	BytesUp, BytesDown, PacketsUp, PacketsDown uint64
}

// ResultKey tells the kinds of ended flows apart.
type ResultKey struct {
	Network  Network
	Upstream string
	Result   string
}

// totals are the table's counters that no flow carries.
type totals struct {
	started, evicted, refused atomic.Uint64
	drops                     [dropReasons]atomic.Uint64
}

// dropReason says why a datagram was not passed on.
type dropReason uint8

const (
	dropTableFull dropReason = iota // no slot for its flow
	dropQueueFull                   // too many wait for an association or a name
	dropLost                        // the association broke under it
	dropTooLarge                    // the upstream cannot carry it
	dropDNSBusy                     // too many queries are being answered
	dropNotDNS                      // sent to port 53, and not a query
	dropBadSource                   // a reply from an address that the application's socket cannot have one from
	dropRate                        // beyond the limits: of bandwidth, or of new flows, which stand for one each
	dropReasons
)

func (r dropReason) String() string {
	return [...]string{"table_full", "queue_full", "association_lost", "too_large", "dns_busy", "not_dns", "bad_source", "rate"}[r]
}

func (t *totals) drop(r dropReason, n int) {
	if n > 0 {
		t.drops[r].Add(uint64(n))
	}
}

// sums add up flows that have ended. Both maps are bounded by the upstreams configured in the daemon's life.
type sums struct {
	upstreams map[string]UpstreamStats
	results   map[ResultKey]uint64
}

func newSums() sums {
	return sums{upstreams: make(map[string]UpstreamStats), results: make(map[ResultKey]uint64)}
}

func (s *sums) add(i *Info, result string) {
	s.upstreams[i.Upstream] = s.upstreams[i.Upstream].plus(i)
	s.results[ResultKey{i.Network, i.Upstream, result}]++
}

func (u UpstreamStats) plus(i *Info) UpstreamStats {
	u.Flows++
	u.BytesUp += i.BytesUp
	u.BytesDown += i.BytesDown
	u.PacketsUp += i.PacketsUp
	u.PacketsDown += i.PacketsDown
	return u
}

// Stats adds everything up. It takes each shard's lock in turn for as long as its flows take to count: call it for a scrape, not for a
// packet.
func (t *Table) Stats() TableStats {
	st := TableStats{
		Active: make(map[Network]int), Upstreams: make(map[string]UpstreamStats), Results: make(map[ResultKey]uint64),
		Dropped: make(map[string]uint64), Flows: t.started.Load(), Evicted: t.evicted.Load(), Refused: t.refused.Load(),
	}
	for i := range t.shard {
		t.shard[i].addTo(&st)
	}
	for _, u := range st.Upstreams {
		st.BytesUp += u.BytesUp
		st.BytesDown += u.BytesDown
		st.PacketsUp += u.PacketsUp
		st.PacketsDown += u.PacketsDown
	}
	for r := range dropReasons {
		st.Dropped[r.String()] = t.drops[r].Load()
	}
	st.Watchers, st.Missed = t.watcherStats()
	return st
}

func (s *tableShard) addTo(st *TableStats) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for name, u := range s.sums.upstreams {
		sum := st.Upstreams[name]
		sum.Flows += u.Flows
		sum.BytesUp += u.BytesUp
		sum.BytesDown += u.BytesDown
		sum.PacketsUp += u.PacketsUp
		sum.PacketsDown += u.PacketsDown
		st.Upstreams[name] = sum
	}
	for k, n := range s.sums.results {
		st.Results[k] += n
	}
	for _, e := range s.live {
		e.mu.Lock()
		i, decided := e.infoLocked(), e.decided
		e.mu.Unlock()
		st.Active[i.Network]++
		if decided {
			u := st.Upstreams[i.Upstream].plus(&i)
			u.Active++
			st.Upstreams[i.Upstream] = u
		}
	}
}
