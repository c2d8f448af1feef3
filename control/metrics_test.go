// SPDX-License-Identifier: GPL-3.0-or-later

package control_test

import (
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/mutex-proxy/mutex/control"
	"github.com/mutex-proxy/mutex/control/controltest"
	"github.com/mutex-proxy/mutex/flow"
)

// scrape returns the lines of our own metrics, without comments.
func scrape(t *testing.T, m *control.Metrics) []string {
	t.Helper()
	w := httptest.NewRecorder()
	m.Handler().ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	if w.Code != 200 {
		t.Fatalf("%d: %s", w.Code, w.Body)
	}
	var lines []string
	for line := range strings.Lines(w.Body.String()) {
		if strings.HasPrefix(line, "mprox_") && !strings.HasPrefix(line, "mprox_build_info") {
			lines = append(lines, strings.TrimSuffix(line, "\n"))
		}
	}
	return lines
}

func TestMetrics(t *testing.T) {
	fake := controltest.New()
	fake.CountersNow = control.Counters{
		Contexts: []control.ContextCounters{{
			Name: "default",
			Table: flow.TableStats{
				Active:    map[flow.Network]int{flow.TCP: 2},
				Results:   map[flow.ResultKey]uint64{{Network: flow.TCP, Upstream: "paris", Result: "ok"}: 5},
				Upstreams: map[string]flow.UpstreamStats{"paris": {BytesUp: 10, BytesDown: 20}},
				Dropped:   map[string]uint64{"queue_full": 1},
			},
			PacketsUp: 100, PacketsDown: 200,
			Dropped: map[string]uint64{"queue_full": 2, "bad_checksum": 3},
			DNS:     control.DNSStatus{Queries: 10, CacheHits: 4, Blocked: 1, Failures: 2},
		}},
		Upstreams:    fake.StatusValue.Upstreams,
		Restored:     map[string]uint64{"rule": 1},
		GuardDropped: 7,
	}
	m, err := control.NewMetrics(fake, "v1")
	if err != nil {
		t.Fatal(err)
	}
	m.Connected("paris", 42*time.Millisecond)
	m.Connected("paris", time.Minute)
	m.UpstreamError("berlin", flow.ReasonTimeout)
	m.Attributed("tcx", control.AttributionFound, 2*time.Microsecond)
	m.Attributed("tcx", control.AttributionFound, 20*time.Microsecond)
	m.Attributed("", control.AttributionNotFound, 5*time.Millisecond)
	m.Reloaded(true, time.Unix(1700000000, 0))
	m.Reloaded(false, time.Unix(1800000000, 0))
	want := []string{
		`mprox_attribution_seconds_bucket{le="1e-06"} 0`,
		`mprox_attribution_seconds_bucket{le="2.5e-06"} 1`,
		`mprox_attribution_seconds_bucket{le="5e-06"} 1`,
		`mprox_attribution_seconds_bucket{le="1e-05"} 1`,
		`mprox_attribution_seconds_bucket{le="2.5e-05"} 2`,
		`mprox_attribution_seconds_bucket{le="0.0001"} 2`,
		`mprox_attribution_seconds_bucket{le="0.001"} 2`,
		`mprox_attribution_seconds_bucket{le="0.01"} 3`,
		`mprox_attribution_seconds_bucket{le="0.1"} 3`,
		`mprox_attribution_seconds_bucket{le="+Inf"} 3`,
		`mprox_attribution_seconds_sum 0.005022`,
		`mprox_attribution_seconds_count 3`,
		`mprox_attribution_total{method="none",result="not_found"} 1`,
		`mprox_attribution_total{method="tcx",result="found"} 2`,
		`mprox_bytes_total{context="default",direction="down",upstream="paris"} 20`,
		`mprox_bytes_total{context="default",direction="up",upstream="paris"} 10`,
		`mprox_config_last_reload_successful 0`,
		`mprox_config_last_reload_timestamp_seconds 1.7e+09`,
		`mprox_connect_seconds_bucket{upstream="paris",le="0.001"} 0`,
		`mprox_connect_seconds_bucket{upstream="paris",le="0.0025"} 0`,
		`mprox_connect_seconds_bucket{upstream="paris",le="0.005"} 0`,
		`mprox_connect_seconds_bucket{upstream="paris",le="0.01"} 0`,
		`mprox_connect_seconds_bucket{upstream="paris",le="0.025"} 0`,
		`mprox_connect_seconds_bucket{upstream="paris",le="0.05"} 1`,
		`mprox_connect_seconds_bucket{upstream="paris",le="0.1"} 1`,
		`mprox_connect_seconds_bucket{upstream="paris",le="0.25"} 1`,
		`mprox_connect_seconds_bucket{upstream="paris",le="0.5"} 1`,
		`mprox_connect_seconds_bucket{upstream="paris",le="1"} 1`,
		`mprox_connect_seconds_bucket{upstream="paris",le="2.5"} 1`,
		`mprox_connect_seconds_bucket{upstream="paris",le="5"} 1`,
		`mprox_connect_seconds_bucket{upstream="paris",le="10"} 1`,
		`mprox_connect_seconds_bucket{upstream="paris",le="+Inf"} 2`,
		`mprox_connect_seconds_sum{upstream="paris"} 60.042`,
		`mprox_connect_seconds_count{upstream="paris"} 2`,
		`mprox_dns_queries_total{context="default",result="answered"} 3`,
		`mprox_dns_queries_total{context="default",result="blocked"} 1`,
		`mprox_dns_queries_total{context="default",result="cached"} 4`,
		`mprox_dns_queries_total{context="default",result="failed"} 2`,
		`mprox_flows_active{context="default",network="icmp"} 0`,
		`mprox_flows_active{context="default",network="tcp"} 2`,
		`mprox_flows_active{context="default",network="udp"} 0`,
		`mprox_flows_total{context="default",network="tcp",result="ok",upstream="paris"} 5`,
		`mprox_guard_dropped_packets_total 7`,
		`mprox_kernel_state_restored_total{object="rule"} 1`,
		`mprox_packets_dropped_total{context="default",reason="bad_checksum"} 3`,
		`mprox_packets_dropped_total{context="default",reason="queue_full"} 3`,
		`mprox_packets_total{context="default",direction="down"} 200`,
		`mprox_packets_total{context="default",direction="up"} 100`,
		`mprox_upstream_active{upstream="berlin"} 0`,
		`mprox_upstream_active{upstream="paris"} 2`,
		`mprox_upstream_errors_total{reason="timeout",upstream="berlin"} 1`,
		`mprox_upstream_up{upstream="berlin"} 0`,
		`mprox_upstream_up{upstream="paris"} 1`,
	}
	if diff := cmp.Diff(want, scrape(t, m)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestMetricsForgetUpstreamsThatAreGone(t *testing.T) {
	fake := controltest.New()
	m, err := control.NewMetrics(fake, "v1")
	if err != nil {
		t.Fatal(err)
	}
	has := func(name string) bool {
		return slices.ContainsFunc(scrape(t, m), func(l string) bool { return strings.Contains(l, `connect_seconds_count{upstream="`+name) })
	}
	fake.CountersNow.Upstreams = []control.UpstreamStatus{{Name: "lease"}}
	m.Connected("lease", time.Second)
	m.Connected("direct", time.Second)
	if !has("lease") || !has("direct") {
		t.Error("not counted")
	}
	fake.CountersNow.Upstreams = nil
	if has("lease") || !has("direct") {
		t.Error("an upstream that is gone has kept its series, or a built-in one has lost them")
	}
}

func TestMetricsAreBounded(t *testing.T) {
	fake := controltest.New()
	m, err := control.NewMetrics(fake, "v1")
	if err != nil {
		t.Fatal(err)
	}
	for i := range 5000 {
		name := "u" + strings.Repeat("x", i%7) + time.Duration(i).String()
		m.Connected(name, time.Second)
		m.UpstreamError(name, flow.ReasonRefused)
		fake.CountersNow.Upstreams = append(fake.CountersNow.Upstreams, control.UpstreamStatus{Name: name})
	}
	fake.CountersNow.Upstreams = append(fake.CountersNow.Upstreams, control.UpstreamStatus{Name: "other"})
	n := 0
	for _, line := range scrape(t, m) {
		if strings.HasPrefix(line, "mprox_connect_seconds_count") {
			n++
		}
	}
	if n > 1025 {
		t.Errorf("%d series", n)
	}
}

func TestMetricsSurviveALabelThatIsNotText(t *testing.T) {
	fake := controltest.New()
	fake.CountersNow.Restored = map[string]uint64{"\xff": 1}
	m, err := control.NewMetrics(fake, "v1")
	if err != nil {
		t.Fatal(err)
	}
	w := httptest.NewRecorder()
	m.Handler().ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil)) // an error, and no panic
	if w.Code != 500 {
		t.Errorf("got %d", w.Code)
	}
}
