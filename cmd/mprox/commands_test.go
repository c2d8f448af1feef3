// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"bufio"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/mutex-proxy/mutex/dialers/server"
)

// answerA answers any query with one address.
func answerA(query []byte) ([]byte, error) {
	var m dns.Msg
	if err := m.Unpack(query); err != nil {
		return nil, err
	}
	r := new(dns.Msg).SetReply(&m)
	rr, err := dns.NewRR(m.Question[0].Name + " 1 IN A 198.18.0.5")
	if err != nil {
		return nil, err
	}
	r.Answer = []dns.RR{rr}
	return r.Pack()
}

// deadSocket leaves a socket as kill -9 does.
func deadSocket(t *testing.T, path string) string {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	return path
}

func writeFile(t *testing.T, path, data string) string {
	t.Helper()
	if err := os.WriteFile(path, []byte(data), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestVersion(t *testing.T) {
	if r := mprox(t, "version"); r.code != 0 || r.stdout != fmt.Sprintf("mprox %s linux/%s %s\n", version, runtime.GOARCH, runtime.Version()) {
		t.Errorf("got %+v", r)
	}
	var v map[string]string
	if r := mprox(t, "version", "-o", "json"); json.Unmarshal([]byte(r.stdout), &v) != nil || v["version"] != version || len(v) != 5 {
		t.Errorf("got %+v", r)
	}
}

func TestCompletionAndMan(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish"} {
		if r := mprox(t, "completion", shell); r.code != 0 || !strings.Contains(r.stdout, "mprox") {
			t.Errorf("%s: %d %s", shell, r.code, r.stderr)
		}
	}
	dir := filepath.Join(t.TempDir(), "man8")
	if r := mprox(t, "man", dir); r.code != 0 {
		t.Fatalf("got %+v", r)
	}
	pages, err := filepath.Glob(filepath.Join(dir, "mprox*.8"))
	if err != nil || len(pages) < 20 {
		t.Errorf("%d pages, %v", len(pages), err)
	}
}

const good = `{ "upstreams": { "p": { "url": "socks5h://203.0.113.1:1080" } },
  "contexts": { "default": { "mode": "global", "default": "p", "rules": [ { "port": 25, "upstream": "reject" } ], "dns": { "servers": "tcp://203.0.113.53" } } } }`

func TestCheck(t *testing.T) {
	path := writeFile(t, filepath.Join(t.TempDir(), "c.json"), good)
	if r := mprox(t, "check", path); r.code != 0 || r.stdout != path+": ok\n" || r.stderr != "" {
		t.Errorf("got %+v", r)
	}
	if r := mprox(t, "check", "-c", path, "-o", "json"); r.code != 0 || !strings.Contains(r.stdout, `"valid": true`) || !strings.Contains(r.stdout, `"errors": []`) {
		t.Errorf("got %+v", r)
	}
	// A mistake of config's, of dialers' and of routing's, at once.
	writeFile(t, path, `{ "upstreams": { "p": { "url": "gopher://203.0.113.1:1080" }, "q": { "url": "direct://" } },
  "contexts": { "default": { "mode": "globl", "default": "q", "dns": { "servers": "tcp://203.0.113.53" } } } }`)
	r := mprox(t, "check", path)
	if r.code != exitConfig || r.stdout != "" || !strings.Contains(r.stderr, path+":1:32: $.upstreams.p.url: ") || !strings.Contains(r.stderr, path+":2:38: $.contexts.default.mode: ") {
		t.Errorf("got %+v", r)
	}
	r = mprox(t, "check", path, "-o", "json")
	var got struct {
		Valid  bool
		Errors []finding
	}
	if err := json.Unmarshal([]byte(r.stdout), &got); err != nil || r.code != exitConfig || got.Valid || len(got.Errors) != strings.Count(mprox(t, "check", path).stderr, "\n") {
		t.Errorf("got %+v %v", r, err)
	}
	if r := mprox(t, "check", path, "-o", "csv"); r.code != exitConfig || !strings.HasPrefix(r.stdout, "file,line,column,path,message,hint\n") {
		t.Errorf("got %+v", r)
	}
}

func TestExplainACandidate(t *testing.T) {
	path := writeFile(t, filepath.Join(t.TempDir(), "c.json"), good)
	var got struct{ Upstream, Rule string }
	for port, want := range map[string]string{"443": "p default", "25": "reject rules[0]"} {
		r := mprox(t, "explain", "tcp", "192.0.2.1:"+port, "-c", path, "-o", "json")
		if err := json.Unmarshal([]byte(r.stdout), &got); err != nil || got.Upstream+" "+got.Rule != want {
			t.Errorf("port %s: %+v, want %s", port, r, want)
		}
	}
	if r := mprox(t, "explain", "tcp", "192.0.2.1:1", "-c", path, "--context", "none"); r.code != exitFailed || strings.Count(r.stderr, "\n") != 1 {
		t.Errorf("got %+v", r)
	}
	if r := mprox(t, "explain", "tcp", "192.0.2.1", "-c", path); r.code != exitUsage {
		t.Errorf("got %+v", r)
	}
}

// TestExplainChoosesTheContext describes processes to a configuration with several contexts: it is the one that would capture them.
func TestExplainChoosesTheContext(t *testing.T) {
	const upstreams = `"upstreams": { "p": { "url": "socks5://192.0.2.1" }, "q": { "url": "socks5://192.0.2.2" } }`
	global := writeFile(t, filepath.Join(t.TempDir(), "g.json"), `{ `+upstreams+`, "contexts": {
		"all": { "mode": "global", "default": "p", "exclude": { "uid": 7 } },
		"work": { "mode": "process", "default": "q", "select": [ { "uid": 65534 }, { "exe": "/usr/bin/curl" }, { "cgroup": "/x.slice" } ] } } }`)
	named := writeFile(t, filepath.Join(t.TempDir(), "d.json"), `{ `+upstreams+`, "contexts": {
		"default": { "mode": "process", "default": "p", "select": { "uid": 1 } },
		"work": { "mode": "process", "default": "q", "select": { "uid": 65534 } } } }`)
	for _, tt := range []struct{ file, flags, want string }{
		{global, "", "p default; all"},
		{global, "--uid 65534", "q default; work"},
		{global, "--uid 0", "p default; all"},
		{global, "--gid 65534", "p default; all"},
		{global, "--exe /usr/bin/curl", "q default; work"},
		{global, "--cgroup /x.slice/y", "q default; work"},
		{global, "--uid 7", "direct not captured; "},
		{global, "--uid 65534 --context all", "p default; "},
		{named, "", "p default; default"},
		{named, "--uid 65534", "q default; work"},
		{named, "--uid 2", "direct not captured; "},
	} {
		var got struct {
			Upstream, Rule string
			Conditions     []struct {
				Rule   string
				Result bool
			}
		}
		r := mprox(t, append([]string{"explain", "tcp", "192.0.2.9:443", "-c", tt.file, "-o", "json"}, strings.Fields(tt.flags)...)...)
		err := json.Unmarshal([]byte(r.stdout), &got)
		captor := ""
		for _, c := range got.Conditions {
			if name, ok := strings.CutPrefix(c.Rule, "context "); ok && c.Result {
				captor = name
				break
			}
		}
		if is := fmt.Sprintf("%s %s; %s", got.Upstream, got.Rule, captor); err != nil || is != tt.want {
			t.Errorf("%s: %s, want %s: %+v", tt.flags, is, tt.want, r)
		}
	}
	if r := mprox(t, "explain", "tcp", "192.0.2.9:443", "-c", named, "--uid", "2"); !strings.Contains(r.stdout, "goes directly: not captured\n") {
		t.Errorf("got %+v", r)
	}
}

func TestFmt(t *testing.T) {
	dir := t.TempDir()
	path := writeFile(t, filepath.Join(dir, "c.json"), good)
	link := filepath.Join(dir, "link.json")
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	want := mprox(t, "fmt", path)
	if want.code != 0 || want.stdout == good || want.stdout == "" {
		t.Fatalf("got %+v", want)
	}
	if r := mprox(t, "fmt", "-w", link); r.code != 0 || r.stdout != "" {
		t.Errorf("got %+v", r)
	}
	data, err := os.ReadFile(path)
	if err != nil || string(data) != want.stdout {
		t.Errorf("the file is %q, %v", data, err)
	}
	if info, err := os.Lstat(link); err != nil || info.Mode().Type() != fs.ModeSymlink {
		t.Errorf("the link is gone: %v %v", info, err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the mode has changed: %v %v", info, err)
	}
	if r := mprox(t, "fmt", path); r.stdout != want.stdout {
		t.Error("formatting twice differs")
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 2 {
		t.Errorf("left behind: %v %v", entries, err)
	}
	if r := mprox(t, "fmt", writeFile(t, path, "{")); r.code != exitConfig || r.stdout != "" {
		t.Errorf("got %+v", r)
	}
}

func TestInit(t *testing.T) {
	if r := mprox(t, "init"); r.code != 0 || !strings.Contains(r.stdout, "upstreams") {
		t.Errorf("got %+v", r)
	}
	path := filepath.Join(t.TempDir(), "new", "c.json")
	if r := mprox(t, "init", "--template", "desktop", "-c", path); r.code != 0 || r.stdout != "" {
		t.Fatalf("got %+v", r)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("got %v %v", info, err)
	}
	if r := mprox(t, "init", path); r.code != exitConflict || !strings.Contains(r.stderr, "--force") {
		t.Errorf("got %+v", r)
	}
	if r := mprox(t, "init", "--force", "--template", "server", path); r.code != 0 {
		t.Errorf("got %+v", r)
	}
}

func TestSchema(t *testing.T) {
	if r := mprox(t, "schema"); r.code != 0 || !json.Valid([]byte(r.stdout)) {
		t.Errorf("got %d %.100s", r.code, r.stdout)
	}
}

func TestInstance(t *testing.T) {
	dir := t.TempDir()
	path := writeFile(t, filepath.Join(dir, "c.json"), `{ /* … */ "control": { "socket": "/run/other.sock" }, "x": "${NOT_SET}", }`)
	for _, tc := range []struct {
		g    globals
		want string
	}{
		{globals{config: path}, "/run/mprox/mprox.sock"},
		{globals{config: path, configGiven: true}, "/run/other.sock"},
		{globals{config: path, configGiven: true, socket: "/s"}, "/s"},
		{globals{config: filepath.Join(dir, "absent"), configGiven: true}, ""},
		{globals{config: writeFile(t, filepath.Join(dir, "bad"), "{"), configGiven: true}, ""},
	} {
		got, err := tc.g.instance()
		if got != tc.want || (err != nil) != (tc.want == "") || err != nil && exitCode(err) != exitConfig {
			t.Errorf("%+v: got %s, %v, want %s", tc.g, got, err, tc.want)
		}
	}
	if r := mprox(t, "down", "-c", filepath.Join(dir, "absent")); r.code != exitConfig || !strings.Contains(r.stderr, "--socket") {
		t.Errorf("got %+v", r)
	}
}

func TestDNSFailure(t *testing.T) {
	_, socket := fakeDaemon(t)
	if r := mprox(t, "dns", "query", "example.com", "MX", "--socket", socket); r.code != exitFailed || !strings.Contains(r.stderr, "example.com. MX: SERVFAIL") {
		t.Errorf("got %+v", r)
	}
}

// limited has the limits of the flags' defaults.
func (f serveFlags) limited() serveFlags {
	f.connections, f.handshake, f.idle = 4096, 10*time.Second, 2*time.Hour
	return f
}

// TestComplete: the shell is given the names that the daemon knows, and nothing without a daemon.
func TestComplete(t *testing.T) {
	_, socket := fakeDaemon(t)
	for _, tc := range []struct {
		args []string
		want string
	}{
		{[]string{"upstreams", "test", ""}, "paris\n"},
		{[]string{"upstreams", "drain", ""}, "paris\n"},
		{[]string{"upstreams", "drain", "paris", ""}, ":4\n"},
		{[]string{"contexts", "disable", ""}, "default\n"},
		{[]string{"attach", "--context", ""}, "default\n"},
	} {
		if r := mprox(t, append([]string{"__complete", "--socket", socket}, tc.args...)...); r.code != 0 || !strings.Contains(r.stdout, tc.want) {
			t.Errorf("%v: %+v", tc.args, r)
		}
	}
	if r := mprox(t, "__complete", "--socket", socket+"x", "upstreams", "test", ""); r.stdout != ":4\n" {
		t.Errorf("without a daemon: %+v", r)
	}
}

// TestServe goes through the proxy by HTTP CONNECT, with and without the password, and stops it.
func TestServe(t *testing.T) {
	origin := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "hello") }))
	defer origin.Close()
	f := serveFlags{listen: "127.0.0.1:0", user: "alice", passwordFile: writeFile(t, filepath.Join(t.TempDir(), "pw"), "secret\r\nmore\n"), allow: []string{"127.0.0.1"}}.limited()
	addr, cfg, err := f.check()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	core, logs := observer.New(zapcore.InfoLevel)
	serving := make(chan string, 1)
	cfg.Log = zap.New(core, zap.Hooks(func(e zapcore.Entry) error {
		if e.Message == "serving" {
			serving <- e.Message
		}
		return nil
	}))
	done := make(chan error, 1)
	go func() { done <- serveProxy(ctx, addr, cfg) }()
	select {
	case <-serving:
	case err := <-done:
		t.Fatal(err)
	}
	var at string
	for at == "" { // the hook runs before the entry is written
		for _, e := range logs.FilterMessage("serving").All() {
			at = e.ContextMap()["listen"].(string)
		}
	}
	for password, want := range map[string]string{"secret": "200", "wrong": "407"} {
		if got := connect(t, at, origin.Listener.Addr().String(), "alice:"+password); got != want {
			t.Errorf("password %s: got %s, want %s", password, got, want)
		}
	}
	if got := connect(t, at, "127.0.0.2:80", "alice:secret"); got != "403" {
		t.Errorf("another address of loopback: %s", got)
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("stopped with %v", err)
	}
}

// connect asks the proxy for a connection, uses it if it gets one, and returns the status.
func connect(t *testing.T, proxy, target, userinfo string) string {
	t.Helper()
	c, err := net.Dial("tcp", proxy)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	fmt.Fprintf(c, "CONNECT %s HTTP/1.1\r\nHost: %s\r\nProxy-Authorization: Basic %s\r\n\r\n", target, target, base64.StdEncoding.EncodeToString([]byte(userinfo)))
	r := bufio.NewReader(c)
	resp, err := http.ReadResponse(r, &http.Request{Method: http.MethodConnect})
	if err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode == http.StatusOK {
		fmt.Fprint(c, "GET / HTTP/1.0\r\n\r\n")
		if body, err := io.ReadAll(r); err != nil || !strings.HasSuffix(string(body), "hello") {
			t.Errorf("through the proxy: %q %v", body, err)
		}
	}
	return resp.Status[:3]
}

func TestServeFlags(t *testing.T) {
	dir := t.TempDir()
	for _, f := range []serveFlags{
		{listen: "localhost:1080"},
		{listen: "1080"},
		{listen: "127.0.0.1:70000"},
		{listen: ":1080", user: "a:b", passwordFile: "/dev/null"},
		{listen: ":1080", user: "a", passwordFile: writeFile(t, filepath.Join(dir, "empty"), "\nx")},
		{listen: ":1080", user: "a", passwordFile: writeFile(t, filepath.Join(dir, "long"), strings.Repeat("x", 256))},
		{listen: ":1080", allow: []string{"example.com"}},
		{listen: ":1080", deny: []string{"192.0.2.1/24"}},
	} {
		f = f.limited()
		if _, _, err := f.check(); exitCode(err) != exitUsage {
			t.Errorf("%+v: got %v", f, err)
		}
	}
	all := serveFlags{listen: ":1080"}.limited()
	addr, cfg, err := all.check()
	if err != nil || cfg.Users != nil || cfg.Allow(netip.MustParseAddrPort("127.0.0.1:22")) || !cfg.Allow(netip.MustParseAddrPort("192.0.2.1:22")) || addr != netip.MustParseAddrPort("[::]:1080") {
		t.Errorf("got %v %v %v", addr, cfg.Users, err)
	}
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	err = serveProxy(t.Context(), netip.MustParseAddrPort(taken.Addr().String()), server.Config{Log: zap.NewNop()})
	if exitCode(err) != exitConflict || errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}
