// SPDX-License-Identifier: GPL-3.0-or-later

package control

import (
	"encoding/json"
	"fmt"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mutex-proxy/mutex/control/client"
	"github.com/mutex-proxy/mutex/flow"
)

const (
	// maxStreams bounds the watchers of flows and events together.
	maxStreams = 128
	// eventBuffer is what a reader of events may lag behind.
	eventBuffer = 64
	// keepAlive is how often a quiet stream says that it lives, and so notices a caller that has gone without a word.
	keepAlive = 15 * time.Second
	// streamWriteTimeout ends a stream whose caller has stopped reading.
	streamWriteTimeout = 10 * time.Second
)

// hub hands events to those who listen. The zero value is ready.
type hub[T any] struct {
	mu      sync.Mutex
	readers map[chan T]struct{}
	streams atomic.Int64 // of any kind; see maxStreams
}

func (h *hub[T]) send(v T) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for ch := range h.readers {
		select {
		case ch <- v:
		default: // too slow: it loses this one
		}
	}
}

// join returns a channel of what is sent from now on, and the function that ends that.
func (h *hub[T]) join() (<-chan T, func()) {
	ch := make(chan T, eventBuffer)
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.readers == nil {
		h.readers = make(map[chan T]struct{})
	}
	h.readers[ch] = struct{}{}
	return ch, func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		delete(h.readers, ch)
	}
}

// sse writes server-sent events (WHATWG HTML, section 9.2), one line of JSON each.
type sse struct {
	w       http.ResponseWriter
	control *http.ResponseController
}

// begin starts a stream: from here on no error can be answered.
func (c *call) begin() (*sse, func(), error) {
	if c.events.streams.Add(1) > maxStreams {
		c.events.streams.Add(-1)
		return nil, nil, &Error{Code: client.CodeTooMany, Message: fmt.Sprintf("%d streams are open, which is the limit", maxStreams)}
	}
	s := &sse{w: c.w, control: http.NewResponseController(c.w)}
	c.w.Header().Set("Content-Type", "text/event-stream")
	return s, func() { c.events.streams.Add(-1) }, nil
}

func (s *sse) event(kind string, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	_ = s.control.SetWriteDeadline(time.Now().Add(streamWriteTimeout))
	_, err = fmt.Fprintf(s.w, "event: %s\ndata: %s\n\n", kind, data)
	return err
}

// alive sends a comment, which readers skip, and all that has been written.
func (s *sse) alive() error {
	_ = s.control.SetWriteDeadline(time.Now().Add(streamWriteTimeout))
	if _, err := s.w.Write([]byte(":\n\n")); err != nil {
		return err
	}
	return s.control.Flush()
}

func getFlows(c *call) error {
	switch watch := c.query.Get("watch"); watch {
	case "", "0":
		c.reply(c.visibleFlows(), nil)
		return nil
	case "1":
	default:
		return badRequest("watch", "%q is neither 0 nor 1", watch)
	}
	out, end, err := c.begin()
	if err != nil {
		return err
	}
	defer end()
	// The changes first, the picture second: a flow that changes in between is told twice, not never.
	changes := c.cfg.Backend.WatchFlows(c.r.Context())
	for _, f := range c.visibleFlows() {
		if out.event("flow", f) != nil {
			return nil
		}
	}
	pump(c, out, changes, func(f flow.Info) (any, bool) {
		if !c.trusted && !c.leases.contextsOf(c.peer.UID)[f.Context] {
			return nil, false
		}
		return FlowOf(&f, c.now()), true
	}, "flow")
	return nil
}

func getEvents(c *call) error {
	out, end, err := c.begin()
	if err != nil {
		return err
	}
	defer end()
	events, leave := c.events.join()
	defer leave()
	pump(c, out, events, func(e Event) (any, bool) { return e, true }, "event")
	return nil
}

// pump writes what comes in until the caller or the server has had enough. It flushes when there is nothing more to write at once.
func pump[T any](c *call, out *sse, in <-chan T, show func(T) (any, bool), kind string) {
	tick := time.NewTicker(keepAlive)
	defer tick.Stop()
	if out.alive() != nil {
		return
	}
	for {
		select {
		case v, ok := <-in:
			if !ok {
				return
			}
			if shown, ok := show(v); ok && out.event(kind, shown) != nil {
				return
			}
			if len(in) == 0 && out.control.Flush() != nil {
				return
			}
		case <-tick.C:
			if out.alive() != nil {
				return
			}
		case <-c.r.Context().Done():
			return
		}
	}
}
