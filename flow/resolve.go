// SPDX-License-Identifier: GPL-3.0-or-later

package flow

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"
)

const (
	// dnsIdle ends a DNS connection that asks nothing (RFC 7766 section 6.2.3 wants "of the order of a few seconds"), or whose reader does
	// not take its answers.
	dnsIdle = 10 * time.Second
	// maxPipelined is how many queries of one connection, or of one UDP socket, are answered at a time; further ones of a connection are
	// not read until one is done, those of a socket are dropped.
	maxPipelined = 32
	// maxQueries is the same for all flows of a context: with the largest messages there can be, 128 MiB of queries and answers.
	maxQueries = 1024
	// queryTimeout is when an answer comes too late: resolvers have given up and asked again by then. dns has shorter ones of its own.
	queryTimeout = 15 * time.Second
	// maxMessage is the longest DNS message (RFC 1035 section 4.2.2), minMessage the header alone (section 4.1.1).
	maxMessage = 65535
	minMessage = 12
)

// errFraming is a DNS connection on which the next message cannot be found.
var errFraming = errors.New("not dns over tcp")

// resolveTCP answers the connection and the DNS queries on it. It is never forwarded: that would be a leak.
func (h *Handler) resolveTCP(ctx context.Context, f *Flow, e *entry, p Pending, head []byte) {
	conn, err := p.Accept()
	if err != nil {
		e.outcome(ResultFailed, because(ctx, fmt.Errorf("accept: %w", err)))
		return
	}
	e.early()
	e.established(0)
	stop := context.AfterFunc(ctx, conn.Abort)
	defer stop()
	s := dnsStream{h: h, conn: conn, f: f, e: e}
	if err := s.serve(ctx, head); err != nil {
		conn.Abort()
		e.outcome(ResultReset, because(ctx, err))
	}
	conn.Close()
}

// dnsStream is one connection of DNS over TCP.
type dnsStream struct {
	h    *Handler
	conn Conn
	f    *Flow
	e    *entry

	mu  sync.Mutex // one answer at a time is written
	err error      // the first that makes the connection useless
}

// serve answers queries, many at a time and each when it is ready (RFC 7766 section 6.2.1.1), until the application is done or idle.
// What has been asked is answered before it returns.
func (s *dnsStream) serve(ctx context.Context, head []byte) error {
	var answers sync.WaitGroup
	defer answers.Wait()
	pipelined := make(turns, maxPipelined)
	var r io.Reader = s.conn
	if len(head) > 0 {
		r = io.MultiReader(bytes.NewReader(head), s.conn)
	}
	for {
		_ = s.conn.SetReadDeadline(time.Now().Add(dnsIdle))
		query, err := readMessage(r)
		if err != nil {
			answers.Wait()
			if errors.Is(err, io.EOF) || isTimeout(err) {
				err = nil
			}
			return errors.Join(s.failure(), err)
		}
		s.e.up.Add(uint64(len(query)) + 2)
		if err := pipelined.take(ctx); err != nil {
			return err
		}
		if err := s.h.queries.take(ctx); err != nil {
			return err
		}
		answers.Go(func() {
			s.answer(ctx, query)
			s.h.queries.give()
			pipelined.give()
		})
	}
}

func (s *dnsStream) answer(ctx context.Context, query []byte) {
	ctx, cancel := context.WithTimeout(ctx, queryTimeout)
	defer cancel()
	reply, err := s.h.names.Exchange(ctx, s.f, query)
	if err == nil && len(reply) > maxMessage {
		err = fmt.Errorf("dns answer of %d bytes", len(reply))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return
	}
	if err == nil {
		_ = s.conn.SetWriteDeadline(time.Now().Add(dnsIdle))
		_, err = s.conn.Write(frame(reply))
	}
	if err != nil {
		s.err = err
		s.conn.Abort() // wakes the reader
		return
	}
	s.e.down.Add(uint64(len(reply)) + 2)
}

func (s *dnsStream) failure() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// readMessage reads one message behind its two bytes of length. io.EOF means that the stream ended where a message could have begun.
func readMessage(r io.Reader) ([]byte, error) {
	var size [2]byte
	if _, err := io.ReadFull(r, size[:]); err != nil {
		return nil, err
	}
	n := int(binary.BigEndian.Uint16(size[:]))
	if n < minMessage {
		return nil, fmt.Errorf("%w: a message of %d bytes", errFraming, n)
	}
	// Grown as bytes arrive: a length alone, promised on many connections, must not cost 64 KiB each.
	var msg bytes.Buffer
	if _, err := io.CopyN(&msg, r, int64(n)); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return nil, err
	}
	return msg.Bytes(), nil
}

// frame puts the length before a message, for a single write (RFC 7766 section 8).
func frame(msg []byte) []byte {
	out := make([]byte, 2, 2+len(msg))
	binary.BigEndian.PutUint16(out, uint16(len(msg)))
	return append(out, msg...)
}
