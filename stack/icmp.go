// SPDX-License-Identifier: GPL-3.0-or-later

package stack

import (
	"encoding/binary"
	"net/netip"
	"sync"

	"golang.org/x/time/rate"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/mutex-proxy/mutex/flow"
	"github.com/mutex-proxy/mutex/tun"
)

// Echo requests are answered only if the Handler says that their destination lives. netstack, which would answer any, hands them to
// a transport handler first and, being told that they are handled, leaves it at that.

// Bounds. A person's ping sends one a second; `ping -f` and scans are what the bounds are for: each request may cost a connection through
// the upstream. Waiting requests hold up to 64 KiB each.
const (
	echoPerSecond = 200
	echoBurst     = 200
	echoWaiting   = 256
)

// echoHeader is the size of ICMP's and ICMPv6's echo header: type, code, checksum, identifier, sequence.
const echoHeader = 8

// echoKey is one request: repeated while the answer is being found, it is not asked again.
type echoKey struct {
	src, dst netip.Addr
	idSeq    uint32
}

type echoTable struct {
	s     *Stack
	limit *rate.Limiter

	mu      sync.Mutex
	waiting map[echoKey]struct{}
	closed  bool
	wg      sync.WaitGroup // one for each waiting request; Add only under mu while not closed
}

func newEchoTable(s *Stack) *echoTable {
	return &echoTable{s: s, limit: rate.NewLimiter(echoPerSecond, echoBurst), waiting: map[echoKey]struct{}{}}
}

// handle takes ICMP messages of version 4 and 6 after netstack has dealt with errors. It says that it has handled all of them, so that netstack
// answers none.
func (t *echoTable) handle(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	src, dst := addrOf(id.RemoteAddress), addrOf(id.LocalAddress)
	th := pkt.TransportHeader().Slice()
	if len(th) < 2 || th[0] != request(src) || th[1] != 0 || len(th)+pkt.Data().Size() < echoHeader {
		return true // a reply to nothing, or an error that netstack has seen already
	}
	b := make([]byte, len(th)+pkt.Data().Size())
	copyData(b[copy(b, th):], pkt)
	if icmpSum(b, src, dst) != 0xffff { // netstack has not looked at version 4's yet when it hands over
		t.s.count.drop(dropChecksum)
		return true
	}
	t.start(echoKey{src, dst, binary.BigEndian.Uint32(b[4:])}, b)
	return true
}

func request(a netip.Addr) byte {
	if a.Is4() {
		return byte(header.ICMPv4Echo)
	}
	return byte(header.ICMPv6EchoRequest)
}

// icmpSum returns the sum over an ICMP message and, for version 6, the pseudo-header: 0xffff if its checksum is right.
func icmpSum(b []byte, src, dst netip.Addr) uint16 {
	if src.Is4() {
		return checksum.Checksum(b, 0)
	}
	return checksum.Checksum(b, pseudoSum(header.ICMPv6ProtocolNumber, src, dst, len(b)))
}

func (t *echoTable) start(k echoKey, b []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, ok := t.waiting[k]; ok || t.closed {
		t.s.count.drop(dropEchoRepeat)
		return
	}
	if len(t.waiting) >= echoWaiting || !t.limit.Allow() {
		t.s.count.drop(dropEchoLimit)
		return
	}
	t.waiting[k] = struct{}{}
	t.wg.Add(1)
	go t.serve(k, b)
}

// serve is the goroutine of one request.
func (t *echoTable) serve(k echoKey, b []byte) {
	defer t.wg.Done()
	alive, r := t.s.cfg.Handler.Echo(t.s.ctx, k.src, k.dst)
	if alive {
		t.reply(k, b)
	} else {
		t.unreachable(k, b, r)
	}
	t.mu.Lock()
	delete(t.waiting, k)
	t.mu.Unlock()
}

// reply turns the request into its reply: same identifier, sequence and payload (RFC 792, RFC 4443 section 4.2).
func (t *echoTable) reply(k echoKey, b []byte) {
	proto := header.ICMPv4ProtocolNumber
	b[0] = byte(header.ICMPv4EchoReply)
	if k.src.Is6() {
		proto = header.ICMPv6ProtocolNumber
		b[0] = byte(header.ICMPv6EchoReply)
	}
	b[2], b[3] = 0, 0
	binary.BigEndian.PutUint16(b[2:], ^icmpSum(b, k.dst, k.src))
	t.s.send.ip(&tun.Header{}, proto, k.dst, k.src, b[:echoHeader], b[echoHeader:])
}

func (t *echoTable) unreachable(k echoKey, b []byte, r flow.Reason) {
	// The IP header is made again: the original may be gone with its fragments.
	quote := b[:min(len(b), quoteMax6)]
	if k.src.Is4() {
		var ip [header.IPv4MinimumSize]byte
		put4(&ip, header.ICMPv4ProtocolNumber, k.src, k.dst, 0, 0, len(b))
		t.s.send.unreachable(append(ip[:], quote...), r)
		return
	}
	var ip [header.IPv6MinimumSize]byte
	put6(&ip, header.ICMPv6ProtocolNumber, k.src, k.dst, len(b))
	t.s.send.unreachable(append(ip[:], quote...), r)
}

// close makes handle swallow what still comes, and waits for the requests under way, which the end of the Stack's context cuts short.
func (t *echoTable) close() {
	t.mu.Lock()
	t.closed = true
	t.mu.Unlock()
	t.wg.Wait()
}

// copyData copies the packet's payload to b, which must have the room.
func copyData(b []byte, pkt *stack.PacketBuffer) int {
	w := tcpip.SliceWriter(b)
	n, _ := pkt.Data().ReadTo(&w, true) // fails only without room
	return n
}

// addrOf translates an address of netstack's.
func addrOf(a tcpip.Address) netip.Addr {
	if a.Len() == header.IPv4AddressSize {
		return netip.AddrFrom4(a.As4())
	}
	return netip.AddrFrom16(a.As16())
}
