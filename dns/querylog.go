// SPDX-License-Identifier: GPL-3.0-or-later

package dns

import (
	"net/netip"
	"strconv"
	"sync"
	"time"

	"github.com/miekg/dns"
)

// maxLog bounds the query log: about 150 KB and the names. It lives in memory only; what someone looks up is nobody else's business.
const maxLog = 1024

// queryLog is a ring of the last queries.
type queryLog struct {
	mu   sync.Mutex
	ring [maxLog]logged
	n    uint64 // entries ever written
}

type logged struct {
	at     time.Time
	client netip.AddrPort
	name   string
	qtype  uint16
	rcode  uint16
	result string
	took   time.Duration
}

func (l *queryLog) add(e logged) {
	l.mu.Lock()
	l.ring[l.n%maxLog] = e
	l.n++
	l.mu.Unlock()
}

// entries returns a copy, oldest first.
func (l *queryLog) entries() []LogEntry {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := min(l.n, maxLog)
	es := make([]LogEntry, 0, n)
	for i := l.n - n; i < l.n; i++ {
		e := &l.ring[i%maxLog]
		es = append(es, LogEntry{
			Time: e.at, Client: e.client, Name: e.name, Type: dns.Type(e.qtype).String(), Rcode: rcodeName(e.rcode),
			Result: e.result, Duration: e.took,
		})
	}
	return es
}

func rcodeName(rcode uint16) string {
	if s, ok := dns.RcodeToString[int(rcode)]; ok {
		return s
	}
	return "RCODE" + strconv.Itoa(int(rcode))
}
