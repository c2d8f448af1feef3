// SPDX-License-Identifier: GPL-3.0-or-later

package flow

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"
)

// Active-mode FTP. The client tells the server where to connect to (PORT, RFC 959 section 4.1.2; EPRT, RFC 2428 section 2): an address of the
// application's, which the server cannot reach through a proxy. So the upstream of the control connection is asked to accept the connection
// (BIND), its address is put into the command, and what it accepts is opened to the application from the server's address.
//
//	client ──PORT 192.0.2.2,…──▶ ftpClient ──BIND──▶ upstream;  ──PORT upstream's address──▶ server
//	client ◀──────── Caller.Call ◀──────── Binding.Accept ◀──────── data connection ──────── server
//
// A command that cannot be served goes on without its argument: the server then refuses it (501) in its turn, and the client knows at once.

// FTPMode says what becomes of active mode on a flow. The zero value watches port 21 only.
type FTPMode uint8

// The FTP modes.
const (
	FTPRefuse FTPMode = iota // on port 21, PORT and EPRT are refused
	FTPActive                // they are served, on any port
	FTPIgnore                // nothing is looked at
)

const (
	ftpPort     = 21
	ftpDataPort = 20 // where data connections come from, unless the upstream says otherwise
	// ftpUnprivileged is the first port that a data connection is made to: below, there are services, not clients (RFC 2577 section 3).
	ftpUnprivileged = 1024
	// ftpLine bounds a command: the longest has a path. What is longer is not FTP.
	ftpLine = 4 << 10
	// ftpBind and ftpAccept are how long the upstream may take to listen, and the server to connect after it was told where.
	ftpBind   = 10 * time.Second
	ftpAccept = time.Minute
	// ftpLate is how long the end of a transfer waits for a data connection that the upstream has not told of yet: some round trips.
	ftpLate = 2 * time.Second
	// ftpData bounds the data connections of one control connection, waited for and running. A client has one, or one and its successor.
	ftpData = 8
)

// Caller is a Conn of an application whose stack can connect to the application too.
type Caller interface {
	// Call opens a connection to the application's socket at to, as if it came from from.
	Call(ctx context.Context, from, to netip.AddrPort) (Conn, error)
}

// ftp is what the two directions of a control connection share.
type ftp struct {
	h     *Handler
	f     *Flow
	d     Decision
	app   Caller
	up    Bound
	ctx   context.Context // the control connection's life: what is waited for ends with it
	stop  context.CancelFunc
	slots turns

	mu      sync.Mutex
	spoke   bool // the server has sent something
	is      bool // and it was the greeting of an FTP server
	auth    bool // the client has asked for TLS, and the server has not answered
	raw     bool // nothing is looked at any more
	waiting context.CancelFunc
	opening chan struct{} // closed when the last data connection has reached the application, or never will; nil = there has been none
	under   bool          // a preliminary reply was the last: a transfer is under way
}

// watchFTP puts itself between the two sides of a flow that may be FTP's control connection. done ends what is waited for.
func (h *Handler) watchFTP(ctx context.Context, f *Flow, d Decision, app, up Conn) (Conn, Conn, func()) {
	caller, ok := app.(Caller)
	bound, ok2 := up.(Bound)
	if d.FTP == FTPActive && (!ok || !ok2) {
		d.FTP = FTPRefuse
	}
	c := &ftp{h: h, f: f, d: d, app: caller, up: bound, slots: make(turns, ftpData)}
	c.ctx, c.stop = context.WithCancel(ctx)
	return &ftpClient{Conn: app, c: c}, &ftpServer{Conn: up, c: c}, c.stop
}

// isFTP reports whether the flow is to be watched. What goes directly is not: the server reaches the application as it is.
func isFTP(f *Flow, d Decision, up Conn) bool {
	if d.FTP != FTPActive && (d.FTP != FTPRefuse || f.Dst.Port != ftpPort) {
		return false
	}
	b, ok := up.(Bound)
	return !ok || !b.Direct()
}

// ftpServer reads what the server says, and changes nothing.
type ftpServer struct {
	Conn
	c    *ftp
	line []byte // the first bytes of the line
}

// Read passes on what was read and notes replies that matter.
func (s *ftpServer) Read(b []byte) (int, error) {
	n, err := s.Conn.Read(b)
	var early chan struct{}
	for _, x := range b[:n] {
		switch {
		case x == '\n':
			s.line = s.line[:0]
		case len(s.line) < 4:
			if s.line = append(s.line, x); len(s.line) == 4 {
				if o := s.c.replied(string(s.line)); o != nil {
					early = o
				}
			}
		}
	}
	if early != nil {
		s.c.hold(early)
	}
	return n, err
}

// hold waits until the application has the data connection whose end the server has told of. That end comes by another connection than the
// upstream's word that the server has connected, and must not overtake it: curl takes it for an error.
func (c *ftp) hold(opening <-chan struct{}) {
	late := time.NewTimer(ftpLate)
	defer late.Stop()
	select {
	case <-opening:
	case <-c.ctx.Done():
	case <-late.C:
	}
}

// replied notes the beginning of a reply: "220 " or "220-". It returns what to wait for before the reply is passed on, or nil.
func (c *ftp) replied(code string) (early chan struct{}) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.spoke {
		c.spoke, c.is = true, code[:3] == "220" || code[:3] == "120"
	}
	if c.auth && code[3] == ' ' {
		c.auth = false
		c.raw = c.raw || code[:3] == "234" // RFC 4217 section 4: TLS begins
	}
	if c.under && code[0] == '2' && !c.raw {
		early = c.opening
	}
	c.under = code[0] == '1'
	return early
}

// ftpClient reads what the client says, command by command.
type ftpClient struct {
	Conn
	c   *ftp
	in  []byte // an unfinished command
	out []byte // commands on their way
	err error  // comes after out
}

// Read returns commands, changed where needed. An unfinished command waits for its end.
func (r *ftpClient) Read(b []byte) (int, error) {
	for len(r.out) == 0 {
		if r.err != nil {
			return 0, r.err
		}
		if r.c.passes() {
			if len(r.in) == 0 {
				return r.Conn.Read(b)
			}
			r.out, r.in = r.in, nil
			break
		}
		n, err := r.Conn.Read(b)
		if len(r.in) == 0 && n > 0 && !ftpText(b[0]) { // another protocol, which may never send the end of a line
			r.c.mu.Lock()
			r.c.raw = true
			r.c.mu.Unlock()
		}
		r.in = append(r.in, b[:n]...)
		if r.err = err; err != nil || r.c.passes() { // the server may have begun TLS while we waited
			r.out, r.in = r.in, nil
			continue
		}
		r.take()
	}
	n := copy(b, r.out)
	if r.out = r.out[n:]; len(r.out) == 0 {
		r.out = nil
	}
	return n, nil
}

// ftpText reports whether a command line may begin with the byte: a letter, Telnet, or the end of an empty line.
func ftpText(b byte) bool {
	return b >= 'a' && b <= 'z' || b >= 'A' && b <= 'Z' || b == '\r' || b == '\n' || b == ' ' || b >= 0x80
}

// take moves finished commands to out.
func (r *ftpClient) take() {
	for {
		end := bytes.IndexByte(r.in, '\n')
		if end < 0 {
			break
		}
		r.out = append(r.out, r.c.command(r.in[:end+1])...)
		r.in = r.in[end+1:]
	}
	if len(r.in) > ftpLine {
		r.c.mu.Lock()
		r.c.raw = true
		r.c.mu.Unlock()
	}
}

// passes reports whether what the client says is none of our business: TLS, or a server that has not greeted as FTP servers do.
func (c *ftp) passes() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.spoke && !c.is {
		c.raw = true
	}
	return c.raw
}

// command returns what is sent for a command, a line with its end.
func (c *ftp) command(line []byte) []byte {
	text := bytes.TrimRight(line, "\r\n")
	for len(text) > 0 && text[0] >= 0x80 { // Telnet IP and DATA MARK may come first (RFC 959 section 4.1.3)
		text = text[1:]
	}
	verb, arg, _ := strings.Cut(string(text), " ")
	verb = strings.ToUpper(verb)
	var want netip.AddrPort
	var err error
	switch verb {
	case "AUTH":
		c.mu.Lock()
		c.auth = true
		c.mu.Unlock()
		return line
	case "PASV", "EPSV": // the data connection goes the other way from now on
		c.succeed(nil, nil)
		return line
	case "PORT":
		want, err = parsePort(arg)
	case "EPRT":
		want, err = parseEprt(arg)
	default:
		return line
	}
	if err == nil {
		want, err = c.serve(want)
	}
	if err != nil {
		c.h.cfg.Log.Info("ftp: active mode refused", zap.String("command", verb), zap.Error(err))
		return []byte(verb + "\r\n")
	}
	return []byte(formatPort(verb, want))
}

var (
	errFTPRefused  = errors.New("no rule allows it")
	errFTPStranger = errors.New("somebody else than the server has connected")
)

// serve asks the upstream to accept the connection that is to go to the application at to, and returns where it listens.
func (c *ftp) serve(to netip.AddrPort) (netip.AddrPort, error) {
	none := netip.AddrPort{}
	switch {
	case c.d.FTP != FTPActive:
		return none, errFTPRefused
	case to.Addr() != c.f.Src.Addr().Unmap() || to.Port() < ftpUnprivileged:
		return none, fmt.Errorf("%s is not the client", to) // RFC 2577 section 3: nobody is sent to third parties
	}
	if !c.slots.tryTake() {
		return none, errors.New("too many data connections")
	}
	ctx, cancel := context.WithTimeout(c.ctx, ftpBind)
	defer cancel()
	b, err := c.up.Bind(ctx)
	if err != nil {
		c.slots.give()
		return none, err
	}
	if err := c.expect(b, to); err != nil {
		c.slots.give()
		_ = b.Close()
		return none, err
	}
	return b.Addr(), nil
}

// expect waits for the server's connection beside the control connection. A new command ends the wait for the last one's.
func (c *ftp) expect(b Binding, to netip.AddrPort) error {
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(c.ctx)) // once it runs, the transfer outlives the control connection
	leave, ok := c.h.enter(cancel)
	if !ok {
		return ErrClosed
	}
	waiting, enough := context.WithTimeout(ctx, ftpAccept)
	unlink := context.AfterFunc(c.ctx, enough)
	opening := make(chan struct{})
	opened := sync.OnceFunc(func() { close(opening) })
	c.succeed(enough, opening)
	go func() { // owned by the Handler, see enter
		defer leave()
		defer cancel(nil)
		defer c.slots.give()
		defer opened()
		up, from, err := b.Accept(waiting)
		unlink()
		enough()
		if err != nil {
			c.h.cfg.Log.Debug("ftp: no data connection", zap.Error(err))
			return
		}
		c.transfer(ctx, cancel, called{up, from, b.Anybody()}, to, opened)
	}()
	return nil
}

// succeed puts a data connection that is waited for in the place of the last, whose wait ends.
func (c *ftp) succeed(enough context.CancelFunc, opening chan struct{}) {
	c.mu.Lock()
	before := c.waiting
	c.waiting, c.opening = enough, opening
	c.mu.Unlock()
	if before != nil {
		before()
	}
}

// origin is where the application sees the data connection come from: the address it knows the server by.
func (c *ftp) origin(from netip.AddrPort) netip.AddrPort {
	port := uint16(ftpDataPort)
	if from.Port() != 0 {
		port = from.Port()
	}
	return netip.AddrPortFrom(c.f.Orig.Addr(), port)
}

// called is a connection that the upstream has accepted for the application.
type called struct {
	Conn
	from    netip.AddrPort
	anybody bool // it may have come from anybody
}

// isServer reports whether the connection comes from the server of the control connection. Of a name the addresses are the upstream's to know,
// which lets nobody else in. If it does, they are asked for, where there are DNS servers to ask.
func (c *ftp) isServer(ctx context.Context, a called) bool {
	want, ip := c.f.Dst, a.from.Addr().Unmap()
	if !want.IsName() {
		return ip == want.IP.Unmap()
	}
	if !a.anybody || c.h.names == nil {
		return true
	}
	ctx, cancel := context.WithTimeout(ctx, c.h.dialTimeout())
	defer cancel()
	ips, err := c.h.names.Resolve(ctx, want.Host)
	return errors.Is(err, ErrNoServers) || slices.ContainsFunc(ips, func(one netip.Addr) bool { return one.Unmap() == ip })
}

// transfer is the life of a data connection: a flow of its own, whose SYN goes the other way.
func (c *ftp) transfer(ctx context.Context, cancel context.CancelCauseFunc, up called, to netip.AddrPort, opened func()) {
	from := c.origin(up.from)
	f := c.h.newFlow(TCP, to, from)
	f.Dst.Host, f.HostSource, f.App, f.Protocol, f.Control = c.f.Dst.Host, c.f.HostSource, c.f.App, "ftp-data", c.f
	e, err := c.h.table.add(f, cancel)
	if err != nil {
		up.Abort()
		return
	}
	defer e.finish()
	e.decide(f, c.d)
	if !c.isServer(ctx, up) {
		up.Abort()
		e.outcome(ResultFailed, errFTPStranger)
		return
	}
	calling, done := context.WithTimeout(ctx, c.h.dialTimeout())
	app, err := c.app.Call(calling, from, to)
	done()
	opened()
	if err != nil {
		up.Abort()
		e.outcome(ResultFailed, because(ctx, fmt.Errorf("connect to the application: %w", err)))
		return
	}
	e.established(0)
	if err := relay(ctx, app, up.Conn, nil, e, c.h.buffers, &c.h.crew); err != nil {
		e.outcome(ResultReset, because(ctx, err))
	}
}

var errFTPAddress = errors.New("malformed address")

// parsePort reads h1,h2,h3,h4,p1,p2.
func parsePort(arg string) (netip.AddrPort, error) {
	fields := strings.Split(strings.TrimSpace(arg), ",")
	if len(fields) != 6 {
		return netip.AddrPort{}, errFTPAddress
	}
	var n [6]byte
	for i, s := range fields {
		v, err := strconv.ParseUint(s, 10, 8)
		if err != nil {
			return netip.AddrPort{}, errFTPAddress
		}
		n[i] = byte(v)
	}
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte(n[:4])), uint16(n[4])<<8|uint16(n[5])), nil
}

// parseEprt reads |protocol|address|port|, where any character may stand for the bar.
func parseEprt(arg string) (netip.AddrPort, error) {
	arg = strings.TrimSpace(arg)
	if len(arg) < 2 {
		return netip.AddrPort{}, errFTPAddress
	}
	fields := strings.Split(arg, arg[:1])
	if len(fields) != 5 || fields[0] != "" || fields[4] != "" {
		return netip.AddrPort{}, errFTPAddress
	}
	ip, err := netip.ParseAddr(fields[2])
	port, err2 := strconv.ParseUint(fields[3], 10, 16)
	if err != nil || err2 != nil || ip.Zone() != "" || fields[1] != "1" && fields[1] != "2" || ip.Is4() != (fields[1] == "1") {
		return netip.AddrPort{}, errFTPAddress
	}
	return netip.AddrPortFrom(ip.Unmap(), uint16(port)), nil
}

// formatPort returns the command for an address. PORT has no room for IPv6: the server that it is for then has EPRT.
func formatPort(verb string, at netip.AddrPort) string {
	if ip := at.Addr().Unmap(); verb == "PORT" && ip.Is4() {
		b := ip.As4()
		return fmt.Sprintf("PORT %d,%d,%d,%d,%d,%d\r\n", b[0], b[1], b[2], b[3], at.Port()>>8, at.Port()&0xff)
	}
	family := 2
	if at.Addr().Unmap().Is4() {
		family = 1
	}
	return fmt.Sprintf("EPRT |%d|%s|%d|\r\n", family, at.Addr().Unmap().WithZone(""), at.Port())
}
