// SPDX-License-Identifier: GPL-3.0-or-later

package control

import (
	"maps"
	"net/http"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/mutex-proxy/mutex/flow"
)

const (
	// maxUpstreamSeries bounds the upstreams that are told apart between two scrapes; the rest is counted as "other".
	maxUpstreamSeries = 1024
	// maxScrapes and scrapeTimeout bound what a scraper can cost.
	maxScrapes    = 4
	scrapeTimeout = 10 * time.Second
)

// connectBuckets are seconds: from a proxy in the same rack to the default dial time-out of 10 s.
func connectBuckets() []float64 {
	return []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10}
}

// Source is what metrics ask the daemon at each scrape. It is called concurrently.
type Source interface {
	Counters() Counters
}

// Counters is everything that is counted elsewhere, at one moment. Labels come from it: contexts and upstreams that are gone take their
// series with them.
type Counters struct {
	Contexts     []ContextCounters
	Upstreams    []UpstreamStatus
	Restored     map[string]uint64 // kernel objects that somebody deleted and the daemon put back, by kind: rule, route, table …
	GuardDropped uint64
}

// ContextCounters is one context's part.
type ContextCounters struct {
	Name                   string
	Table                  flow.TableStats
	PacketsUp, PacketsDown uint64            // read from and written to the TUN
	Dropped                map[string]uint64 // by reason, the stack's and the link's; those of Table are added
	DNS                    DNSStatus
}

// Metrics is the registry behind /metrics. It is also the flow.Recorder of every context.
type Metrics struct {
	source   Source
	registry *prometheus.Registry
	desc     descs

	attribution attribution
	mu          sync.Mutex // guards what follows
	connect     map[string]*connectTimes
	errors      map[string]map[flow.Reason]uint64
	reloadOK    bool
	reloadAt    time.Time
}

// connectTimes is a histogram that can be forgotten.
type connectTimes struct {
	count   uint64
	sum     float64
	buckets []uint64 // of connectBuckets, not cumulative
}

var (
	_ flow.Recorder        = (*Metrics)(nil)
	_ prometheus.Collector = (*Metrics)(nil)
)

type descs struct {
	flows, flowsActive, bytes, packets, dropped, connect         *prometheus.Desc
	upstreamUp, upstreamErrors, upstreamActive, dns              *prometheus.Desc
	reloadOK, reloadAt, restored, guardDropped, buildInformation *prometheus.Desc
}

// NewMetrics returns the metrics of a daemon of the given version. The configuration it is starting with counts as applied now.
func NewMetrics(source Source, version string) (*Metrics, error) {
	d := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc("mprox_"+name, help, labels, nil)
	}
	m := &Metrics{
		source:   source,
		registry: prometheus.NewRegistry(),
		connect:  make(map[string]*connectTimes),
		errors:   make(map[string]map[flow.Reason]uint64),
		reloadOK: true,
		reloadAt: time.Now(),

		attribution: newAttribution(),
		desc: descs{
			flows:          d("flows_total", "Flows that have ended, by how.", "context", "network", "upstream", "result"),
			flowsActive:    d("flows_active", "Flows alive now.", "context", "network"),
			bytes:          d("bytes_total", "Payload bytes moved; up is from the application.", "context", "upstream", "direction"),
			packets:        d("packets_total", "Packets read from (up) and written to (down) the TUN device.", "context", "direction"),
			dropped:        d("packets_dropped_total", "Packets and datagrams that were not passed on.", "context", "reason"),
			connect:        d("connect_seconds", "Time an upstream took to open a connection or an association.", "upstream"),
			upstreamUp:     d("upstream_up", "Whether the upstream works.", "upstream"),
			upstreamErrors: d("upstream_errors_total", "Connections the upstream did not open, by what the application was told.", "upstream", "reason"),
			upstreamActive: d("upstream_active", "Connections and associations open through the upstream.", "upstream"),
			dns:            d("dns_queries_total", "DNS queries answered, by how.", "context", "result"),
			reloadOK:       d("config_last_reload_successful", "Whether the last configuration was applied."),
			reloadAt:       d("config_last_reload_timestamp_seconds", "When a configuration was last applied."),
			restored:       d("kernel_state_restored_total", "Kernel objects that something else had removed and that were put back.", "object"),
			guardDropped:   d("guard_dropped_packets_total", "Packets that the guard kept from leaving unproxied."),
			buildInformation: prometheus.NewDesc("mprox_build_info", "The build; always 1.", nil,
				prometheus.Labels{"version": version, "goversion": runtime.Version(), "goarch": runtime.GOARCH}),
		},
	}
	for _, c := range []prometheus.Collector{m, m.attribution.total, m.attribution.seconds, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{})} {
		if err := m.registry.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// Handler serves the registry in the formats of Prometheus.
func (m *Metrics) Handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{
		MaxRequestsInFlight: maxScrapes,
		Timeout:             scrapeTimeout,
		EnableOpenMetrics:   true,
	})
}

// FlowEnded implements flow.Recorder. Ended flows are counted by their table, where live ones are counted too: the sum cannot go back.
func (m *Metrics) FlowEnded(*flow.Info, string) {}

// Connected implements flow.Recorder.
func (m *Metrics) Connected(upstream string, d time.Duration) {
	seconds := d.Seconds()
	m.mu.Lock()
	defer m.mu.Unlock()
	h := m.connect[m.nameLocked(upstream)]
	if h == nil {
		h = &connectTimes{buckets: make([]uint64, len(connectBuckets()))}
		m.connect[m.nameLocked(upstream)] = h
	}
	h.count++
	h.sum += seconds
	if i, _ := slices.BinarySearch(connectBuckets(), seconds); i < len(h.buckets) {
		h.buckets[i]++
	}
}

// UpstreamError implements flow.Recorder.
func (m *Metrics) UpstreamError(upstream string, r flow.Reason) {
	m.mu.Lock()
	defer m.mu.Unlock()
	name := m.nameLocked(upstream)
	if m.errors[name] == nil {
		m.errors[name] = make(map[flow.Reason]uint64)
	}
	m.errors[name][r]++
}

// nameLocked returns the label of an upstream: its name, while there is room.
func (m *Metrics) nameLocked(upstream string) string {
	_, connected := m.connect[upstream]
	_, failed := m.errors[upstream]
	if connected || failed || len(m.connect)+len(m.errors) < maxUpstreamSeries {
		return upstream
	}
	return "other"
}

// Reloaded notes the outcome of a reload, whoever asked for it.
func (m *Metrics) Reloaded(ok bool, at time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.reloadOK = ok
	if ok {
		m.reloadAt = at
	}
}

// Describe implements prometheus.Collector.
func (m *Metrics) Describe(ch chan<- *prometheus.Desc) {
	d := &m.desc
	for _, desc := range []*prometheus.Desc{
		d.flows, d.flowsActive, d.bytes, d.packets, d.dropped, d.connect, d.upstreamUp, d.upstreamErrors, d.upstreamActive, d.dns,
		d.reloadOK, d.reloadAt, d.restored, d.guardDropped, d.buildInformation,
	} {
		ch <- desc
	}
}

// emitter sends metrics. A label that is not UTF-8 makes an error of the scrape, never a panic.
type emitter struct {
	ch chan<- prometheus.Metric
}

func (e emitter) send(d *prometheus.Desc, m prometheus.Metric, err error) {
	if err != nil {
		m = prometheus.NewInvalidMetric(d, err)
	}
	e.ch <- m
}

func (e emitter) counter(d *prometheus.Desc, v uint64, labels ...string) {
	m, err := prometheus.NewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
	e.send(d, m, err)
}

func (e emitter) gauge(d *prometheus.Desc, v float64, labels ...string) {
	m, err := prometheus.NewConstMetric(d, prometheus.GaugeValue, v, labels...)
	e.send(d, m, err)
}

// Collect implements prometheus.Collector.
func (m *Metrics) Collect(ch chan<- prometheus.Metric) {
	c := m.source.Counters()
	e := emitter{ch}
	e.gauge(m.desc.buildInformation, 1)
	for i := range c.Contexts {
		m.collectContext(&c.Contexts[i], e)
	}
	for _, u := range c.Upstreams {
		e.gauge(m.desc.upstreamUp, boolValue(u.Up), u.Name)
		e.gauge(m.desc.upstreamActive, float64(u.Active), u.Name)
	}
	for object, n := range c.Restored {
		e.counter(m.desc.restored, n, object)
	}
	e.counter(m.desc.guardDropped, c.GuardDropped)
	m.collectRecorded(c.Upstreams, e)
}

func (m *Metrics) collectContext(c *ContextCounters, e emitter) {
	for _, n := range []flow.Network{flow.TCP, flow.UDP, flow.ICMP} {
		e.gauge(m.desc.flowsActive, float64(c.Table.Active[n]), c.Name, n.String())
	}
	for key, n := range c.Table.Results {
		e.counter(m.desc.flows, n, c.Name, key.Network.String(), key.Upstream, key.Result)
	}
	for upstream, u := range c.Table.Upstreams {
		e.counter(m.desc.bytes, u.BytesUp, c.Name, upstream, "up")
		e.counter(m.desc.bytes, u.BytesDown, c.Name, upstream, "down")
	}
	e.counter(m.desc.packets, c.PacketsUp, c.Name, "up")
	e.counter(m.desc.packets, c.PacketsDown, c.Name, "down")
	dropped := maps.Clone(c.Dropped)
	if dropped == nil {
		dropped = make(map[string]uint64)
	}
	for reason, n := range c.Table.Dropped {
		dropped[reason] += n
	}
	for reason, n := range dropped {
		e.counter(m.desc.dropped, n, c.Name, reason)
	}
	// The four counters are not read at one instant; the rest is what no other result claims.
	claimed := c.DNS.CacheHits + c.DNS.Blocked + c.DNS.Failures
	e.counter(m.desc.dns, c.DNS.CacheHits, c.Name, "cached")
	e.counter(m.desc.dns, c.DNS.Blocked, c.Name, "blocked")
	e.counter(m.desc.dns, c.DNS.Failures, c.Name, "failed")
	e.counter(m.desc.dns, c.DNS.Queries-min(c.DNS.Queries, claimed), c.Name, "answered")
}

// collectRecorded writes what Recorder was told, and forgets upstreams that the daemon does not have any more.
func (m *Metrics) collectRecorded(upstreams []UpstreamStatus, e emitter) {
	known := map[string]bool{"direct": true}
	for _, u := range upstreams {
		known[u.Name] = true
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	maps.DeleteFunc(m.connect, func(name string, _ *connectTimes) bool { return !known[name] })
	maps.DeleteFunc(m.errors, func(name string, _ map[flow.Reason]uint64) bool { return !known[name] })
	for name, h := range m.connect {
		cumulative, n := make(map[float64]uint64, len(h.buckets)), uint64(0)
		for i, bound := range connectBuckets() {
			n += h.buckets[i]
			cumulative[bound] = n
		}
		metric, err := prometheus.NewConstHistogram(m.desc.connect, h.count, h.sum, cumulative, name)
		e.send(m.desc.connect, metric, err)
	}
	for name, reasons := range m.errors {
		for r, n := range reasons {
			e.counter(m.desc.upstreamErrors, n, name, r.String())
		}
	}
	e.gauge(m.desc.reloadOK, boolValue(m.reloadOK))
	if !m.reloadAt.IsZero() {
		e.gauge(m.desc.reloadAt, float64(m.reloadAt.UnixMilli())/1e3)
	}
}

func boolValue(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
