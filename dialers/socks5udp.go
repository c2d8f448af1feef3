// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/flow"
)

// maxControlNoise bounds what a server may say on the control connection of an association, where it has nothing to say.
const maxControlNoise = 4096

// ListenPacket asks the upstream for a UDP association (RFC 1928 section 7). It wraps errors.ErrUnsupported if the upstream has none,
// and then at once for a while.
func (s *SOCKS5) ListenPacket(ctx context.Context, f *flow.Flow) (flow.PacketConn, error) {
	if s.spec.overTCP() {
		return s.listenOverTCP(ctx, s.Dial)
	}
	if s.spec.UDP == UDPOff || s.spec.UDP != UDPOn && !s.udp.allowed() {
		return nil, s.wrap("udp associate", errors.ErrUnsupported)
	}
	if f != nil && f.Dst.IP.Is6() && (f.Dst.Host == "" || !s.names) && s.ipv6.denied() {
		return nil, s.wrap("udp associate", fmt.Errorf("%w: the upstream has no IPv6", flow.ErrNetUnreachable))
	}
	a, err := s.associate(ctx)
	s.done(err)
	if err != nil {
		return nil, err
	}
	return a, nil
}

func (s *SOCKS5) associate(ctx context.Context) (*association, error) {
	tcp, err := s.connect(ctx)
	if err != nil {
		return nil, err
	}
	var ctl flow.Conn
	var relay flow.Addr
	var udp *net.UDPConn
	err = handshake(ctx, tcp, func() (err error) {
		if ctl, err = secure(ctx, tcp, s.tls); err != nil {
			return err
		}
		server := tcp.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
		// The address we shall send from is not known: a NAT may lie between (RFC 1928: then zeros). In the server's own family.
		from := flow.Addr{IP: wildcard(server)}
		if relay, err = s.request(ctl, cmdUDP, from); err != nil {
			return err
		}
		to, err := relayAddr(relay, server)
		if err != nil {
			return err
		}
		if udp, err = s.net.DialUDP(ctx, to); err != nil {
			return fmt.Errorf("relay %s: %w: %w", to, flow.ErrUpstream, err)
		}
		return nil
	})
	if err == nil {
		s.udp.can()
		var a *association
		if a, err = newAssociation(s, ctl, udp); err == nil {
			s.track(tcp)
			a.watch.Go(a.control)
			return a, nil
		}
	}
	tcp.Abort()
	if udp != nil {
		_ = udp.Close()
	}
	return nil, s.ended(ctx, "udp associate", s.noUDP(err))
}

// noUDP finds out whether a failed request means that the upstream carries no UDP. Servers say so with code 7, or by closing (ssh -D);
// code 2 means that it is forbidden, code 1 that it failed. None of them lets a datagram through.
func (s *SOCKS5) noUDP(err error) error {
	var rep replyError
	switch {
	case errors.As(err, &rep):
		if rep == repUnsupported || rep == 2 {
			s.udp.cannot()
		}
		return fmt.Errorf("%w: %w", errors.ErrUnsupported, err)
	case errors.Is(err, errNoReply) && !errors.Is(err, flow.ErrUpstream):
		s.udp.doubt()
		return fmt.Errorf("%w: %w", errors.ErrUnsupported, err)
	}
	return err
}

// relayAddr returns where datagrams are sent to, from the address in the reply. Servers that do not know their address answer 0.0.0.0 or
// ::, and servers behind a NAT a private or loopback address that means nothing to us: then it is the address that we reached them at.
func relayAddr(bound flow.Addr, server netip.Addr) (netip.AddrPort, error) {
	if bound.Port == 0 {
		return netip.AddrPort{}, fmt.Errorf("%w: relay has port 0", flow.ErrUpstream)
	}
	ip := bound.IP
	unusable := !ip.IsValid() || ip.IsUnspecified() || ip.IsMulticast() ||
		ip.IsLoopback() && !server.IsLoopback() ||
		(ip.IsPrivate() || ip.IsLinkLocalUnicast()) && !server.IsPrivate() && !server.IsLinkLocalUnicast() && !server.IsLoopback()
	if unusable {
		ip = server
	}
	if ip.IsLinkLocalUnicast() && ip.Zone() == "" {
		ip = ip.WithZone(server.Zone())
	}
	return netip.AddrPortFrom(ip, bound.Port), nil
}

// association is one UDP association. It lives as long as its control connection: when the server closes that, ReadBatch returns an error
// and the caller makes another.
//
// The socket is connected to the relay, so that the kernel drops datagrams of anybody else.
type association struct {
	batchConn
	s     *SOCKS5
	ctl   flow.Conn
	once  sync.Once
	watch sync.WaitGroup

	mu    sync.Mutex
	cause error // why it ended; nil while it lives or after Close
}

func newAssociation(s *SOCKS5, ctl flow.Conn, udp *net.UDPConn) (*association, error) {
	a := &association{s: s, ctl: ctl}
	if err := a.init(s.net, udp, &socksCodec{names: s.names, ipv6: &s.ipv6}, &s.dropped); err != nil {
		return nil, err
	}
	return a, nil
}

// control waits for the end of the control connection.
func (a *association) control() {
	var buf [512]byte
	for noise := 0; ; {
		n, err := a.ctl.Read(buf[:])
		if noise += n; err == nil && noise > maxControlNoise {
			err = errors.New("server talks on the control connection")
		}
		if err == nil {
			continue
		}
		a.mu.Lock()
		a.cause = a.s.wrap("udp association", fmt.Errorf("%w: ended by the server: %w", flow.ErrUpstream, err))
		a.mu.Unlock()
		_ = a.UDPConn.Close()
		return
	}
}

// ReadBatch fills ds with what came through the relay. Its error says that the association has ended, unless it is a deadline's.
func (a *association) ReadBatch(ds []flow.Datagram) (int, error) {
	n, err := a.batchConn.ReadBatch(ds)
	return n, a.why(err)
}

// WriteBatch sends ds through the relay. An error about one datagram leaves the association as it is, and is not flow.ErrUpstream.
func (a *association) WriteBatch(ds []flow.Datagram) (int, error) {
	n, err := a.batchConn.WriteBatch(ds)
	if errors.Is(err, unix.EMSGSIZE) || errors.Is(err, flow.ErrHostUnreachable) || errors.Is(err, flow.ErrNetUnreachable) {
		return n, err
	}
	return n, a.why(err)
}

func (a *association) why(err error) error {
	if err == nil || timedOut(err) {
		return err
	}
	if !errors.Is(err, net.ErrClosed) { // ECONNREFUSED by ICMP: the relay's port is gone
		return a.s.wrap("udp association", fmt.Errorf("%w: %w", flow.ErrUpstream, err))
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.cause != nil {
		return a.cause
	}
	return net.ErrClosed
}

// SetReadDeadline ends a waiting ReadBatch at t.
func (a *association) SetReadDeadline(t time.Time) error { return a.UDPConn.SetReadDeadline(t) }

// Close ends the association at the server and waits for its goroutine.
func (a *association) Close() error {
	a.once.Do(func() {
		_ = a.UDPConn.Close()
		_ = a.ctl.Close()
		a.watch.Wait()
		a.mu.Lock()
		a.cause = nil
		a.mu.Unlock()
	})
	return nil
}

// socksCodec puts the header of RFC 1928 section 7 in front of payloads and takes it off.
//
//	+-----+------+------+----------+----------+------+
//	| RSV | FRAG | ATYP | DST.ADDR | DST.PORT | DATA |
//	+-----+------+------+----------+----------+------+
//	   2      1      1    variable       2
type socksCodec struct {
	names bool // send names
	ipv6  *capability
	// host is the last name that came in a header: a server that answers with names answers with the same one most of the time.
	host string
	ip   netip.Addr // host, if that is an IP literal
}

func (s *socksCodec) send(b *batch, i int, d *flow.Datagram) error {
	addr := flow.Addr{Port: d.Addr.Port, IP: d.Addr.IP}
	switch {
	case s.names && d.Addr.Host != "":
		if addr.Host = d.Addr.Host; len(addr.Host) > 255 {
			return flow.ErrHostUnreachable
		}
	case !addr.IP.IsValid():
		return flow.ErrHostUnreachable
	default:
		if addr.IP = addr.IP.Unmap(); addr.IP.Is6() && s.ipv6.denied() {
			return flow.ErrNetUnreachable
		}
	}
	head := appendSOCKSAddr(append(b.heads[i][:0], 0, 0, 0), addr)
	setIov(&b.iovs[i][0], head)
	setIov(&b.iovs[i][1], d.Buf)
	b.hdrs[i].hdr.SetIovlen(2)
	return nil
}

func (s *socksCodec) prepare(b *batch, i int, buf []byte) {
	setIov(&b.iovs[i][0], b.heads[i][:headFixed])
	setIov(&b.iovs[i][1], buf)
	setIov(&b.iovs[i][2], b.heads[i][headFixed:]) // as much as a longer header can push the payload back
	b.hdrs[i].hdr.SetIovlen(3)
}

func (s *socksCodec) received(b *batch, i, n int, d *flow.Datagram) bool {
	size, ok := s.unwrap(b.heads[i][:], d.Buf, n, &d.Addr)
	if ok {
		d.Buf = d.Buf[:size]
	}
	return ok
}

// unwrap takes the header off a datagram of n bytes that lies in head[:headFixed], buf, head[headFixed:], in this order, and moves the
// payload to the start of buf. It reports the payload's size; false if there is no valid header, it is a fragment (which RFC 1928 allows
// to drop, and no known server sends), or the payload does not fit.
func (s *socksCodec) unwrap(head, buf []byte, n int, from *flow.Addr) (int, bool) {
	fixed, tail := head[:min(n, headFixed)], head[headFixed:]
	if n < 5 || fixed[2] != 0 {
		return 0, false
	}
	var size int
	switch fixed[3] {
	case atypIPv4:
		size = headFixed
	case atypIPv6:
		size = 3 + 1 + 16 + 2
	case atypDomain:
		size = 3 + 2 + int(fixed[4]) + 2
	default:
		return 0, false
	}
	payload := n - size
	if payload < 0 || payload > len(buf) {
		return 0, false
	}
	if size <= headFixed {
		if !s.address(fixed[3:size], from) {
			return 0, false
		}
		over := headFixed - size // payload bytes that landed in head: only after a name of less than 3 bytes
		over = min(over, payload)
		copy(buf[over:payload], buf[:payload-over])
		copy(buf, fixed[size:size+over])
		return payload, true
	}
	var long [headMax]byte
	in := min(size-headFixed, len(buf))
	copy(long[:], fixed)
	copy(long[headFixed:], buf[:in])
	skip := size - headFixed - in // header bytes that landed in tail: only with a tiny buffer
	copy(long[headFixed+in:], tail[:skip])
	if !s.address(long[3:size], from) {
		return 0, false
	}
	m := copy(buf, buf[in:min(len(buf), n-headFixed)])
	copy(buf[m:payload], tail[skip:])
	return payload, true
}

// address reads type, address and port, without allocating unless a name comes for the first time.
func (s *socksCodec) address(b []byte, a *flow.Addr) bool {
	if b[0] != atypDomain {
		addr, _, err := parseSOCKSAddr(b)
		*a = addr
		return err == nil
	}
	name := b[2 : len(b)-2]
	if len(name) == 0 {
		return false
	}
	if s.host == "" || string(name) != s.host { // compares without allocating
		s.host = string(name)
		s.ip, _ = netip.ParseAddr(s.host)
	}
	*a = flow.Addr{Host: s.host, Port: binary.BigEndian.Uint16(b[len(b)-2:])}
	if s.ip.IsValid() {
		a.Host, a.IP = "", s.ip.Unmap()
	}
	return true
}
