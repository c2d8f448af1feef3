// SPDX-License-Identifier: GPL-3.0-or-later

package control

import (
	"cmp"
	_ "embed"
	"net"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/mutex-proxy/mutex/control/client"
	"github.com/mutex-proxy/mutex/flow"
)

//go:embed openapi.yaml
var openAPI []byte

func getOpenAPI(c *call) (any, error) {
	c.w.Header().Set("Content-Type", "application/yaml")
	return openAPI, nil
}

// visible returns the status as the caller may see it. Without authority that is one's own leases: no upstreams, no paths.
func (c *call) visible() Status {
	st := c.cfg.Backend.Status(c.ctx)
	if !c.trusted {
		own := c.leases.contextsOf(c.peer.UID)
		st.Contexts = slices.DeleteFunc(slices.Clone(st.Contexts), func(cs ContextStatus) bool { return !own[cs.Name] })
		st.Upstreams = nil
		st.Config.Path, st.Config.SHA256 = "", ""
		st.DNS = DNSStatus{}
	}
	st.Contexts = orEmpty(st.Contexts)
	st.Upstreams = orEmpty(st.Upstreams)
	return st
}

// orEmpty keeps null out of the answers.
func orEmpty[T any](list []T) []T {
	if list == nil {
		return []T{}
	}
	return list
}

func getStatus(c *call) (any, error) {
	st := c.visible()
	st.Upstreams = slices.Clone(st.Upstreams)
	for i := range st.Upstreams {
		st.Upstreams[i].State, st.Upstreams[i].Auth, st.Upstreams[i].Warm = "", nil, 0
	}
	return st, nil
}

func getContexts(c *call) (any, error) { return c.visible().Contexts, nil }

func getUpstreams(c *call) (any, error) { return c.visible().Upstreams, nil }

func postUpstreamTest(c *call) (any, error) {
	target := c.query.Get("target")
	if target == "" {
		target = client.DefaultTestTarget
	}
	if _, port, err := net.SplitHostPort(target); err != nil || port == "" {
		return nil, badRequest("target", "%q is not host:port", target)
	}
	name := c.r.PathValue("name")
	c.audit("upstream tested", zap.String("upstream", name), zap.String("target", target))
	t, err := c.cfg.Backend.TestUpstream(c.ctx, name, target)
	if err != nil {
		return nil, err
	}
	t.Steps = orEmpty(t.Steps)
	return t, nil
}

func postUpstreamState(state string) func(*call) (any, error) {
	return func(c *call) (any, error) {
		name := c.r.PathValue("name")
		if err := c.cfg.Backend.SetUpstream(name, state); err != nil {
			return nil, err
		}
		c.audit("upstream switched", zap.String("upstream", name), zap.String("state", state))
		c.Publish(Event{Kind: "upstream_" + state, UID: int64(c.peer.UID), Message: "upstream " + name + " is " + state})
		return nil, nil
	}
}

func getHealth(c *call) (any, error) {
	h := healthOf(c.cfg.Backend.Health(c.ctx))
	if !c.trusted {
		h.Checks = []Check{} // names of upstreams are not for everyone
	}
	return h, nil
}

// healthOf judges: without a single check nothing is known, and so nothing is well.
func healthOf(checks []Check) Health {
	return Health{Healthy: len(checks) > 0 && !slices.ContainsFunc(checks, func(c Check) bool { return !c.OK }), Checks: orEmpty(checks)}
}

func getStats(c *call) (any, error) {
	stats := statsOf(c.visible(), c.now())
	switch format := c.query.Get("format"); format {
	case "", "json":
		return stats, nil
	case "csv":
		c.w.Header().Set("Content-Type", "text/csv; charset=utf-8; header=present")
		return statsCSV(stats), nil
	case "protobuf":
		return nil, &Error{Code: client.CodeUnsupported, Path: "format", Message: "protobuf is not supported yet: use json or csv"}
	default:
		return nil, badRequest("format", "%q is none of json, csv", format)
	}
}

func deleteFlow(c *call) (any, error) {
	text := c.r.PathValue("id")
	id, err := strconv.ParseUint(text, 10, 64)
	if err != nil || id == 0 {
		return nil, badRequest("id", "%q is not the number of a flow", text)
	}
	// Someone else's flow is answered like one that does not exist: its existence is no business of the caller.
	if !c.ownsFlow(id) || !c.cfg.Backend.KillFlow(id) {
		return nil, &Error{Code: client.CodeNotFound, Message: "there is no live flow " + strconv.FormatUint(id, 10)}
	}
	c.audit("flow killed", zap.Uint64("flow", id))
	c.Publish(Event{Kind: "flow_killed", UID: int64(c.peer.UID), Message: "flow " + strconv.FormatUint(id, 10)})
	return nil, nil
}

func (c *call) ownsFlow(id uint64) bool {
	if c.trusted {
		return true
	}
	own := c.leases.contextsOf(c.peer.UID)
	return slices.ContainsFunc(c.cfg.Backend.Flows(), func(f flow.Info) bool { return f.ID == id && own[f.Context] })
}

// visibleFlows returns the caller's flows, oldest first.
func (c *call) visibleFlows() []Flow {
	infos := c.cfg.Backend.Flows()
	own := c.leases.contextsOf(c.peer.UID)
	now := c.now()
	flows := make([]Flow, 0, len(infos))
	for i := range infos {
		if c.trusted || own[infos[i].Context] {
			flows = append(flows, FlowOf(&infos[i], now))
		}
	}
	slices.SortFunc(flows, func(a, b Flow) int { return cmp.Compare(a.ID, b.ID) })
	return flows
}

func explainQuery() []string {
	return []string{"context", "network", "dest", "uid", "gid", "pid", "exe", "cgroup", "protocol", "sni"}
}

func getExplain(c *call) (any, error) {
	r, err := parseExplain(c.query)
	if err != nil {
		return nil, err
	}
	if !c.trusted && !c.leases.contextsOf(c.peer.UID)[r.Context] {
		return nil, c.forbidden()
	}
	e, err := c.cfg.Backend.Explain(c.ctx, r)
	if err != nil {
		return nil, err
	}
	e.Conditions = orEmpty(e.Conditions)
	return e, nil
}

// parseExplain reads the query of /v1/explain.
func parseExplain(q url.Values) (ExplainRequest, error) {
	r := ExplainRequest{
		Context: q.Get("context"), Network: q.Get("network"), Dest: q.Get("dest"),
		Exe: q.Get("exe"), Cgroup: q.Get("cgroup"), Protocol: q.Get("protocol"), SNI: q.Get("sni"),
	}
	if r.Network != "tcp" && r.Network != "udp" {
		return r, badRequest("network", "%q is neither tcp nor udp", r.Network)
	}
	host, port, err := net.SplitHostPort(r.Dest)
	if err != nil || host == "" {
		return r, badRequest("dest", "%q is not HOST:PORT", r.Dest)
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return r, badRequest("dest", "%q is not a port from 1 to 65535", port)
	}
	if r.UID, err = parseID(q, "uid"); err != nil {
		return r, err
	}
	if r.GID, err = parseID(q, "gid"); err != nil {
		return r, err
	}
	if text := q.Get("pid"); text != "" {
		pid, err := strconv.ParseUint(text, 10, 31)
		if err != nil || pid == 0 {
			return r, badRequest("pid", "%q is not a process id", text)
		}
		r.PID = int(pid)
	}
	return r, nil
}

func parseID(q url.Values, key string) (*int64, error) {
	text := q.Get(key)
	if text == "" {
		return nil, nil
	}
	n, err := strconv.ParseUint(text, 10, 32)
	if err != nil {
		return nil, badRequest(key, "%q is not a number from 0 to 4294967295", text)
	}
	return new(int64(n)), nil
}

func postReload(c *call) (any, error) {
	if err := noBody(c); err != nil {
		return nil, err
	}
	err := c.cfg.Backend.Reload(c.ctx)
	e := Event{Kind: "reload", UID: int64(c.peer.UID), Message: "applied"}
	if err != nil {
		e.Message = "refused: " + toError(err).Error()
	}
	c.audit("reload", zap.Bool("applied", err == nil))
	c.Publish(e)
	return nil, err
}

func postShutdown(c *call) (any, error) {
	if err := noBody(c); err != nil {
		return nil, err
	}
	keep := c.query.Get("keep")
	if keep != "" && keep != "closed" {
		return nil, badRequest("keep", "%q is not closed", keep)
	}
	c.audit("shutdown", zap.String("keep", keep))
	c.Publish(Event{Kind: "stopping", UID: int64(c.peer.UID), Message: "asked to stop"})
	if keep != "" {
		c.cfg.Backend.StopClosed()
		return nil, nil
	}
	c.cfg.Backend.Stop()
	return nil, nil
}

func noBody(c *call) error {
	if strings.TrimSpace(string(c.body)) != "" {
		return badRequest("", "this call takes no body")
	}
	return nil
}

// FlowOf converts a flow to the shape of the API. now is when the duration of a live flow ends.
func FlowOf(f *flow.Info, now time.Time) Flow {
	dst := f.Orig
	if f.Dst.IP.IsValid() {
		dst = f.Dst.AddrPort()
	}
	end := now
	if !f.End.IsZero() {
		end = f.End
	}
	out := Flow{
		ID: f.ID, Context: f.Context, Network: f.Network.String(),
		Src: addrString(f.Src), Dst: addrString(dst), Host: f.Dst.Host, HostSource: f.HostSource.String(),
		Protocol: f.Protocol, Confidence: f.Confidence.String(), App: appOf(f.App),
		Rule: f.Rule, Upstream: f.Upstream, State: f.State, Handshake: f.Handshake,
		Start: f.Start.UTC(), DurationSeconds: max(0, end.Sub(f.Start).Seconds()),
		BytesUp: f.BytesUp, BytesDown: f.BytesDown, PacketsUp: f.PacketsUp, PacketsDown: f.PacketsDown,
		ConnectSeconds: f.Connect.Seconds(), Error: f.Err, Path: f.Path, PathReason: f.PathReason,
	}
	return out
}

func appOf(a flow.App) App {
	if a.Method == "" {
		return App{UID: -1, GID: -1}
	}
	return App{PID: a.PID, UID: int64(a.UID), GID: int64(a.GID), Exe: a.Exe, Cgroup: a.Cgroup, Method: a.Method}
}
