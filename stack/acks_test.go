// SPDX-License-Identifier: GPL-3.0-or-later

package stack

import (
	"testing"
	"testing/synctest"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/mutex-proxy/mutex/tun"
)

// segment is what hold is shown of a packet.
type segment struct {
	hash  uint32
	port  uint16
	ack   uint32
	flags header.TCPFlags
	data  int
	tcp   int // bytes of TCP header; 0 = 20
}

func (s segment) hold(a *heldAcks) bool {
	n := max(s.tcp, header.TCPMinimumSize)
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{ReserveHeaderBytes: n + header.IPv4MinimumSize})
	defer pkt.DecRef()
	t := header.TCP(pkt.TransportHeader().Push(n))
	pkt.TransportProtocolNumber = header.TCPProtocolNumber
	t.Encode(&header.TCPFields{SrcPort: 80, DstPort: s.port, AckNum: s.ack, DataOffset: uint8(n), Flags: s.flags})
	pkt.Hash = s.hash
	if s.data > 0 {
		pkt.Data().AppendView(headerView(make([]byte, s.data)))
	}
	return a.hold(pkt, &tun.Header{}, [][]byte{make([]byte, header.IPv4MinimumSize), t})
}

func TestHeldAcks(t *testing.T) {
	const ack, syn, fin, psh = header.TCPFlagAck, header.TCPFlagSyn, header.TCPFlagFin, header.TCPFlagPsh
	tests := []struct {
		name     string
		segments []segment
		held     []bool
		written  int // after the delay
	}{
		{"request without a reply", []segment{{1, 9, 100, syn | ack, 0, 0}, {1, 9, 164, ack, 0, 0}}, []bool{false, true}, 1},
		{"reply in time", []segment{{1, 9, 100, syn | ack, 0, 0}, {1, 9, 164, ack, 0, 0}, {1, 9, 164, ack | psh, 64, 0}}, []bool{false, true, false}, 0},
		{"FIN answered by FIN", []segment{{1, 9, 100, syn | ack, 0, 0}, {1, 9, 101, ack, 0, 0}, {1, 9, 101, ack | fin, 0, 0}}, []bool{false, true, false}, 0},
		{"second in a row", []segment{{1, 9, 100, syn | ack, 0, 0}, {1, 9, 164, ack, 0, 0}, {1, 9, 264, ack, 0, 0}}, []bool{false, true, false}, 0},
		{"a window's worth", []segment{{1, 9, 100, syn | ack, 0, 0}, {1, 9, 100 + 14600, ack, 0, 0}}, []bool{false, false}, 0},
		{"nothing new", []segment{{1, 9, 100, syn | ack, 0, 0}, {1, 9, 100, ack, 0, 0}}, []bool{false, false}, 0},
		{"SACK", []segment{{1, 9, 100, syn | ack, 0, 0}, {1, 9, 164, ack, 0, 44}}, []bool{false, false}, 0},
		{"reset", []segment{{1, 9, 100, syn | ack, 0, 0}, {1, 9, 164, ack | header.TCPFlagRst, 0, 0}}, []bool{false, false}, 0},
		{"another connection in the slot", []segment{{1, 9, 100, syn | ack, 0, 0}, {1, 9, 164, ack, 0, 0}, {1 + ackSlots, 8, 200, ack, 0, 0}}, []bool{false, true, false}, 1},
		{"unknown connection", []segment{{1, 9, 100, ack, 0, 0}}, []bool{false}, 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				written := 0
				a := &heldAcks{write: func(uint32, *tun.Header, []byte) { written++ }}
				for i, s := range tt.segments {
					if got := s.hold(a); got != tt.held[i] {
						t.Errorf("segment %d: held %v, want %v", i, got, tt.held[i])
					}
				}
				<-time.After(2 * ackDelay) // of the fake clock
				synctest.Wait()
				if written != tt.written {
					t.Errorf("%d written after the delay, want %d", written, tt.written)
				}
				a.close()
				if (segment{1, 9, 1000, ack, 0, 0}).hold(a) {
					t.Error("kept one after close")
				}
			})
		})
	}
}
