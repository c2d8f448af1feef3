// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"bytes"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/flow"
)

// filled is a batch with one message of each size, to the port of the same place.
func filled(sizes []int, ports []uint16) *batch {
	b := new(batch)
	p := &plainCodec{v4: true}
	for i, n := range sizes {
		b.hdrs[i] = mmsghdr{hdr: unix.Msghdr{Iov: &b.iovs[i][0]}}
		_ = p.send(b, i, &flow.Datagram{Addr: flow.Addr{IP: loopback, Port: ports[i]}, Buf: make([]byte, n)})
	}
	return b
}

func TestSegmentJoin(t *testing.T) {
	same := func(n, size int) []int { return slices.Repeat([]int{size}, n) }
	for _, tc := range []struct {
		name  string
		sizes []int
		ports []uint16 // nil = all the same
		limit int
		want  []uint8
	}{
		{"one", []int{100}, nil, maxTrain, []uint8{1}},
		{"equal", same(5, 100), nil, maxTrain, []uint8{5}},
		{"the last is shorter", []int{100, 100, 60, 100}, nil, maxTrain, []uint8{3, 1}},
		{"growing", []int{60, 100, 120}, nil, maxTrain, []uint8{1, 1, 1}},
		{"empty ones stay alone", []int{0, 0, 100, 0, 100}, nil, maxTrain, []uint8{1, 1, 1, 1, 1}},
		{"as many as the kernel takes", same(64, 10), nil, maxTrain, []uint8{64}},
		{"as much as a packet takes", same(5, 20000), nil, maxTrain, []uint8{3, 2}},
		{"other addresses", same(4, 100), []uint16{1, 1, 2, 1}, maxTrain, []uint8{2, 1, 1}},
		{"larger than the limit", []int{100, 100, 50, 50}, nil, 99, []uint8{1, 1, 2}},
		{"off", same(3, 100), nil, 0, []uint8{1, 1, 1}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ports := tc.ports
			if ports == nil {
				ports = slices.Repeat([]uint16{9}, len(tc.sizes))
			}
			b := filled(tc.sizes, ports)
			s := segmenter{limit: tc.limit}
			got := b.counts[:s.join(b, len(tc.sizes))]
			if !slices.Equal(got, tc.want) {
				t.Fatalf("%v, want %v", got, tc.want)
			}
			at := 0
			for i, n := range got {
				h := &b.hdrs[i].hdr
				if n > 1 != (h.Control != nil) || n > 1 && int(b.controls[i].size) != tc.sizes[at] {
					t.Errorf("message %d: control %v, size %d", i, h.Control, b.controls[i].size)
				}
				at += int(n)
			}
		})
	}
}

// TestSegmentFailed: what a refused train says of the next ones, and what has nothing to do with trains.
func TestSegmentFailed(t *testing.T) {
	for _, tc := range []struct {
		count uint8
		errno unix.Errno
		limit int
		again bool
	}{
		{2, unix.EINVAL, 99, true},
		{2, unix.EMSGSIZE, 99, true},
		{2, unix.EIO, 0, true},
		{2, unix.ENETUNREACH, maxTrain, false},
		{1, unix.EMSGSIZE, maxTrain, false},
	} {
		s := segmenter{limit: maxTrain}
		b := new(batch)
		b.counts[0], b.controls[0].size = tc.count, 100
		if got := s.failed(b, tc.errno); got != tc.again || s.limit != tc.limit {
			t.Errorf("%d datagrams, %v: %v, limit %d", tc.count, tc.errno, got, s.limit)
		}
	}
}

// TestSegmentSame: whatever is sent arrives as it would without trains: same datagrams, same order.
func TestSegmentSame(t *testing.T) {
	relay, at := relaySocket(t)
	_ = relay.SetReadBuffer(4 << 20)
	send := func(off bool) *batchConn {
		n := NewNet(NetConfig{NoSegment: off})
		u, err := n.DialUDP(testContext(t), at)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = u.Close() })
		c := new(batchConn)
		if err := c.init(n, u, &socksCodec{names: true, ipv6: new(capability)}, new(atomic.Uint64)); err != nil {
			t.Fatal(err)
		}
		return c
	}
	with, without := send(false), send(true)
	if with.segments.limit == 0 || without.segments.limit != 0 {
		t.Fatalf("limits %d and %d", with.segments.limit, without.segments.limit)
	}
	r := rand.New(rand.NewPCG(1, 2))
	buf := make([]byte, 65536)
	for round := range 200 {
		ds := make([]flow.Datagram, 1+r.IntN(batchSize+10))
		size := r.IntN(1500)
		for i := range ds {
			if r.IntN(4) == 0 {
				size = r.IntN(1500)
			}
			ds[i] = flow.Datagram{Addr: flow.Addr{IP: netip.AddrFrom4([4]byte{192, 0, 2, byte(r.IntN(2))}), Port: 53}, Buf: make([]byte, size)}
			for k := range ds[i].Buf {
				ds[i].Buf[k] = byte(r.Uint32())
			}
			if r.IntN(10) == 0 {
				ds[i].Addr = flow.Addr{Host: "example.com", Port: 53}
			}
		}
		var got [2][][]byte
		for k, c := range []*batchConn{with, without} {
			if n, err := c.WriteBatch(ds); n != len(ds) || err != nil {
				t.Fatal(n, err)
			}
			_ = relay.SetReadDeadline(time.Now().Add(10 * time.Second))
			for range ds {
				n, err := relay.Read(buf)
				if err != nil {
					t.Fatalf("round %d: %v after %d of %d", round, err, len(got[k]), len(ds))
				}
				got[k] = append(got[k], bytes.Clone(buf[:n]))
			}
		}
		if !slices.EqualFunc(got[0], got[1], bytes.Equal) {
			t.Fatalf("round %d: the datagrams differ", round)
		}
	}
}

// BenchmarkAssociationWriteOneByOne is BenchmarkAssociationWrite with the fall-back.
func BenchmarkAssociationWriteOneByOne(b *testing.B) {
	relay, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(loopback, 0)))
	if err != nil {
		b.Fatal(err)
	}
	defer relay.Close()
	benchmarkWrite(b, NewNet(NetConfig{NoSegment: true}), relay)
}

// TestPause: after a pause in which others had the processor for long there is none for a while.
func TestPause(t *testing.T) {
	var p pause
	now := time.Now()
	if p.after(now, pauseLong); p.resting(now) {
		t.Error("a short pause is followed by a rest")
	}
	if p.after(now, pauseLong+1); !p.resting(now) || p.resting(now.Add(pauseRest)) {
		t.Errorf("after a long pause, at %v, it rests until %v", now, p.rest)
	}
	rest := p.rest
	if p.take(); p.rest != rest {
		t.Error("it did not rest")
	}
}
