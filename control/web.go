// SPDX-License-Identifier: GPL-3.0-or-later

package control

import (
	"context"
	"fmt"
	"net/http"
	"time"
)

// readyLimit bounds a probe: kubelet gives up after one second unless told otherwise.
const readyLimit = 900 * time.Millisecond

// webHandler serves what may be read over TCP: metrics and probes, nothing that changes or names a flow.
func (s *Server) webHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintln(w, "ok")
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), readyLimit)
		defer cancel()
		h := healthOf(s.cfg.Backend.Health(ctx))
		if !h.Healthy {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
		for _, c := range h.Checks {
			if c.OK {
				fmt.Fprintf(w, "[+] %s\n", c.Name)
			} else {
				fmt.Fprintf(w, "[-] %s: %s\n", c.Name, c.Message)
			}
		}
		if !h.Healthy {
			fmt.Fprintln(w, "not ready")
			return
		}
		fmt.Fprintln(w, "ok")
	})
	if s.cfg.Metrics != nil {
		mux.Handle("GET /metrics", s.cfg.Metrics.Handler())
	}
	return mux
}
