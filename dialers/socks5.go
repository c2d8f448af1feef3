// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"

	"github.com/mutex-proxy/mutex/flow"
)

// Protocol numbers of RFC 1928 and RFC 1929.
const (
	socksVersion = 5
	authVersion  = 1 // of the user/password sub-negotiation

	methodNone     = 0x00
	methodPassword = 0x02
	methodRefused  = 0xff

	cmdConnect = 1
	cmdUDP     = 3

	atypIPv4   = 1
	atypDomain = 3
	atypIPv6   = 4

	repSucceeded   = 0
	repUnsupported = 7 // command not supported
	repAddressType = 8 // address type not supported
)

// maxSOCKSAddr is the largest address of RFC 1928: type, length, 255 bytes of name, port.
const maxSOCKSAddr = 1 + 1 + 255 + 2

// errNoReply is how ssh -D, and every server that crashed, says no: it closes instead of replying.
var errNoReply = errors.New("closed without a reply")

// SOCKS5 is a SOCKS5 upstream (RFC 1928) with user/password (RFC 1929), CONNECT, BIND and UDP ASSOCIATE. As socks5h it is sent names; as socks5s
// it is reached over TLS, and sent names.
type SOCKS5 struct {
	upstream
	names bool        // send the name when there is one
	tls   *tls.Config // nil unless socks5s
	ahead sendAhead   // whether the request may follow the greeting at once
}

func newSOCKS5(name string, s Spec, n *Net) *SOCKS5 {
	if s.Scheme == SchemeSOCKS5s && s.UDP != UDPOn && !s.overTCP() {
		s.UDP = UDPOff // datagrams would go to the proxy in the clear: only if asked for
	}
	d := &SOCKS5{names: s.Scheme != SchemeSOCKS5}
	d.init(name, s, n)
	d.ahead.now = n.cfg.Now
	if s.Scheme == SchemeSOCKS5s {
		d.tls = tlsConfig(&s)
	}
	d.keepWarm(func(ctx context.Context, tcp *TCPConn) (flow.Conn, error) {
		c, err := secure(ctx, tcp, d.tls)
		if err == nil {
			err = d.greet(c, nil)
		}
		return c, err
	})
	return d
}

// Status returns the counters and what has been learned.
func (s *SOCKS5) Status() Status {
	st := s.status()
	if s.spec.UDP == UDPOff {
		st.UDP = no
	}
	if st.RemoteDNS = no; s.names {
		st.RemoteDNS = yes
	}
	return st
}

// takesNames reports whether the upstream resolves names.
func (s *SOCKS5) takesNames() bool { return s.names }

// DialContext is Dial for golang.org/x/net/proxy.
func (s *SOCKS5) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	return dialContext(ctx, s, network, address)
}

// Dial asks the upstream for a connection to dst.
func (s *SOCKS5) Dial(ctx context.Context, dst flow.Addr) (flow.Conn, error) {
	c, err := s.dial(ctx, dst)
	s.done(err)
	return c, err
}

func (s *SOCKS5) dial(ctx context.Context, dst flow.Addr) (flow.Conn, error) {
	addr, err := s.target(dst)
	if err != nil {
		return nil, s.wrap("connect "+dst.String(), err)
	}
	v6 := addr.Host == "" && addr.IP.Is6()
	if v6 && !s.ipv6.allowed() {
		return nil, s.wrap("connect "+dst.String(), fmt.Errorf("%w: the upstream has no IPv6", flow.ErrNetUnreachable))
	}
	defer s.findAhead(ctx)()
	o, err := s.open(ctx, addr)
	if v6 {
		s.learnIPv6(err)
	}
	if err != nil {
		return nil, err
	}
	s.track(o.tcp)
	o.tcp.bind = func(ctx context.Context) (flow.Binding, error) { return s.bindBeside(ctx, addr, o.local) }
	return o.conn, nil
}

// opened is a connection through the server.
type opened struct {
	tcp   *TCPConn
	conn  flow.Conn  // tcp, or TLS over it
	local netip.Addr // where the server says that it has connected from
}

// open asks for addr, on a connection that is ready or on a new one.
func (s *SOCKS5) open(ctx context.Context, addr flow.Addr) (opened, error) {
	w := s.warmed()
	if w == nil {
		return s.openFresh(ctx, addr)
	}
	return overWarm(ctx, &s.upstream, "connect "+addr.String(), w, func() (opened, error) {
		local, err := s.command(w.conn, appendRequest(nil, cmdConnect, addr))
		return opened{w.tcp, w.conn, local.IP}, err
	}, func(ctx context.Context) (opened, error) { return s.openFresh(ctx, addr) }, func(o opened) { o.tcp.Abort() })
}

// openFresh connects to the server and asks it for addr, sending the request ahead if it is known to take that.
func (s *SOCKS5) openFresh(ctx context.Context, addr flow.Addr) (opened, error) {
	ahead := s.ahead.known()
	o, err := s.tryOpen(ctx, addr, ahead || s.spec.Pipeline)
	if err != nil && ahead {
		if s.ahead.failed(err); errors.Is(err, errGreeting) && ctx.Err() == nil {
			// The server has said no word of the request: it is not the one that was asked, or a restart has changed it.
			return s.tryOpen(ctx, addr, s.spec.Pipeline)
		}
	}
	return o, err
}

func (s *SOCKS5) tryOpen(ctx context.Context, addr flow.Addr, ahead bool) (opened, error) {
	tcp, err := s.connect(ctx)
	if err != nil {
		return opened{}, err
	}
	o := opened{tcp: tcp}
	err = handshake(ctx, tcp, func() (err error) {
		if o.conn, err = secure(ctx, tcp, s.tls); err == nil {
			var local flow.Addr
			local, err = s.ask(o.conn, cmdConnect, addr, ahead)
			o.local = local.IP
		}
		return err
	})
	if err != nil {
		tcp.Abort()
		return opened{}, s.ended(ctx, "connect "+addr.String(), err)
	}
	return o, nil
}

// ended wraps an error of a handshake; a caller that gave up sees why it did, and blames nobody.
func (u *upstream) ended(ctx context.Context, op string, err error) error {
	if errors.Is(ctx.Err(), context.Canceled) {
		return u.wrap(op, context.Cause(ctx))
	}
	return u.wrap(op, err)
}

// target returns what is sent for dst: the name for socks5h, else the address.
func (s *SOCKS5) target(dst flow.Addr) (flow.Addr, error) {
	if s.names && dst.Host != "" {
		if !sendable(dst.Host) {
			return dst, fmt.Errorf("%w: not a name that can be sent", flow.ErrHostUnreachable)
		}
		return flow.Addr{Host: dst.Host, Port: dst.Port}, nil
	}
	if !dst.IP.IsValid() {
		return dst, fmt.Errorf("%w: name not resolved", flow.ErrHostUnreachable)
	}
	return flow.Addr{IP: dst.IP.Unmap().WithZone(""), Port: dst.Port}, nil
}

func (u *upstream) learnIPv6(err error) {
	var rep replyError
	switch {
	case err == nil, errors.Is(err, flow.ErrRefused):
		u.ipv6.can()
	case errors.As(err, &rep) && rep == repAddressType:
		u.ipv6.cannot()
	case errors.Is(err, flow.ErrNetUnreachable):
		u.ipv6.doubt()
	}
}

// request goes through the greeting, the authentication and one request, and returns the address in the reply. Reads are of exact size:
// what follows the reply stays in the socket.
//
// Each step waits for the one before, unless pipeline=1 asks for all of them at once.
func (s *SOCKS5) request(c io.ReadWriter, cmd byte, addr flow.Addr) (flow.Addr, error) {
	return s.ask(c, cmd, addr, s.spec.Pipeline)
}

// ask is request; ahead sends all of it without waiting for an answer. RFC 1928 would allow that with every server, but those that take one
// recv(2) for one message (microsocks) lose the rest and hang.
func (s *SOCKS5) ask(c io.ReadWriter, cmd byte, addr flow.Addr, ahead bool) (flow.Addr, error) {
	req := appendRequest(make([]byte, 0, 3+maxSOCKSAddr), cmd, addr)
	if !ahead {
		if err := s.greet(c, nil); err != nil {
			return flow.Addr{}, err
		}
		return s.command(c, req)
	}
	if err := s.greet(c, req); err != nil {
		return flow.Addr{}, err
	}
	return s.reply(c)
}

func appendRequest(b []byte, cmd byte, addr flow.Addr) []byte {
	return appendSOCKSAddr(append(b, socksVersion, cmd, 0), addr)
}

// greet goes through the greeting and the authentication. ahead, if any, is a request to be sent together with them.
func (s *SOCKS5) greet(c io.ReadWriter, ahead []byte) error {
	greeting := []byte{socksVersion, 1, methodNone}
	if s.spec.HasUser {
		greeting = []byte{socksVersion, 2, methodNone, methodPassword}
	}
	if ahead != nil {
		if s.spec.HasUser { // only what cannot be answered with a choice can be sent ahead
			greeting = append([]byte{socksVersion, 1, methodPassword}, s.credentials()...)
		}
		greeting = append(greeting, ahead...)
	}
	_, err := c.Write(greeting)
	clear(greeting)
	if err != nil {
		return s.ungreeted(err)
	}
	if ahead != nil {
		lastQuestion(c)
	}
	return s.authenticate(c, ahead != nil)
}

// command sends one request after the greeting and returns the address in the reply.
func (s *SOCKS5) command(c io.ReadWriter, req []byte) (flow.Addr, error) {
	if _, err := c.Write(req); err != nil {
		return flow.Addr{}, s.broken("request", err)
	}
	return s.reply(c)
}

func (s *SOCKS5) reply(c io.Reader) (flow.Addr, error) {
	bound, err := readReply(c)
	if err != nil && timedOut(err) {
		// The upstream is alive, it has just greeted us: it is the destination that does not answer.
		return flow.Addr{}, fmt.Errorf("%w: no reply", flow.ErrTimeout)
	}
	return bound, err
}

// broken marks a failure of the upstream before it was asked for anything.
func (s *SOCKS5) broken(step string, err error) error {
	return fmt.Errorf("%s: %w: %w", step, flow.ErrUpstream, noEOF(err))
}

// errGreeting marks what went wrong before the server has said anything of the request.
var errGreeting = errors.New("not greeted")

// ungreeted is broken for the greeting.
func (s *SOCKS5) ungreeted(err error) error {
	return greetingError{s.broken("greeting", err)}
}

// greetingError is an errGreeting that reads as what it wraps.
type greetingError struct{ error }

// Is makes it errGreeting.
func (greetingError) Is(target error) bool { return target == errGreeting }

// Unwrap returns the cause.
func (e greetingError) Unwrap() error { return e.error }

func noEOF(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return errNoReply
	}
	return err
}

// authenticate reads the choice of method and does what it asks for.
func (s *SOCKS5) authenticate(c io.ReadWriter, ahead bool) error {
	var choice [2]byte
	if _, err := io.ReadFull(c, choice[:]); err != nil {
		return s.ungreeted(err)
	}
	if choice[0] != socksVersion {
		return s.ungreeted(fmt.Errorf("not a SOCKS5 server: first byte %#02x", choice[0]))
	}
	switch choice[1] {
	case methodNone:
		s.ahead.chose(methodNone)
		s.auth.are(authNone)
		if ahead && s.spec.HasUser {
			return s.ungreeted(errors.New("chose a method that was not offered"))
		}
		return nil
	case methodPassword:
		s.ahead.chose(methodPassword)
		s.auth.are(authPassword)
		if s.spec.HasUser {
			return s.password(c, ahead)
		}
		return s.ungreeted(errors.New("wants user and password"))
	case methodRefused:
		if s.spec.HasUser {
			return s.ungreeted(errors.New("accepts neither user and password nor none"))
		}
		return s.ungreeted(errors.New("wants authentication"))
	}
	return s.ungreeted(fmt.Errorf("chose a method that was not offered: %#02x", choice[1]))
}

// password is the sub-negotiation of RFC 1929.
func (s *SOCKS5) password(c io.ReadWriter, ahead bool) error {
	if !ahead {
		msg := s.credentials()
		_, err := c.Write(msg)
		clear(msg)
		if err != nil {
			return s.broken("authentication", err)
		}
	}
	var reply [2]byte
	if _, err := io.ReadFull(c, reply[:]); err != nil {
		return s.broken("authentication", err)
	}
	// Some servers answer with version 5; the status is what counts.
	if reply[0] != authVersion && reply[0] != socksVersion {
		return s.broken("authentication", fmt.Errorf("garbage: first byte %#02x", reply[0]))
	}
	if reply[1] != 0 {
		return s.broken("authentication", errors.New("wrong user or password"))
	}
	return nil
}

func (s *SOCKS5) credentials() []byte {
	user, pass := s.spec.Username, s.spec.Password.bytes()
	msg := make([]byte, 0, 3+255+255)
	msg = append(msg, authVersion, byte(len(user)))
	msg = append(msg, user...)
	msg = append(msg, byte(len(pass)))
	return append(msg, pass...)
}

// replyError is a REP code of RFC 1928 section 6 other than success.
type replyError byte

// Error names the code.
func (e replyError) Error() string {
	names := [...]string{
		"succeeded", "general failure", "not allowed by ruleset", "network unreachable", "host unreachable", "connection refused",
		"TTL expired", "command not supported", "address type not supported",
	}
	if int(e) < len(names) {
		return "server says: " + names[e]
	}
	return fmt.Sprintf("server says: code %#02x", byte(e))
}

// Unwrap returns the sentinel of flow that the code means. Unassigned codes (tor has some for onion services) are an unreachable host.
func (e replyError) Unwrap() error {
	switch e {
	case 2:
		return flow.ErrProhibited
	case 3, repAddressType:
		return flow.ErrNetUnreachable
	case 5:
		return flow.ErrRefused
	case 6:
		return flow.ErrTimeout
	case repUnsupported:
		return errors.ErrUnsupported
	}
	return flow.ErrHostUnreachable
}

// readReply reads one reply and not a byte more. The shortest has 7 bytes (an empty name), so 5 can be asked for before its length is
// known. A failure that is cut short is still that failure.
func readReply(r io.Reader) (flow.Addr, error) {
	var buf [4 + maxSOCKSAddr]byte
	n, err := io.ReadFull(r, buf[:5])
	switch {
	case n >= 1 && buf[0] != socksVersion:
		return flow.Addr{}, fmt.Errorf("reply: %w: first byte %#02x", flow.ErrUpstream, buf[0])
	case n >= 2 && buf[1] != repSucceeded:
		// The rest of the reply is not waited for: the connection ends here, and some servers never send it.
		return flow.Addr{}, replyError(buf[1])
	case err != nil && timedOut(err):
		return flow.Addr{}, err
	case err != nil && n == 0:
		return flow.Addr{}, fmt.Errorf("reply: %w: %w", flow.ErrHostUnreachable, noEOF(err))
	case err != nil:
		return flow.Addr{}, fmt.Errorf("reply: %w: cut short", flow.ErrUpstream)
	}
	var rest int
	switch buf[3] {
	case atypIPv4:
		rest = 4 + 2 - 1
	case atypIPv6:
		rest = 16 + 2 - 1
	case atypDomain:
		rest = int(buf[4]) + 2
	default:
		return flow.Addr{}, fmt.Errorf("reply: %w: address type %#02x", flow.ErrUpstream, buf[3])
	}
	if _, err := io.ReadFull(r, buf[5:5+rest]); err != nil {
		return flow.Addr{}, fmt.Errorf("reply: %w: %w", flow.ErrUpstream, noEOF(err))
	}
	addr, _, err := parseSOCKSAddr(buf[3 : 5+rest])
	if err != nil { // cannot be: the length is the type's
		return flow.Addr{}, fmt.Errorf("reply: %w: %w", flow.ErrUpstream, err)
	}
	return addr, nil
}

var errSOCKSAddr = errors.New("malformed SOCKS address")

// parseSOCKSAddr reads type, address and port, and returns how many bytes they take.
func parseSOCKSAddr(b []byte) (flow.Addr, int, error) {
	if len(b) < 2 {
		return flow.Addr{}, 0, errSOCKSAddr
	}
	var a flow.Addr
	var end int
	switch b[0] {
	case atypIPv4:
		if end = 1 + 4; len(b) < end+2 {
			return a, 0, errSOCKSAddr
		}
		a.IP = netip.AddrFrom4([4]byte(b[1:5]))
	case atypIPv6:
		if end = 1 + 16; len(b) < end+2 {
			return a, 0, errSOCKSAddr
		}
		a.IP = netip.AddrFrom16([16]byte(b[1:17])).Unmap()
	case atypDomain:
		if end = 2 + int(b[1]); len(b) < end+2 {
			return a, 0, errSOCKSAddr
		}
		a.Host = string(b[2:end])
	default:
		return a, 0, errSOCKSAddr
	}
	a.Port = binary.BigEndian.Uint16(b[end:])
	return a, end + 2, nil
}

// appendSOCKSAddr appends type, address and port. A name is sent if there is one; it has at most 255 bytes.
func appendSOCKSAddr(b []byte, a flow.Addr) []byte {
	switch {
	case a.Host != "":
		b = append(b, atypDomain, byte(len(a.Host)))
		b = append(b, a.Host...)
	case a.IP.Is4():
		ip := a.IP.As4()
		b = append(append(b, atypIPv4), ip[:]...)
	default:
		ip := a.IP.As16()
		b = append(append(b, atypIPv6), ip[:]...)
	}
	return binary.BigEndian.AppendUint16(b, a.Port)
}
