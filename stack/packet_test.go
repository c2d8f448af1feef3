// SPDX-License-Identifier: GPL-3.0-or-later

package stack

import (
	"bytes"
	"context"
	"encoding/binary"
	"net/netip"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/mutex-proxy/mutex/flow"
	"github.com/mutex-proxy/mutex/tun"
)

// samples returns one packet of every kind the link tells apart, and the ways they go wrong.
func samples() map[string][]byte {
	v4, v6 := variants()[0], variants()[1]
	src4, dst4 := netip.AddrPortFrom(v4.app(), 1), v4.dst(53)
	src6, dst6 := netip.AddrPortFrom(v6.app(), 1), v6.dst(53)
	change := func(b []byte, f func(b []byte)) []byte {
		b = append([]byte(nil), b...)
		f(b)
		return b
	}
	u4, u6 := udpPacket(src4, dst4, []byte("payload")), udpPacket(src6, dst6, []byte("payload"))
	chain := []byte{60, 0, 1, 4, 0, 0, 0, 0} // one of 100 destination option headers
	var long []byte
	for range 100 {
		long = append(long, chain...)
	}
	return map[string][]byte{
		"empty":         {},
		"one byte":      {0x45},
		"version 5":     {0x55, 0, 0, 20},
		"short v4":      u4[:19],
		"short v6":      u6[:39],
		"udp v4":        u4,
		"udp v6":        u6,
		"padded":        append(append([]byte(nil), u4...), 0, 0, 0),
		"tcp v4":        tcp4(src4.Addr(), dst4.Addr(), 1, 80, header.TCPFlagSyn),
		"tcp v6":        tcp4(src6.Addr(), dst6.Addr(), 1, 80, header.TCPFlagSyn),
		"tcp garbage":   ip4(src4.Addr(), dst4.Addr(), 6, bytes.Repeat([]byte{0xff}, 40)),
		"header length": change(u4, func(b []byte) { b[0] = 0x4f }),
		"total length":  change(u4, func(b []byte) { b[3] = 200 }),
		"total short":   change(u4, func(b []byte) { b[3] = 10 }),
		"v4 checksum":   change(u4, func(b []byte) { b[10]++ }),
		"udp checksum":  change(u4, func(b []byte) { b[30]++ }),
		"udp6 checksum": change(u6, func(b []byte) { b[50]++ }),
		"udp6 none":     change(u6, func(b []byte) { b[46], b[47] = 0, 0 }),
		"udp4 none":     change(u4, func(b []byte) { b[26], b[27] = 0, 0 }),
		"udp length":    change(u6, func(b []byte) { b[45]++ }),
		"udp short":     ip4(src4.Addr(), dst4.Addr(), 17, []byte{0, 1, 0, 2, 0, 4}),
		"multicast":     udpPacket(src4, netip.MustParseAddrPort("224.0.0.251:5353"), nil),
		"broadcast":     udpPacket(src4, netip.MustParseAddrPort("255.255.255.255:67"), nil),
		"multicast v6":  udpPacket(src6, netip.MustParseAddrPort("[ff02::fb]:5353"), nil),
		"from nowhere":  udpPacket(netip.MustParseAddrPort("0.0.0.0:68"), dst4, nil),
		"loopback":      udpPacket(src4, netip.MustParseAddrPort("127.0.0.53:53"), nil),
		"loopback v6":   udpPacket(netip.MustParseAddrPort("[::1]:1"), dst6, nil),
		"mapped":        udpPacket(src6, netip.MustParseAddrPort("[::ffff:1.2.3.4]:53"), nil),
		"fragment v4":   fragments(v4, src4.Addr(), dst4.Addr(), make([]byte, 100), 48, 1)[0],
		"fragment v6":   fragments(v6, src6.Addr(), dst6.Addr(), make([]byte, 100), 48, 1)[1],
		"chain":         ip6(src6.Addr(), dst6.Addr(), 60, long),
		"hop by hop":    ip6(src6.Addr(), dst6.Addr(), 0, []byte{17, 255, 0, 0, 0, 0, 0, 0}),
		"options v6":    ip6(src6.Addr(), dst6.Addr(), 60, append([]byte{6, 0, 1, 4, 0, 0, 0, 0}, tcp4(src6.Addr(), dst6.Addr(), 1, 80, header.TCPFlagSyn)[40:]...)),
		"no next":       ip6(src6.Addr(), dst6.Addr(), 59, nil),
		"igmp":          ip4(src4.Addr(), dst4.Addr(), 2, make([]byte, 8)),
		"sctp":          ip4(src4.Addr(), dst4.Addr(), 132, make([]byte, 12)),
		"options":       ip4(src4.Addr(), dst4.Addr(), 1, []byte{8, 0, 0, 0}),
	}
}

func TestParse(t *testing.T) {
	want := map[string]verdict{
		"udp v4": toUDP, "udp v6": toUDP, "padded": toUDP, "udp4 none": toUDP,
		"tcp v4": toNetstackSlow, "tcp v6": toNetstackSlow, "tcp garbage": toNetstackSlow,
		"fragment v4": toNetstackSlow, "fragment v6": toNetstackSlow, "chain": toNetstackSlow, "hop by hop": toNetstackSlow,
		"no next": toNetstackSlow, "options v6": toNetstackSlow, "igmp": toNetstackSlow, "sctp": toNetstackSlow, "options": toNetstackSlow,
	}
	why := map[string]drop{
		"v4 checksum": dropChecksum, "header length": dropMalformed, "udp checksum": dropChecksum, "udp6 checksum": dropChecksum, "udp6 none": dropChecksum,
		"multicast": dropMulticast, "broadcast": dropMulticast, "multicast v6": dropMulticast,
		"from nowhere": dropMartian, "loopback": dropMartian, "loopback v6": dropMartian, "mapped": dropMartian,
		"total length": dropMalformed, "total short": dropMalformed, "udp length": dropMalformed, "udp short": dropMalformed,
	}
	for name, b := range samples() {
		var p packet
		p.parse(b, &tun.Header{})
		if p.verdict != want[name] {
			t.Errorf("%s: verdict %d, want %d", name, p.verdict, want[name])
		}
		if w, ok := why[name]; p.verdict == dropped && ok && p.why != w {
			t.Errorf("%s: dropped for %s, want %s", name, p.why, w)
		}
		if p.verdict == toUDP && (string(p.payload) != "payload" || p.src.Port() != 1 || p.dst.Port() != 53) {
			t.Errorf("%s: %v", name, p)
		}
	}
}

// TestParseOffload: what the kernel vouches for, and what does not fit its packet.
func TestParseOffload(t *testing.T) {
	s := samples()
	cases := []struct {
		name, packet string
		h            tun.Header
		want         verdict
	}{
		{"open checksum", "udp checksum", tun.Header{Flags: tun.NeedsChecksum, CsumStart: 20, CsumOffset: 6}, toUDP},
		{"verified", "udp6 checksum", tun.Header{Flags: tun.ChecksumValid}, toUDP},
		{"start before the header", "udp checksum", tun.Header{Flags: tun.NeedsChecksum, CsumStart: 10, CsumOffset: 6}, dropped},
		{"end after the packet", "udp checksum", tun.Header{Flags: tun.NeedsChecksum, CsumStart: 20, CsumOffset: 600}, dropped},
		{"tcp open", "tcp v4", tun.Header{Flags: tun.NeedsChecksum, CsumStart: 20, CsumOffset: 16}, toNetstack},
		{"train", "tcp v4", tun.Header{Flags: tun.NeedsChecksum, GSOType: tun.GSOTCP4, GSOSize: 1460, CsumStart: 20, CsumOffset: 16}, toNetstack},
		{"train v6", "tcp v6", tun.Header{Flags: tun.NeedsChecksum, GSOType: tun.GSOTCP6, GSOSize: 1440, CsumStart: 40, CsumOffset: 16}, toNetstack},
		{"train of the other family", "tcp v6", tun.Header{Flags: tun.NeedsChecksum, GSOType: tun.GSOTCP4, CsumStart: 40, CsumOffset: 16}, dropped},
		{"train of datagrams", "udp v4", tun.Header{GSOType: 5}, dropped},
		{"train of fragments", "fragment v4", tun.Header{GSOType: tun.GSOTCP4}, dropped},
		{"open checksum elsewhere", "udp v4", tun.Header{Flags: tun.NeedsChecksum, CsumStart: 20, CsumOffset: 4}, dropped},
		{"tcp open elsewhere", "tcp v4", tun.Header{Flags: tun.NeedsChecksum, CsumStart: 22, CsumOffset: 16}, toNetstackSlow},
		{"train open elsewhere", "tcp v4", tun.Header{Flags: tun.NeedsChecksum, GSOType: tun.GSOTCP4, GSOSize: 1460, CsumStart: 24, CsumOffset: 2}, dropped},
		{"train behind options", "options v6", tun.Header{Flags: tun.NeedsChecksum, GSOType: tun.GSOTCP6, GSOSize: 1440, CsumStart: 48, CsumOffset: 16}, toNetstack},
		{"ping open", "options", tun.Header{Flags: tun.NeedsChecksum, CsumStart: 20, CsumOffset: 2}, toNetstackSlow},
		{"fragment never vouched for", "fragment v4", tun.Header{Flags: tun.ChecksumValid}, toNetstackSlow},
		{"fragment v6 never vouched for", "fragment v6", tun.Header{Flags: tun.ChecksumValid}, toNetstackSlow},
	}
	for _, c := range cases {
		var p packet
		p.parse(s[c.packet], &c.h)
		if p.verdict != c.want {
			t.Errorf("%s: verdict %d (%s), want %d", c.name, p.verdict, p.why, c.want)
		}
	}
}

// nowhere is a netstack that drops what it is given.
type nowhere struct{}

func (nowhere) DeliverNetworkPacket(tcpip.NetworkProtocolNumber, *stack.PacketBuffer) {}
func (nowhere) DeliverLinkPacket(tcpip.NetworkProtocolNumber, *stack.PacketBuffer)    {}

// TestReadAllocations: the link itself allocates nothing for a packet to netstack; views and packet buffers are gVisor's, and pooled.
func TestReadAllocations(t *testing.T) {
	if race {
		t.Skip("the race detector allocates")
	}
	n := &nic{dispatcher: nowhere{}}
	r := &reader{link: &link{count: &counters{}}, trusted: n, checked: n}
	defer r.close()
	v := variants()[0]
	for _, size := range []int{0, 1460, 60000} {
		seg := tcp4(v.app(), v.dst(0).Addr(), 1, 80, header.TCPFlagAck)
		wire := ip4(v.app(), v.dst(0).Addr(), 6, append(seg[20:], make([]byte, size)...))
		h := tun.Header{Flags: tun.ChecksumValid}
		if got := testing.AllocsPerRun(200, func() {
			r.Packet(&h, copy(r.Buffer(), wire))
		}); got != 0 {
			t.Errorf("%d bytes: %v allocations", size, got)
		}
	}
}

// FuzzLink throws packets at a whole Stack: nothing may panic. What it makes of them goes nowhere.
func FuzzLink(f *testing.F) {
	for _, b := range samples() {
		f.Add(b, uint8(0))
		f.Add(b, uint8(tun.ChecksumValid))
	}
	s, _ := startStack(f, &handler{
		udp: func(_ context.Context, _ netip.AddrPort, in flow.PacketSource, out flow.PacketSink) {
			ds := []flow.Datagram{{Buf: make([]byte, slabLarge)}}
			if n, err := in.ReadBatch(ds); err == nil {
				out.Unreachable(ds[0].Addr.AddrPort(), ds[0].Buf, flow.ReasonRefused)
				out.Deliver(ds[:n])
			}
		},
		tcp: func(_ context.Context, _, _ netip.AddrPort, p flow.Pending) { p.Reject(flow.ReasonHostUnreachable) },
		echo: func(context.Context, netip.Addr, netip.Addr) (bool, flow.Reason) {
			return true, 0
		},
	}, true, func(c *Config) { c.MaxUDPSessions = 64 })
	s.link.dev.Load().Queues()[0].Stop() // the reader is the fuzzer now
	s.readers.Wait()
	trusted, ok := s.ns.GetLinkEndpointByName("trusted").(*nic)
	if !ok {
		f.Fatal("no trusted nic")
	}
	checked := s.ns.GetLinkEndpointByName("checked").(*nic)
	r := &reader{link: s.link, trusted: trusted, checked: checked, udp: s.udp.receive, reuse: s.tcp.reuse}
	f.Cleanup(r.close)
	f.Fuzz(func(_ *testing.T, b []byte, flags uint8) {
		h := tun.Header{Flags: flags}
		if flags&tun.NeedsChecksum != 0 {
			h.CsumStart, h.CsumOffset = 40, 16
			if len(b) > 0 && b[0]>>4 == 4 {
				h.CsumStart = 20
			}
		}
		// The checksums are put right now and then, so that the fuzzer gets past them.
		if flags&0x80 != 0 && len(b) >= 20 && b[0]>>4 == 4 {
			b[10], b[11] = 0, 0
			binary.BigEndian.PutUint16(b[10:], ^sum(b[:min(len(b), int(b[0]&0xf)*4)]))
		}
		r.Packet(&h, copy(r.Buffer(), b))
	})
}
