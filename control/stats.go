// SPDX-License-Identifier: GPL-3.0-or-later

package control

import (
	"bytes"
	"encoding/csv"
	"net/netip"
	"strconv"
	"time"
)

// addrString is "" for an address that is not known, where netip would say "invalid AddrPort".
func addrString(ap netip.AddrPort) string {
	if !ap.IsValid() {
		return ""
	}
	return ap.String()
}

// statsOf sums up a status.
func statsOf(st Status, now time.Time) Stats {
	out := Stats{
		Time: now.UTC(), UptimeSeconds: st.UptimeSeconds,
		Contexts: st.Contexts, Upstreams: st.Upstreams, Guard: st.Guard, DNS: st.DNS,
	}
	for _, c := range st.Contexts {
		out.Total.FlowsActive += c.FlowsActive
		out.Total.FlowsTotal += c.FlowsTotal
		out.Total.BytesUp += c.BytesUp
		out.Total.BytesDown += c.BytesDown
		out.Total.PacketsDropped += c.PacketsDropped
	}
	return out
}

// statsCSV writes the counters as scope,name,metric,value: one shape for everything, so that a later counter adds rows and breaks no reader.
func statsCSV(s Stats) []byte {
	var buf bytes.Buffer
	w := csv.NewWriter(&buf)
	row := func(scope, name, metric, value string) { _ = w.Write([]string{scope, name, metric, value}) } // a bytes.Buffer does not fail
	num := func(scope, name, metric string, v uint64) { row(scope, name, metric, strconv.FormatUint(v, 10)) }
	row("scope", "name", "metric", "value")
	row("daemon", "", "time", s.Time.Format(time.RFC3339Nano))
	row("daemon", "", "uptime_seconds", strconv.FormatFloat(s.UptimeSeconds, 'f', -1, 64))
	counters := func(scope, name string, t Totals) {
		num(scope, name, "flows_active", t.FlowsActive)
		num(scope, name, "flows_total", t.FlowsTotal)
		num(scope, name, "bytes_up", t.BytesUp)
		num(scope, name, "bytes_down", t.BytesDown)
		num(scope, name, "packets_dropped", t.PacketsDropped)
	}
	counters("total", "", s.Total)
	for _, c := range s.Contexts {
		counters("context", c.Name, Totals{
			FlowsActive: c.FlowsActive, FlowsTotal: c.FlowsTotal,
			BytesUp: c.BytesUp, BytesDown: c.BytesDown, PacketsDropped: c.PacketsDropped,
		})
	}
	for _, u := range s.Upstreams {
		row("upstream", u.Name, "up", strconv.FormatBool(u.Up))
		row("upstream", u.Name, "latency_seconds", strconv.FormatFloat(u.LatencySeconds, 'f', -1, 64))
		num("upstream", u.Name, "active", u.Active)
		num("upstream", u.Name, "total", u.Total)
		num("upstream", u.Name, "errors", u.Errors)
	}
	row("guard", "", "active", strconv.FormatBool(s.Guard.Active))
	num("guard", "", "dropped_packets", s.Guard.DroppedPackets)
	num("dns", "", "queries", s.DNS.Queries)
	num("dns", "", "cache_hits", s.DNS.CacheHits)
	num("dns", "", "blocked", s.DNS.Blocked)
	num("dns", "", "failures", s.DNS.Failures)
	w.Flush()
	return buf.Bytes()
}
