// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"context"
	"errors"
	"io"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mutex-proxy/mutex/dialers/dialertest"
	"github.com/mutex-proxy/mutex/flow"
)

// hanging is a server whose next request is answered as next says; the kernel acknowledges all.
type hanging struct {
	*dialertest.Server
	next     atomic.Pointer[func(*dialertest.Conv) error] // nil = well
	requests atomic.Int32
	left     atomic.Int32 // connections that the client has ended
}

// hangingServer is one of a protocol, with the dialer that keeps one connection to it ready and has used the first.
func hangingServer(t *testing.T, protocol, options string) (*hanging, flow.Dialer) {
	t.Helper()
	h := new(hanging)
	answer := map[string]string{"socks5": first5, "socks4": first4, "http": "HTTP/1.1 200 OK\r\n\r\n"}[protocol]
	steps := map[string][]dialertest.Step{
		"socks5": {dialertest.Read(3), dialertest.Send(greet5), dialertest.Read(10)}, "socks4": {dialertest.Read(9)}, "http": {dialertest.ReadHead()},
	}[protocol]
	h.Server = dialertest.Start(t, append(steps, func(c *dialertest.Conv) error {
		h.requests.Add(1)
		defer h.left.Add(1)
		if next := h.next.Swap(nil); next != nil {
			if err := (*next)(c); err != nil {
				return err
			}
		}
		if _, err := io.WriteString(c, answer); err != nil {
			return err
		}
		return dialertest.Silent()(c)
	})...)
	d := warmDialer(t, protocol+"://"+h.Addr.String()+"?warm=2"+options)
	mustDial(t, d)
	return h, d
}

func (h *hanging) will(f func(*dialertest.Conv) error) { h.next.Store(&f) }

// hang says nothing more until the client has had enough.
func hang(c *dialertest.Conv) error {
	_ = dialertest.Silent()(c)
	return io.EOF
}

// warmOf returns the warm connections of an upstream, which are patient for the time given.
func warmOf(d flow.Dialer, patient time.Duration) *warm {
	var w *warm
	switch d := d.(type) {
	case *SOCKS5:
		w = d.warm
	case *SOCKS4:
		w = d.warm
	case *HTTP:
		w = d.warm
	}
	w.first = patient
	return w
}

// TestWarmHangs: a server that acknowledges and never answers on a connection that was ready costs a flow the usual time, and not all it has.
// The server is asked once more, on a new connection, and the flow sees one. Others that were made at that time are not tried.
func TestWarmHangs(t *testing.T) {
	for _, protocol := range []string{"socks5", "socks4", "http"} {
		t.Run(protocol, func(t *testing.T) {
			h, d := hangingServer(t, protocol, "")
			w := warmOf(d, short)
			ready(t, d, 2)
			h.will(hang)
			begin := time.Now()
			mustDial(t, d) // has 10 s
			if took := time.Since(begin); took < short || took > 5*time.Second {
				t.Errorf("took %v", took)
			}
			if got := h.requests.Load(); got != 3 {
				t.Errorf("%d requests of two flows", got)
			}
			waitFor(t, "the one that hangs to be ended", func() bool { return h.left.Load() == 1 })
			if st := StatusOf(d); st.Active != 2 || st.Total != 2 || st.Errors != 0 || !st.Up || st.Warm != 0 {
				t.Errorf("%+v", st)
			}
			w.mu.Lock()
			pause := w.pause
			w.mu.Unlock()
			if pause != warmPause {
				t.Errorf("new ones after %v", pause)
			}
		})
	}
}

// TestWarmSlow: the first answer counts, whichever connection it comes by, and what it says.
func TestWarmSlow(t *testing.T) {
	t.Run("that was ready", func(t *testing.T) {
		h, d := hangingServer(t, "socks5", "")
		warmOf(d, short/10)
		ready(t, d, 2)
		h.will(func(*dialertest.Conv) error { // once the new connection has been asked, which hangs, this one answers
			h.will(hang)
			for h.requests.Load() < 3 {
				<-time.After(time.Millisecond)
			}
			return nil
		})
		mustDial(t, d)
		waitFor(t, "the new one to be ended", func() bool { return h.left.Load() == 1 })
		if st := StatusOf(d); st.Active != 2 || st.Errors != 0 {
			t.Errorf("%+v", st)
		}
	})
	for name, hangs := range map[string]bool{"refused on the new one": true, "refused on the one that was ready": false} {
		t.Run(name, func(t *testing.T) {
			h, d := hangingServer(t, "socks5", "")
			warmOf(d, short/10)
			ready(t, d, 2)
			refuse := func(c *dialertest.Conv) error {
				for h.requests.Load() < 3 {
					<-time.After(time.Millisecond)
				}
				_, _ = io.WriteString(c, "\x05\x05\x00\x01\x00\x00\x00\x00\x00\x00")
				return io.EOF
			}
			first, second := hang, refuse
			if !hangs {
				first, second = refuse, hang
			}
			h.will(func(c *dialertest.Conv) error { h.will(second); return first(c) })
			begin := time.Now()
			if _, err := d.Dial(testContext(t), addr(t, "192.0.2.7:21")); !errors.Is(err, flow.ErrRefused) || strings.Count(err.Error(), "socks5 ") != 1 {
				t.Errorf("%v", err)
			}
			if took := time.Since(begin); took > 5*time.Second {
				t.Errorf("took %v", took)
			}
			if st := StatusOf(d); st.Active != 1 || st.Errors != 0 || h.requests.Load() != 3 {
				t.Errorf("%+v, %d requests", st, h.requests.Load())
			}
		})
	}
}

// TestWarmHangsBounded: without a place for a second connection there is none, and a flow that ends while both are asked leaves neither.
func TestWarmHangsBounded(t *testing.T) {
	t.Run("max_flows", func(t *testing.T) {
		h, d := hangingServer(t, "socks4", "&max_flows=2")
		warmOf(d, short/10)
		ready(t, d, 1)
		h.will(func(*dialertest.Conv) error { <-time.After(short); return nil })
		mustDial(t, d)
		if got := h.requests.Load(); got != 2 || h.Accepted() != 2 {
			t.Errorf("%d requests on %d connections", got, h.Accepted())
		}
	})
	t.Run("given up", func(t *testing.T) {
		h, d := hangingServer(t, "http", "")
		w := warmOf(d, short/10)
		ready(t, d, 2)
		h.will(func(c *dialertest.Conv) error { h.will(hang); return hang(c) })
		ctx, cancel := context.WithCancelCause(t.Context())
		go func() {
			for h.requests.Load() < 3 {
				<-time.After(time.Millisecond)
			}
			cancel(errGone)
		}()
		if _, err := d.Dial(ctx, addr(t, "192.0.2.7:21")); !errors.Is(err, errGone) || errors.Is(err, flow.ErrUpstream) {
			t.Errorf("%v", err)
		}
		waitFor(t, "both to be ended", func() bool { return h.left.Load() == 2 })
		w.mu.Lock()
		pause := w.pause
		w.mu.Unlock()
		if st := StatusOf(d); st.Active != 1 || pause != 0 {
			t.Errorf("%+v, pause %v", st, pause)
		}
	})
}

// TestWarmPatience: what is usual is known after some answers, within bounds.
func TestWarmPatience(t *testing.T) {
	w := &warm{first: warmPatience}
	for _, tt := range []struct{ answers, want time.Duration }{
		{0, warmPatience}, {time.Millisecond, minWarmPatience}, {400 * time.Millisecond, 448 * time.Millisecond}, {time.Minute, maxStagger},
	} {
		for range 2 * maxSamples {
			if tt.answers > 0 {
				w.worked(tt.answers)
			}
		}
		if got := w.patience(); got != tt.want {
			t.Errorf("with answers after %v: %v, want %v", tt.answers, got, tt.want)
		}
	}
}
