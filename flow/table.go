// SPDX-License-Identifier: GPL-3.0-or-later

package flow

import (
	"cmp"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
)

// DefaultMaxFlows is the bound of a table whose configuration names none.
const DefaultMaxFlows = 65536

// Why a flow was ended from outside. They are the causes of the flow's context.
var (
	ErrKilled    = errors.New("killed on request")
	ErrEvicted   = errors.New("longest idle flow of a full table")
	ErrShort     = errors.New("longest idle flow when file descriptors ran out")
	ErrRules     = errors.New("blocked by the new rules")
	ErrDisabled  = errors.New("its upstream was disabled")
	ErrClosed    = errors.New("context closed")
	ErrIdle      = errors.New("half-closed and idle")
	ErrTableFull = errors.New("flow table full")
)

// TableConfig says what a Table is made of.
type TableConfig struct {
	Context  string
	MaxFlows int              // 0 = DefaultMaxFlows
	IDs      *atomic.Uint64   // shared by all contexts, so that an ID names one flow of the daemon; nil = the table's own
	Log      *zap.Logger      // one line a flow, on a logger that has the context's name already; nil = none
	Recorder Recorder         // nil = none
	Now      func() time.Time // nil = time.Now
}

// Recorder is what metrics learn as it happens. Its methods are called from the flows' goroutines and must not block.
type Recorder interface {
	// FlowEnded is called once a flow. result is one of the Result constants. The Info is the callee's.
	FlowEnded(i *Info, result string)
	// Connected is called when an upstream has opened a connection or an association, with the time it took.
	Connected(upstream string, d time.Duration)
	// UpstreamError is called when it has not. A destination's refusal is counted here too, as reason refused.
	UpstreamError(upstream string, r Reason)
}

// Info is a flow as others may see it: a copy that does not change.
type Info struct {
	Flow
	Rule, Upstream, State, Handshake string
	// Bytes are payload, without headers. Packets are datagrams; the netstack's segments are not counted here, TCP has 0.
	BytesUp, BytesDown, PacketsUp, PacketsDown uint64
	Connect                                    time.Duration // how long the upstream took; 0 = not connected
	End                                        time.Time     // zero while the flow lives
	Err                                        string
	// Path is one of the Path constants; "" before a TCP flow is established, and for what is none. PathReason is why not the kernel.
	Path, PathReason string
}

// The ways of an established TCP flow's bytes.
const (
	PathKernel   = "kernel"   // spliced between two sockets: the flow was adopted
	PathNetstack = "netstack" // through the network stack in user space
)

// Why a flow is not adopted, besides errors of the kernel's.
const (
	PathOff       = "off"
	PathEarly     = "the application had to be answered first"
	PathUpstream  = "the upstream is not a plain socket"
	PathWatched   = "commands inside the connection are watched"
	PathPaced     = "its bandwidth is limited"
	PathContainer = "the application is in another network namespace"
	PathForwarded = "the application is on another host"
)

// The states of a flow.
const (
	StateNew          = "new"          // known, not decided or waiting for payload
	StateEstablishing = "establishing" // the upstream is being asked
	StateEstablished  = "established"
	StateClosing      = "closing" // one direction has ended, or the flow is being ended
	StateClosed       = "closed"
)

// How a flow's handshake was done.
const (
	HandshakeHonest = "honest" // the application was answered after the upstream had answered
	HandshakeEarly  = "early"  // before, because a rule needed payload or because the answer comes from us
)

// shards is how many locks the table has: a power of two, enough for the cores of a large machine not to meet.
const shards = 16

// Table tracks every flow of one context: bounded, sharded by ID. It is safe for concurrent use.
type Table struct {
	cfg   TableConfig
	epoch time.Time
	slots atomic.Int64 // flows that have a slot; an evicted flow gives its slot back before it has ended
	// maxFlows is TableConfig.MaxFlows, or what SetMaxFlows has made of it.
	maxFlows atomic.Int64
	limits   atomic.Pointer[limits]
	shard    [shards]tableShard
	totals

	evictMu sync.Mutex
	idlest  idlest[*entry]

	watchers
}

type tableShard struct {
	mu   sync.Mutex
	live map[uint64]*entry
	sums sums // of the flows that have ended here
}

// NewTable returns an empty table.
func NewTable(cfg TableConfig) *Table {
	if cfg.IDs == nil {
		cfg.IDs = new(atomic.Uint64)
	}
	if cfg.Log == nil {
		cfg.Log = zap.NewNop()
	}
	if cfg.Recorder == nil {
		cfg.Recorder = noRecorder{}
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	t := &Table{cfg: cfg, epoch: cfg.Now()}
	t.SetMaxFlows(cfg.MaxFlows)
	t.SetLimits(Limits{})
	for i := range t.shard {
		t.shard[i].live = make(map[uint64]*entry)
		t.shard[i].sums = newSums()
	}
	return t
}

// SetMaxFlows changes how many flows the table has room for; 0 means DefaultMaxFlows. Flows beyond a smaller bound are not ended by it: they
// go as new ones come.
func (t *Table) SetMaxFlows(n int) {
	if n <= 0 {
		n = DefaultMaxFlows
	}
	t.maxFlows.Store(int64(n))
}

// add gives the flow an ID and a slot, ending the longest idle flow if there is none left. ErrRate, ErrTableFull. kill is called at most once, from any
// goroutine, with none of the table's locks held, when the flow has to end; the owner then calls finish.
func (t *Table) add(f *Flow, kill func(error)) (*entry, error) {
	if !t.begins() {
		t.drop(dropRate, 1)
		return nil, ErrRate
	}
	for t.slots.Add(1) > t.maxFlows.Load() {
		t.slots.Add(-1)
		if !t.evict(ErrEvicted) {
			t.refused.Add(1)
			return nil, ErrTableFull
		}
	}
	f.ID = t.cfg.IDs.Add(1)
	e := &entry{t: t, id: f.ID, kill: kill, since: t.clock()}
	e.up.clock, e.down.clock = t.clock, t.clock
	e.info = Info{Flow: *f, State: StateNew, Handshake: HandshakeHonest}
	s := &t.shard[e.id%shards]
	s.mu.Lock()
	s.live[e.id] = e
	s.mu.Unlock()
	t.started.Add(1)
	return e, nil
}

// clock returns nanoseconds since the table was made; monotonic when Config.Now is.
func (t *Table) clock() int64 { return t.clockAt(t.cfg.Now()) }

func (t *Table) clockAt(now time.Time) int64 { return int64(now.Sub(t.epoch)) }

// evict ends the flow that has been idle longest, and reports whether there was one.
func (t *Table) evict(cause error) bool {
	t.evictMu.Lock()
	e, ok := t.idlest.take((*entry).giveSlot)
	if !ok {
		t.idlest.scanned(t.scan())
		e, ok = t.idlest.take((*entry).giveSlot)
	}
	t.evictMu.Unlock()
	if !ok {
		return false
	}
	t.evicted.Add(1)
	e.end(cause)
	return true
}

// scan returns the flows that have a slot, with when they last moved.
func (t *Table) scan() []aged[*entry] {
	all := make([]aged[*entry], 0, t.Len())
	for i := range t.shard {
		s := &t.shard[i]
		s.mu.Lock()
		for _, e := range s.live {
			if !e.slotless.Load() {
				all = append(all, aged[*entry]{e, e.last()})
			}
		}
		s.mu.Unlock()
	}
	return all
}

// entries returns the flows alive now, in no order.
func (t *Table) entries() []*entry {
	out := make([]*entry, 0, t.Len())
	for i := range t.shard {
		s := &t.shard[i]
		s.mu.Lock()
		for _, e := range s.live {
			out = append(out, e)
		}
		s.mu.Unlock()
	}
	return out
}

// Snapshot returns the flows that have been decided and have not ended, oldest first.
func (t *Table) Snapshot() []Info {
	es := t.entries()
	out := make([]Info, 0, len(es))
	for _, e := range es {
		if i, ok := e.snapshot(); ok {
			out = append(out, i)
		}
	}
	slices.SortFunc(out, func(a, b Info) int { return cmp.Compare(a.ID, b.ID) })
	return out
}

// Kill ends a flow: TCP by RST to both sides. It reports whether there was such a flow. A UDP flow starts anew with the application's
// next datagram if the rules let it.
func (t *Table) Kill(id uint64) bool {
	s := &t.shard[id%shards]
	s.mu.Lock()
	e := s.live[id]
	s.mu.Unlock()
	if e == nil {
		return false
	}
	e.end(ErrKilled)
	return true
}

// KillIf ends the flows that f says yes to, with cause, and returns how many. In a reload (ErrRules) a flow that is being decided meanwhile is decided
// again by its handler, so none escapes as long as SetDecider comes first.
func (t *Table) KillIf(cause error, f func(*Info) bool) int {
	n := 0
	for _, e := range t.entries() {
		if i, ok := e.snapshot(); ok && f(&i) {
			e.end(cause)
			n++
		}
	}
	return n
}

// Started returns how many flows have begun in the table's life.
func (t *Table) Started() uint64 { return t.started.Load() }

// Len returns how many slots are taken; never more than MaxFlows.
func (t *Table) Len() int { return int(max(0, min(t.slots.Load(), t.maxFlows.Load()))) }

type noRecorder struct{}

func (noRecorder) FlowEnded(*Info, string)         {}
func (noRecorder) Connected(string, time.Duration) {}
func (noRecorder) UpstreamError(string, Reason)    {}
