// SPDX-License-Identifier: GPL-3.0-or-later

package stack

import (
	"bytes"
	"context"
	"encoding/binary"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/flow"
	"github.com/mutex-proxy/mutex/tun"
)

// fallbacks are the ways a device can be opened: everything the kernel has, and each technique taken away.
func fallbacks() map[string]tun.Config {
	return map[string]tun.Config{
		"all":        {Name: "mprox0"},
		"no uso":     {Name: "mprox0", NoUSO: true},
		"no offload": {Name: "mprox0", NoOffload: true},
		"no header":  {Name: "mprox0", NoHeader: true},
		"two queues": {Name: "mprox0", Queues: 2},
	}
}

// trainEcho sends back what it gets, as many in one go as came in one go.
func trainEcho(ctx context.Context, _ netip.AddrPort, in flow.PacketSource, out flow.PacketSink) {
	defer context.AfterFunc(ctx, func() { _ = in.SetReadDeadline(time.Unix(1, 0)) })()
	bufs := make([][]byte, 64)
	for i := range bufs {
		bufs[i] = make([]byte, slabLarge)
	}
	ds := make([]flow.Datagram, len(bufs))
	for {
		for i := range ds {
			ds[i].Buf = bufs[i]
		}
		n, err := in.ReadBatch(ds)
		if err != nil {
			return
		}
		out.Deliver(ds[:n])
		out.Flush()
	}
}

// TestKernelTrains: an application that sends trains (UDP_SEGMENT) gets back the datagrams of each, the kernel having split them or we; with
// a train's worth of system calls if the device has USO.
func TestKernelTrains(t *testing.T) {
	for name, cfg := range fallbacks() {
		for _, v := range variants()[:2] {
			t.Run(name+" "+v.name, func(t *testing.T) {
				k := startKernel(t, &handler{udp: trainEcho}, cfg)
				c, err := k.dial("udp", v.dst(7))
				if err != nil {
					t.Fatal(err)
				}
				u := c.(*net.UDPConn)
				for _, sizes := range [][]int{{1000, 1000, 1000, 300}, slices.Repeat([]int{1400}, 45), {1, 1}, slices.Repeat([]int{512}, 64), {9}} {
					before := k.s.Stats()
					var all []byte
					for i, n := range sizes {
						all = append(all, bytes.Repeat([]byte{byte(i + 1)}, n)...)
					}
					if _, _, err := u.WriteMsgUDPAddrPort(all, segmentOption(sizes[0]), netip.AddrPort{}); err != nil {
						t.Fatal(err)
					}
					buf := make([]byte, 65536)
					for i, want := range sizes {
						n, err := u.Read(buf)
						if err != nil {
							t.Fatalf("%d of %v: %v", i, sizes, err)
						}
						if !bytes.Equal(buf[:n], bytes.Repeat([]byte{byte(i + 1)}, want)) {
							t.Fatalf("%d of %v: %d bytes, % x", i, sizes, n, buf[:min(n, 8)])
						}
					}
					after := k.s.Stats()
					in, out := after.PacketsIn-before.PacketsIn, after.PacketsOut-before.PacketsOut
					switch uso := k.s.cfg.Device.USO(); {
					case uso != (name == "all" || name == "two queues"):
						t.Errorf("USO %v", uso)
					case uso && len(sizes) > 40 && (in > 3 || out > uint64(len(sizes))/4):
						t.Errorf("%d datagrams came as %d packets and left as %d", len(sizes), in, out)
					case !uso && out+2 < uint64(len(sizes)): // the last ones are counted after they have been read here
						t.Errorf("%d datagrams left as %d packets", len(sizes), out)
					}
				}
			})
		}
	}
}

func segmentOption(size int) []byte {
	b := make([]byte, unix.CmsgSpace(2))
	binary.NativeEndian.PutUint64(b, uint64(unix.CmsgLen(2)))
	binary.NativeEndian.PutUint32(b[8:], unix.SOL_UDP)
	binary.NativeEndian.PutUint32(b[12:], unix.UDP_SEGMENT)
	binary.NativeEndian.PutUint16(b[16:], uint16(size))
	return b
}

// TestParseTrains: what the link makes of trains of datagrams, and what it refuses.
func TestParseTrains(t *testing.T) {
	s := samples()
	for _, c := range []struct {
		name, packet string
		h            tun.Header
		want         verdict
		segment      int
	}{
		{"train", "udp v4", tun.Header{Flags: tun.NeedsChecksum, GSOType: tun.GSOUDP, GSOSize: 3, CsumStart: 20, CsumOffset: 6}, toUDP, 3},
		{"train v6", "udp v6", tun.Header{Flags: tun.NeedsChecksum, GSOType: tun.GSOUDP, GSOSize: 3, CsumStart: 40, CsumOffset: 6}, toUDP, 3},
		{"a train of one", "udp v4", tun.Header{Flags: tun.ChecksumValid, GSOType: tun.GSOUDP, GSOSize: 100}, toUDP, 7},
		{"no train", "udp v4", tun.Header{}, toUDP, 7},
		{"of nothing", "udp v4", tun.Header{Flags: tun.NeedsChecksum, GSOType: tun.GSOUDP, CsumStart: 20, CsumOffset: 6}, dropped, 0},
		{"nobody answers for it", "udp v4", tun.Header{GSOType: tun.GSOUDP, GSOSize: 3}, dropped, 0},
		{"of segments", "udp v4", tun.Header{Flags: tun.NeedsChecksum, GSOType: tun.GSOTCP4, GSOSize: 3, CsumStart: 20, CsumOffset: 6}, dropped, 0},
		{"of tcp", "tcp v4", tun.Header{Flags: tun.NeedsChecksum, GSOType: tun.GSOUDP, GSOSize: 3, CsumStart: 20, CsumOffset: 16}, dropped, 0},
		{"of fragments", "fragment v4", tun.Header{GSOType: tun.GSOUDP, GSOSize: 3}, dropped, 0},
	} {
		var p packet
		p.parse(s[c.packet], &c.h)
		if p.verdict != c.want || p.segment != c.segment {
			t.Errorf("%s: verdict %d (%s), segment %d; want %d, %d", c.name, p.verdict, p.why, p.segment, c.want, c.segment)
		}
	}
}
