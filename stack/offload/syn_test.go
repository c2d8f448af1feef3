// SPDX-License-Identifier: GPL-3.0-or-later

package offload

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// syn4 is a SYN as Linux sends it: MSS 1460, SACK, timestamps, window scale 7.
func syn4() []byte {
	b := []byte{
		0x45, 0, 0, 60, 0, 0, 0x40, 0, 64, 6, 0, 0, 192, 0, 2, 2, 198, 51, 100, 80,
		0x9c, 0x40, 0, 80, 0xfe, 0xdc, 0xba, 0x98, 0, 0, 0, 0, 0xa0, 0x02, 0xfa, 0xf0, 0, 0, 0, 0,
		2, 4, 0x05, 0xb4, 4, 2, 8, 10, 1, 2, 3, 4, 0, 0, 0, 0, 1, 3, 3, 7,
	}
	return b
}

func syn6() []byte {
	b := make([]byte, ip6Header, ip6Header+tcpHeader+4)
	b[0], b[5], b[6], b[7] = 6<<4, tcpHeader+4, protoTCP, 64
	from, to := netip.MustParseAddr("2001:db8::2").As16(), netip.MustParseAddr("2001:db8::80").As16()
	copy(b[8:], from[:])
	copy(b[24:], to[:])
	b = append(b, 0x9c, 0x40, 1, 187, 0, 0, 0, 9, 0, 0, 0, 0, 0x60, 0x02, 0x20, 0, 0, 0, 0, 0)
	return append(b, 2, 4, 0x05, 0xa0)
}

func TestParseSYN(t *testing.T) {
	want := SYN{
		Src: netip.MustParseAddrPort("192.0.2.2:40000"), Dst: netip.MustParseAddrPort("198.51.100.80:80"),
		Seq: 0xfedcba98, Window: 64240, Scale: 7, HasScale: true, SACK: true, Timestamps: true, TSVal: 0x01020304,
	}
	addrs := cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })
	if got, err := ParseSYN(syn4()); err != nil || !cmp.Equal(got, want, addrs) {
		t.Errorf("IPv4: %v %s", err, cmp.Diff(want, got, addrs))
	}
	want = SYN{Src: netip.MustParseAddrPort("[2001:db8::2]:40000"), Dst: netip.MustParseAddrPort("[2001:db8::80]:443"), Seq: 9, Window: 8192}
	if got, err := ParseSYN(syn6()); err != nil || !cmp.Equal(got, want, addrs) {
		t.Errorf("IPv6: %v %s", err, cmp.Diff(want, got, addrs))
	}
	for name, change := range map[string]func([]byte) []byte{
		"empty":            func([]byte) []byte { return nil },
		"cut in TCP":       func(b []byte) []byte { return b[:39] },
		"cut in options":   func(b []byte) []byte { return b[:50] },
		"IPv4 options":     func(b []byte) []byte { b[0] = 0x46; return b },
		"UDP":              func(b []byte) []byte { b[9] = 17; return b },
		"SYN and ACK":      func(b []byte) []byte { b[33] = 0x12; return b },
		"header too short": func(b []byte) []byte { b[32] = 0x40; return b },
		"option too long":  func(b []byte) []byte { b[41] = 40; return b },
		"option too short": func(b []byte) []byte { b[41] = 1; return b },
	} {
		if got, err := ParseSYN(change(syn4())); err == nil {
			t.Errorf("%s: accepted as %+v", name, got)
		}
	}
	b := syn4()
	b[59] = 200 // a scale above 14 counts as 14 (RFC 7323 section 2.3)
	if got, err := ParseSYN(b); err != nil || got.Scale != 14 {
		t.Errorf("scale 200: %d, %v", got.Scale, err)
	}
}

// TestSYNACK: both checksums hold, and only what the SYN has offered is answered.
func TestSYNACK(t *testing.T) {
	for name, b := range map[string][]byte{"IPv4, all options": syn4(), "IPv6, MSS alone": syn6()} {
		s, err := ParseSYN(b)
		if err != nil {
			t.Fatal(err)
		}
		more := []byte{253, 16, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14}
		got := synACK(nil, &s, &answer{seq: 77, window: 65535, mss: 65495, scale: ourScale, ts: 5, ttl: 77, more: more})
		at, ttl := ip4Header, got[8]
		var addrs []byte
		if s.Src.Addr().Is4() {
			addrs = got[12:20]
			if fold(sum(0, got[:at])) != 0xffff {
				t.Errorf("%s: IP checksum", name)
			}
		} else {
			at, addrs, ttl = ip6Header, got[8:40], got[7]
		}
		tcp := got[at:]
		if fold(sum(pseudo(addrs, len(tcp)), tcp)) != 0xffff {
			t.Errorf("%s: TCP checksum", name)
		}
		if ttl != 77 || binary.BigEndian.Uint32(tcp[4:]) != 77 || binary.BigEndian.Uint32(tcp[8:]) != s.Seq+1 || tcp[13] != 0x12 {
			t.Errorf("%s: % x", name, got)
		}
		tcp[13] = flagSYN // read back as if it were a SYN
		back, err := ParseSYN(got)
		if err != nil || back.HasScale != s.HasScale || back.SACK != s.SACK || back.Timestamps != s.Timestamps {
			t.Errorf("%s: options %+v, %v", name, back, err)
		}
		if !bytes.Equal(tcp[tcpHeader:][:4], []byte{2, 4, 0xff, 0xd7}) || !bytes.HasSuffix(got, more) || len(got) > maxAnswer {
			t.Errorf("%s: %d bytes, % x", name, len(got), got)
		}
	}
}

func FuzzParseSYN(f *testing.F) {
	f.Add(syn4())
	f.Add(syn6())
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := ParseSYN(b)
		if err != nil {
			return
		}
		if s.Scale > maxScale || s.Src.Addr().Is4() != s.Dst.Addr().Is4() {
			t.Errorf("%+v", s)
		}
		if got := synACK(nil, &s, &answer{more: make([]byte, maxMore)}); len(got) > maxAnswer {
			t.Errorf("an answer of %d bytes", len(got))
		}
	})
}
