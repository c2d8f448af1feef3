// SPDX-License-Identifier: GPL-3.0-or-later

package control

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"path"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/mutex-proxy/mutex/control/client"
)

// route is one call of the API. Exactly one of answer and stream is set.
type route struct {
	method, path string
	open         bool     // anyone may call it, and sees and changes what is theirs; else it takes authority
	query        []string // the parameters it knows; another is an error, so that a filter is never silently ignored
	limit        time.Duration
	answer       func(c *call) (any, error) // nil = no content; []byte = as it is
	stream       func(c *call) error        // writes for itself; an error only before it has begun to
}

// call is one request on its way to a route.
type call struct {
	*Server
	w       http.ResponseWriter
	r       *http.Request
	ctx     context.Context // bounded by the route's limit
	peer    Peer
	trusted bool
	query   url.Values
	body    []byte
}

const (
	// callLimit bounds a call that only looks something up.
	callLimit = 10 * time.Second
	// reloadLimit bounds a reload: upstreams given by name may have to be resolved.
	reloadLimit = 55 * time.Second
	// testLimit bounds a test of an upstream, or of all members of a pool.
	testLimit = 30 * time.Second
	// leaseLimit bounds the making of a context.
	leaseLimit = 20 * time.Second
)

// routes is the API; openapi.yaml describes the same, and a test holds them together.
func (s *Server) routes() []route {
	return []route{
		{method: "GET", path: "/v1/status", open: true, answer: getStatus},
		{method: "GET", path: "/v1/health", open: true, answer: getHealth},
		{method: "GET", path: "/v1/flows", open: true, query: []string{"watch"}, stream: getFlows},
		{method: "GET", path: "/v1/apps", open: true, answer: getApps},
		{method: "DELETE", path: "/v1/flows/{id}", open: true, answer: deleteFlow},
		{method: "GET", path: "/v1/contexts", open: true, answer: getContexts},
		{method: "POST", path: "/v1/contexts", limit: reloadLimit, answer: postContext},
		{method: "DELETE", path: "/v1/contexts/{name}", limit: reloadLimit, answer: deleteContext},
		{method: "POST", path: "/v1/contexts/{name}/enable", limit: reloadLimit, answer: postContextState(true)},
		{method: "POST", path: "/v1/contexts/{name}/disable", limit: reloadLimit, answer: postContextState(false)},
		{method: "POST", path: "/v1/contexts/{name}/attach", limit: reloadLimit, answer: postSelector("attached", Backend.Attach)},
		{method: "POST", path: "/v1/contexts/{name}/detach", limit: reloadLimit, answer: postSelector("detached", Backend.Detach)},
		{method: "GET", path: "/v1/processes/{pid}", answer: getProcess},
		{method: "GET", path: "/v1/upstreams", open: true, answer: getUpstreams},
		{method: "POST", path: "/v1/upstreams/{name}/test", query: []string{"target"}, limit: testLimit, answer: postUpstreamTest},
		{method: "POST", path: "/v1/upstreams/{name}/enable", answer: postUpstreamState("enabled")},
		{method: "POST", path: "/v1/upstreams/{name}/disable", answer: postUpstreamState("disabled")},
		{method: "POST", path: "/v1/upstreams/{name}/drain", answer: postUpstreamState("draining")},
		{method: "GET", path: "/v1/stats", open: true, query: []string{"format"}, answer: getStats},
		{method: "GET", path: "/v1/explain", open: true, query: explainQuery(), answer: getExplain},
		{method: "GET", path: "/v1/dns/query", query: []string{"context", "name", "type"}, answer: getDNSQuery},
		{method: "GET", path: "/v1/events", stream: getEvents},
		{method: "POST", path: "/v1/reload", limit: reloadLimit, answer: postReload},
		{method: "POST", path: "/v1/leases", open: true, limit: leaseLimit, stream: postLease},
		{method: "POST", path: "/v1/shutdown", query: []string{"keep"}, answer: postShutdown},
		{method: "GET", path: "/v1/openapi.yaml", open: true, answer: getOpenAPI},
	}
}

func (s *Server) handler() http.Handler {
	mux := http.NewServeMux()
	methods := make(map[string][]string)
	for _, rt := range s.routes() {
		mux.Handle(rt.method+" "+rt.path, s.call(rt))
		methods[rt.path] = append(methods[rt.path], rt.method)
	}
	for pattern, allowed := range methods {
		slices.Sort(allowed)
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Allow", strings.Join(allowed, ", "))
			writeError(w, &Error{Code: client.CodeMethod, Message: r.Method + " is not possible here: use " + strings.Join(allowed, " or ")})
		})
	}
	mux.HandleFunc("/", notFound)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// ServeMux would answer these by itself: a redirect, or a 400 without a body.
		if r.RequestURI == "*" || path.Clean(r.URL.Path) != r.URL.Path {
			notFound(w, r)
			return
		}
		mux.ServeHTTP(w, r)
	})
}

func notFound(w http.ResponseWriter, r *http.Request) {
	writeError(w, &Error{Code: client.CodeNotFound, Message: fmt.Sprintf("there is no %q: see /v1/openapi.yaml", r.URL.Path)})
}

// call is the way of every request: time-outs, who asks, may they, parse, do, answer.
func (s *Server) call(rt route) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Cache-Control", "no-store")
		control := http.NewResponseController(w)
		now := time.Now() // deadlines are the kernel's, not those of an injected clock
		_ = control.SetReadDeadline(now.Add(bodyTimeout))
		limit := rt.limit
		if limit == 0 {
			limit = callLimit
		}
		_ = control.SetWriteDeadline(now.Add(limit + writeTimeout))
		// A connection that did not come through peerListener has no peer: it is nobody, and nobody has authority.
		conn, ok := r.Context().Value(connKey{}).(*peerConn)
		if !ok {
			writeError(w, &Error{Code: client.CodeForbidden, Message: "the caller is not known"})
			return
		}
		c := &call{Server: s, w: w, r: r, peer: conn.peer, trusted: conn.trusted}
		if !rt.open && !c.trusted {
			writeError(w, c.forbidden())
			return
		}
		if err := c.parse(rt); err != nil {
			writeError(w, err)
			return
		}
		// The body is in. From here on the connection is read only to notice that the caller has gone, which may take its time.
		_ = control.SetReadDeadline(time.Time{})
		ctx, cancel := context.WithTimeout(r.Context(), limit)
		defer cancel()
		c.ctx = ctx
		if rt.stream != nil {
			if err := rt.stream(c); err != nil {
				writeError(w, err)
			}
			return
		}
		c.reply(rt.answer(c))
	})
}

func (c *call) forbidden() error {
	msg := "only root may do this"
	if c.cfg.Group != "" {
		msg = "only root and members of the group " + c.cfg.Group + " may do this"
	}
	return &Error{Code: client.CodeForbidden, Message: msg}
}

func (c *call) parse(rt route) (err error) {
	if c.query, err = url.ParseQuery(c.r.URL.RawQuery); err != nil {
		return badRequest("", "the query cannot be parsed: %v", err)
	}
	for key, values := range c.query {
		if !slices.Contains(rt.query, key) {
			return badRequest(key, "unknown parameter")
		}
		if len(values) > 1 {
			return badRequest(key, "given %d times", len(values))
		}
	}
	c.body, err = io.ReadAll(http.MaxBytesReader(c.w, c.r.Body, maxBody))
	return err
}

func (c *call) reply(v any, err error) {
	if err != nil {
		writeError(c.w, err)
		return
	}
	switch v := v.(type) {
	case nil:
		c.w.WriteHeader(http.StatusNoContent)
	case []byte:
		_, _ = c.w.Write(v)
	default:
		var buf bytes.Buffer
		if err := json.NewEncoder(&buf).Encode(v); err != nil {
			writeError(c.w, err)
			return
		}
		c.w.Header().Set("Content-Type", "application/json")
		_, _ = c.w.Write(buf.Bytes())
	}
}

// audit logs who changed what.
func (c *call) audit(what string, fields ...zap.Field) {
	c.log.Info(what, append(fields, zap.Uint32("uid", c.peer.UID), zap.Int("pid", c.peer.PID))...)
}
