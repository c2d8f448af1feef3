// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/mutex-proxy/mutex/dialers/uot"
	"github.com/mutex-proxy/mutex/flow"
)

// udpStall is how long datagrams may wait for a stream that takes none: longer, and whoever sent them has given them up.
const udpStall = 10 * time.Second

var (
	_ flow.PacketConn = (*overTCP)(nil)
	_ flow.Waiter     = (*overTCP)(nil)
)

// overTCP is an association whose datagrams travel in a stream through the upstream (udp=over-tcp). Each costs the stream's delays: one that
// is lost on the way holds up all behind it.
type overTCP struct {
	u    *upstream
	conn flow.Conn
	r    *uot.Reader

	mu  sync.Mutex // of WriteBatch
	out []byte
}

// listenOverTCP opens an association over a stream that dial opens to a name: version 2, or version 1 for a server that knows no other. The
// upstream resolves the name, or rather knows it: it must be one that is sent names.
func (u *upstream) listenOverTCP(ctx context.Context, dial func(context.Context, flow.Addr) (flow.Conn, error)) (flow.PacketConn, error) {
	magic := uot.Magic2
	if u.spec.UDP == UDPOverTCP1 {
		magic = uot.Magic1
	}
	if !u.udp.allowed() {
		return nil, u.wrap("udp over tcp", errors.ErrUnsupported)
	}
	c, err := dial(ctx, flow.Addr{Host: magic})
	if err == nil && magic == uot.Magic2 {
		// Not for one destination; where to is said with each datagram.
		if _, err = c.Write([]byte{0, atypIPv4, 0, 0, 0, 0, 0, 0}); err != nil {
			c.Abort()
		}
	}
	if err != nil {
		if !errors.Is(err, flow.ErrUpstream) && !errors.Is(err, flow.ErrTimeout) && ctx.Err() == nil {
			u.udp.cannot() // it took the name for a name
			return nil, fmt.Errorf("%w: %w", errors.ErrUnsupported, err)
		}
		return nil, err
	}
	u.udp.can()
	return &overTCP{u: u, conn: c, r: uot.NewReader(c, false)}, nil
}

// ReadBatch fills ds with what has come, and waits for the first. A datagram that does not fit is dropped.
func (o *overTCP) ReadBatch(ds []flow.Datagram) (int, error) {
	n := 0
	for n < len(ds) && (n == 0 || o.r.Ready()) {
		addr, payload, err := o.r.Next()
		switch {
		case err == nil && len(payload) <= len(ds[n].Buf):
			ds[n].Addr = addr
			ds[n].Buf = ds[n].Buf[:copy(ds[n].Buf, payload)]
			n++
		case err == nil:
		case n > 0:
			return n, nil // it comes again
		default:
			return 0, o.why(err)
		}
	}
	return n, nil
}

// WaitRead waits until there is something to read.
func (o *overTCP) WaitRead() error {
	if o.r.Ready() {
		return nil
	}
	return o.why(o.r.Wait())
}

func (o *overTCP) why(err error) error {
	if err == nil || timedOut(err) || errors.Is(err, net.ErrClosed) {
		return err
	}
	return o.fault(err)
}

// fault is an end of the stream that the upstream answers for.
func (o *overTCP) fault(err error) error {
	return o.u.wrap("udp over tcp", fmt.Errorf("%w: %w", flow.ErrUpstream, noEOF(err)))
}

// WriteBatch sends ds in one piece.
func (o *overTCP) WriteBatch(ds []flow.Datagram) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.out = o.out[:0]
	for i := range ds {
		var err error
		if o.out, err = uot.Append(o.out, ds[i].Addr, ds[i].Buf); err != nil {
			if i == 0 {
				return 0, fmt.Errorf("%w: %w", flow.ErrHostUnreachable, err)
			}
			ds = ds[:i] // it is the next one's turn to be told
			break
		}
	}
	_ = o.conn.SetWriteDeadline(time.Now().Add(udpStall))
	if _, err := o.conn.Write(o.out); err != nil { // half a datagram may have gone: the stream is of no more use
		if errors.Is(err, net.ErrClosed) {
			return 0, err
		}
		return 0, o.fault(err)
	}
	if cap(o.out) > uot.MaxPayload {
		o.out = nil
	}
	return len(ds), nil
}

// SetReadDeadline bounds ReadBatch and WaitRead.
func (o *overTCP) SetReadDeadline(t time.Time) error { return o.conn.SetReadDeadline(t) }

// Close ends the association.
func (o *overTCP) Close() error {
	o.conn.Abort()
	return nil
}
