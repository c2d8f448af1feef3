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

// TestHung stops daemons with SIGSTOP: every command says within ten seconds what to do about one that hangs, and `mprox down` does it.
func TestHung(t *testing.T) {
	t.Parallel()
	for _, crash := range []string{"block", "open"} {
		t.Run("on_crash "+crash, func(t *testing.T) {
			t.Parallel()
			l := lab.New(t, lab.Options{})
			s := l.Dante(t, 1080, false)
			long := crash == "open" // and for so long that it has no room for another connection on its socket
			if long {
				if r := lab.Exec(t, l.Client.Command("sysctl", "-w", "net.core.somaxconn=2")); r.Code != 0 {
					t.Fatal(r)
				}
			}
			before := l.Snapshot(t)
			m := l.Mprox(t)
			m.UpConfig(globalConfig(s, fmt.Sprintf(`"on_crash": %q,`, crash)))
			checkProxied(t, l)
			m.Signal(syscall.SIGSTOP)
			pid := fmt.Sprint(m.PID())

			if long {
				for range 4 {
					if r := m.CLI("healthcheck"); r.Code != 7 {
						t.Errorf("healthcheck: %v", r)
					}
				}
				if r := m.CLI("status"); r.Code != 5 || !strings.Contains(r.Stderr, "mprox down") || !strings.Contains(r.Stderr, pid) {
					t.Errorf("status: %v", r)
				}
			} else {
				for _, command := range []string{"status", "flows --watch", "reload", "guard off", "down --keep-closed", "run --context default -- true"} {
					within(t, 10*time.Second, command, func() {
						r := m.CLI(strings.Fields(command)...)
						if r.Code != 5 && r.Code != 125 || strings.Count(r.Stderr, "\n") != 1 || !strings.Contains(r.Stderr, "mprox down") || !strings.Contains(r.Stderr, pid) {
							t.Errorf("%s: %v", command, r)
						}
					})
				}
			}
			within(t, 20*time.Second, "down", func() {
				r := m.CLI("down")
				if r.Code != 0 || strings.Count(r.Stderr, "\n") != 1 || !strings.Contains(r.Stderr, pid) {
					t.Errorf("down: %v", r)
				}
			})
			if d := before.Diff(l.Snapshot(t)); d != "" {
				t.Errorf("down of a daemon that hung left:\n%s", d)
			}
			if out := mustCurl(t, l, originURL(false, "/")); fromProxy(out) {
				t.Errorf("open, and yet %q", out)
			}
		})
	}
}

// TestHungComesRound shows that a daemon that only paused for a while is stopped in order, and not killed.
func TestHungComesRound(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, false)
	before := l.Snapshot(t)
	m := l.Mprox(t)
	m.UpConfig(globalConfig(s, ""))
	m.Signal(syscall.SIGSTOP)
	p := lab.Start(t, "down", m.Command("down"))
	time.Sleep(3 * time.Second)
	m.Signal(syscall.SIGCONT)
	if code := p.Wait(30 * time.Second); code != 0 || strings.Contains(p.Log.String(), "kill") {
		t.Errorf("down: exit %d: %s", code, p.Log.String())
	}
	if code := m.Wait(time.Second); code != 0 {
		t.Errorf("the daemon's exit code is %d", code)
	}
	if d := before.Diff(l.Snapshot(t)); d != "" {
		t.Errorf("down left:\n%s", d)
	}
}
