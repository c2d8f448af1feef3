// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"

	"github.com/miekg/dns"

	"github.com/mutex-proxy/mutex/flow"
)

// udpTries is how often a check by UDP asks within its time-out: one datagram may be lost.
const udpTries = 3

// answerSize holds the answer, which without EDNS has at most 512 bytes (RFC 1035 section 4.2.1).
const answerSize = 4096

// parseUDPTarget reads the address of a DNS server; the port defaults to 53. A name is no use: not every association takes one.
func parseUDPTarget(s string) (flow.Addr, error) {
	if !strings.Contains(s, ":") || strings.HasPrefix(s, "[") && strings.HasSuffix(s, "]") {
		s += ":53"
	}
	a, err := ParseAddr(s)
	if err == nil && !a.IP.IsValid() {
		err = errors.New("not the address of a DNS server")
	}
	return a, err
}

// reachUDP asks the DNS server through an association of the member. Any answer to the question will do.
func (p *poolState) reachUDP(ctx context.Context, d flow.Dialer) error {
	pc, err := d.ListenPacket(ctx, nil)
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = pc.Close() })
	defer func() {
		stop()
		_ = pc.Close()
	}()
	q := new(dns.Msg).SetQuestion(".", dns.TypeNS)
	query, err := q.Pack()
	if err != nil {
		return err
	}
	buf := make([]byte, answerSize)
	for range udpTries {
		if _, err := pc.WriteBatch([]flow.Datagram{{Addr: p.checks.udp, Buf: query}}); err != nil {
			return err
		}
		if err := pc.SetReadDeadline(time.Now().Add(p.cfg.Health.Timeout / udpTries)); err != nil {
			return err
		}
		switch err := awaitAnswer(pc, q, buf); {
		case err == nil:
			return nil
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case !timedOut(err):
			return err
		}
	}
	return fmt.Errorf("target: %w", flow.ErrTimeout)
}

// awaitAnswer reads until an answer to q, or the deadline.
func awaitAnswer(pc flow.PacketConn, q *dns.Msg, buf []byte) error {
	for {
		ds := []flow.Datagram{{Buf: buf}}
		n, err := pc.ReadBatch(ds)
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return fmt.Errorf("%w: the association has ended", flow.ErrUpstream)
			}
			return err
		}
		var a dns.Msg
		if n == 1 && a.Unpack(ds[0].Buf) == nil && a.Response && a.Id == q.Id {
			return nil
		}
	}
}
