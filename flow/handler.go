// SPDX-License-Identifier: GPL-3.0-or-later

package flow

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
)

// DefaultDialTimeout is how long an application is kept waiting for an upstream: well under the minute or two that a kernel's own connect
// takes, long enough for a lossy satellite link to get three SYNs through.
const DefaultDialTimeout = 10 * time.Second

// How many connections and associations are being opened at a time, for all flows of a context: a flood towards something that does not answer
// holds so many sockets, and the rest waits (within its own dial time-out). Datagrams from ever new ports cost their sender next to nothing, the
// proxy a connection each: connections have their turns to themselves, and find few of those before them in the proxy's queue.
const (
	maxDials  = 4096
	maxAssocs = 512
)

// ICMPMode says how echo requests are answered.
type ICMPMode uint8

// The ICMP modes.
const (
	ICMPHonest ICMPMode = iota // alive if a TCP connect through the upstream finds somebody
	ICMPDrop                   // silence
	ICMPReject                 // unreachable, without asking anybody
)

// HandlerConfig says what a Handler is made of.
type HandlerConfig struct {
	Context string
	Table   *Table
	Names   Names   // nil = dns off: flows have no names, and what should be resolved is blocked
	Owner   Owner   // nil = nobody is known
	Sniffer Sniffer // nil = a rule that needs payload blocks
	Tuning  Tuning
	Apart   string           // why the kernel can take over none of the flows that come here, PathContainer say; "" = it can
	Log     *zap.Logger      // nil = none
	Now     func() time.Time // nil = the table's
}

// Tuning is what may change while flows run. A change counts for what begins after it.
type Tuning struct {
	DialTimeout time.Duration // of one flow, all attempts of a pool together; 0 = DefaultDialTimeout
	ICMP        ICMPMode
	Offload     Offload // of flows whose rule says nothing; OffloadDefault is OffloadOff
}

// Handler is the life of every flow of one context. stack calls TCP, UDP and Echo, each from a goroutine of its own.
type Handler struct {
	cfg     HandlerConfig
	table   *Table
	names   Names
	rules   atomic.Pointer[ruleSet]
	tuning  atomic.Pointer[Tuning]
	dials   turns        // connections, while an upstream is being asked
	assocs  turns        // associations, likewise
	queries turns        // while a DNS query is being answered
	held    atomic.Int64 // bytes of datagrams that wait for an association or a name
	buffers *bufferPool
	crew    crew // uploads
	echo    echoCache

	wg     sync.WaitGroup
	mu     sync.Mutex
	closed bool
	lives  map[uint64]context.CancelCauseFunc // of every call that has not returned
	nextID uint64
}

// ruleSet is a Decider in force. It is a pointer of its own so that "the rules were swapped" is one comparison.
type ruleSet struct{ Decider }

// NewHandler returns a Handler that blocks everything until SetDecider.
func NewHandler(cfg HandlerConfig) *Handler {
	if cfg.Log == nil {
		cfg.Log = zap.NewNop()
	}
	if cfg.Table == nil {
		cfg.Table = NewTable(TableConfig{Context: cfg.Context, Log: cfg.Log, Now: cfg.Now})
	}
	if cfg.Now == nil {
		cfg.Now = cfg.Table.cfg.Now
	}
	h := &Handler{
		cfg: cfg, table: cfg.Table, names: cfg.Names,
		dials:   make(turns, maxDials),
		assocs:  make(turns, maxAssocs),
		queries: make(turns, maxQueries),
		buffers: newBufferPool(),
		echo:    newEchoCache(),
		lives:   make(map[uint64]context.CancelCauseFunc),
	}
	h.rules.Store(&ruleSet{blockAll{}})
	h.Tune(cfg.Tuning)
	return h
}

// Tune changes the tuning in one step.
func (h *Handler) Tune(t Tuning) {
	if t.DialTimeout <= 0 {
		t.DialTimeout = DefaultDialTimeout
	}
	h.tuning.Store(&t)
}

func (h *Handler) dialTimeout() time.Duration { return h.tuning.Load().DialTimeout }

// SetDecider puts new rules in force, in one step, for every flow not decided yet. Flows that run are not touched: call Table.KillIf for
// those that the new rules block. Datagrams of running UDP flows are decided again.
func (h *Handler) SetDecider(d Decider) {
	h.rules.Store(&ruleSet{d})
}

// TCP is the life of a TCP flow, from a SYN that nobody has answered to the end of the connection.
//
//	new ──decide──▶ establishing ──dial, accept──▶ established ──first FIN──▶ closing ──▶ closed
func (h *Handler) TCP(ctx context.Context, src, orig netip.AddrPort, p Pending) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	leave, ok := h.enter(cancel)
	if !ok {
		p.Reject(ReasonHostUnreachable)
		return
	}
	defer leave()

	// A slot first: nothing is looked up, dialled or remembered for a flow that the table has no room for.
	f := h.newFlow(TCP, src, orig)
	e, err := h.table.add(f, cancel)
	if err != nil {
		p.Reject(ReasonHostUnreachable)
		return
	}
	defer e.finish()

	// Where is it meant to go? A fake IP nobody knows any more leads nowhere.
	release, err := h.name(f)
	if err != nil {
		e.decide(f, Decision{Rule: ruleUnmapped})
		e.outcome(ResultFailed, err)
		p.Reject(ReasonHostUnreachable)
		return
	}
	defer release()

	d := h.decide(f, e)
	var head []byte // what the application has said already, if a rule had to hear it
	if d.Action == Sniff && h.cfg.Sniffer != nil {
		if p, head, err = h.sniff(ctx, f, e, p); err != nil {
			e.outcome(ResultReset, err)
			return
		}
		d = h.decide(f, e)
	}
	switch d.Action {
	case Forward:
		h.forward(ctx, f, e, d, p, head)
	case Resolve:
		h.resolveTCP(ctx, f, e, p, head)
	case Drop:
		e.outcome(ResultDropped, nil)
		p.Reject(ReasonDrop)
	default:
		e.outcome(ResultBlocked, nil)
		p.Reject(ReasonRefused)
	}
}

// forward dials while the SYN is held, answers it, and relays until both sides are done.
func (h *Handler) forward(ctx context.Context, f *Flow, e *entry, d Decision, p Pending, head []byte) {
	via := d.Via
	begin := h.cfg.Now()
	up, err := h.dial(ctx, via, f)
	connect := h.cfg.Now().Sub(begin)
	if err != nil {
		h.blame(ctx, via, err)
		e.outcome(ResultFailed, because(ctx, err))
		p.Reject(ReasonOf(err))
		return
	}
	h.table.cfg.Recorder.Connected(via.Name(), connect)

	watched := isFTP(f, d, up)
	app, err := h.accept(e, d.Offload, p, up, watched)
	if err != nil { // the application has gone; the upstream learns it the same way
		up.Abort()
		e.outcome(ResultFailed, because(ctx, fmt.Errorf("accept: %w", err)))
		return
	}
	e.established(connect)
	if watched {
		var done func()
		app, up, done = h.watchFTP(ctx, f, d, app, up)
		defer done()
	}
	if err := relay(ctx, app, up, head, e, h.buffers, &h.crew); err != nil {
		e.outcome(ResultReset, because(ctx, err))
	}
}

// accept answers the application: by the kernel where that can be done, else by netstack, which always can. The flow shows which, and why. Bytes
// that are watched have to come by here.
func (h *Handler) accept(e *entry, o Offload, p Pending, up Conn, watched bool) (Conn, error) {
	if o == OffloadDefault {
		o = h.tuning.Load().Offload
	}
	why := PathOff
	if o == OffloadAuto {
		a, held := p.(Adopter)
		_, socket := up.(Socket)
		switch {
		case h.cfg.Apart != "":
			why = h.cfg.Apart
		case watched:
			why = PathWatched
		case h.table.paced():
			why = PathPaced
		case !held:
			why = PathEarly
		case !socket:
			why = PathUpstream
		default:
			app, err := a.Adopt()
			if err == nil || errors.Is(err, ErrGone) {
				e.path(PathKernel, "")
				return app, err
			}
			why = err.Error()
		}
	}
	e.path(PathNetstack, why)
	return p.Accept()
}

// dial opens a connection within the flow's dial time-out, waiting for its turn included.
func (h *Handler) dial(ctx context.Context, via Dialer, f *Flow) (Conn, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, h.dialTimeout(), ErrTimeout)
	defer cancel()
	if err := takeTurn(ctx, h.dials); err != nil {
		return nil, err
	}
	defer h.dials.give()
	return makeRoom(ctx, h.table, func() (Conn, error) {
		if d, ok := via.(SourceDialer); ok {
			return d.DialFlow(ctx, f)
		}
		return via.Dial(ctx, f.Dst)
	})
}

// What makeRoom does at most: it ends a flow at each roomEvery-th try, and waits roomWait for descriptors before the next.
const (
	roomTries = 32
	roomEvery = 4
	roomWait  = 20 * time.Millisecond
)

// makeRoom opens something of an upstream's. Where descriptors run out before the table is full, the longest idle flow ends, as it would in a full
// table: new flows are worth more.
func makeRoom[T any](ctx context.Context, t *Table, open func() (T, error)) (T, error) {
	for tries := 0; ; tries++ {
		c, err := open()
		if err == nil || !OutOfDescriptors(err) || tries == roomTries || tries%roomEvery == 0 && !t.evict(ErrShort) {
			return c, err
		}
		wait := time.NewTimer(roomWait)
		select {
		case <-wait.C:
		case <-ctx.Done():
			wait.Stop()
			return c, err
		}
	}
}

// takeTurn waits until an upstream may be asked.
func takeTurn(ctx context.Context, t turns) error {
	if err := t.take(ctx); err != nil {
		return fmt.Errorf("waiting to dial: %w", err)
	}
	return nil
}

// blame counts an upstream's failure, unless it was us who gave up.
func (h *Handler) blame(ctx context.Context, via Dialer, err error) {
	if ctx.Err() == nil {
		h.table.cfg.Recorder.UpstreamError(via.Name(), ReasonOf(err))
	}
}

// because returns why we ended the flow, if we did, else err.
func because(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// ruleUnmapped is what flows to a fake IP without a name show as their rule.
const ruleUnmapped = "fakeip"

// errUnmapped is a flow to an address that dns has handed out and forgotten, or has never handed out.
var errUnmapped = errors.New("fake ip without a name")

func (h *Handler) newFlow(n Network, src, orig netip.AddrPort) *Flow {
	return &Flow{Context: h.cfg.Context, Network: n, Src: src, Orig: orig, Dst: AddrFrom(orig), Start: h.cfg.Now()}
}

// name fills in Dst from what dns knows of the address. A fake IP's mapping is held until release is called.
func (h *Handler) name(f *Flow) (release func(), err error) {
	ip := f.Dst.IP
	if h.names == nil {
		return func() {}, nil
	}
	if !h.names.IsFake(ip) {
		if host, src, ok := h.names.HostOf(ip); ok {
			f.Dst.Host, f.HostSource = host, src
		}
		return func() {}, nil
	}
	h.names.Hold(ip) // before the look-up, so that the name cannot be given away in between
	host, src, ok := h.names.HostOf(ip)
	if !ok {
		h.names.Release(ip)
		f.Dst = Addr{Port: f.Dst.Port} // no upstream is ever sent a fake IP
		if h.ask(h.rules.Load(), f).Action == Resolve {
			return func() {}, nil // queries are answered whomever they are for
		}
		return nil, fmt.Errorf("%w: %s", errUnmapped, ip)
	}
	f.Dst = Addr{Host: host, Port: f.Dst.Port}
	f.HostSource = src
	return func() { h.names.Release(ip) }, nil
}

// decide asks the rules in force, and who the application is if one of them wants to know, and shows the flow in the table.
//
// Rules swapped meanwhile are asked again: the flow is either in the table before a reload looks there for flows to end, or sees the new
// rules here. It cannot slip through between the two.
func (h *Handler) decide(f *Flow, e *entry) Decision {
	for {
		rules := h.rules.Load()
		d := h.ask(rules, f)
		e.decide(f, d)
		if rules == h.rules.Load() {
			return d
		}
	}
}

// ask is one look at the rules. It changes f.App only.
func (h *Handler) ask(rules *ruleSet, f *Flow) Decision {
	if h.cfg.Owner != nil && f.App.Method == "" && (rules.Needs(f)&NeedApp != 0 || h.cfg.Owner.Fast()) {
		if app, err := h.cfg.Owner.Lookup(f.Network, f.Src, f.Orig); err == nil {
			f.App = app
		} // else unknown: rules that name an application do not match
	}
	d := rules.Decide(f)
	switch {
	case d.Action == Forward && d.Via == nil, d.Action == Resolve && h.names == nil:
		d.Action = Block
	}
	return d
}

// enter registers a call, so that Close can end it and wait for it.
func (h *Handler) enter(cancel context.CancelCauseFunc) (leave func(), ok bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return nil, false
	}
	h.nextID++
	id := h.nextID
	h.lives[id] = cancel
	h.wg.Add(1)
	return func() {
		h.mu.Lock()
		delete(h.lives, id)
		h.mu.Unlock()
		h.wg.Done()
	}, true
}

// Close ends every flow, TCP by RST to both sides, and waits until all calls have returned. It is idempotent.
func (h *Handler) Close() error {
	h.mu.Lock()
	h.closed = true
	cancels := make([]context.CancelCauseFunc, 0, len(h.lives))
	for _, c := range h.lives {
		cancels = append(cancels, c)
	}
	h.mu.Unlock()
	for _, c := range cancels {
		c(ErrClosed)
	}
	h.wg.Wait()
	h.crew.close()
	return nil
}

// blockAll is the rules of a Handler that has none yet.
type blockAll struct{}

func (blockAll) Decide(*Flow) Decision { return Decision{Rule: "not configured"} }
func (blockAll) Needs(*Flow) Needs     { return 0 }
