// SPDX-License-Identifier: GPL-3.0-or-later

package stack

import (
	"context"
	"encoding/binary"
	"net"
	"net/netip"
	"reflect"
	"runtime"
	"testing"
	"time"
	"unsafe"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// eventually waits for a condition that other goroutines bring about.
func eventually(tb testing.TB, f func() bool) {
	tb.Helper()
	deadline := time.Now().Add(wait)
	for !f() {
		if time.Now().After(deadline) {
			tb.Fatal("the condition did not come true")
		}
		runtime.Gosched()
	}
}

func gonetDial(ctx context.Context, a *app, port uint16) (*gonet.TCPConn, error) {
	return gonet.DialContextTCP(ctx, a.ns, fullAddress(a.dst(port)), a.proto())
}

func gonetDialFrom(tb testing.TB, a *app, from, port uint16) (*gonet.TCPConn, error) {
	tb.Helper()
	ctx, cancel := context.WithTimeout(tb.Context(), wait)
	defer cancel()
	return gonet.DialTCPWithBind(ctx, a.ns, fullAddress(netip.AddrPortFrom(a.app(), from)), fullAddress(a.dst(port)), a.proto())
}

// endpointOf reaches into gonet, which has no way to reset a connection.
func endpointOf(c net.Conn) tcpip.Endpoint {
	f := reflect.ValueOf(c).Elem().FieldByName("ep")
	return *(*tcpip.Endpoint)(unsafe.Pointer(f.UnsafeAddr()))
}

// ip4 makes an IPv4 packet with a right header checksum.
func ip4(src, dst netip.Addr, proto byte, payload []byte) []byte {
	b := make([]byte, 20, 20+len(payload))
	put4((*[20]byte)(b), tcpip.TransportProtocolNumber(proto), src, dst, 7, 0, len(payload))
	return append(b, payload...)
}

func ip6(src, dst netip.Addr, next byte, payload []byte) []byte {
	b := make([]byte, 40, 40+len(payload))
	put6((*[40]byte)(b), tcpip.TransportProtocolNumber(next), src, dst, len(payload))
	return append(b, payload...)
}

// ip makes a packet of either family.
func ip(src, dst netip.Addr, proto byte, payload []byte) []byte {
	if src.Is4() {
		return ip4(src, dst, proto, payload)
	}
	return ip6(src, dst, proto, payload)
}

// tcp4 makes a segment without options or payload.
func tcp4(src, dst netip.Addr, sport, dport uint16, flags header.TCPFlags) []byte {
	b := make([]byte, 20)
	h := header.TCP(b)
	h.Encode(&header.TCPFields{SrcPort: sport, DstPort: dport, SeqNum: 1000, DataOffset: 20, Flags: flags, WindowSize: 65535})
	h.SetChecksum(^checksum.Checksum(b, pseudoSum(header.TCPProtocolNumber, src, dst, 20)))
	return ip(src, dst, 6, b)
}

// udpPacket makes a datagram with a right checksum.
func udpPacket(src, dst netip.AddrPort, payload []byte) []byte {
	b := make([]byte, 8, 8+len(payload))
	binary.BigEndian.PutUint16(b, src.Port())
	binary.BigEndian.PutUint16(b[2:], dst.Port())
	binary.BigEndian.PutUint16(b[4:], uint16(8+len(payload)))
	b = append(b, payload...)
	sum := ^checksum.Checksum(b, pseudoSum(header.UDPProtocolNumber, src.Addr(), dst.Addr(), len(b)))
	if sum == 0 {
		sum = 0xffff
	}
	binary.BigEndian.PutUint16(b[6:], sum)
	return ip(src.Addr(), dst.Addr(), 17, b)
}

func sum(b []byte) uint16 { return checksum.Checksum(b, 0) }
