// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"context"
	"errors"
	"net/netip"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/mutex-proxy/mutex/flow"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// short bounds waits that are expected to end by themselves, or that must end by their deadline.
const short = 100 * time.Millisecond

func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// hostileContext is for a server whose conversation ends as reason says: soon, where only time ends it, and else in a time that does not matter.
func hostileContext(t *testing.T, reason flow.Reason) context.Context {
	t.Helper()
	if reason != flow.ReasonTimeout {
		return testContext(t)
	}
	ctx, cancel := context.WithTimeout(t.Context(), short)
	t.Cleanup(cancel)
	return ctx
}

func spec(t *testing.T, raw string) Spec {
	t.Helper()
	s, err := ParseURL(raw)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func dialer(t *testing.T, raw string) flow.Dialer {
	t.Helper()
	d, err := New("up", spec(t, raw), NewNet(NetConfig{}))
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func addr(t *testing.T, s string) flow.Addr {
	t.Helper()
	a, err := ParseAddr(s)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// waitFor waits until cond holds.
func waitFor(t *testing.T, what string, cond func() bool) {
	t.Helper()
	tick := time.NewTicker(50 * time.Microsecond)
	defer tick.Stop()
	end := time.Now().Add(10 * time.Second)
	for !cond() {
		if <-tick.C; time.Now().After(end) {
			t.Fatal("waited in vain for " + what)
		}
	}
}

// wants is what an error shall be: the reason for the application, and whether the upstream is to blame.
func wantError(t *testing.T, err error, reason flow.Reason, upstream bool) {
	t.Helper()
	if err == nil {
		t.Fatal("no error")
	}
	if got := flow.ReasonOf(err); got != reason {
		t.Errorf("reason %v, want %v: %v", got, reason, err)
	}
	if got := errors.Is(err, flow.ErrUpstream); got != upstream {
		t.Errorf("blames the upstream: %v, want %v: %v", got, upstream, err)
	}
}

var loopback = netip.AddrFrom4([4]byte{127, 0, 0, 1})
