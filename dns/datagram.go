// SPDX-License-Identifier: GPL-3.0-or-later

package dns

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"github.com/miekg/dns"

	"github.com/mutex-proxy/mutex/flow"
)

const (
	// resendAfter and tcpAfter: a lost datagram is sent again after a second, as glibc and unbound do; when that is not answered either,
	// UDP may not work at all on this path and the question goes by TCP.
	resendAfter = time.Second
	tcpAfter    = 2 * time.Second
	// tcpFor is how long TCP is used at once after UDP has proven not to work.
	tcpFor = time.Minute
	// An association is given up after this many questions or this long: its source port is not new for each question, so that a forger
	// must not have all day.
	maxPerAssociation  = 256
	associationMaxLife = time.Minute
	// udpIdle closes an association that is not used; for a SOCKS5 server each one is a TCP connection.
	udpIdle = 10 * time.Second
	// maxDatagram is what a reply may have: servers that ignore ednsSize send up to 4096.
	maxDatagram = 4096
)

// datagrams asks one server over UDP, and over TCP at the same address where a reply is cut, or where the upstream carries no UDP: the
// same server through the same proxy, so not less private.
type datagrams struct {
	p       *profile
	via     flow.Dialer
	addr    flow.Addr
	context string
	tcp     *streams

	mu      sync.Mutex
	current *association
	noUDP   time.Time // TCP at once until then
}

// association is one UDP association with the upstream.
type association struct {
	d     *datagrams
	mux   mux
	born  time.Time
	sent  int           // guarded by d.mu
	ready chan struct{} // closed when pc is set
	pc    flow.PacketConn

	mu   sync.Mutex // one write at a time
	from netip.AddrPort
}

func newDatagrams(p *profile, via flow.Dialer, addr flow.Addr, contextName string) *datagrams {
	return &datagrams{p: p, via: via, addr: addr, context: contextName, tcp: newStreams(p, via, addr, nil)}
}

func (d *datagrams) close() {}

func (d *datagrams) ask(ctx context.Context, q question) (*dns.Msg, error) {
	d.mu.Lock()
	byTCP := time.Now().Before(d.noUDP)
	d.mu.Unlock()
	if byTCP {
		return d.tcp.ask(ctx, q)
	}
	a := d.association()
	m, err := a.ask(ctx, q)
	if errors.Is(err, errGone) && ctx.Err() == nil { // the server dropped the association before
		a = d.association()
		m, err = a.ask(ctx, q)
	}
	if err == nil && !m.Truncated || ctx.Err() != nil {
		return m, err
	}
	m, tcpErr := d.tcp.ask(ctx, q)
	if tcpErr != nil {
		return nil, errors.Join(err, tcpErr)
	}
	if _, answered := a.mux.load(); answered == 0 {
		d.mu.Lock()
		d.noUDP = time.Now().Add(tcpFor)
		d.mu.Unlock()
	}
	return m, nil
}

// association returns the one in use, or a new one.
func (d *datagrams) association() *association {
	d.mu.Lock()
	defer d.mu.Unlock()
	a := d.current
	if a == nil || a.sent >= maxPerAssociation || time.Since(a.born) > associationMaxLife {
		a = &association{d: d, born: time.Now(), ready: make(chan struct{})}
		a.mux.datagrams = true
		d.current = a
		d.p.wg.Go(a.run)
	}
	a.sent++
	return a
}

// run opens the association and reads until it ends.
func (a *association) run() {
	pc, err := a.open()
	if err != nil {
		a.end(err)
		return
	}
	defer func() { _ = pc.Close() }()
	defer context.AfterFunc(a.d.p.life, func() { _ = pc.Close() })()
	a.pc = pc
	close(a.ready)
	buf := make([]byte, maxDatagram)
	ds := make([]flow.Datagram, 1)
	for err == nil {
		ds[0].Buf = buf
		var n int
		if err = pc.SetReadDeadline(time.Now().Add(udpIdle)); err != nil {
			break
		}
		if n, err = pc.ReadBatch(ds); err == nil && n == 1 && a.isServer(ds[0].Addr) {
			a.mux.deliver(ds[0].Buf)
		}
	}
	a.end(fmt.Errorf("%w: %w", errGone, err))
}

func (a *association) open() (flow.PacketConn, error) {
	ctx, cancel := context.WithTimeout(a.d.p.life, dialTimeout)
	defer cancel()
	return a.d.via.ListenPacket(ctx, &flow.Flow{
		Context: a.d.context, Network: flow.UDP, Orig: a.d.addr.AddrPort(), Dst: a.d.addr, Start: time.Now(),
	})
}

func (a *association) end(err error) {
	a.d.mu.Lock()
	if a.d.current == a {
		a.d.current = nil
	}
	a.d.mu.Unlock()
	a.mux.fail(err)
}

// isServer reports whether a datagram came from the server. Where the proxy resolved its name, the first address that answers is it.
func (a *association) isServer(from flow.Addr) bool {
	if from.Port != a.d.addr.Port {
		return false
	}
	if a.d.addr.IP.IsValid() {
		return from.IP.Unmap() == a.d.addr.IP
	}
	if from.IsName() {
		return from.Host == a.d.addr.Host
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.from.IsValid() {
		a.from = from.AddrPort()
	}
	return a.from == from.AddrPort()
}

// ask sends one question, twice if need be, and waits for its answer.
func (a *association) ask(ctx context.Context, q question) (*dns.Msg, error) {
	id, w, err := a.mux.add(q)
	if err != nil {
		return nil, err
	}
	defer a.mux.remove(id)
	wire, err := q.pack(id, false)
	if err != nil {
		return nil, err
	}
	select {
	case <-a.ready:
	case r := <-w.ch: // no association
		return r.msg, r.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	for _, patience := range []time.Duration{resendAfter, tcpAfter - resendAfter} {
		if err := a.send(wire); err != nil {
			return nil, fmt.Errorf("%w: %w", errGone, err)
		}
		timer := time.NewTimer(patience)
		select {
		case r := <-w.ch:
			timer.Stop()
			return r.msg, r.err
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return nil, context.Cause(ctx)
		}
	}
	return nil, fmt.Errorf("udp: %w", flow.ErrTimeout)
}

func (a *association) send(wire []byte) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := a.pc.SetReadDeadline(time.Now().Add(udpIdle)); err != nil {
		return err
	}
	n, err := a.pc.WriteBatch([]flow.Datagram{{Addr: a.d.addr, Buf: wire}})
	if err == nil && n != 1 {
		return flow.ErrUpstream
	}
	return err
}
