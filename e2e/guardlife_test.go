// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mutex-proxy/mutex/e2e/lab"
)

// TestOpenOnCrash kills daemons whose contexts open on a crash: everything is as before within a second, unless another context stays closed.
// The watcher survives a SIGTERM to all, is started again when it is killed itself, and ends with an orderly end.
func TestOpenOnCrash(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, true)
	before := l.Snapshot(t)
	m := l.Mprox(t)
	watcher := func(daemon int) int {
		pid := 0
		lab.Eventually(t, 5*time.Second, "a watcher that ignores SIGTERM", func() bool {
			pid = childPID(daemon, "exe")
			status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
			_, after, _ := strings.Cut(string(status), "SigIgn:\t")
			mask, _, _ := strings.Cut(after, "\n")
			n, err := strconv.ParseUint(mask, 16, 64)
			return err == nil && n&(1<<(syscall.SIGTERM-1)) != 0
		})
		return pid
	}
	gone := func(pid int) bool { return syscall.Kill(pid, 0) != nil }

	m.UpConfig(globalConfig(s, `"on_crash": "open",`))
	checkProxied(t, l)
	first := watcher(m.PID())
	if err := syscall.Kill(first, syscall.SIGKILL); err != nil {
		t.Error(err)
	}
	lab.Eventually(t, 5*time.Second, "another watcher", func() bool { pid := childPID(m.PID(), "exe"); return pid != 0 && pid != first })
	second := watcher(m.PID())
	_ = syscall.Kill(second, syscall.SIGTERM)
	m.Kill()
	var diff string
	if !lab.Poll(2*time.Second, func() bool { diff = before.Diff(l.Snapshot(t)); return diff == "" }) {
		t.Errorf("killed, and not as before:\n%s", diff)
	}
	if out := mustCurl(t, l, originURL(false, "/")); fromProxy(out) {
		t.Errorf("open, and yet %q", out)
	}
	lab.Eventually(t, 5*time.Second, "the watcher ends", func() bool { return gone(second) })

	// One opens, one stays closed.
	m.UpConfig(fmt.Sprintf(`{ "upstreams": { "p": { "url": %q } }, "contexts": {
		"a": { "mode": "process", "select": { "uid": 4001 }, "default": "p", "on_crash": "open" },
		"b": { "mode": "process", "select": { "uid": 4002 }, "default": "p" } } }`, s.URL()))
	third := watcher(m.PID())
	for _, uid := range []int{4001, 4002} {
		if got := exitOf(t, l, uid); got != lab.ExitV4 {
			t.Errorf("user %d comes from %s", uid, got)
		}
	}
	m.Kill()
	lab.Eventually(t, 2*time.Second, "the one that opens is direct", func() bool {
		return as(t, l, 4001, "-m", "1", originURL(false, "/")).Code == 0
	})
	if got := exitOf(t, l, 4001); got != lab.ClientV4 {
		t.Errorf("user 4001 comes from %s", got)
	}
	if r := as(t, l, 4002, "-m", "1", originURL(false, "/")); r.Code == 0 {
		t.Errorf("the one that stays closed: %v", r)
	}
	lab.Eventually(t, 5*time.Second, "the watcher ends", func() bool { return gone(third) })
	must(t, m, "guard", "off")
	if d := before.Diff(l.Snapshot(t)); d != "" {
		t.Errorf("left behind:\n%s", d)
	}

	// An orderly end is no crash.
	m.UpConfig(globalConfig(s, `"on_crash": "open", "on_stop": "block",`))
	fourth := watcher(m.PID())
	must(t, m, "down")
	lab.Eventually(t, 5*time.Second, "the watcher ends", func() bool { return gone(fourth) })
	if r := curl(t, l, "-m", "1", originURL(false, "/")); r.Code == 0 {
		t.Errorf("stopped with on_stop: block: %v", r)
	}
	must(t, m, "guard", "off")
}

// TestGuardCommand shows status, on and off, without any daemon.
func TestGuardCommand(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, true)
	before := l.Snapshot(t)
	m := l.Mprox(t)
	status := func() (st struct {
		Active         bool
		Owner          string
		Contexts       []struct{ Name, Mode string }
		DroppedPackets uint64 `json:"dropped_packets"`
	},
	) {
		t.Helper()
		if err := json.Unmarshal([]byte(must(t, m, "guard", "status", "-o", "json")), &st); err != nil {
			t.Error(err)
		}
		return st
	}
	if st := status(); st.Active || st.Owner != "" || len(st.Contexts) != 0 {
		t.Errorf("at first: %+v", st)
	}
	m.WriteConfig(globalConfig(s, ""))
	must(t, m, "guard", "on", "-c", m.ConfigPath())
	if st := status(); !st.Active || st.Owner != "" || len(st.Contexts) != 1 || st.Contexts[0].Mode != "global" {
		t.Errorf("on: %+v", st)
	}
	cp := l.Capture(t)
	l.Client.Probe(lab.Probes())
	lab.Allow{Direct: lab.LANPrefixes}.Check(t, cp.Packets())
	if st := status(); st.DroppedPackets == 0 {
		t.Errorf("nothing was dropped: %+v", st)
	}
	m.Up("-c", m.ConfigPath())
	checkProxied(t, l)
	if st := status(); !st.Active || st.Owner == "" {
		t.Errorf("with a daemon: %+v", st)
	}
	if r := m.CLI("guard", "off"); r.Code != 6 {
		t.Errorf("off while the daemon lives: %v", r)
	}
	m.Kill()
	must(t, m, "guard", "off")
	if d := before.Diff(l.Snapshot(t)); d != "" {
		t.Errorf("left behind:\n%s", d)
	}
}
