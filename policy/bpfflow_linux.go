// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

const (
	// maxFlowOwners bounds the flows whose owner is remembered; the least recently used goes first. A flow is asked for milliseconds after its
	// first packet, so this is many more than are under way.
	maxFlowOwners = 16384
	// flowOwnerTime is how long after a flow's last packet that counts its owner still does: what is older may be another's by now.
	flowOwnerTime = 10 * time.Second
)

// Layout of the map `flows`: the key is proto, IP version, 2 bytes of nothing, ports, addresses (16 bytes each, IPv4 in the first four); the
// value is CLOCK_MONOTONIC_COARSE, the socket's cookie, an owner record.
const (
	sizeofFlowKey  = 40
	flowPorts      = 4
	flowSrc        = 8
	flowDst        = 24
	flowCookie     = 8
	flowOwner      = 16
	sizeofFlow     = flowOwner + sizeofOwner
	skbProtocol    = 16 // __sk_buff.protocol (include/uapi/linux/bpf.h)
	tcpSYN         = 0x02
	tcpACK         = 0x10
	ipv6Fragment   = 44
	stFlowKey      = -sizeofFlowKey
	stFlowHeader   = stFlowKey - 40
	stFlow         = stFlowHeader - sizeofFlow
	stFlowCookie   = stFlow - 8
	tcxNext        = -1 // TCX_NEXT: somebody else's programs decide
	ipv4HeaderSize = 20
	ipv6HeaderSize = 40
)

func htons16(v uint16) int32 {
	return int32(binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, v)))
}

// flowProgram looks at what goes into a TUN device: whose socket a TCP connection's SYN, or a datagram, is of. It drops nothing. The socket
// may be closed, or its process gone, when somebody asks.
//
//	R6 packet, R7 cookie, R8 protocol, then the owner's record, R9 offset of the transport header
func flowProgram(m *bpfMaps) *ebpf.ProgramSpec {
	a := &assembler{}
	load := func(off asm.Instruction, size int32) {
		a.emit(
			asm.Mov.Reg(asm.R1, asm.R6), off,
			asm.Mov.Reg(asm.R3, asm.RFP), asm.Add.Imm(asm.R3, stFlowHeader),
			asm.Mov.Imm(asm.R4, size),
			asm.FnSkbLoadBytes.Call(),
			asm.JNE.Imm(asm.R0, 0, "pass"))
	}
	move := func(dst, src int16, size asm.Size) {
		a.emit(asm.LoadMem(asm.R1, asm.RFP, src, size), asm.StoreMem(asm.RFP, dst, asm.R1, size))
	}
	a.emit(
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.FnGetSocketCookie.Call(),
		asm.JEq.Imm(asm.R0, 0, "pass"), // no socket of this machine
		asm.Mov.Reg(asm.R7, asm.R0),
		asm.StoreMem(asm.RFP, stFlowCookie, asm.R0, asm.DWord))
	a.zero(stFlowKey, sizeofFlowKey)
	a.emit(
		asm.LoadMem(asm.R1, asm.R6, skbProtocol, asm.Word),
		asm.JEq.Imm(asm.R1, htons16(unix.ETH_P_IPV6), "v6"),
		asm.JNE.Imm(asm.R1, htons16(unix.ETH_P_IP), "pass"))

	load(asm.Mov.Imm(asm.R2, 0), ipv4HeaderSize)
	a.emit(
		asm.LoadMem(asm.R1, asm.RFP, stFlowHeader+6, asm.Half), // only a first fragment has ports
		asm.And.Imm(asm.R1, htons16(0x1fff)),
		asm.JNE.Imm(asm.R1, 0, "pass"),
		asm.LoadMem(asm.R8, asm.RFP, stFlowHeader+9, asm.Byte),
		asm.LoadMem(asm.R9, asm.RFP, stFlowHeader, asm.Byte),
		asm.And.Imm(asm.R9, 15),
		asm.LSh.Imm(asm.R9, 2))
	move(stFlowKey+flowSrc, stFlowHeader+12, asm.Word)
	move(stFlowKey+flowDst, stFlowHeader+16, asm.Word)
	a.emit(asm.StoreImm(asm.RFP, stFlowKey+1, 4, asm.Byte), asm.Ja.Label("ports"))

	a.at("v6")
	load(asm.Mov.Imm(asm.R2, 0), ipv6HeaderSize)
	a.emit(asm.LoadMem(asm.R8, asm.RFP, stFlowHeader+6, asm.Byte), asm.Mov.Imm(asm.R9, ipv6HeaderSize))
	for i := int16(0); i < 16; i += 8 {
		move(stFlowKey+flowSrc+i, stFlowHeader+8+i, asm.DWord)
		move(stFlowKey+flowDst+i, stFlowHeader+24+i, asm.DWord)
	}
	a.emit(asm.StoreImm(asm.RFP, stFlowKey+1, 6, asm.Byte), asm.JNE.Imm(asm.R8, ipv6Fragment, "ports"))
	load(asm.Mov.Imm(asm.R2, ipv6HeaderSize), 8)
	a.emit(
		asm.LoadMem(asm.R1, asm.RFP, stFlowHeader+2, asm.Half),
		asm.And.Imm(asm.R1, htons16(0xfff8)),
		asm.JNE.Imm(asm.R1, 0, "pass"),
		asm.LoadMem(asm.R8, asm.RFP, stFlowHeader, asm.Byte),
		asm.Mov.Imm(asm.R9, ipv6HeaderSize+8))

	a.at("ports")
	a.emit(
		asm.StoreMem(asm.RFP, stFlowKey, asm.R8, asm.Byte),
		asm.JEq.Imm(asm.R8, protoUDP, "udp"),
		asm.JNE.Imm(asm.R8, protoTCP, "pass"))
	load(asm.Mov.Reg(asm.R2, asm.R9), 16)
	a.emit(
		asm.LoadMem(asm.R1, asm.RFP, stFlowHeader+13, asm.Byte),
		asm.And.Imm(asm.R1, tcpSYN|tcpACK),
		asm.JNE.Imm(asm.R1, tcpSYN, "pass"),
		asm.Ja.Label("known"))
	a.at("udp")
	load(asm.Mov.Reg(asm.R2, asm.R9), 4)
	a.at("known")
	move(stFlowKey+flowPorts, stFlowHeader, asm.Word)
	a.remember(m)
	a.returns("pass", tcxNext)
	return &ebpf.ProgramSpec{Name: "mprox_flow", Type: ebpf.SchedCLS, AttachType: ebpf.AttachTCXEgress, Instructions: a.ins, License: "GPL"}
}

// remember writes the owner of the socket whose cookie is in R7 down as that of the flow whose key is on the stack.
func (a *assembler) remember(m *bpfMaps) {
	a.lookup(m.owners, stFlowCookie)
	a.emit(asm.Mov.Reg(asm.R8, asm.R0), asm.JNE.Imm(asm.R8, 0, "owned"))
	a.remove(m.flows, stFlowKey) // of a socket before this one
	a.emit(asm.Ja.Label("pass"))
	a.at("owned")
	a.emit(asm.FnKtimeGetCoarseNs.Call(), asm.StoreMem(asm.RFP, stFlow, asm.R0, asm.DWord))
	a.lookup(m.flows, stFlowKey)
	a.emit(
		asm.JEq.Imm(asm.R0, 0, "write"),
		asm.LoadMem(asm.R1, asm.R0, flowCookie, asm.DWord),
		asm.JNE.Reg(asm.R1, asm.R7, "write"),
		asm.LoadMem(asm.R1, asm.R0, flowOwner, asm.Word),
		asm.LoadMem(asm.R2, asm.R8, 0, asm.Word),
		asm.JNE.Reg(asm.R1, asm.R2, "write"), // the socket is another process's now
		asm.LoadMem(asm.R1, asm.RFP, stFlow, asm.DWord),
		asm.StoreMem(asm.R0, 0, asm.R1, asm.DWord),
		asm.Ja.Label("pass"))
	a.at("write")
	a.emit(asm.StoreMem(asm.RFP, stFlow+flowCookie, asm.R7, asm.DWord))
	for i := int16(0); i < sizeofOwner; i += 8 {
		a.emit(asm.LoadMem(asm.R1, asm.R8, i, asm.DWord), asm.StoreMem(asm.RFP, stFlow+flowOwner+i, asm.R1, asm.DWord))
	}
	a.update(m.flows, stFlowKey, stFlow)
}

// flowKey is the key of a flow as the program writes it.
func flowKey(proto uint8, src, dst netip.AddrPort) (k [sizeofFlowKey]byte) {
	k[0] = proto
	binary.BigEndian.PutUint16(k[flowPorts:], src.Port())
	binary.BigEndian.PutUint16(k[flowPorts+2:], dst.Port())
	if src.Addr().Is4() {
		k[1] = 4
		s, d := src.Addr().As4(), dst.Addr().As4()
		copy(k[flowSrc:], s[:])
		copy(k[flowDst:], d[:])
		return k
	}
	k[1] = 6
	s, d := src.Addr().As16(), dst.Addr().As16()
	copy(k[flowSrc:], s[:])
	copy(k[flowDst:], d[:])
	return k
}

// parseFlow reads a value of the map; ok is false if it is too old to count at now, in nanoseconds of CLOCK_MONOTONIC.
func parseFlow(b []byte, now int64) (ownerRecord, bool) {
	if len(b) < sizeofFlow || now-int64(binary.NativeEndian.Uint64(b)) > int64(flowOwnerTime) {
		return ownerRecord{}, false
	}
	return parseOwner(b[flowOwner:])
}

// followFlowsLocked attaches the program of flows to the devices, and to nothing else. Where it cannot be (kernel < 6.6, a device that has
// just gone), owners are found by their sockets.
func (h *LinuxHost) followFlowsLocked(s *bpfState, devices []string) error {
	if !s.bits.owners {
		devices = nil
	}
	return h.inside(func() error {
		want := map[int]bool{}
		for _, name := range devices {
			if ifi, err := net.InterfaceByName(name); err == nil {
				want[ifi.Index] = true
			}
		}
		for index, l := range s.flows {
			if info, err := l.Info(); want[index] && err == nil && info.TCX() != nil && int(info.TCX().Ifindex) == index {
				delete(want, index)
				continue
			}
			closeQuietly(l) // of a device that is gone, or somebody has detached it
			delete(s.flows, index)
		}
		if len(want) == 0 || s.noTCX {
			return nil
		}
		p, err := ebpf.NewProgram(flowProgram(s.maps))
		if err != nil {
			return fmt.Errorf("bpf program flow: %w", err)
		}
		defer closeQuietly(p)
		for index := range want {
			l, err := link.AttachTCX(link.TCXOptions{Interface: index, Program: p, Attach: ebpf.AttachTCXEgress})
			if err != nil {
				s.noTCX = errors.Is(err, ebpf.ErrNotSupported)
				continue
			}
			s.flows[index] = l
		}
		return nil
	})
}
