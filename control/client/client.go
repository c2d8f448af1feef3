// SPDX-License-Identifier: GPL-3.0-or-later

// Package client talks to a running mprox daemon over its control socket: HTTP/1.1 and JSON on a unix socket, a method per call.
//
// It holds the types of the API, which the daemon uses too, and no server code. The commands of mprox are built on it, and so may be
// anything else: what a caller may do is decided by its uid and groups alone (SO_PEERCRED, SO_PEERGROUPS), there is nothing to log in with.
package client

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// DefaultSocket is where a daemon listens unless its configuration or --socket says otherwise.
const DefaultSocket = "/run/mprox/mprox.sock"

const (
	// maxAnswer bounds what an answer may take: every flow of 160 full tables (65,536 flows of about 700 bytes each) is far from real.
	maxAnswer = 256 << 20
	// maxEvent bounds one line of a stream; a flow is below 10 KiB.
	maxEvent = 1 << 20
	// answerTimeout bounds the wait for the head of an answer when the caller's context has no deadline. A reload may re-resolve upstreams.
	answerTimeout = 60 * time.Second
)

// Client talks to one daemon. It is safe for concurrent use. Close it when done.
type Client struct {
	socket    string
	transport *http.Transport
	http      *http.Client
}

// New returns a Client for the daemon that listens on the unix socket. It does not connect; "" is DefaultSocket.
func New(socket string) *Client {
	if socket == "" {
		socket = DefaultSocket
	}
	c := &Client{socket: socket}
	c.transport = &http.Transport{
		DialContext:           func(ctx context.Context, _, _ string) (net.Conn, error) { return c.dial(ctx) },
		ResponseHeaderTimeout: answerTimeout,
		MaxIdleConns:          2,
		IdleConnTimeout:       30 * time.Second,
		DisableCompression:    true,
	}
	c.http = &http.Client{Transport: c.transport}
	return c
}

// Socket returns the path given to New.
func (c *Client) Socket() string { return c.socket }

// Close drops idle connections. Calls that are under way, and leases, go on.
func (c *Client) Close() { c.transport.CloseIdleConnections() }

func (c *Client) dial(ctx context.Context) (net.Conn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "unix", c.socket) //nolint:forbidigo // a unix socket: nothing leaves, nothing to mark
	if err != nil {
		return nil, dialError(c.socket, err)
	}
	return conn, nil
}

// Status returns what the daemon says about itself.
func (c *Client) Status(ctx context.Context) (Status, error) {
	return get[Status](ctx, c, "/v1/status", nil)
}

// Health returns the daemon's own judgement of itself.
func (c *Client) Health(ctx context.Context) (Health, error) {
	return get[Health](ctx, c, "/v1/health", nil)
}

// Flows returns the live flows the caller may see, oldest first.
func (c *Client) Flows(ctx context.Context) ([]Flow, error) {
	return get[[]Flow](ctx, c, "/v1/flows", nil)
}

// Apps returns the processes behind the live flows that the caller may see, the busiest first.
func (c *Client) Apps(ctx context.Context) ([]AppUsage, error) {
	return get[[]AppUsage](ctx, c, "/v1/apps", nil)
}

// WatchFlows yields each live flow once, and then each flow when it starts and when it ends (its state is then closed). A consumer that is
// too slow loses some of them, never memory. It ends with ctx, when the daemon stops, or with the one error it yields.
func (c *Client) WatchFlows(ctx context.Context) iter.Seq2[Flow, error] {
	return stream[Flow](ctx, c, "/v1/flows", url.Values{"watch": {"1"}})
}

// KillFlow ends one flow with a reset.
func (c *Client) KillFlow(ctx context.Context, id uint64) error {
	return c.send(ctx, http.MethodDelete, "/v1/flows/"+strconv.FormatUint(id, 10), nil)
}

// Contexts returns the contexts the caller may see.
func (c *Client) Contexts(ctx context.Context) ([]ContextStatus, error) {
	return get[[]ContextStatus](ctx, c, "/v1/contexts", nil)
}

// AddContext makes a context that lives until it is removed or the daemon ends, and returns it.
func (c *Client) AddContext(ctx context.Context, r ContextRequest) (out ContextStatus, err error) {
	resp, err := c.request(ctx, http.MethodPost, "/v1/contexts", nil, r)
	if err != nil {
		return out, err
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxAnswer)).Decode(&out); err != nil {
		return out, fmt.Errorf("decode the new context: %w", err)
	}
	return out, nil
}

// RemoveContext ends a context and its flows. One of the configuration file stays away until the daemon ends or it is added again.
func (c *Client) RemoveContext(ctx context.Context, name string) error {
	return c.send(ctx, http.MethodDelete, contextPath(name), nil)
}

// EnableContext lets a context capture again. One whose mode is disabled gets process if it selects anybody, else global.
func (c *Client) EnableContext(ctx context.Context, name string) error {
	return c.send(ctx, http.MethodPost, contextPath(name)+"/enable", nil)
}

// DisableContext ends a context's flows and lets those it has captured go as if it were not there.
func (c *Client) DisableContext(ctx context.Context, name string) error {
	return c.send(ctx, http.MethodPost, contextPath(name)+"/disable", nil)
}

// Attach captures what already runs, from its next connection on; with the context's existing: reset its old connections are ended.
func (c *Client) Attach(ctx context.Context, name string, s Selector) error {
	return c.send(ctx, http.MethodPost, contextPath(name)+"/attach", s)
}

// Detach takes a selector, as it was given to Attach or stands in the configuration, out of a context.
func (c *Client) Detach(ctx context.Context, name string, s Selector) error {
	return c.send(ctx, http.MethodPost, contextPath(name)+"/detach", s)
}

// Process says which context captures a process, and why.
func (c *Client) Process(ctx context.Context, pid int) (Capture, error) {
	return get[Capture](ctx, c, "/v1/processes/"+strconv.Itoa(pid), nil)
}

// contextPath keeps a name that is none from becoming another path.
func contextPath(name string) string { return "/v1/contexts/" + url.PathEscape(name) }

// Upstreams returns the upstreams and what is known of them.
func (c *Client) Upstreams(ctx context.Context) ([]UpstreamStatus, error) {
	return get[[]UpstreamStatus](ctx, c, "/v1/upstreams", nil)
}

// DefaultTestTarget is where a test of an upstream connects to unless told: a name that is reserved (RFC 2606) and exists.
const DefaultTestTarget = "example.com:443"

// TestUpstream tries an upstream, or each member of a pool, step by step, with a connection to target (host:port; "" = DefaultTestTarget).
func (c *Client) TestUpstream(ctx context.Context, name, target string) (out UpstreamTest, err error) {
	if target == "" {
		target = DefaultTestTarget
	}
	resp, err := c.request(ctx, http.MethodPost, "/v1/upstreams/"+name+"/test", url.Values{"target": {target}}, nil)
	if err != nil {
		return out, err
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxAnswer)).Decode(&out); err != nil {
		return out, fmt.Errorf("decode answer of the test: %w", err)
	}
	return out, nil
}

// EnableUpstream lets an upstream or a pool take flows again.
func (c *Client) EnableUpstream(ctx context.Context, name string) error {
	return c.send(ctx, http.MethodPost, "/v1/upstreams/"+name+"/enable", nil)
}

// DisableUpstream lets an upstream or a pool take nothing new, and ends the flows that go through it.
func (c *Client) DisableUpstream(ctx context.Context, name string) error {
	return c.send(ctx, http.MethodPost, "/v1/upstreams/"+name+"/disable", nil)
}

// DrainUpstream lets an upstream or a pool take nothing new, and finish the flows that go through it.
func (c *Client) DrainUpstream(ctx context.Context, name string) error {
	return c.send(ctx, http.MethodPost, "/v1/upstreams/"+name+"/drain", nil)
}

// Explain says what would happen to a flow, rule by rule.
func (c *Client) Explain(ctx context.Context, r ExplainRequest) (Explanation, error) {
	q := url.Values{"network": {r.Network}, "dest": {r.Dest}}
	set := func(key, value string) {
		if value != "" {
			q.Set(key, value)
		}
	}
	set("context", r.Context)
	set("exe", r.Exe)
	set("cgroup", r.Cgroup)
	set("protocol", r.Protocol)
	set("sni", r.SNI)
	if r.UID != nil {
		q.Set("uid", strconv.FormatInt(*r.UID, 10))
	}
	if r.GID != nil {
		q.Set("gid", strconv.FormatInt(*r.GID, 10))
	}
	if r.PID != 0 {
		q.Set("pid", strconv.Itoa(r.PID))
	}
	return get[Explanation](ctx, c, "/v1/explain", q)
}

// Stats returns the counters of the moment.
func (c *Client) Stats(ctx context.Context) (Stats, error) {
	return get[Stats](ctx, c, "/v1/stats", url.Values{"format": {"json"}})
}

// StatsCSV returns the same counters as rows of scope,name,metric,value under one header line.
func (c *Client) StatsCSV(ctx context.Context) ([]byte, error) {
	return c.raw(ctx, "/v1/stats", url.Values{"format": {"csv"}})
}

// QueryDNS asks the DNS module of a context, as a process captured by it would.
func (c *Client) QueryDNS(ctx context.Context, r DNSRequest) (DNSAnswer, error) {
	return get[DNSAnswer](ctx, c, "/v1/dns/query", url.Values{"context": {r.Context}, "name": {r.Name}, "type": {r.Type}})
}

// Reload makes the daemon read its configuration again. When it returns without error the new one is in force.
func (c *Client) Reload(ctx context.Context) error {
	return c.send(ctx, http.MethodPost, "/v1/reload", nil)
}

// Events yields what happens to the daemon from now on, until ctx ends, the daemon stops, or with the one error it yields.
func (c *Client) Events(ctx context.Context) iter.Seq2[Event, error] {
	return stream[Event](ctx, c, "/v1/events", nil)
}

// OpenAPI returns the description of the API that the daemon serves, in YAML.
func (c *Client) OpenAPI(ctx context.Context) ([]byte, error) {
	return c.raw(ctx, "/v1/openapi.yaml", nil)
}

// request sends one request. The caller closes the body of the answer, which is one of the 200s.
func (c *Client) request(ctx context.Context, method, path string, query url.Values, in any) (*http.Response, error) {
	var body io.Reader
	if in != nil {
		data, err := json.Marshal(in)
		if err != nil {
			return nil, fmt.Errorf("encode request: %w", err)
		}
		body = bytes.NewReader(data)
	}
	// The host is a placeholder: dial ignores it.
	u := url.URL{Scheme: "http", Host: "mprox", RawQuery: query.Encode()}
	if plain, err := url.PathUnescape(path); err == nil {
		u.Path, u.RawPath = plain, path
	} else {
		u.Path = path
	}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), body)
	if err != nil {
		return nil, err
	}
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.http.Do(req)
	if err != nil {
		// url.Error would add the placeholder to the message.
		if ue, ok := errors.AsType[*url.Error](err); ok {
			err = ue.Err
		}
		if errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE) {
			err = fmt.Errorf("%w at %s: it closed the connection", ErrUnreachable, c.socket)
		}
		return nil, err
	}
	if resp.StatusCode/100 != 2 {
		defer resp.Body.Close()
		return nil, answerError(resp)
	}
	return resp, nil
}

// answerError reads {"error":{…}}. An answer of another shape came from something that is not a daemon.
func answerError(resp *http.Response) error {
	var body struct {
		Error *Error `json:"error"`
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxEvent)).Decode(&body); err != nil || body.Error == nil {
		return &Error{Code: CodeInternal, Message: "unexpected answer: " + resp.Status}
	}
	return body.Error
}

func (c *Client) send(ctx context.Context, method, path string, in any) error {
	resp, err := c.request(ctx, method, path, nil, in)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	_, err = io.Copy(io.Discard, io.LimitReader(resp.Body, maxEvent))
	return err
}

func (c *Client) raw(ctx context.Context, path string, query url.Values) ([]byte, error) {
	resp, err := c.request(ctx, http.MethodGet, path, query, nil)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	return io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
}

func get[T any](ctx context.Context, c *Client, path string, query url.Values) (out T, err error) {
	resp, err := c.request(ctx, http.MethodGet, path, query, nil)
	if err != nil {
		return out, err
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxAnswer)).Decode(&out); err != nil {
		return out, fmt.Errorf("decode answer of %s: %w", path, err)
	}
	return out, nil
}

// stream yields the events of a stream of server-sent events.
func stream[T any](ctx context.Context, c *Client, path string, query url.Values) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		var zero T
		resp, err := c.request(ctx, http.MethodGet, path, query, nil)
		if err != nil {
			yield(zero, err)
			return
		}
		defer resp.Body.Close()
		for v, err := range events[T](resp.Body) {
			if err != nil {
				// A daemon that stops ends the stream in order; the caller's own end is no error either.
				if ctx.Err() == nil {
					yield(zero, fmt.Errorf("read %s: %w", path, err))
				}
				return
			}
			if !yield(v, nil) {
				return
			}
		}
	}
}

// events decodes the data lines of r. Comments (lines that begin with a colon) keep a stream alive and are skipped.
func events[T any](r io.Reader) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		var zero T
		lines := bufio.NewScanner(r)
		lines.Buffer(make([]byte, 0, 4096), maxEvent)
		for lines.Scan() {
			data, ok := strings.CutPrefix(lines.Text(), "data:")
			if !ok {
				continue
			}
			var v T
			if err := json.Unmarshal([]byte(data), &v); err != nil {
				yield(zero, fmt.Errorf("decode event: %w", err))
				return
			}
			if !yield(v, nil) {
				return
			}
		}
		if err := lines.Err(); err != nil {
			yield(zero, err)
		}
	}
}
