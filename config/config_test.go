// SPDX-License-Identifier: GPL-3.0-or-later

package config

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// testEnv is the environment of the tests.
func testEnv(name string) (string, bool) {
	v, ok := map[string]string{"PARIS_PASSWORD": "p@ss/w:rd", "PROXY_URL": "socks5h://u:hidden@192.0.2.1:1080", "LEVEL": "debug", "EMPTY": ""}[name]
	return v, ok
}

// TestGolden: testdata/NAME.json gives NAME.golden: the errors, or the normalised configuration and the warnings.
func TestGolden(t *testing.T) {
	t.Parallel()
	inputs, err := filepath.Glob("testdata/*.json")
	if err != nil || len(inputs) == 0 {
		t.Fatal("no inputs", err)
	}
	for _, in := range inputs {
		t.Run(filepath.Base(in), func(t *testing.T) {
			t.Parallel()
			data, err := os.ReadFile(in)
			if err != nil {
				t.Fatal(err)
			}
			c, err := parse(filepath.Base(in), data, testEnv, nil)
			got := ""
			if err != nil {
				got = err.Error() + "\n"
			} else {
				out, err := json.MarshalIndent(c, "", "  ")
				if err != nil {
					t.Fatal(err)
				}
				got = string(out) + "\n"
				for _, w := range c.Warnings() {
					got += "warning: " + w.Error() + "\n"
				}
			}
			golden(t, strings.TrimSuffix(in, ".json")+".golden", got)
			if strings.Contains(got, "hidden") || strings.Contains(got, "p@ss") || strings.Contains(got, "p%40ss") {
				t.Error("a secret is printed")
			}
		})
	}
}

func golden(t *testing.T, path, got string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-want +got; go test -update rewrites it):\n%s", path, diff)
	}
}

func TestDefaultsAreValid(t *testing.T) {
	t.Parallel()
	// Each default is accepted where it stands, so setText cannot fail.
	for path, f := range allFields() {
		if !f.hasDef {
			continue
		}
		value, err := json.Marshal(defaultValue(&f))
		if err != nil {
			t.Fatal(err)
		}
		if schemaPath := strings.NewReplacer("NAME", "x", "[]", "").Replace(path); schemaPath == "" {
			t.Fatal(path)
		}
		if err := checkDefault(&f, string(value)); err != nil {
			t.Errorf("%s: default %s: %v", path, value, err)
		}
	}
}

func TestTemplates(t *testing.T) {
	t.Parallel()
	for _, name := range TemplateNames() {
		data, err := Template(name)
		if err != nil {
			t.Fatal(err)
		}
		c, err := Parse(name+".json", data)
		if err != nil {
			t.Errorf("%s:\n%v", name, err)
			continue
		}
		for u := range c.Upstreams {
			if url := c.Upstreams[u].URL.Reveal(); !strings.HasPrefix(url, "socks5h://203.0.113.1") {
				t.Errorf("%s: placeholder %s is not documented", name, url)
			}
		}
		formatted, err := Format(data)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(string(data), string(formatted)); diff != "" {
			t.Errorf("%s is not formatted (-file +formatted):\n%s", name, diff)
		}
	}
	if _, err := Template("../config"); err == nil || !strings.Contains(err.Error(), "minimal, desktop") {
		t.Errorf("unknown template: %v", err)
	}
}

func write(t *testing.T, dir, name, text string, mode fs.FileMode) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil { // whatever the umask
		t.Fatal(err)
	}
	return path
}

func TestLoadMergesEnvironment(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	base := write(t, dir, "config.json", `{
  "log": { "level": "debug", "format": "json" },
  "upstreams": { "a": { "url": "socks5h://192.0.2.1:1080", "weight": 5 }, "gone": { "url": "http://192.0.2.2" } },
  "contexts": { "default": { "default": "a", "rules": [ { "port": 25, "upstream": "drop" } ] } }
}`, 0o644)
	write(t, dir, "config.prod.json", `{
  "log": { "level": null },
  "upstreams": { "gone": null, "b": { "url": "http://192.0.2.3" } },
  "contexts": { "default": { "default": "b", "rules": [] } },
  "http": { "listen": "127.0.0.1:1" }
}`, 0o644)
	c, err := Load(base, "prod")
	if err != nil {
		t.Fatal(err)
	}
	got := fmt.Sprint(c.Log.Level, c.Log.Format, len(c.Upstreams), c.Upstreams["a"].Weight, c.Contexts["default"].Default, len(c.Contexts["default"].Rules), c.HTTP.Listen)
	if want := fmt.Sprint("info", "json", 2, 5, "b", 0, "127.0.0.1:1"); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	// Errors stand where the text stands: one in each file.
	bad := write(t, dir, "config.bad.json", "{\n \"contexts\": { \"default\": { \"default\": \"c\",\n  \"tun\": { \"mtu\": 9 } } }, \"log\": { \"levl\": 1 } }", 0o644)
	write(t, dir, "config.json", strings.Replace(`{
  "upstreams": { "a": { "url": "x", "weigth": 5 } },
  "contexts": { "default": { "default": "a" } }
}`, "x", "socks5h://192.0.2.1:1080", 1), 0o644)
	_, err = Load(base, "bad")
	want := strings.Join([]string{
		bad + `:2:40: $.contexts.default.default: unknown upstream or pool "c" (did you mean "a"?)`,
		bad + `:3:19: $.contexts.default.tun.mtu: 9 is not between 1280 and 65535`,
		bad + `:3:37: $.log.levl: unknown key (did you mean "level"?)`,
		base + `:2:60: $.upstreams.a.weigth: unknown key (did you mean "weight"?)`,
	}, "\n")
	if err == nil {
		t.Fatal("no error")
	}
	if diff := cmp.Diff(want, err.Error()); diff != "" {
		t.Error(diff)
	}
	for _, env := range []string{"../x", "none", "a/b"} {
		if _, err := Load(base, env); err == nil {
			t.Errorf("environment %q is accepted", env)
		}
	}
}

func TestLoadSecrets(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	pass := write(t, dir, "pass", "s3cret\nsecond line\n", 0o600)
	text := `{ "upstreams": {
  "inline": { "url": "socks5h://alice:hunter2@192.0.2.1:1080" },
  "token":  { "url": "http://192.0.2.1", "auth": { "type": "bearer", "token": "hunter3" } },
  "user":   { "url": "socks5h://alice@192.0.2.1" },
  "file":   { "url": "socks5h://192.0.2.1", "auth": { "username": "bob", "password_file": "` + pass + `" } } },
 "contexts": { "default": { "default": "inline" } } }`
	path := write(t, dir, "config.json", text, 0o604)
	_, err := Load(path, "")
	want := path + `:2:22: a secret in a file that everyone can read (run: chmod 600 ` + path + ")\n" +
		path + `:3:79: a secret in a file that everyone can read (run: chmod 600 ` + path + ")"
	if err == nil || err.Error() != want {
		t.Errorf("got\n%v\nwant\n%s", err, want)
	}
	if err := os.Chmod(path, 0o640); err != nil {
		t.Fatal(err)
	}
	c, err := Load(path, "")
	if err != nil {
		t.Fatal(err)
	}
	if got := c.Upstreams["file"].Auth.Password.Reveal(); got != "s3cret" {
		t.Errorf("password of the file: %q", got)
	}
	for _, format := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
		out := fmt.Sprintf(format, *c)
		out += fmt.Sprintf(format, c.Upstreams["inline"]) + fmt.Sprintf(format, c.Upstreams["inline"].URL) + fmt.Sprintf(format, c.Upstreams["token"].Auth.Token)
		for _, secret := range []string{"hunter", "s3cret", fmt.Sprintf("%x", "hunter")} {
			if strings.Contains(out, secret) {
				t.Errorf("%s prints a secret: %s", format, out)
			}
		}
	}
	data, err := json.Marshal(c)
	if err != nil || strings.Contains(string(data), "hunter") || strings.Contains(string(data), "s3cret") {
		t.Errorf("marshalled: %s, %v", data, err)
	}
	write(t, dir, "config.json", strings.ReplaceAll(text, "/pass", "/nopass"), 0o600)
	_, err = Load(path, "")
	if err == nil || !strings.Contains(err.Error(), "config.json:5:91: $.upstreams.file.auth.password_file: "+pass[:len(pass)-4]+"nopass: no such file or directory") {
		t.Errorf("missing password file: %v", err)
	}
	if _, err = Load(filepath.Join(dir, "none.json"), ""); !errors.Is(err, fs.ErrNotExist) || !strings.HasSuffix(err.Error(), "none.json: no such file or directory") {
		t.Errorf("missing file: %v", err)
	}
	write(t, dir, "config.json", strings.Repeat(" ", MaxSize+1), 0o600)
	if _, err = Load(path, ""); err == nil || err.Error() != path+": the file is larger than 4 MiB" {
		t.Errorf("large file: %v", err)
	}
}

func TestExpansion(t *testing.T) {
	t.Parallel()
	text := `{ "log": { "level": "${LEVEL}" }, "audit": { "file": "/x/$${LEVEL}" }, "upstreams": {
  "a": { "url": "socks5h://alice:${PARIS_PASSWORD}@192.0.2.1:1080" },
  "b": { "url": "${PROXY_URL}" },
  "c": { "url": "http://192.0.2.1", "auth": { "username": "c", "password": "${PARIS_PASSWORD}" } } },
 "contexts": { "default": { "default": "a" } } }`
	c, err := parse("x", []byte(text), testEnv, nil)
	if err != nil {
		t.Fatal(err)
	}
	got := []string{c.Log.Level, c.Audit.File, c.Upstreams["a"].URL.Reveal(), c.Upstreams["b"].URL.Reveal(), c.Upstreams["c"].Auth.Password.Reveal()}
	want := []string{"debug", "/x/${LEVEL}", "socks5h://alice:p%40ss%2Fw%3Ard@192.0.2.1:1080", "socks5h://u:hidden@192.0.2.1:1080", "p@ss/w:rd"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if got := c.Upstreams["b"].URL.String(); got != "socks5h://u:***@192.0.2.1:1080" {
		t.Errorf("masked: %s", got)
	}
}

func TestChecksOfOthersJoin(t *testing.T) {
	t.Parallel()
	text := `{ "upstreams": { "a": { "url": "nonsense" } }, "contexts": { "default": { "default": "b" } } }`
	_, err := Parse("x.json", []byte(text), func(c *Config) []*Error {
		return []*Error{
			c.ErrorAt("$.upstreams.a.url", errors.New("not a proxy"), ""),
			c.ErrorAt("$.contexts.default.default", errors.New("unknown upstream"), ""), // known already
		}
	})
	want := "x.json:1:32: $.upstreams.a.url: not a proxy\n" +
		`x.json:1:86: $.contexts.default.default: unknown upstream or pool "b" (did you mean "a"?)`
	if err == nil || err.Error() != want {
		t.Errorf("got\n%v\nwant\n%s", err, want)
	}
}

func TestLocate(t *testing.T) {
	t.Parallel()
	const text = "// comment\n{\n  \"contexts\": { \"a.b\": { \"rules\": [ { \"port\": 22 },\n\t{ \"pört\": 1, \"x\": [1, 2] } ] } } }"
	for _, tt := range []struct {
		path      string
		line, col int
	}{
		{"$", 2, 1},
		{`$.contexts["a.b"].rules[0].port`, 3, 47},
		{`$.contexts["a.b"].rules[0].port[0]`, 3, 47},
		{`$.contexts["a.b"].rules[0].port[1]`, 3, 47},
		{`$.contexts["a.b"].rules[1].x[1]`, 4, 24},
		{`$.contexts["a.b"].rules[1].missing.deep`, 4, 2},
		{`$.contexts["a.b"].rules[9]`, 3, 35},
		{`$.nothing`, 2, 1},
		{`rubbish[[[`, 2, 1},
		{`$["unterminated`, 2, 1},
	} {
		if line, col := Locate([]byte(text), tt.path); line != tt.line || col != tt.col {
			t.Errorf("%s: got %d:%d, want %d:%d", tt.path, line, col, tt.line, tt.col)
		}
	}
	if line, col := Locate([]byte("{"), "$.x"); line != 1 || col != 1 {
		t.Errorf("broken text: %d:%d", line, col)
	}
}

func TestDiff(t *testing.T) {
	t.Parallel()
	const base = `{ "upstreams": { "a": { "url": "socks5h://u:one@192.0.2.1" } }, "contexts": { "default": { "default": "a" }, "old": { "mode": "disabled", "default": "a" } } }`
	const next = `{ "kernel": { "table_base": 5000 }, "control": { "socket": "/run/x.sock", "group": "adm" },
 "upstreams": { "a": { "url": "socks5h://u:two@192.0.2.1", "weight": 2 } },
 "contexts": { "new": { "mode": "process", "default": "reject" },
 "default": { "default": "a", "tun": { "name": "t9", "mtu": 1400 }, "rules": { "port": 22, "upstream": "drop" }, "dns": { "fake": { "v4": "100.64.0.0/16", "exclude": "*.lan" } }, "bypass": { "port": [] } } } }`
	old, err := Parse("old", []byte(base))
	if err != nil {
		t.Fatal(err)
	}
	current, err := Parse("new", []byte(next))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, c := range Diff(old, current) {
		line := c.Path
		if c.FixedAtStart {
			line += " fixed"
		}
		if len(c.Old)+len(c.New) < 80 {
			line += " " + c.Old + " -> " + c.New
		}
		got = append(got, line)
	}
	want := []string{
		`$.control.socket fixed "/run/mprox/mprox.sock" -> "/run/x.sock"`,
		`$.control.group fixed "mprox" -> "adm"`,
		`$.kernel.table_base fixed 19760 -> 5000`,
		`$.upstreams.a.url "socks5h://u:***@192.0.2.1" -> "socks5h://u:***@192.0.2.1"`,
		`$.upstreams.a.weight 1 -> 2`,
		`$.contexts.default.rules`,
		`$.contexts.default.dns.fake.v4 fixed "198.18.0.0/15" -> "100.64.0.0/16"`,
		`$.contexts.default.dns.fake.exclude ["*.local"] -> ["*.lan"]`,
		`$.contexts.default.tun.name fixed "mprox0" -> "t9"`,
		`$.contexts.default.tun.mtu fixed 1500 -> 1400`,
		`$.contexts.new`,
		`$.contexts.old`,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if changes := Diff(old, old); len(changes) != 0 {
		t.Errorf("a configuration differs from itself: %+v", changes)
	}
}

func TestFromFlags(t *testing.T) {
	t.Parallel()
	c, err := FromFlags(OneLiner{
		Proxy: []string{"socks5h://u:${X}p@192.0.2.1:1080?name=paris", "http://192.0.2.2", "http://192.0.2.3"},
		DNS:   []string{"192.0.2.53,tls://192.0.2.54", "fakeip"}, Bypass: []string{"private, 198.51.100.0/24", "123", "icmp", "6000-6010"},
		Mode: "process", TUN: "tun7", MTU: 1400, Strategy: "failover",
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx := c.Contexts["default"]
	got := fmt.Sprintln(c.Pools["proxies"].Members, c.Pools["proxies"].Strategy, ctx.Default, ctx.Mode, ctx.TUN, ctx.DNS.Servers, ctx.DNS.Mode, ctx.Bypass, ctx.Limits.Flows, ctx.ICMP)
	want := "[paris proxy2 proxy3] failover proxies process {tun7 1400 auto 1} [192.0.2.53 tls://192.0.2.54] fakeip {[private 198.51.100.0/24] [123 6000-6010] [icmp] [] []} 65536 honest\n"
	if got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if u := c.Upstreams["paris"].URL.Reveal(); u != "socks5h://u:${X}p@192.0.2.1:1080?name=paris" {
		t.Errorf("the URL is changed: %s", u)
	}
	if e := c.ErrorAt("$.upstreams.paris.url", errors.New("x"), ""); e.Error() != "--proxy: x" {
		t.Errorf("error of a flag: %v", e)
	}
	one, err := FromFlags(OneLiner{Proxy: []string{"socks5h://192.0.2.1"}})
	if err != nil || one.Contexts["default"].Default != "proxy" || one.Contexts["default"].TUN.Name != "mprox0" || one.Contexts["default"].Mode != "global" {
		t.Errorf("one proxy: %+v, %v", one, err)
	}
	if len(one.Pools) != 0 {
		t.Error("one proxy is no pool")
	}
	_, err = FromFlags(OneLiner{Proxy: []string{"bad", ""}, Mode: "globl", MTU: 9, TUN: "a/b", DNS: []string{"ftp://x"}, Bypass: []string{"privat", "99999", "198.18.1.0/24"}, Strategy: "x"},
		func(c *Config) []*Error {
			return []*Error{c.ErrorAt("$.upstreams.proxy1.url", errors.New("no scheme"), "")}
		})
	want = strings.Join([]string{
		`--bypass: "99999" is not a port: ports are 1 to 65535`,
		`--bypass: "privat" is not an address, a CIDR, or one of: local, private, link-local, multicast, loopback, public (did you mean "private"?)`,
		`--bypass: 198.18.1.0/24 overlaps the fake range 198.18.0.0/15: names would lead nowhere`,
		`--dns: "ftp://x": want udp://, tcp://, tls:// or https://`,
		`--mode: "globl" is not one of: disabled, process, cgroup, global, gateway (did you mean "global"?)`,
		`--mtu: 9 is not between 1280 and 65535`,
		`--proxy: no scheme`,
		`--proxy: the url is empty`,
		`--strategy: "x" is not one of: round-robin, weighted, least-connections, random, hash, least-latency, failover`,
		`--tun: "a/b" is not a valid name of a device`,
	}, "\n")
	if err == nil {
		t.Fatal("no error")
	}
	lines := strings.Split(err.Error(), "\n")
	if diff := cmp.Diff(strings.Split(want, "\n"), sortedLines(lines)); diff != "" {
		t.Error(diff)
	}
	for _, o := range []OneLiner{{}, {Proxy: []string{"http://x"}, Strategy: "failover"}, {Proxy: []string{"http://x?name=a", "http://y?name=a"}}} {
		if _, err := FromFlags(o); err == nil || !strings.HasPrefix(err.Error(), "--") {
			t.Errorf("%+v: %v", o, err)
		}
	}
}

// TestHugeMistakes: a large file that is nothing but mistakes takes seconds, not hours, and a bounded number of errors.
func TestHugeMistakes(t *testing.T) {
	t.Parallel()
	for name, text := range map[string]string{
		"unknown":   "{" + strings.Repeat("\"lvl\": 1,\n", 100_000) + "}",
		"wrong":     `{"upstreams":{"a":{"url":"x"}},"contexts":{"default":{"default":"a","bypass":{"port":[` + strings.Repeat("0,", 200_000) + `]}}}}`,
		"one line":  `{"log":{` + numbered(50_000, `"k%d":1,`) + `}}`,
		"contexts":  `{"contexts":{` + numbered(3_000, `"c%d":{},`) + `}}`,
		"upstreams": `{"upstreams":{` + numbered(3_000, `"u %d":{"url":""},`) + `}}`,
	} {
		_, err := Parse(name, []byte(text))
		var errs Errors
		if !errors.As(err, &errs) || len(errs) != maxErrors+1 {
			t.Errorf("%s: %d errors", name, len(errs))
		}
	}
}

func numbered(n int, format string) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, format, i)
	}
	return b.String()
}

func TestOnRequest(t *testing.T) {
	t.Parallel()
	c := OnRequest()
	if len(c.Contexts) != 0 || c.Kernel.MarkMask != 0xff000000 || c.Control.Group != "mprox" {
		t.Errorf("%+v: want no context and the defaults", c)
	}
}

func TestEditDistance(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		a, b string
		want int
	}{{"", "", 0}, {"a", "", 1}, {"kitten", "sitting", 3}, {"upstrem", "upstream", 1}, {"levl", "level", 1}, {"lveel", "level", 1}, {"abc", "abc", 0}, {strings.Repeat("x", 65), "x", 64}} {
		if got := editDistance(tt.a, tt.b); got != tt.want {
			t.Errorf("%q %q: %d, want %d", tt.a, tt.b, got, tt.want)
		}
	}
}
