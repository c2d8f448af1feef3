// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"fmt"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mutex-proxy/mutex/e2e/lab"
)

// TestDeviceDeleted deletes the TUN device under a daemon that captures: it is back within a second, connections live on, and no packet leaves past
// the upstream at any moment.
func TestDeviceDeleted(t *testing.T) {
	for _, offload := range []string{"auto", "off"} {
		t.Run("offload "+offload, func(t *testing.T) {
			t.Parallel()
			w := newWire(t, offload, lab.Options{})
			cp := w.Capture(t)
			defer func() { upstreamOnly(w.s).Check(t, cp.Packets()) }()
			pairs := w.openBoth(t)
			whole := noIndexes(w.Snapshot(t))
			lose := [][]string{
				{"ip", "link", "del", "mprox0"},
				{"ip", "link", "set", "mprox0", "name", "other0"}, // its reader does not notice
				{"ip", "link", "del", "mprox0"},
			}
			for _, args := range lose {
				w.Client.Run(t, args...)
				began := time.Now()
				if !lab.Poll(lab.Patience, func() bool { return w.m.CLI("healthcheck").Code == 0 && proxiedNow(w.Lab) }) {
					t.Fatalf("the device is not put back: %v", w.m.CLI("healthcheck"))
				}
				if took := time.Since(began); took > 2*time.Second { // the machine that runs the tests is busy
					t.Errorf("put back after %v", took)
				}
			}
			for _, p := range pairs {
				stream(t, p[0], p[1], func() {})
				w.check(t, p[0], p[1])
			}
			if diff := ""; !lab.Poll(lab.Patience, func() bool { diff = whole.Diff(noIndexes(w.Snapshot(t))); return diff == "" }) {
				t.Errorf("not as before:\n%s", diff)
			}
			if r := w.m.CLI("reload"); r.Code != 0 {
				t.Errorf("reload: %v", r)
			}
			log := w.m.Log.String()
			if n := strings.Count(log, "was deleted by somebody"); n != 3 {
				t.Errorf("logged %d times, want 3", n)
			}
			if strings.Contains(log, "kernel state not repaired") {
				t.Error("a repair has failed")
			}
		})
	}
}

// noIndexes leaves the indexes of devices out: a device that was made again has another one.
func noIndexes(s lab.Snapshot) lab.Snapshot {
	for _, key := range []string{"link", "addr"} {
		for i, line := range s[key] {
			_, s[key][i], _ = strings.Cut(line, ": ")
		}
	}
	return s
}

// proxiedNow reports whether a new connection gets an answer.
func proxiedNow(l *lab.Lab) bool {
	c, err := l.Client.Dial("tcp", netip.AddrPortFrom(lab.OriginV4, lab.PortEcho).String(), 300*time.Millisecond)
	if err != nil {
		return false
	}
	c.Close()
	return true
}

// TestDeviceNameTaken puts somebody else's device in the place of the one that was deleted: what is captured stays closed, healthcheck says so,
// other changes go on, and as soon as the name is free the device is back.
func TestDeviceNameTaken(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, false)
	m := l.Mprox(t)
	m.UpConfig(fmt.Sprintf(`{ "upstreams": { "p": { "url": %q } }, "contexts": { "default": { "mode": "global", "default": "p" } } }`, s.URL()))
	checkProxied(t, l)
	cp := l.Capture(t)
	defer func() { upstreamOnly(s).Check(t, cp.Packets()) }()
	stop := func(sig syscall.Signal) {
		if err := syscall.Kill(m.PID(), sig); err != nil {
			t.Fatal(err)
		}
	}
	stop(syscall.SIGSTOP) // or the daemon would be as fast as ip
	l.Client.Run(t, "ip", "link", "del", "mprox0")
	l.Client.Run(t, "ip", "link", "add", "mprox0", "type", "veth", "peer", "name", "other0")
	stop(syscall.SIGCONT)
	lab.Eventually(t, lab.Patience, "healthcheck fails", func() bool { return m.CLI("healthcheck").Code == 7 })
	if r := m.CLI("healthcheck"); !strings.Contains(r.Stdout+r.Stderr, "device:default") || !strings.Contains(r.Stdout, "mprox0") {
		t.Errorf("healthcheck: %v", r)
	}
	if proxiedNow(l) {
		t.Error("a connection without the device")
	}
	if r := m.CLI("reload"); r.Code != 0 {
		t.Errorf("reload: %v", r)
	}
	must(t, m, "contexts", "add", "work", "--default", "p", "--uid", "4001")
	if proxiedNow(l) {
		t.Error("a connection without the device")
	}
	l.Client.Run(t, "ip", "link", "del", "mprox0")
	lab.Eventually(t, lab.Patience, "the device is back", func() bool { return proxiedNow(l) && m.CLI("healthcheck").Code == 0 })
	checkProxied(t, l)
	if n := strings.Count(m.Log.String(), "cannot be made again"); n == 0 || n > 2 {
		t.Errorf("the failure was logged %d times", n)
	}
}
