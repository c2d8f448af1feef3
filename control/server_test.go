// SPDX-License-Identifier: GPL-3.0-or-later

package control_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/dns"
	"go.uber.org/goleak"

	"github.com/mutex-proxy/mutex/config"
	"github.com/mutex-proxy/mutex/control"
	"github.com/mutex-proxy/mutex/control/client"
	"github.com/mutex-proxy/mutex/control/controltest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// daemon is a Server over a fake backend, and a client for it.
type daemon struct {
	*controltest.Fake
	server *control.Server
	client *client.Client
	socket string
}

// start serves on a real socket until the test ends.
func start(t *testing.T, options ...func(*control.Config)) *daemon {
	t.Helper()
	d := &daemon{Fake: controltest.New(), socket: filepath.Join(t.TempDir(), "run", "m.sock")}
	cfg := control.Config{UserLeases: 16, Socket: d.socket, Backend: d.Fake, Now: controltest.Epoch}
	for _, o := range options {
		o(&cfg)
	}
	d.server = control.NewServer(cfg)
	if err := d.server.Start(); err != nil {
		t.Fatal(err)
	}
	d.client = client.New(d.socket)
	t.Cleanup(func() {
		d.client.Close()
		if err := d.server.Close(); err != nil {
			t.Error(err)
		}
		if _, err := os.Lstat(d.socket); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the socket is left behind: %v", err)
		}
	})
	return d
}

// do sends one request and returns the status and the body.
func (d *daemon) do(t *testing.T, method, path, body string) (int, string) {
	t.Helper()
	hc := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", d.socket)
	}}}
	req, err := http.NewRequestWithContext(t.Context(), method, "http://mprox"+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := hc.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(data)
}

func TestUpstreamCalls(t *testing.T) {
	d := start(t)
	for call, want := range map[string]int{
		"/v1/upstreams/paris/test": http.StatusOK, "/v1/upstreams/paris/test?target=192.0.2.1:80": http.StatusOK,
		"/v1/upstreams/none/test": http.StatusNotFound, "/v1/upstreams/none/drain": http.StatusNotFound, "/v1/upstreams/paris/other": http.StatusNotFound,
		"/v1/upstreams/paris/test?target=a": http.StatusBadRequest, "/v1/upstreams/paris/test?to=a:1": http.StatusBadRequest,
		"/v1/upstreams/paris/disable": http.StatusNoContent,
	} {
		if status, body := d.do(t, "POST", call, ""); status != want {
			t.Errorf("%s: %d %s, want %d", call, status, body, want)
		}
	}
	if st := d.Status(t.Context()).Upstreams[1].State; st != "disabled" {
		t.Errorf("paris is %s", st)
	}
}

func TestAnswersGolden(t *testing.T) {
	d := start(t)
	for path, file := range map[string]string{
		"/v1/status":           "status.json",
		"/v1/flows":            "flows.json",
		"/v1/contexts":         "contexts.json",
		"/v1/upstreams":        "upstreams.json",
		"/v1/health":           "health.json",
		"/v1/stats":            "stats.json",
		"/v1/stats?format=csv": "stats.csv",
		"/v1/explain?network=tcp&dest=example.com:443":       "explain.json",
		"/v1/explain?network=tcp&dest=example.com:443&uid=0": "explain.json",
	} {
		t.Run(path, func(t *testing.T) {
			status, got := d.do(t, "GET", path, "")
			if status != http.StatusOK {
				t.Fatalf("status %d: %s", status, got)
			}
			golden(t, file, got)
		})
	}
}

// golden compares with testdata/golden; MPROX_UPDATE_GOLDEN=1 writes it anew. JSON is indented, so that a difference is a line.
func golden(t *testing.T, file, got string) {
	t.Helper()
	if strings.HasSuffix(file, ".json") {
		var v any
		if err := json.Unmarshal([]byte(got), &v); err != nil {
			t.Fatal(err)
		}
		data, err := json.MarshalIndent(v, "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		got = string(data) + "\n"
	}
	path := filepath.Join("testdata", "golden", file)
	if os.Getenv("MPROX_UPDATE_GOLDEN") != "" {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("differs from %s (-want +got):\n%s", path, diff)
	}
}

func TestEmptyListsAreNotNull(t *testing.T) {
	d := start(t)
	d.StatusValue = control.Status{}
	d.FlowList, d.Checks = nil, nil
	d.Explained = control.Explanation{}
	for path, want := range map[string]string{
		"/v1/flows":                            "[]",
		"/v1/contexts":                         "[]",
		"/v1/upstreams":                        "[]",
		"/v1/status":                           `"upstreams":[]`,
		"/v1/stats":                            `"contexts":[]`,
		"/v1/health":                           `"checks":[]`,
		"/v1/explain?network=udp&dest=[::1]:5": `"conditions":[]`,
	} {
		if _, got := d.do(t, "GET", path, ""); !strings.Contains(got, want) || strings.Contains(got, "null") {
			t.Errorf("%s: got %s, want %s and no null", path, got, want)
		}
	}
}

func TestErrors(t *testing.T) {
	d := start(t)
	d.ReloadErr = config.Errors{
		{File: "c.json", Line: 3, Column: 9, Path: "$.pools.eu", Msg: "unknown member", Hint: `did you mean "paris"?`},
		{File: "c.json", Line: 5, Column: 1, Path: "$.x", Msg: "unknown key"},
	}
	for _, tc := range []struct {
		method, path, body string
		status             int
		code, errPath      string
	}{
		{"GET", "/", "", 404, client.CodeNotFound, ""},
		{"GET", "/v1/nonsense", "", 404, client.CodeNotFound, ""},
		{"POST", "/v1/status", "", 405, client.CodeMethod, ""},
		{"GET", "/v1/reload", "", 405, client.CodeMethod, ""},
		{"GET", "/v1/status?verbose=1", "", 400, client.CodeBadRequest, "verbose"},
		{"GET", "/v1/flows?watch=1&watch=1", "", 400, client.CodeBadRequest, "watch"},
		{"GET", "/v1/flows?watch=yes", "", 400, client.CodeBadRequest, "watch"},
		{"GET", "/v1/flows?%zz", "", 400, client.CodeBadRequest, ""},
		{"GET", "/v1/stats?format=xml", "", 400, client.CodeBadRequest, "format"},
		{"GET", "/v1/stats?format=protobuf", "", 501, client.CodeUnsupported, "format"},
		{"DELETE", "/v1/flows/99", "", 404, client.CodeNotFound, ""},
		{"DELETE", "/v1/flows/0", "", 400, client.CodeBadRequest, "id"},
		{"DELETE", "/v1/flows/x", "", 400, client.CodeBadRequest, "id"},
		{"GET", "/v1/explain?network=icmp&dest=h:1", "", 400, client.CodeBadRequest, "network"},
		{"GET", "/v1/explain?network=tcp&dest=h", "", 400, client.CodeBadRequest, "dest"},
		{"GET", "/v1/explain?network=tcp&dest=:80", "", 400, client.CodeBadRequest, "dest"},
		{"GET", "/v1/explain?network=tcp&dest=h:70000", "", 400, client.CodeBadRequest, "dest"},
		{"GET", "/v1/explain?network=tcp&dest=h:1&uid=-1", "", 400, client.CodeBadRequest, "uid"},
		{"GET", "/v1/explain?network=tcp&dest=h:1&pid=x", "", 400, client.CodeBadRequest, "pid"},
		{"GET", "/v1/dns/query", "", 400, client.CodeBadRequest, "name"},
		{"GET", "/v1/dns/query?name=a..b", "", 400, client.CodeBadRequest, "name"},
		{"GET", "/v1/dns/query?name=a.example&type=QQ", "", 400, client.CodeBadRequest, "type"},
		{"POST", "/v1/reload", "{}", 400, client.CodeBadRequest, ""},
		{"POST", "/v1/reload", "", 422, client.CodeConfigInvalid, "$.pools.eu"},
		{"POST", "/v1/leases", "", 400, client.CodeBadRequest, "$"},
		{"POST", "/v1/leases", "[]", 400, client.CodeBadRequest, "$."},
		{"POST", "/v1/leases", "{}", 400, client.CodeBadRequest, "$.proxies"},
		{"POST", "/v1/leases", `{"proxies":["direct://"],"x":1}`, 400, client.CodeBadRequest, "$"},
		{"POST", "/v1/leases", `{"proxies":["direct://"]} {}`, 400, client.CodeBadRequest, "$"},
		{"POST", "/v1/leases", `{"proxies":[""]}`, 400, client.CodeBadRequest, "$.proxies[0]"},
		{"POST", "/v1/leases", `{"proxies":["direct://"],"name":"a b"}`, 400, client.CodeBadRequest, "$.name"},
		{"POST", "/v1/leases", `{"proxies":["direct://"],"context":"c"}`, 400, client.CodeBadRequest, "$.context"},
		{"POST", "/v1/leases", `{"proxies":["` + strings.Repeat("x", 70<<10) + `"]}`, 413, client.CodeTooLarge, ""},
	} {
		t.Run(tc.method+" "+tc.path[:min(len(tc.path), 40)]+" "+tc.body[:min(len(tc.body), 40)], func(t *testing.T) {
			status, body := d.do(t, tc.method, tc.path, tc.body)
			var got struct {
				Error map[string]string `json:"error"`
			}
			if err := json.Unmarshal([]byte(body), &got); err != nil {
				t.Fatalf("%s: %v", body, err)
			}
			if status != tc.status || got.Error["code"] != tc.code || got.Error["path"] != tc.errPath || got.Error["message"] == "" || len(got.Error) != 3 {
				t.Errorf("got %d %s, want %d %s with path %q", status, body, tc.status, tc.code, tc.errPath)
			}
		})
	}
}

func TestReloadShowsEveryConfigurationError(t *testing.T) {
	d := start(t)
	d.ReloadErr = config.Errors{{File: "c.json", Line: 3, Column: 9, Path: "$.a", Msg: "one"}, {File: "c.json", Line: 4, Column: 2, Path: "$.b", Msg: "two"}}
	err := d.client.Reload(t.Context())
	if client.Code(err) != client.CodeConfigInvalid || !strings.Contains(err.Error(), "c.json:3:9") || !strings.Contains(err.Error(), "two") {
		t.Errorf("got %v", err)
	}
	d.ReloadErr = fmt.Errorf("apply: %w", &control.Error{Code: client.CodeConflict, Message: "table 19760 is taken"})
	if err := d.client.Reload(t.Context()); client.Code(err) != client.CodeConflict {
		t.Errorf("got %v, want a conflict", err)
	}
	d.ReloadErr = nil
	if err := d.client.Reload(t.Context()); err != nil || d.Reloads() != 3 {
		t.Errorf("got %v after %d reloads", err, d.Reloads())
	}
}

func TestKillFlow(t *testing.T) {
	d := start(t)
	if err := d.client.KillFlow(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	if got := d.Killed(); !slices.Equal(got, []uint64{1}) {
		t.Errorf("killed %v", got)
	}
}

func TestDNSQuery(t *testing.T) {
	d := start(t)
	d.ExchangeFunc = func(query []byte) ([]byte, error) {
		var m dns.Msg
		if err := m.Unpack(query); err != nil {
			return nil, err
		}
		rr, err := dns.NewRR(m.Question[0].Name + " 1 IN AAAA fd4d:5554:4558::5")
		if err != nil {
			return nil, err
		}
		r := new(dns.Msg).SetReply(&m)
		r.Answer = []dns.RR{rr}
		return r.Pack()
	}
	got, err := d.client.QueryDNS(t.Context(), client.DNSRequest{Name: "example.com", Type: "aaaa"})
	if err != nil {
		t.Fatal(err)
	}
	got.DurationSeconds = 0
	want := client.DNSAnswer{
		Name: "example.com.", Type: "AAAA", Rcode: "NOERROR",
		Answers: []client.DNSRecord{{Name: "example.com.", Type: "AAAA", TTL: 1, Data: "fd4d:5554:4558::5"}},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	d.ExchangeFunc = nil
	if got, err := d.client.QueryDNS(t.Context(), client.DNSRequest{Name: "example.com"}); err != nil || got.Rcode != "SERVFAIL" {
		t.Errorf("got %v %v, want SERVFAIL", got, err)
	}
	d.ExchangeFunc = func([]byte) ([]byte, error) { return []byte("?"), nil }
	if _, err := d.client.QueryDNS(t.Context(), client.DNSRequest{Name: "example.com"}); client.Code(err) != client.CodeInternal {
		t.Errorf("got %v for an answer that is not DNS", err)
	}
}

func TestWatchFlows(t *testing.T) {
	d := start(t)
	closed := d.FlowList[1]
	closed.State, closed.End = "closed", controltest.Epoch()
	d.Changes = append(d.Changes, closed)
	var got []string
	for f, err := range d.client.WatchFlows(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, fmt.Sprint(f.ID, " ", f.State))
		if len(got) == 3 {
			break
		}
	}
	if want := []string{"1 established", "2 closing", "1 closed"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestEventsAndClose(t *testing.T) {
	d := start(t)
	// The stream has begun when its head has arrived; only then is an event sure to be seen.
	conn, err := new(net.Dialer).DialContext(t.Context(), "unix", d.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprint(conn, "GET /v1/events HTTP/1.1\r\nHost: m\r\n\r\n")
	lines := bufio.NewScanner(conn)
	next := func(prefix string) string {
		for lines.Scan() {
			if rest, ok := strings.CutPrefix(lines.Text(), prefix); ok {
				return rest
			}
		}
		t.Fatalf("no line %q: %v", prefix, lines.Err())
		return ""
	}
	next(":")
	d.server.Publish(control.Event{Kind: "upstream_down", UID: -1, Message: "paris"})
	var e control.Event
	if err := json.Unmarshal([]byte(next("data: ")), &e); err != nil {
		t.Fatal(err)
	}
	if want := (control.Event{Time: controltest.Epoch(), Kind: "upstream_down", UID: -1, Message: "paris"}); e != want {
		t.Errorf("got %+v, want %+v", e, want)
	}
	if err := d.server.Close(); err != nil {
		t.Fatal(err)
	}
	for lines.Scan() { // ends: the server's end is the stream's
	}
}

func TestSlowEventReaderDoesNotBlock(t *testing.T) {
	d := start(t)
	conn, err := new(net.Dialer).DialContext(t.Context(), "unix", d.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprint(conn, "GET /v1/events HTTP/1.1\r\nHost: m\r\n\r\n")
	if _, err := conn.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	for range 10_000 { // returns, though nobody reads
		d.server.Publish(control.Event{Kind: "x", Message: strings.Repeat("y", 1000)})
	}
}

func TestShutdown(t *testing.T) {
	d := start(t)
	closed := make(chan error, 1)
	d.OnStop = func() { go func() { closed <- d.server.Close() }() }
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := d.client.Shutdown(ctx); err != nil {
		t.Fatal(err)
	}
	if err := <-closed; err != nil {
		t.Fatal(err)
	}
	if _, err := d.client.Status(ctx); !errors.Is(err, client.ErrUnreachable) {
		t.Errorf("got %v, want ErrUnreachable", err)
	}
}
