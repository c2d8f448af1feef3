// SPDX-License-Identifier: GPL-3.0-or-later

// Package flow holds the nouns of the project and the life of a flow: name it, ask who it is, decide, dial, relay, count.
//
// It is not a network stack, not a proxy client and not a rule engine: those are stack, dialers and routing, which meet here only
// through the interfaces below. handler.go is the hot path, readable from top to bottom; stack calls it, cmd/mprox/daemon builds it.
package flow

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strconv"
	"time"
)

// Network is the transport a flow uses.
type Network uint8

// The networks a flow can be of. The zero value is none of them, so that a forgotten field matches no rule.
const (
	TCP Network = iota + 1
	UDP
	ICMP
)

// String returns the name used in rules, metrics and the API: tcp, udp, icmp.
func (n Network) String() string {
	switch n {
	case TCP:
		return "tcp"
	case UDP:
		return "udp"
	case ICMP:
		return "icmp"
	}
	return "unknown"
}

// Addr is a destination: a name or an IP address, and a port. It is a type of its own, and not a string, so that nothing resolves a
// name by accident. Host is empty when only the address is known; when both are set, Host is what an upstream that takes names is sent.
type Addr struct {
	Host string // lower case, without the trailing dot; never an IP literal
	IP   netip.Addr
	Port uint16
}

// AddrFrom returns the Addr of an address that has no name. v4-mapped IPv6 addresses become IPv4.
func AddrFrom(ap netip.AddrPort) Addr {
	return Addr{IP: ap.Addr().Unmap(), Port: ap.Port()}
}

// IsName reports whether the address has a name.
func (a Addr) IsName() bool { return a.Host != "" }

// AddrPort returns the IP and port; its Addr is invalid when only the name is known.
func (a Addr) AddrPort() netip.AddrPort { return netip.AddrPortFrom(a.IP, a.Port) }

// String returns host:port, with the name if there is one and IPv6 addresses in brackets.
func (a Addr) String() string {
	host := a.Host
	if host == "" {
		host = a.IP.String()
	}
	return net.JoinHostPort(host, strconv.Itoa(int(a.Port)))
}

// Source says how a flow's name was learned.
type Source uint8

// The sources of a name, from none to the ones that need payload.
const (
	SourceNone   Source = iota
	SourceFakeIP        // the destination was a fake IP that dns had handed out
	SourceDNS           // dns had answered this name with the flow's address
	SourceSNI           // read from a TLS or QUIC ClientHello
	SourceHTTP          // read from an HTTP Host header
)

// String returns the name used in the API: "", fakeip, dns, sni, http.
func (s Source) String() string {
	switch s {
	case SourceFakeIP:
		return "fakeip"
	case SourceDNS:
		return "dns"
	case SourceSNI:
		return "sni"
	case SourceHTTP:
		return "http"
	}
	return ""
}

// App is the process a flow belongs to. The zero value means unknown. Method says how it was found ("" when it was not).
type App struct {
	PID    int
	UID    uint32
	GID    uint32
	Exe    string
	Cgroup string
	Method string
}

// Flow is one TCP connection, one UDP association towards one destination, or one ICMP echo exchange. It is private to the goroutine
// that made it until it is decided, and read-only after; the table shows copies.
type Flow struct {
	ID         uint64 // set when the table gives the flow a slot, never 0 after
	Context    string
	Network    Network
	Src        netip.AddrPort // the application's socket
	Orig       netip.AddrPort // where the application sent it: may be a fake IP
	Dst        Addr           // where it is meant to go: never a fake IP
	HostSource Source
	App        App
	Protocol   string // detected protocol, "" when not (yet) known
	Confidence Confidence
	Start      time.Time
	Control    *Flow // of an FTP data connection: its control connection; nil for all others
}

// Ruled returns the flow that rules decide about: of an FTP data connection that is its control connection.
func (f *Flow) Ruled() *Flow {
	if f.Control != nil {
		return f.Control
	}
	return f
}

// Confidence is how sure protocol detection is.
type Confidence uint8

// The five levels of confidence.
const (
	ConfidenceNone Confidence = iota
	ConfidenceLow
	ConfidenceMedium
	ConfidenceHigh
	ConfidenceCertain
)

// String returns the name used in the API.
func (c Confidence) String() string {
	return [...]string{"none", "low", "medium", "high", "certain"}[min(c, ConfidenceCertain)]
}

// Action is what the router wants done with a flow. The zero value blocks, so that a forgotten case leaks nothing.
type Action uint8

// The actions a Decision can carry.
const (
	Block   Action = iota // RST, or ICMP unreachable
	Drop                  // silence
	Forward               // dial through Decision.Via
	Resolve               // a DNS query: answered by Names, never forwarded as it is
	Sniff                 // a rule that can still match needs payload: accept, peek, decide again
)

// String returns the name used in logs and explain.
func (a Action) String() string {
	switch a {
	case Drop:
		return "drop"
	case Forward:
		return "forward"
	case Resolve:
		return "resolve"
	case Sniff:
		return "sniff"
	}
	return "block"
}

// Decision is what a Decider answers: what to do, through which upstream, and the name of the rule that said so.
type Decision struct {
	Action Action
	Via    Dialer // set exactly when Action is Forward
	Rule   string // "default", "bypass[0]", "rules[3]", "dns" ...
	FTP    FTPMode
	// Offload is whether a TCP flow is adopted into the kernel if it can be.
	Offload Offload
}

// Offload is what a rule says about adopting flows into the kernel. The zero value says nothing.
type Offload uint8

// The values of offload.
const (
	OffloadDefault Offload = iota // as the context says
	OffloadAuto                   // where it can be done
	OffloadOff
)

// Needs is a set of things a rule that can still match has to know.
type Needs uint8

// The things a rule may need.
const (
	NeedApp Needs = 1 << iota
	NeedPayload
)

// Decider chooses what happens to a flow. Implementations are immutable, pure and safe for concurrent use; they do not allocate.
type Decider interface {
	Decide(f *Flow) Decision
	Needs(f *Flow) Needs
}

// Dialer is one upstream, or a pool of them. Implementations are safe for concurrent use, and comparable (pointers): associations are kept by
// Dialer. One whose associations cannot be given names says so as a UDPNamer.
type Dialer interface {
	// Name returns the upstream's name in the configuration.
	Name() string
	// Dial opens a connection to dst through the upstream and returns when the upstream has said that dst has answered. Errors wrap one
	// of the sentinels of reason.go where the cause is known. Every wait ends with ctx.
	Dial(ctx context.Context, dst Addr) (Conn, error)
	// ListenPacket opens one UDP association for the application socket f.Src, which is used for other destinations than f's too. ctx bounds
	// the opening alone. It wraps errors.ErrUnsupported if the upstream carries no UDP.
	ListenPacket(ctx context.Context, f *Flow) (PacketConn, error)
}

// SourceDialer is implemented by a Dialer for which more of a flow counts than where it goes to: a pool that keeps the flows of one source
// together.
type SourceDialer interface {
	// DialFlow is Dial to f.Dst. f is read-only, and not kept.
	DialFlow(ctx context.Context, f *Flow) (Conn, error)
}

// Binding is an upstream that listens for one connection. Exactly one of Accept and Close is called.
type Binding interface {
	// Addr is where the upstream listens.
	Addr() netip.AddrPort
	// Anybody reports whether whoever comes first is accepted, and not the destination alone.
	Anybody() bool
	// Accept waits for the connection and returns it, and where it came from if the upstream says so.
	Accept(ctx context.Context) (Conn, netip.AddrPort, error)
	Close() error
}

// Bound is implemented by a Conn through an upstream that may be able to accept connections too (SOCKS BIND). What belongs to a connection,
// an FTP data connection, must come by the same way.
type Bound interface {
	// Bind asks the upstream to accept one connection from the destination of this one, and returns when it listens. It wraps
	// errors.ErrUnsupported if the upstream is known not to.
	Bind(ctx context.Context) (Binding, error)
	// Direct reports whether there is no upstream in between: the destination reaches the application as it is.
	Direct() bool
}

// Conn is a stream with half-close and abort. A Conn that also implements syscall.Conn is a plain socket: bytes may be moved to and from
// its descriptor directly, nothing is buffered above it.
type Conn interface {
	net.Conn
	CloseWrite() error // sends FIN
	Abort()            // sends RST, discards what is queued; safe after Close
}

// Socket is implemented by a Conn that is a plain TCP socket which can be given away. A Conn that is not one has bytes of its own in between.
type Socket interface {
	Conn
	// Detach makes fd, a descriptor of the caller's, one of the socket, which does not block and is not known to the runtime's poller. So it
	// needs no descriptor that might not be there. The Conn itself has still to be closed, by Close, after that: it counts as open until then.
	// Abort calls abort from now on, which must not block or call the Conn. With an error nothing has changed. It must not be called while the
	// Conn is being read or written.
	Detach(fd int, abort func()) error
}

// Adopter is implemented by a Pending that can make the application's connection in the kernel, so that bytes never pass through here.
type Adopter interface {
	// Adopt answers the request as Accept does. Unless the error is ErrGone, the application has not been answered then, and Accept or Reject
	// has still to be called.
	Adopt() (Splicer, error)
}

// Splicer is an application's Conn that moves bytes between itself and an upstream's socket without anybody waiting for them.
type Splicer interface {
	Conn
	// Splice is to move bytes both ways, and counts those towards the upstream in up and those towards the application in down. ended is
	// called once for each direction, with nil after the end of file and everything before it have been passed on, else with an error as that
	// of WriterTo; after it the direction's source can be read. It must not block. Splice returns the Conn to use for the upstream from now
	// on, and what begins to move bytes; with an error nothing has changed. If beginning fails, ended is not called.
	Splice(upstream Socket, up, down *Counter, ended func(upload bool, err error)) (far Conn, begin func() error, err error)
}

// ErrGone means that the application has been answered, and is there no more.
var ErrGone = errors.New("the application has gone")

// Pending is a connection request (SYN) that has not been answered. Exactly one of its methods is called, exactly once.
type Pending interface {
	// Accept completes the handshake with the application.
	Accept() (Conn, error)
	// Reject answers with RST, with an ICMP unreachable, or not at all, as the reason asks.
	Reject(r Reason)
}

// Datagram is one UDP payload. Towards an upstream Addr is the destination, from an upstream the source. Towards the application it is the
// source the application shall see. In ReadBatch, Buf is the caller's: its length is the room on entry and the datagram's size on return.
type Datagram struct {
	Addr Addr
	Buf  []byte
}

// PacketConn is one UDP association with an upstream. One goroutine may read while another writes.
type PacketConn interface {
	// ReadBatch fills at least one element of ds and returns how many. A datagram longer than its Buf is dropped and counted, never cut.
	ReadBatch(ds []Datagram) (int, error)
	// WriteBatch sends the datagrams in order and returns how many were taken. The buffers are the caller's again when it returns. An error
	// about the next datagram alone wraps EMSGSIZE, ErrNetUnreachable, ErrHostUnreachable, ErrProhibited or ErrRefused (or their errno), and
	// not ErrUpstream; any other means that the association is of no more use.
	WriteBatch(ds []Datagram) (int, error)
	SetReadDeadline(t time.Time) error
	Close() error // unblocks ReadBatch with net.ErrClosed; idempotent
}

// PacketSource is what an application socket sent: a bounded queue, filled by the stack. Buffers in ds are the caller's, as in PacketConn;
// Addr.IP and Addr.Port are the destination as the application wrote it. SetReadDeadline may be called from any goroutine, and wakes a
// ReadBatch that waits. See Waiter.
type PacketSource interface {
	ReadBatch(ds []Datagram) (int, error)
	SetReadDeadline(t time.Time) error
}

// PacketSink takes datagrams towards one application socket, one call at a time. Addr must be an address (no name) of the socket's own family.
type PacketSink interface {
	// Deliver queues or writes the datagrams; the buffers are the caller's again when it returns.
	Deliver(ds []Datagram)
	// Flush sends what Deliver still holds. Call it when the next read would block.
	Flush()
	// Unreachable answers the application's datagram to dst (its first bytes are payload) with the ICMP error of the reason.
	Unreachable(dst netip.AddrPort, payload []byte, r Reason)
}

// Names is the DNS module as a flow sees it.
type Names interface {
	// Exchange answers one DNS message. An error of any kind is answered as SERVFAIL inside the reply; err is set only when query is not a
	// DNS message at all (the caller then drops it).
	Exchange(ctx context.Context, f *Flow, query []byte) ([]byte, error)
	// HostOf returns the name that dns has handed out for the address, and how it knows. It does not allocate.
	HostOf(ip netip.Addr) (host string, src Source, ok bool)
	// IsFake reports whether the address lies in the fake ranges, mapped or not. A flow to an unmapped fake IP is blocked.
	IsFake(ip netip.Addr) bool
	// Hold keeps a fake IP's mapping while a flow uses it; Release ends that. Both count, both ignore addresses that are not fake.
	Hold(ip netip.Addr)
	Release(ip netip.Addr)
	// Resolve asks the profile's servers, through the proxy, for the real addresses of a name. ErrNoServers if there are none.
	Resolve(ctx context.Context, host string) ([]netip.Addr, error)
}

// Owner finds the process that owns a socket of this machine.
type Owner interface {
	Lookup(network Network, src, dst netip.AddrPort) (App, error)
	// Fast reports whether Lookup takes microseconds. If not, it is called only when a rule needs the answer.
	Fast() bool
}
