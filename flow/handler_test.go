// SPDX-License-Identifier: GPL-3.0-or-later

package flow

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// tcpRig is a flow in progress: what the test holds of the application and of the upstream.
type tcpRig struct {
	*rig
	p       *pending
	app, up *memConn // the far ends
	dialled chan Addr
	via     *dialer
	done    chan struct{}
}

// start runs a flow to orig through a dialer whose Dial succeeds.
func startTCP(t *testing.T, r *rig, orig netip.AddrPort) *tcpRig {
	t.Helper()
	x := &tcpRig{rig: r, done: make(chan struct{}), dialled: make(chan Addr, 1)}
	var appIn, upIn *memConn
	x.app, appIn = memPipe()
	x.up, upIn = memPipe()
	x.p = &pending{accept: func() (Conn, error) { return appIn, nil }}
	x.via = &dialer{name: "up", dial: func(_ context.Context, a Addr) (Conn, error) {
		x.dialled <- a
		if x.p.accepted.Load() {
			t.Error("accepted before the upstream answered")
		}
		return upIn, nil
	}}
	r.SetDecider(always(Forward, x.via))
	go func() {
		defer close(x.done)
		r.TCP(t.Context(), appAddr, orig, x.p)
	}()
	return x
}

func TestTCPLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, nil)
		x := startTCP(t, r, webAddr)
		mustWrite(t, x.app, "hello")
		mustRead(t, x.up, "hello")
		mustWrite(t, x.up, "welcome")
		mustRead(t, x.app, "welcome")
		synctest.Wait()
		if s := r.table.Snapshot(); len(s) != 1 || s[0].State != StateEstablished || s[0].BytesUp != 5 || s[0].BytesDown != 7 {
			t.Errorf("while it runs: %+v", s)
		}
		_ = x.app.CloseWrite()
		mustEOF(t, x.up)
		synctest.Wait()
		if s := r.table.Snapshot(); len(s) != 1 || s[0].State != StateClosing {
			t.Errorf("half-closed: %+v", s)
		}
		mustWrite(t, x.up, "bye")
		_ = x.up.Close()
		mustRead(t, x.app, "bye")
		mustEOF(t, x.app)
		<-x.done
		line := r.line(t)
		for k, want := range map[string]any{
			"result": "ok", "upstream": "up", "rule": "default", "bytes_up": uint64(5), "bytes_down": uint64(10), "dst": webAddr.String(),
		} {
			if line[k] != want {
				t.Errorf("log: %s is %v, want %v", k, line[k], want)
			}
		}
		if d := cmp.Diff([]string{"tcp up ok"}, r.rec.ended); d != "" {
			t.Error(d)
		}
		if len(r.rec.connected) != 1 || len(r.rec.errors) != 0 || x.p.calls.Load() != 1 {
			t.Errorf("%+v, %d calls of Pending", r.rec, x.p.calls.Load())
		}
	})
}

// What an application is told of each way not to get through.
func TestTCPRefusals(t *testing.T) {
	for name, c := range map[string]struct {
		decider Decider
		orig    netip.AddrPort
		names   Names
		reason  Reason
		result  string
		logged  string // the reason field
	}{
		"no rules yet":        {nil, webAddr, nil, ReasonRefused, ResultBlocked, ""},
		"block":               {always(Block, nil), webAddr, nil, ReasonRefused, ResultBlocked, ""},
		"unknown action":      {always(200, nil), webAddr, nil, ReasonRefused, ResultBlocked, ""},
		"forward nowhere":     {always(Forward, nil), webAddr, nil, ReasonRefused, ResultBlocked, ""},
		"drop":                {always(Drop, nil), webAddr, nil, ReasonDrop, ResultDropped, ""},
		"sniff, no sniffer":   {always(Sniff, nil), webAddr, nil, ReasonRefused, ResultBlocked, ""},
		"resolve, no dns":     {always(Resolve, nil), webAddr, nil, ReasonRefused, ResultBlocked, ""},
		"fake ip, no name":    {always(Forward, failing(nil)), fakeAddr, &names{}, ReasonHostUnreachable, ResultFailed, "host_unreachable"},
		"refused":             {always(Forward, failing(ErrRefused)), webAddr, nil, ReasonRefused, ResultFailed, "refused"},
		"refused by kernel":   {always(Forward, failing(unix.ECONNREFUSED)), webAddr, nil, ReasonRefused, ResultFailed, "refused"},
		"net unreachable":     {always(Forward, failing(ErrNetUnreachable)), webAddr, nil, ReasonNetUnreachable, ResultFailed, "net_unreachable"},
		"prohibited":          {always(Forward, failing(ErrProhibited)), webAddr, nil, ReasonProhibited, ResultFailed, "prohibited"},
		"upstream refuses us": {always(Forward, failing(fmt.Errorf("%w: %w", ErrUpstream, unix.ECONNREFUSED))), webAddr, nil, ReasonHostUnreachable, ResultFailed, "host_unreachable"},
		"who knows":           {always(Forward, failing(errors.New("?"))), webAddr, nil, ReasonHostUnreachable, ResultFailed, "host_unreachable"},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, func(h *HandlerConfig, _ *TableConfig) { h.Names = c.names })
			if c.decider != nil {
				r.SetDecider(c.decider)
			}
			p := &pending{}
			r.TCP(t.Context(), appAddr, c.orig, p)
			if p.accepted.Load() || p.calls.Load() != 1 || p.reason != c.reason {
				t.Errorf("accepted %v, %d calls, reason %v, want %v", p.accepted.Load(), p.calls.Load(), p.reason, c.reason)
			}
			line := r.line(t)
			if line["result"] != c.result || c.logged != "" && line["reason"] != c.logged || c.logged == "" && line["reason"] != nil {
				t.Errorf("logged %v", line)
			}
		})
	}
}

func TestTCPDialTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, func(h *HandlerConfig, _ *TableConfig) { h.Tuning.DialTimeout = 3 * time.Second })
		r.SetDecider(always(Forward, &dialer{name: "up", dial: func(ctx context.Context, _ Addr) (Conn, error) {
			<-ctx.Done()
			return nil, fmt.Errorf("dial: %w", ctx.Err())
		}}))
		p := &pending{}
		begin := time.Now()
		r.TCP(t.Context(), appAddr, webAddr, p)
		if took := time.Since(begin); took != 3*time.Second || p.reason != ReasonTimeout {
			t.Errorf("%v after %v", p.reason, took)
		}
		if d := cmp.Diff([]string{"up timeout"}, r.rec.errors); d != "" {
			t.Error(d)
		}
	})
}

// Dials beyond the bound wait for their turn within their own time-out.
func TestDialsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, nil)
		r.SetDecider(always(Forward, failing(ErrRefused)))
		for range maxDials {
			r.dials <- struct{}{}
		}
		p := &pending{}
		r.TCP(t.Context(), appAddr, webAddr, p)
		if p.reason != ReasonTimeout {
			t.Errorf("reason %v", p.reason)
		}
		<-r.dials
		q := &pending{}
		r.TCP(t.Context(), appAddr, webAddr, q)
		if q.reason != ReasonRefused {
			t.Errorf("reason %v", q.reason)
		}
	})
}

func TestTCPApplicationGoneBeforeAccept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, nil)
		far, near := memPipe()
		r.SetDecider(always(Forward, &dialer{name: "up", dial: func(context.Context, Addr) (Conn, error) { return near, nil }}))
		r.TCP(t.Context(), appAddr, webAddr, &pending{accept: func() (Conn, error) { return nil, errors.New("gone") }})
		if _, err := far.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("the upstream sees %v, want a reset", err)
		}
		if line := r.line(t); line["result"] != ResultFailed {
			t.Error(line)
		}
	})
}

// A fake IP's name is what is dialled, and is held for as long as the flow lives.
func TestTCPFakeIP(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &names{fake: map[netip.Addr]string{fakeAddr.Addr(): "example.com"}}
		r := newRig(t, func(h *HandlerConfig, _ *TableConfig) { h.Names = n })
		x := startTCP(t, r, fakeAddr)
		synctest.Wait()
		if d := cmp.Diff(Addr{Host: "example.com", Port: 443}, <-x.dialled, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); d != "" {
			t.Error(d)
		}
		if n.holds(fakeAddr.Addr()) != 1 {
			t.Errorf("held %d times, want 1", n.holds(fakeAddr.Addr()))
		}
		x.app.Abort()
		<-x.done
		if n.holds(fakeAddr.Addr()) != 0 {
			t.Error("still held after the flow's end")
		}
		if line := r.line(t); line["host"] != "example.com" || line["result"] != ResultReset {
			t.Error(line)
		}
	})
}

// owner counts look-ups.
type owner struct{ n atomic.Int32 }

func (o *owner) Fast() bool { return false }

func (o *owner) Lookup(Network, netip.AddrPort, netip.AddrPort) (App, error) {
	o.n.Add(1)
	return App{PID: 7, Method: "test"}, nil
}

func TestOwnerIsAskedOnlyIfNeeded(t *testing.T) {
	for _, needs := range []Needs{0, NeedPayload, NeedApp} {
		o := &owner{}
		r := newRig(t, func(h *HandlerConfig, _ *TableConfig) { h.Owner = o })
		var pid int
		r.SetDecider(decider{needs: needs, decide: func(f *Flow) Decision { pid = f.App.PID; return Decision{} }})
		r.TCP(t.Context(), appAddr, webAddr, &pending{})
		want := 0
		if needs == NeedApp {
			want = 7
		}
		if pid != want || (o.n.Load() == 1) != (want == 7) {
			t.Errorf("needs %d: pid %d, %d look-ups", needs, pid, o.n.Load())
		}
	}
}

// A reload that happens while a flow is being decided must not miss it.
func TestRulesSwappedDuringDecision(t *testing.T) {
	r := newRig(t, nil)
	p := &pending{}
	r.SetDecider(decider{decide: func(*Flow) Decision {
		r.SetDecider(always(Block, nil)) // and KillIf finds nothing yet
		return Decision{Action: Forward, Via: failing(nil)}
	}})
	r.TCP(t.Context(), appAddr, webAddr, p)
	if p.reason != ReasonRefused || r.line(t)["result"] != ResultBlocked {
		t.Errorf("reason %v, %v", p.reason, r.line(t))
	}
}

func TestKilledFlowsReset(t *testing.T) {
	for name, c := range map[string]struct {
		kill   func(r *rig)
		result string
	}{
		"kill":     {func(r *rig) { r.table.Kill(r.table.Snapshot()[0].ID) }, ResultKilled},
		"reload":   {func(r *rig) { r.table.KillIf(ErrRules, func(*Info) bool { return true }) }, ResultReloaded},
		"disable":  {func(r *rig) { r.table.KillIf(ErrDisabled, func(*Info) bool { return true }) }, ResultKilled},
		"shutdown": {func(r *rig) { r.Close() }, ResultShutdown},
		"evict":    {func(r *rig) { r.table.evict(ErrEvicted) }, ResultEvicted},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, nil)
				x := startTCP(t, r, webAddr)
				mustWrite(t, x.app, "x")
				mustRead(t, x.up, "x")
				synctest.Wait()
				c.kill(r)
				<-x.done
				for side, conn := range map[string]*memConn{"application": x.app, "upstream": x.up} {
					if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
						t.Errorf("%s sees %v, want a reset", side, err)
					}
				}
				if line := r.line(t); line["result"] != c.result {
					t.Errorf("result %v, want %v", line["result"], c.result)
				}
			})
		})
	}
}

func TestCloseEndsDials(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, nil)
		r.SetDecider(always(Forward, &dialer{name: "up", dial: func(ctx context.Context, _ Addr) (Conn, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}}))
		p := &pending{}
		go r.TCP(t.Context(), appAddr, webAddr, p)
		synctest.Wait()
		r.Close()
		r.Close()
		if line := r.line(t); line["result"] != ResultShutdown || len(r.rec.errors) != 0 {
			t.Errorf("%v, upstream blamed: %v", line, r.rec.errors)
		}
		q := &pending{}
		r.TCP(t.Context(), appAddr, webAddr, q)
		if q.calls.Load() != 1 || q.accepted.Load() {
			t.Error("a flow after Close was not refused")
		}
	})
}

func TestFullTableEndsIdleFlow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, func(_ *HandlerConfig, c *TableConfig) { c.MaxFlows = 2 })
		a := startTCP(t, r, webAddr)
		synctest.Wait()
		<-time.After(time.Second)
		b := startTCP(t, r, webAddr)
		synctest.Wait()
		time.Sleep(time.Second)  //nolint:forbidigo // the bubble's clock
		mustWrite(t, a.app, "x") // now b is idle for longer
		mustRead(t, a.up, "x")
		synctest.Wait()
		c := startTCP(t, r, webAddr)
		<-b.done
		synctest.Wait()
		if line := r.line(t); line["result"] != ResultEvicted {
			t.Error(line)
		}
		mustWrite(t, a.app, "y")
		mustRead(t, a.up, "y")
		mustWrite(t, c.app, "z")
		mustRead(t, c.up, "z")
	})
}

// Where descriptors run out, the longest idle flow makes room for the new one, which is dialled again.
func TestNoDescriptorsEndsIdleFlow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, nil)
		old := startTCP(t, r, webAddr)
		synctest.Wait()
		<-time.After(time.Second)
		startTCP(t, r, webAddr)
		synctest.Wait()
		var tries atomic.Int32
		y := &tcpRig{rig: r}
		_, appIn := memPipe()
		upOut, upIn := memPipe()
		defer upOut.Close()
		y.p = &pending{accept: func() (Conn, error) { return appIn, nil }}
		r.SetDecider(always(Forward, &dialer{name: "up", dial: func(context.Context, Addr) (Conn, error) {
			if tries.Add(1) == 1 {
				return nil, fmt.Errorf("%w: %w", ErrUpstream, os.NewSyscallError("socket", unix.EMFILE))
			}
			return upIn, nil
		}}))
		go r.TCP(t.Context(), appAddr, webAddr, y.p)
		<-old.done
		<-time.After(time.Second)
		if tries.Load() != 2 || !y.p.accepted.Load() {
			t.Errorf("%d tries, accepted: %v", tries.Load(), y.p.accepted.Load())
		}
		if line := r.line(t); line["result"] != ResultEvicted || line["error"] != ErrShort.Error() {
			t.Error(line)
		}
	})
}

// sniffer knows one protocol.
type sniffer struct{ serverFirst uint16 }

func (s sniffer) ServerFirst(port uint16) bool { return port == s.serverFirst }

func (sniffer) Sniff(f *Flow, first []byte) (more bool) {
	if len(first) < 5 {
		return true
	}
	if string(first[:5]) == "HELLO" {
		f.Protocol, f.Confidence = "hello", ConfidenceCertain
	}
	return false
}

func TestSniff(t *testing.T) {
	for name, c := range map[string]struct {
		port   uint16
		says   []string
		want   string
		waits  time.Duration
		action Action
	}{
		"at once":      {80, []string{"HELLO world"}, "hello", 0, Forward},
		"in pieces":    {80, []string{"HE", "L", "LO world"}, "hello", 0, Forward},
		"other":        {80, []string{"GOODBYE"}, "unknown", 0, Forward},
		"silent":       {80, nil, "unknown", sniffTime, Forward},
		"server first": {25, nil, "unknown", 0, Forward},
		"then blocked": {80, []string{"HELLO"}, "hello", 0, Block},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, func(h *HandlerConfig, _ *TableConfig) { h.Sniffer = sniffer{25} })
				app, appIn := memPipe()
				up, upIn := memPipe()
				via := &dialer{name: "up", dial: func(context.Context, Addr) (Conn, error) { return upIn, nil }}
				var protocol string
				r.SetDecider(decider{decide: func(f *Flow) Decision {
					if f.Protocol == "" {
						return Decision{Action: Sniff}
					}
					protocol = f.Protocol
					return Decision{Action: c.action, Via: via}
				}})
				begin := time.Now()
				done := make(chan struct{})
				go func() {
					defer close(done)
					r.TCP(t.Context(), appAddr, netip.AddrPortFrom(webAddr.Addr(), c.port), &pending{accept: func() (Conn, error) { return appIn, nil }})
				}()
				all := ""
				for _, s := range c.says {
					mustWrite(t, app, s)
					synctest.Wait()
					all += s
				}
				if c.action == Block {
					<-done
					if _, err := app.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
						t.Errorf("the application sees %v, want a reset", err)
					}
				} else {
					mustWrite(t, up, "hi")
					mustRead(t, app, "hi")
					mustRead(t, up, all)
					if took := time.Since(begin); took != c.waits {
						t.Errorf("took %v, want %v", took, c.waits)
					}
					_ = app.Close()
					_ = up.Close()
					<-done
				}
				line := r.line(t)
				if protocol != c.want || line["handshake"] != HandshakeEarly {
					t.Errorf("protocol %q, want %q; %v", protocol, c.want, line)
				}
			})
		})
	}
}

func TestPendingOfTableFull(t *testing.T) {
	r := newRig(t, func(_ *HandlerConfig, c *TableConfig) { c.MaxFlows = 1 })
	e := mustAdd(t, r.table, func(error) {})
	e.giveSlot()
	r.table.slots.Add(1) // a slot held by a flow that cannot be ended
	p := &pending{}
	r.TCP(t.Context(), appAddr, webAddr, p)
	if p.reason != ReasonHostUnreachable || p.calls.Load() != 1 || r.table.Stats().Refused != 1 {
		t.Errorf("%v, %+v", p.reason, r.table.Stats())
	}
	r.table.slots.Add(-1)
	e.finish()
}
