// SPDX-License-Identifier: GPL-3.0-or-later

package offload

import (
	"errors"
	"sync"
	"time"

	"go.uber.org/zap"
)

const (
	// silence is how long the kernel's answer to a SYN-ACK may take before it is in doubt that applications' packets arrive over lo. It takes
	// microseconds, as it is made while the SYN-ACK is written.
	silence = time.Second
	// deafFirst is how long no flow is adopted then, twice as long each time, up to deafMost. Each try may cost a connection.
	deafFirst = time.Minute
	deafMost  = time.Hour
)

var errDeaf = errors.New("what applications send does not arrive over lo: does a firewall stop it there?")

// hearing is whether what applications send into adopted flows arrives. A firewall's rule on lo, or one that keeps conntrack from seeing the packets,
// is nobody's to find out before: the application is told that it is connected, and is then not heard. So until one flow has been heard, the next ones
// wait for its outcome, and after one that was not, netstack has them all for a while.
type hearing struct {
	log *zap.Logger
	now func() time.Time

	mu      sync.Mutex
	heard   bool          // the last that is known
	waiting int           // flows of which it is not known yet
	known   chan struct{} // closed with the next outcome; nil if nobody waits for it
	until   time.Time
	pause   time.Duration // 0 = there was never silence, or it has ended
}

// try reports whether a flow may be adopted. It waits for silence at most. nil has to be followed by one of yes, no and unknown.
func (h *hearing) try() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	for !h.heard && h.waiting > 0 && h.pause == 0 {
		if h.known == nil {
			h.known = make(chan struct{})
		}
		known := h.known
		h.mu.Unlock()
		<-known
		h.mu.Lock()
	}
	if !h.heard && h.waiting > 0 || h.now().Before(h.until) {
		return errDeaf
	}
	h.waiting++
	return nil
}

// doneLocked ends a try.
func (h *hearing) doneLocked() {
	h.waiting--
	if h.known != nil {
		close(h.known)
		h.known = nil
	}
}

// unknown is the outcome of a flow that has ended, or was never answered.
func (h *hearing) unknown() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.doneLocked()
}

// yes is the outcome of a flow that has been heard of.
func (h *hearing) yes() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.doneLocked()
	if h.pause > 0 {
		h.log.Info("flows are adopted again")
	}
	h.heard, h.until, h.pause = true, time.Time{}, 0
}

// no is the outcome of a flow that has not been heard of for silence.
func (h *hearing) no() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.doneLocked()
	h.heard = false
	if h.now().Before(h.until) {
		return // one of the same time
	}
	h.pause = min(max(2*h.pause, deafFirst), deafMost)
	h.until = h.now().Add(h.pause)
	h.log.Warn("flows are not adopted for now", zap.Error(errDeaf), zap.Duration("for", h.pause))
}
