// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"encoding/base64"
	"fmt"
	"io"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/mutex-proxy/mutex/e2e/lab"
)

// secretForms are the shapes in which a password could be written: as it is, percent-encoded in both ways, in base64 alone and as the
// credentials of Basic, and what Digest makes of it.
func secretForms() map[string]string {
	out := map[string]string{"digest": lab.HA1()}
	for name, secret := range map[string]string{"password": lab.Password, "wrong": wrongSecret, "token": bearerSecret, "header": headerSecret} {
		out[name] = secret
		out[name+", path-escaped"] = url.PathEscape(secret)
		out[name+", query-escaped"] = url.QueryEscape(secret)
		out[name+", userinfo"] = strings.TrimPrefix(url.UserPassword("", secret).String(), ":")
		out[name+", base64"] = base64.StdEncoding.EncodeToString([]byte(secret))
		out[name+", basic"] = base64.StdEncoding.EncodeToString([]byte(lab.User + ":" + secret))
	}
	return out
}

const (
	wrongSecret  = "wr0ng-s3cret!"
	bearerSecret = "t0ken.of-bearer~123"
	headerSecret = "header-s3cret-456"
)

// TestSecrets uses every way to give a credential, right and wrong, over each protocol, at level debug, and then looks for them in all that
// the program wrote or shows: its log, the output of its commands and their errors, API, metrics, files, and command lines.
func TestSecrets(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	l.Unbound(t)
	pki := l.PKI(t)
	dante, micro, squid := l.Dante(t, 1081, true), l.Microsocks(t, 1082), l.Squid(t, 3128)
	digest, tls := l.SquidDigest(t, 3132), l.SquidTLS(t, 3129, pki)
	digest.Options = "auth=digest"
	users := l.File("users", lab.User+":"+lab.Password+"\n")
	own := l.Serve(t, 1087, "--password-file", users, "--log-level", "debug")
	own.Pass = lab.Password
	password := l.File("password", lab.Password+"\n")
	token := l.File("token", bearerSecret+"\n")
	at := squid.Addr.String()
	ups := map[string]string{
		"dante": fmt.Sprintf(`"url": %q`, dante.URL()), "micro": fmt.Sprintf(`"url": %q`, micro.URL()), "squid": fmt.Sprintf(`"url": %q`, squid.URL()),
		"digest": fmt.Sprintf(`"url": %q`, digest.URL()), "tls": fmt.Sprintf(`"url": %q`, tls.URL()), "own": fmt.Sprintf(`"url": %q`, own.URL()),
		"own4":   fmt.Sprintf(`"url": "socks4a://%s:%s@%s"`, lab.User, url.QueryEscape(lab.Password), own.Addr),
		"auto":   fmt.Sprintf(`"url": %q`, own.URLAs("auto")),
		"file":   fmt.Sprintf(`"url": "http://%s", "auth": { "type": "basic", "username": %q, "password_file": %q }`, at, lab.User, password),
		"env":    fmt.Sprintf(`"url": "http://%s:${LAB_PASSWORD}@%s"`, lab.User, at),
		"plain":  fmt.Sprintf(`"url": "http://%s", "auth": { "type": "digest", "username": %q, "password": %q }`, digest.Addr, lab.User, lab.Password),
		"bearer": fmt.Sprintf(`"url": "http://%s", "auth": { "type": "bearer", "token_file": %q }`, at, token),
		"header": fmt.Sprintf(`"url": "http://%s?header=X-Key:%s"`, at, headerSecret),
	}
	for name, s := range map[string]*lab.Server{"dante": dante, "micro": micro, "squid": squid, "digest": digest, "tls": tls, "own": own} {
		bad := *s
		bad.Pass = wrongSecret
		ups[name+"-wrong"] = fmt.Sprintf(`"url": %q`, bad.URL())
	}
	var list, rules, members []string
	port := 20000
	ports := map[string]int{}
	for name, u := range ups {
		port++
		ports[name] = port
		list = append(list, fmt.Sprintf("%q: { %s }", name, u))
		members = append(members, fmt.Sprintf("%q", name))
		rules = append(rules, fmt.Sprintf(`{ "port": %d, "upstream": %q }`, port, name))
	}
	m := l.Mprox(t)
	m.Env = []string{"LAB_PASSWORD=" + lab.Password}
	config := fmt.Sprintf(`{ "log": { "level": "debug" }, "http": { "listen": "127.0.0.1:9464" }, "upstreams": { %s },
  "pools": { "all": { "members": [ %s ], "retry": 16, "health": { "interval": "1s", "timeout": "500ms", "target": "%s:7" } } },
  "contexts": { "default": { "mode": "global", "default": "all", "rules": [ %s ] } } }`,
		strings.Join(list, ", "), strings.Join(members, ", "), lab.OriginV4, strings.Join(rules, ", "))
	m.UpConfig(config)

	out := map[string]string{}
	say := func(what string, r lab.Result) { out["mprox "+what] = r.Stdout + r.Stderr }
	for name, p := range ports { // nobody listens there: the error of each upstream is logged
		curl(t, l, originURL(false, ":"+strconv.Itoa(p)+"/"))
		say("upstreams test "+name, m.CLI("upstreams", "test", name, "--target", lab.OriginV4.String()+":7"))
	}
	hold := dialOrigin(t, l, lab.OriginV4, lab.PortHold)
	for _, args := range []string{
		"status", "status -o json", "flows -o json", "upstreams", "upstreams -o json", "contexts -o json", "stats", "explain tcp 198.51.100.80:80 -o json",
		"explain tcp 198.51.100.80:20001", "reload", "healthcheck -o json", "upstreams drain dante", "check -c " + m.ConfigPath(),
	} {
		say(args, m.CLI(strings.Fields(args)...))
	}
	hold.Close()
	m.WriteConfig(strings.Replace(config, `"retry": 16`, `"retri": 16`, 1)) // mistakes are quoted
	say("check, a mistake", m.CLI("check", "-c", m.ConfigPath()))
	say("reload, a mistake", m.CLI("reload"))
	for _, bad := range []string{dante.URL() + "0000", strings.Replace(dante.URL(), "socks5h", "socks9", 1), "socks5h://alice:" + lab.Password + "@203.0.113.10:1080"} {
		say("up --proxy, a mistake", m.CLI("up", "--proxy", bad))
		say("forward, a mistake", m.CLI("forward", "--upstream", bad, "127.0.0.1:9"))
	}
	for _, path := range []string{"status", "flows", "contexts", "upstreams", "apps", "stats?format=json", "stats?format=csv", "explain?network=tcp&address=198.51.100.80:80"} {
		out["GET /v1/"+path] = apiText(m, path)
	}
	out["metrics"] = mustCurl(t, l, "http://127.0.0.1:9464/metrics") + mustCurl(t, l, "http://127.0.0.1:9464/readyz")
	cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", m.PID()))
	if err != nil {
		t.Fatal(err)
	}
	out["command line"] = string(cmdline)
	m.Stop()
	out["log of the daemon"], out["log of serve"] = m.Log.String(), own.Log.String()
	maps.Copy(out, stateFiles(t, m))
	checkSecrets(t, out)
}

// apiText returns what the API answers, whatever the status.
func apiText(m *lab.Mprox, path string) string {
	var text any
	err := m.Get("/v1/"+path, &text)
	return fmt.Sprint(text, err)
}

// stateFiles returns the files that the daemon has written: all beside the socket and in the state directory but its configuration.
func stateFiles(t *testing.T, m *lab.Mprox) map[string]string {
	t.Helper()
	out := map[string]string{}
	err := filepath.WalkDir(filepath.Dir(m.Socket), func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || path == m.ConfigPath() {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		b, err := io.ReadAll(f)
		out[path] = string(b)
		return err
	})
	if err != nil {
		t.Error(err)
	}
	return out
}

func checkSecrets(t *testing.T, out map[string]string) {
	t.Helper()
	total := 0
	for where, text := range out {
		total += len(text)
		for form, secret := range secretForms() {
			if i := strings.Index(text, secret); i >= 0 {
				t.Errorf("%s has the %s: …%.200q…", where, form, text[max(0, i-60):])
			}
		}
	}
	// That nothing was found means something only if there was something to look at.
	if logged := out["log of the daemon"]; !strings.Contains(logged, "wrong user or password") || !strings.Contains(logged, "407") || !strings.Contains(logged, "DEBUG") {
		t.Errorf("the log does not tell of the wrong passwords:\n%.2000s", logged)
	}
	for _, where := range []string{"mprox upstreams -o json", "GET /v1/upstreams", "metrics", "mprox reload, a mistake"} {
		if len(out[where]) < 20 {
			t.Errorf("%s: %q", where, out[where])
		}
	}
	t.Logf("%d bytes in %d places", total, len(out))
}
