// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/mutex-proxy/mutex/policy/process"
)

func TestInboundOf(t *testing.T) {
	ap := netip.MustParseAddrPort
	sock := func(state uint8, local, remote string) process.Socket {
		return process.Socket{State: state, Local: ap(local), Remote: ap(remote)}
	}
	got := inboundOf([]process.Socket{
		sock(process.StateListen, "0.0.0.0:22", "0.0.0.0:0"), sock(process.StateEstablished, "192.0.2.1:22", "198.51.100.1:5000"),
		sock(process.StateEstablished, "127.0.0.1:22", "127.0.0.1:5000"), sock(process.StateEstablished, "192.0.2.1:40000", "198.51.100.1:443"),
		sock(process.StateClose, "192.0.2.1:22", "198.51.100.2:5000"), sock(8, "[2001:db8::1]:22", "[2001:db8::2]:6"),
	})
	want := []Tuple{{Local: ap("192.0.2.1:22"), Remote: ap("198.51.100.1:5000")}, {Local: ap("[2001:db8::1]:22"), Remote: ap("[2001:db8::2]:6")}}
	if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.AddrPort{})); diff != "" {
		t.Error(diff)
	}
}

func TestClientsOf(t *testing.T) {
	ap := netip.MustParseAddrPort
	sock := func(inode uint32, local, remote string) process.Socket {
		return process.Socket{Inode: inode, Local: ap(local), Remote: ap(remote)}
	}
	got := clientsOf([]process.Socket{
		sock(1, "0.0.0.0:53", "0.0.0.0:0"),             // a server
		sock(2, "0.0.0.0:45000", "0.0.0.0:0"),          // an unconnected client
		sock(3, "192.0.2.1:39000", "198.51.100.1:443"), // a connected one
		sock(0, "0.0.0.0:51820", "0.0.0.0:0"),          // WireGuard
		sock(4, "192.0.2.1:53", "198.51.100.1:999"),    // a server's connected socket
		sock(5, "192.0.2.1:123", "198.51.100.1:123"),   // a client on a low port
		sock(6, "0.0.0.0:0", "0.0.0.0:0"),              // not bound
	}, 32768, 60999)
	if diff := cmp.Diff([]uint16{123, 39000, 45000}, got); diff != "" {
		t.Error(diff)
	}
}

// TestDoomed: sockets of a context that goes, and what is left of adopted flows. A flow with both ends may be another instance's.
func TestDoomed(t *testing.T) {
	const mask = 0xff000000
	ap := netip.MustParseAddrPort
	sock := func(mark uint32, local, remote string) process.Socket {
		return process.Socket{Mark: mark, Local: ap(local), Remote: ap(remote)}
	}
	socks := []process.Socket{
		sock(ContextMark(mask, 3)|0xabc, "192.0.2.1:1", "198.51.100.1:80"), sock(ContextMark(mask, 4), "192.0.2.1:2", "198.51.100.1:80"),
		sock(0, "192.0.2.1:3", "198.51.100.1:80"), sock(AccelMark(mask)|0xabc, "192.0.2.1:4", "198.51.100.1:80"),
		sock(AccelMark(mask), "192.0.2.1:5", "198.51.100.1:80"), sock(AccelMark(mask), "198.51.100.1:80", "192.0.2.1:5"),
		sock(AccelMark(mask), "[2001:db8::1]:6", "[2001:db8::2]:80"), sock(0, "[2001:db8::2]:80", "[2001:db8::1]:6"),
	}
	var got []uint16
	for _, s := range doomed(socks, []uint32{ContextMark(mask, 3)}, mask) {
		got = append(got, s.Local.Port())
	}
	if diff := cmp.Diff([]uint16{1, 4, 6}, got); diff != "" {
		t.Error(diff)
	}
}
