// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"

	"github.com/mutex-proxy/mutex/flow"
)

// Protocol numbers of "SOCKS: A protocol for TCP proxy across firewalls" (Y.-D. Lee).
const (
	socks4Version = 4

	socks4Granted  = 90
	socks4Rejected = 91
	socks4NoIdent  = 92 // the server cannot reach identd on our machine
	socks4Ident    = 93 // identd says another user
)

// SOCKS4 is a SOCKS4 upstream. It carries TCP over IPv4 and an unverified user id. As socks4a ("SOCKS 4A: A Simple Extension to SOCKS 4
// Protocol") it is sent names.
type SOCKS4 struct {
	upstream
	names bool
}

func newSOCKS4(name string, s Spec, n *Net) *SOCKS4 {
	d := &SOCKS4{names: s.Scheme == SchemeSOCKS4a}
	d.init(name, s, n)
	d.keepWarm(func(_ context.Context, c *TCPConn) (flow.Conn, error) { return c, nil })
	return d
}

// Status returns the counters and what the protocol can do.
func (s *SOCKS4) Status() Status {
	st := s.status()
	if st.IPv6 = no; !s.spec.overTCP() {
		st.UDP = no
	}
	if st.RemoteDNS = no; s.names {
		st.RemoteDNS = yes
	}
	return st
}

func (s *SOCKS4) takesNames() bool { return s.names }

// DialContext is Dial for golang.org/x/net/proxy.
func (s *SOCKS4) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	return dialContext(ctx, s, network, address)
}

// ListenPacket opens an association in a stream if that is asked for (udp=over-tcp), and else wraps errors.ErrUnsupported.
func (s *SOCKS4) ListenPacket(ctx context.Context, _ *flow.Flow) (flow.PacketConn, error) {
	if s.spec.overTCP() {
		return s.listenOverTCP(ctx, s.Dial)
	}
	return nil, s.wrap("udp", errors.ErrUnsupported)
}

// Dial asks the upstream for a connection to dst. An IPv6 address is refused at once: the protocol has no room for it.
func (s *SOCKS4) Dial(ctx context.Context, dst flow.Addr) (flow.Conn, error) {
	c, err := s.dial(ctx, dst)
	s.done(err)
	if err != nil {
		return nil, err
	}
	s.track(c)
	return c, nil
}

func (s *SOCKS4) dial(ctx context.Context, dst flow.Addr) (*TCPConn, error) {
	op := "connect " + dst.String()
	req, err := s.request(cmdConnect, dst)
	if err != nil {
		return nil, s.wrap(op, err)
	}
	var c *TCPConn
	if w := s.warmed(); w == nil {
		c, err = s.openFresh(ctx, op, req)
	} else {
		c, err = overWarm(ctx, &s.upstream, op, w, func() (*TCPConn, error) {
			_, err := ask4(w.tcp, req)
			return w.tcp, err
		}, func(ctx context.Context) (*TCPConn, error) { return s.openFresh(ctx, op, req) }, (*TCPConn).Abort)
	}
	if err != nil {
		return nil, err
	}
	c.bind = func(ctx context.Context) (flow.Binding, error) { return s.Bind(ctx, dst) }
	return c, nil
}

// openFresh connects to the server and asks.
func (s *SOCKS4) openFresh(ctx context.Context, op string, req []byte) (*TCPConn, error) {
	c, err := s.connect(ctx)
	if err != nil {
		return nil, err
	}
	if err := handshake(ctx, c, func() error {
		_, err := ask4(c, req)
		return err
	}); err != nil {
		c.Abort()
		return nil, s.ended(ctx, op, err)
	}
	return c, nil
}

// ask4 sends a request and returns the address in the reply.
func ask4(c io.ReadWriter, req []byte) (flow.Addr, error) {
	if _, err := c.Write(req); err != nil {
		return flow.Addr{}, fmt.Errorf("request: %w: %w", flow.ErrUpstream, err)
	}
	lastQuestion(c)
	return readReply4(c)
}

// request returns the one message of the client. For a name, the address is 0.0.0.1: never a destination, so it marks what follows.
func (s *SOCKS4) request(cmd byte, dst flow.Addr) ([]byte, error) {
	ip := dst.IP.Unmap()
	name := ""
	switch {
	case s.names && dst.Host != "":
		if !sendable(dst.Host) {
			return nil, fmt.Errorf("%w: not a name that can be sent", flow.ErrHostUnreachable)
		}
		name, ip = dst.Host, netip.AddrFrom4([4]byte{0, 0, 0, 1})
	case !ip.IsValid():
		return nil, fmt.Errorf("%w: name not resolved", flow.ErrHostUnreachable)
	case !ip.Is4():
		return nil, fmt.Errorf("%w: SOCKS4 has no IPv6", flow.ErrNetUnreachable)
	}
	if strings.Contains(s.spec.Username, "\x00") {
		return nil, fmt.Errorf("%w: a user id cannot contain a zero byte", flow.ErrUpstream)
	}
	v4 := ip.As4()
	req := binary.BigEndian.AppendUint16([]byte{socks4Version, cmd}, dst.Port)
	req = append(append(append(req, v4[:]...), s.spec.Username...), 0)
	if name != "" {
		req = append(append(req, name...), 0)
	}
	return req, nil
}

// reply4Error is a reply code other than granted.
type reply4Error byte

// Error names the code.
func (e reply4Error) Error() string {
	switch e {
	case socks4Rejected:
		return "server says: rejected or failed"
	case socks4NoIdent:
		return "server says: no identd to ask"
	case socks4Ident:
		return "server says: wrong user id"
	}
	return fmt.Sprintf("server says: code %d", byte(e))
}

// Unwrap returns the sentinel of flow that the code means. There is one code for all that can be wrong with a destination.
func (e reply4Error) Unwrap() error {
	if e == socks4Rejected {
		return flow.ErrHostUnreachable
	}
	return flow.ErrUpstream
}

// readReply4 reads the eight bytes of a reply and returns its address, which only BIND gives a meaning. Its version is 0; some servers answer
// with their own.
func readReply4(r io.Reader) (flow.Addr, error) {
	var reply [8]byte
	n, err := io.ReadFull(r, reply[:])
	switch {
	case n >= 1 && reply[0] != 0 && reply[0] != socks4Version:
		return flow.Addr{}, fmt.Errorf("reply: %w: not a SOCKS4 server: first byte %#02x", flow.ErrUpstream, reply[0])
	case n >= 2 && reply[1] != socks4Granted:
		return flow.Addr{}, reply4Error(reply[1])
	case err == nil:
		return flow.Addr{IP: netip.AddrFrom4([4]byte(reply[4:])), Port: binary.BigEndian.Uint16(reply[2:])}, nil
	case timedOut(err):
		// Whether the proxy hangs or the destination does cannot be told apart.
		return flow.Addr{}, fmt.Errorf("%w: no reply", flow.ErrTimeout)
	case n == 0 && errors.Is(err, io.EOF):
		return flow.Addr{}, fmt.Errorf("reply: %w: %w", flow.ErrHostUnreachable, errNoReply)
	}
	return flow.Addr{}, fmt.Errorf("reply: %w: %w", flow.ErrUpstream, noEOF(err))
}
