// SPDX-License-Identifier: GPL-3.0-or-later

package flow

import (
	"context"
	"fmt"
	"time"
)

const (
	// sniffSize and sniffTime bound what a rule that needs payload may cost: a ClientHello with post-quantum keys has some 1.8 KB; whoever
	// says nothing for 300 ms is waiting for the server to speak first.
	sniffSize = 4 << 10
	sniffTime = 300 * time.Millisecond
)

// protocolUnknown is what a flow is after payload has been looked at in vain, so that rules can tell it from one not looked at.
const protocolUnknown = "unknown"

// Sniffer detects protocols.
type Sniffer interface {
	// Sniff looks at the first bytes of an application, at least 1 and at most 4 KiB of them, and fills in f.Protocol, f.Confidence and,
	// if it finds a name and there is none yet, f.Dst.Host and f.HostSource. more says that more bytes could tell more.
	Sniff(f *Flow, first []byte) (more bool)
	// ServerFirst reports whether the server speaks first in what usually runs on the port, so that waiting for the application is idle.
	ServerFirst(port uint16) bool
}

// accepted is a connection request that has been answered already: refusing it can only be a reset.
type accepted struct{ conn Conn }

func (a accepted) Accept() (Conn, error) { return a.conn, nil }
func (a accepted) Reject(Reason)         { a.conn.Abort() }

// sniff accepts the flow, because only then does the application speak, and listens to its first bytes. Whatever is decided next goes
// through the returned Pending; head is what was read and is still to be sent on.
func (h *Handler) sniff(ctx context.Context, f *Flow, e *entry, p Pending) (Pending, []byte, error) {
	app, err := p.Accept()
	if err != nil {
		return nil, nil, because(ctx, fmt.Errorf("accept: %w", err))
	}
	e.early()
	stop := context.AfterFunc(ctx, app.Abort)
	defer stop()
	var head []byte
	if !h.cfg.Sniffer.ServerFirst(f.Dst.Port) {
		head = make([]byte, 0, sniffSize)
		_ = app.SetReadDeadline(time.Now().Add(sniffTime))
		for more := true; more && len(head) < cap(head); {
			n, err := app.Read(head[len(head):cap(head)])
			if n > 0 {
				head = head[:len(head)+n]
				more = h.cfg.Sniffer.Sniff(f, head)
			}
			if err != nil { // a time-out, or an end that the relay will come to as well
				break
			}
		}
		_ = app.SetReadDeadline(time.Time{})
	}
	if ctx.Err() != nil {
		app.Abort()
		return nil, nil, context.Cause(ctx)
	}
	if f.Protocol == "" {
		f.Protocol = protocolUnknown
	}
	return accepted{app}, head, nil
}
