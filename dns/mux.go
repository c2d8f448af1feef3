// SPDX-License-Identifier: GPL-3.0-or-later

package dns

import (
	"errors"
	"math/rand/v2"
	"sync"
)

// maxInFlight bounds the questions on one connection. Servers that stop reading at fewer are slow, not wrong.
const maxInFlight = 128

var errFull = errors.New("too many questions on one connection")

// mux pairs the replies on one connection with the questions that are waiting for one.
type mux struct {
	// datagrams: anyone may have sent a reply, so that one that does not fit is ignored; on a stream it fails its question.
	datagrams bool

	mu       sync.Mutex
	waiting  map[uint16]*waiter
	err      error // why the connection has ended
	answered uint64
}

type waiter struct {
	q  question
	ch chan reply // room for one
}

// add registers a question under a new random id (ChaCha8, seeded by the system): the first thing a forger must guess.
func (m *mux) add(q question) (uint16, *waiter, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err != nil {
		return 0, nil, m.err
	}
	if len(m.waiting) >= maxInFlight {
		return 0, nil, errFull
	}
	if m.waiting == nil {
		m.waiting = make(map[uint16]*waiter)
	}
	id := uint16(rand.Uint32())
	for m.waiting[id] != nil {
		id++
	}
	w := &waiter{q: q, ch: make(chan reply, 1)}
	m.waiting[id] = w
	return id, w, nil
}

func (m *mux) remove(id uint16) {
	m.mu.Lock()
	delete(m.waiting, id)
	m.mu.Unlock()
}

// deliver gives a reply to the question it belongs to, and reports whether it did.
func (m *mux) deliver(wire []byte) bool {
	if len(wire) < headerSize {
		return false
	}
	id := uint16(wire[0])<<8 | uint16(wire[1])
	m.mu.Lock()
	defer m.mu.Unlock()
	w := m.waiting[id]
	if w == nil {
		return false
	}
	msg, err := parseReply(w.q, id, wire)
	if err != nil && m.datagrams {
		return false
	}
	delete(m.waiting, id)
	m.answered++
	w.ch <- reply{msg, err}
	return true
}

// fail ends the connection: every question gets the error, and no new one is taken. It returns how many were waiting and how many had
// been answered before.
func (m *mux) fail(err error) (waiting int, answered uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err != nil {
		return 0, m.answered
	}
	m.err = err
	waiting = len(m.waiting)
	for id, w := range m.waiting {
		delete(m.waiting, id)
		w.ch <- reply{nil, err}
	}
	return waiting, m.answered
}

// load returns how many questions wait, and how many have been answered.
func (m *mux) load() (waiting int, answered uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.waiting), m.answered
}
