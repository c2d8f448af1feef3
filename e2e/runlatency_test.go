// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/mutex-proxy/mutex/e2e/lab"
)

// TestRunFirstPacket measures how much later a command sends its first packet when `mprox run` starts it, with a daemon: at best within 30 ms. The
// median depends on what else the machine does, and is logged.
func TestRunFirstPacket(t *testing.T) {
	t.Parallel()
	const rounds = 15
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, true)
	m := l.Mprox(t)
	m.UpConfig(fmt.Sprintf(`{ "upstreams": { "p": { "url": %q } }, "contexts": { "work": { "mode": "cgroup", "default": "p" } } }`, s.URL()))
	// The time right after the first packet, in microseconds.
	command := []string{"bash", "-c", fmt.Sprintf("echo x > /dev/udp/%s/%d; echo ${EPOCHREALTIME/[.,]/}", lab.OriginV4, lab.PortEcho)}
	first := func(run bool) time.Duration {
		cmd := l.Client.Command(command...)
		if run {
			cmd = m.Command(append([]string{"run", "--context", "work", "--"}, command...)...)
		}
		began := time.Now()
		r := lab.Exec(t, cmd)
		us, err := strconv.ParseInt(strings.TrimSpace(r.Stdout), 10, 64)
		if err != nil {
			t.Fatal(r)
		}
		return time.UnixMicro(us).Sub(began)
	}
	var alone, through []time.Duration
	for range rounds {
		alone, through = append(alone, first(false)), append(through, first(true))
	}
	slices.Sort(alone)
	slices.Sort(through)
	t.Logf("first packet: alone %s at best, %s p50; by mprox run %s at best, %s p50", alone[0], alone[rounds/2], through[0], through[rounds/2])
	if d := through[0] - alone[0]; d > 30*time.Millisecond {
		t.Errorf("%s later at best, want 30 ms at most", d)
	}
}
