// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"fmt"
	"math"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/e2e/lab"
)

// times is a number of the environment, for the long version of a test, or the default.
func times(t *testing.T, env string, otherwise int) int {
	t.Helper()
	s := os.Getenv(env)
	if s == "" {
		return otherwise
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 {
		t.Fatalf("%s=%q", env, s)
	}
	return n
}

// paths counts the flows by the way that their bytes take.
func paths(m *lab.Mprox) (kernel, netstack int, why map[string]int) {
	why = map[string]int{}
	for _, f := range m.Flows() {
		switch f.Path {
		case "kernel":
			kernel++
		case "netstack":
			netstack++
			why[f.PathReason]++
		}
	}
	return kernel, netstack, why
}

// TestDescriptors: where a process may have few open files, flows that need one descriptor instead of two come in; and when there is none left
// at all, the longest idle flow makes room, as in a full table. No new connection fails for it.
func TestDescriptors(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Microsocks(t, 1082)
	m := l.Mprox(t)
	m.WriteConfig(globalConfig(s, `"dns": { "mode": "off" },`))
	const limit, above = 1000, 1000 / 16 * 15
	m.StartCommand(l.Client.Command(append([]string{"prlimit", fmt.Sprintf("--nofile=%d", limit)}, m.Args("up", "-c", m.ConfigPath())...)...))
	m.WaitReady()
	files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", m.PID()))
	if err != nil {
		t.Fatal(err)
	}
	c := l.Crowd(t)
	n := (above-len(files))/2 + 8
	c.Must(lab.CrowdTask{Conns: n, Workers: 8, Hold: true})
	kernel, netstack, why := paths(m)
	t.Logf("%d in the kernel, %d in netstack: %v", kernel, netstack, why)
	if kernel < n*3/4 || netstack == 0 || kernel+netstack != n || why["few file descriptors are left"] != netstack {
		t.Errorf("%d flows in the kernel, %d in netstack, because of %v", kernel, netstack, why)
	}
	c.Must(lab.CrowdTask{Conns: n, Workers: 8, Hold: true})
	kernel, netstack, _ = paths(m)
	if sum := kernel + netstack; sum < n/2 || sum >= 2*n {
		t.Errorf("%d flows with %d descriptors", sum, limit)
	}
	if !strings.Contains(m.Log.String(), "file descriptors ran out") {
		t.Error("nothing in the log says why flows have ended")
	}
	sayWhy(t, m)
	c.Do(lab.CrowdTask{Leave: true})
}

// TestShortConnections opens, uses and closes connections one after the other as fast as it goes; none may fail. The long version,
// MPROX_SHORT=1000000, takes minutes.
func TestShortConnections(t *testing.T) {
	t.Parallel()
	n := times(t, "MPROX_SHORT", 3000)
	eachPath(t, func(t *testing.T, l *lab.Lab, m *lab.Mprox) {
		t.Helper()
		// A port of an ended connection is not free for a minute otherwise: 28,000 connections on, each connect looks at all of them, and this is
		// about the ports being reused.
		for _, ns := range []*lab.NS{l.Client, l.Proxy} {
			if err := ns.Sysctl(map[string]string{"net/ipv4/tcp_tw_reuse": "1"}); err != nil {
				t.Fatal(err)
			}
		}
		c := l.Crowd(t)
		for left := n; left > 0 && !t.Failed(); {
			part := min(left, 20_000)
			r := c.Must(lab.CrowdTask{Conns: part, Workers: 64})
			left -= part
			lab.Progress("%s: %d left, %.0f a second, slowest %v, %d KB", t.Name(), left, float64(part)/r.Took.Seconds(), r.Slowest.Round(time.Millisecond), m.RSS()>>10)
		}
		lab.Eventually(t, lab.Patience, "all flows have ended", func() bool { return m.Status().Contexts[0].FlowsActive == 0 })
		if s := m.Status().Contexts[0]; s.FlowsTotal != uint64(n) {
			t.Errorf("%d flows for %d connections", s.FlowsTotal, n)
		}
		sayWhy(t, m)
	})
}

// TestBurst opens 3,000 connections at the same moment. All complete; with MPROX_SOAK, on a machine that does nothing else, within twice the
// time that the same takes without a proxy and the time that the upstream takes for as many. Elsewhere the others' share of the machine
// decides such a ratio, so that the best of some bursts is held to a wider one.
func TestBurst(t *testing.T) {
	const n = 3000
	l := lab.New(t, lab.Options{})
	s := l.Microsocks(t, 1082)
	c := l.Crowd(t)
	// The first time, neighbours are looked up and buffers made.
	var plain, upstream lab.CrowdResult
	for range 2 {
		plain = c.Must(lab.CrowdTask{Conns: n, Workers: n})
		upstream = c.Must(lab.CrowdTask{Conns: n, Workers: n, Via: s.Addr.String(), Pass: s.Pass})
	}
	limit := 3 * (plain.Took + upstream.Took)
	if soak() {
		limit = 2*plain.Took + upstream.Took
	}
	m := l.Mprox(t)
	m.UpConfig(globalConfig(s, `"dns": { "mode": "off" },`))
	best := time.Duration(math.MaxInt64)
	for try := 0; try < 6 && (try < 2 || best > limit); try++ {
		best = min(best, c.Must(lab.CrowdTask{Conns: n, Workers: n}).Took)
	}
	t.Logf("%d at once: %v without a proxy, %v the upstream alone, %v through mprox", n, plain.Took, upstream.Took, best)
	if best > limit {
		t.Errorf("%v, more than %v", best, limit)
	}
	sayWhy(t, m)
}

// sayWhy shows what the daemon's log says of flows that failed, each kind once.
func sayWhy(t *testing.T, m *lab.Mprox) {
	t.Helper()
	seen := map[string]int{}
	for line := range strings.SplitSeq(m.Log.String(), "\n") {
		if strings.Contains(line, `"result": "failed"`) {
			_, why, _ := strings.Cut(line, `"error": `)
			seen[why]++
		}
	}
	if len(seen) > 0 {
		t.Logf("flows failed: %v", seen)
	}
}

// fileLimit is how many files a process may have open.
func fileLimit(t *testing.T) uint64 {
	t.Helper()
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		t.Fatal(err)
	}
	return l.Cur
}

// TestIdleFlows holds many connections open. Each may take 16 KB and, adopted, two descriptors and no goroutine but its own.
func TestIdleFlows(t *testing.T) {
	t.Parallel()
	n := times(t, "MPROX_IDLE", 1500)
	// Above this, flows are not adopted any more, or end: TestDescriptors.
	if most := int(fileLimit(t)/16*15-200) / 2; n > most {
		t.Logf("%d flows instead of %d: no more descriptors may be open here", most, n)
		n = most
	}
	l := lab.New(t, lab.Options{})
	m := l.Mprox(t)
	m.UpConfig(crowdConfig(t, l, "auto"))
	c := l.Crowd(t)
	c.Must(lab.CrowdTask{Conns: 100, Workers: 64}) // what is made once
	if !lab.CanAdopt() {
		t.Skip("flows are not adopted in this run")
	}
	lab.Eventually(t, lab.Patience, "no flows", func() bool { return len(m.Flows()) == 0 })
	goroutines, fds, rss := metric(t, l, "go_goroutines"), metric(t, l, "process_open_fds"), m.RSS()
	c.Must(lab.CrowdTask{Conns: n, Workers: 64, Hold: true})
	kernel, netstack, why := paths(m)
	const limit = 16 << 10
	var each int64
	lab.Poll(lab.Patience, func() bool { // the garbage of a burst goes back to the kernel when the burst is over
		each = (m.RSS() - rss) / int64(n)
		return each <= limit
	})
	perFlow := (metric(t, l, "process_open_fds") - fds - float64(netstack)) / float64(kernel)
	gs := metric(t, l, "go_goroutines") - goroutines
	t.Logf("%d in the kernel, %d in netstack (%v): %d bytes, %.3f descriptors, %.3f goroutines each", kernel, netstack, why, each, perFlow, gs/float64(n))
	if kernel+netstack != n || kernel < n {
		t.Errorf("%d flows in the kernel, %d in netstack", kernel, netstack)
	}
	if each > limit {
		t.Errorf("%d bytes a connection, more than %d", each, limit)
	}
	const idlePipes = 2 * 2 * 16 // of the workers
	if perFlow > 2+float64(idlePipes)/float64(kernel) {
		t.Errorf("%.2f descriptors a flow", perFlow)
	}
	if gs > float64(n)+70 {
		t.Errorf("%.0f goroutines for %d flows", gs, n)
	}
	c.Do(lab.CrowdTask{Leave: true})
}
