// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mutex-proxy/mutex/e2e/lab"
)

// as runs curl as a user in the client's namespace.
func as(t *testing.T, l *lab.Lab, uid int, args ...string) lab.Result {
	t.Helper()
	id := fmt.Sprint(uid)
	return lab.Exec(t, l.Client.Command(append([]string{
		"setpriv", "--reuid", id, "--regid", id, "--clear-groups", "curl", "-sS", "-m", "10",
	}, args...)...))
}

// TestSelectUser shows that a selected user goes through the proxy, by address and by name, that nobody else does, that a reload moves the
// line, and that the selected are blocked when the daemon has been killed.
func TestSelectUser(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, true)
	l.Unbound(t)
	before := l.Snapshot(t)
	m := l.Mprox(t)
	config := func(uid int) string {
		return fmt.Sprintf(`{ "upstreams": { "p": { "url": %q } }, "contexts": { "work": { "mode": "process", "select": { "uid": %d }, "default": "p" } } }`, s.URL(), uid)
	}
	m.UpConfig(config(4001))
	check := func(in, out int) {
		t.Helper()
		for _, v6 := range []bool{false, true} {
			if r := as(t, l, in, originURL(v6, "/")); r.Code != 0 || !fromProxy(r.Stdout) {
				t.Errorf("user %d, v6 %v: %v", in, v6, r)
			}
			for _, uid := range []int{0, out} {
				if r := as(t, l, uid, originURL(v6, "/")); r.Code != 0 || fromProxy(r.Stdout) {
					t.Errorf("user %d, v6 %v: %v", uid, v6, r)
				}
			}
		}
		if r := as(t, l, in, "http://www.example.test/"); r.Code != 0 || !fromProxy(r.Stdout) {
			t.Errorf("user %d, by name: %v", in, r)
		}
	}
	check(4001, 4002)
	m.WriteConfig(config(4002))
	if err := m.Post("/v1/reload"); err != nil {
		t.Fatal(err)
	}
	check(4002, 4001)
	m.Signal(syscall.SIGKILL)
	m.Wait(5 * time.Second)
	if r := as(t, l, 4002, "-m", "2", originURL(false, "/")); r.Code == 0 {
		t.Errorf("killed: %v", r)
	}
	if r := as(t, l, 4001, originURL(false, "/")); r.Code != 0 || fromProxy(r.Stdout) {
		t.Errorf("killed, user 4001: %v", r)
	}
	if r := m.CLI("down"); r.Code != 0 {
		t.Error(r)
	}
	if diff := before.Diff(l.Snapshot(t)); diff != "" {
		t.Errorf("not as before:\n%s", diff)
	}
}

// TestExcludeUser shows that a global context leaves out whom it excludes, and nobody else.
func TestExcludeUser(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, true)
	m := l.Mprox(t)
	m.UpConfig(globalConfig(s, `"exclude": [ { "uid": 4001 }, { "user": "nobody" } ],`))
	for uid, proxied := range map[int]bool{0: true, 4001: false, 4002: true, 65534: false} {
		for _, v6 := range []bool{false, true} {
			if r := as(t, l, uid, originURL(v6, "/")); r.Code != 0 || fromProxy(r.Stdout) != proxied || !strings.Contains(r.Stdout, "hello ") {
				t.Errorf("user %d, v6 %v: want proxied %v, got %v", uid, v6, proxied, r)
			}
		}
	}
}
