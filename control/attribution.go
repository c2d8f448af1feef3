// SPDX-License-Identifier: GPL-3.0-or-later

package control

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// attribution is how flows' owners have been found.
type attribution struct {
	total   *prometheus.CounterVec
	seconds prometheus.Histogram
}

func newAttribution() attribution {
	return attribution{
		total: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "mprox_attribution_total", Help: "Flows whose process was looked for, by how it was found; method none with result not_found or error.",
		}, []string{"method", "result"}),
		seconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "mprox_attribution_seconds", Help: "Time it took to look for a flow's process.",
			// From one read of a map to a look at all processes.
			Buckets: []float64{.000001, .0000025, .000005, .00001, .000025, .0001, .001, .01, .1},
		}),
	}
}

// The results of looking for a flow's process.
const (
	AttributionFound    = "found"
	AttributionNotFound = "not_found"
	AttributionError    = "error"
)

// Attributed counts a look for a flow's process. method is flow.App.Method, "" when it was not found; result one of the Attribution constants.
func (m *Metrics) Attributed(method, result string, d time.Duration) {
	if method == "" {
		method = "none"
	}
	m.attribution.total.WithLabelValues(method, result).Inc()
	m.attribution.seconds.Observe(d.Seconds())
}
