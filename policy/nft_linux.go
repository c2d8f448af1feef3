// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// The two registers in use: 16 bytes each, from NFT_REG_1. Concatenated keys run on over the 4-byte registers from NFT_REG32_00.
const (
	reg1   = unix.NFT_REG_1
	reg32  = 8 // NFT_REG32_00
	nfInet = 1 // NFPROTO_INET
	nfDev  = 5 // NFPROTO_NETDEV
	nfPort = 7 // NFPROTO_BRIDGE
)

func native32(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }
func be16(v uint16) []byte     { return binary.BigEndian.AppendUint16(nil, v) }

// exprs translates a rule into what the kernel's virtual machine runs.
func exprs(r nfRule) ([]expr.Any, error) {
	var out []expr.Any
	for _, s := range r {
		e, err := stmtExprs(s)
		if err != nil {
			return nil, err
		}
		out = append(out, e...)
	}
	return out, nil
}

func stmtExprs(s nfStmt) ([]expr.Any, error) {
	switch s := s.(type) {
	case stMark:
		return []expr.Any{loadMark(s.ct), masked(native32(s.mask), native32(0)), cmpReg(s.not, native32(s.value))}, nil
	case stSetMark:
		out := []expr.Any{loadMark(s.ct), masked(native32(^s.mask), native32(s.value))}
		if s.ct {
			return append(out, &expr.Ct{Key: expr.CtKeyMARK, Register: reg1, SourceRegister: true}), nil
		}
		return append(out, &expr.Meta{Key: expr.MetaKeyMARK, Register: reg1, SourceRegister: true}), nil
	case stIface:
		return ifaceExprs(s), nil
	case stKind:
		const iifKind = 26 // NFT_META_IIFKIND, kernel 5.0; not in x/sys/unix
		return []expr.Any{&expr.Meta{Key: iifKind, Register: reg1}, cmpReg(false, ifName(s.kind))}, nil
	case stIndexIn:
		return []expr.Any{&expr.Meta{Key: expr.MetaKeyIIF, Register: reg1}, &expr.Lookup{SourceRegister: reg1, SetName: s.set}}, nil
	case stNameIn:
		return []expr.Any{&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: reg1}, &expr.Lookup{SourceRegister: reg1, SetName: s.set}}, nil
	case stLocal:
		return []expr.Any{&expr.Meta{Key: expr.MetaKeyIIF, Register: reg1}, cmpReg(false, native32(0))}, nil
	case stProto:
		return l4(s.proto), nil
	case stFamily:
		return family(s.v6), nil
	case stPort:
		return []expr.Any{thPort(s.src, reg1), cmpReg(s.not, be16(s.port))}, nil
	case stPortNotIn:
		return []expr.Any{thPort(false, reg1), &expr.Lookup{SourceRegister: reg1, SetName: s.set, Invert: true}}, nil
	case stAddrIn:
		return append(family(s.v6), nhAddr(s.v6, false, reg1), &expr.Lookup{SourceRegister: reg1, SetName: s.set}), nil
	case stTupleIn:
		return tupleIn(s), nil
	case stSYN:
		flags := &expr.Payload{DestRegister: reg1, Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1}
		return append(l4(protoTCP), flags, masked([]byte{0x17}, []byte{0}), cmpReg(s.not, []byte{0x02})), nil
	case stCgroup:
		return []expr.Any{
			&expr.Socket{Key: expr.SocketKeyCgroupv2, Level: uint32(s.ref.Level), Register: reg1},
			cmpReg(false, binary.NativeEndian.AppendUint64(nil, s.ref.ID)),
		}, nil
	case stUID:
		return []expr.Any{&expr.Meta{Key: expr.MetaKeySKUID, Register: reg1}, cmpReg(s.not, native32(s.uid))}, nil
	case stGID:
		return []expr.Any{&expr.Meta{Key: expr.MetaKeySKGID, Register: reg1}, cmpReg(false, native32(s.gid))}, nil
	case stToLocal:
		return []expr.Any{&expr.Fib{Register: reg1, ResultADDRTYPE: true, FlagDADDR: true}, cmpReg(false, native32(unix.RTN_LOCAL))}, nil
	}
	return stmtExprs2(s)
}

func stmtExprs2(s nfStmt) ([]expr.Any, error) {
	switch s := s.(type) {
	case stOwned:
		// The load itself fails without a process: any value will do.
		return []expr.Any{&expr.Meta{Key: expr.MetaKeySKUID, Register: reg1}, &expr.Cmp{Op: expr.CmpOpLte, Register: reg1, Data: native32(^uint32(0))}}, nil
	case stFrameType:
		if !s.ethernet {
			return []expr.Any{&expr.Meta{Key: expr.MetaKeyPROTOCOL, Register: reg1}, cmpReg(false, be16(s.proto))}, nil
		}
		return []expr.Any{&expr.Payload{DestRegister: reg1, Base: expr.PayloadBaseLLHeader, Offset: 12, Len: 2}, cmpReg(false, be16(s.proto))}, nil
	case stFrameAddrIn:
		return []expr.Any{nhAddr(s.v6, false, reg1), &expr.Lookup{SourceRegister: reg1, SetName: s.set}}, nil
	case stCtNew:
		const stateNew = 8 // NF_CT_STATE_BIT(IP_CT_NEW)
		return []expr.Any{&expr.Ct{Key: expr.CtKeySTATE, Register: reg1}, masked(native32(stateNew), native32(0)), cmpReg(true, native32(0))}, nil
	case stCtDNS:
		return []expr.Any{
			&expr.Ct{Key: expr.CtKeyDIRECTION, Register: reg1}, cmpReg(false, []byte{0}),
			&expr.Ct{Key: expr.CtKeyPROTODST, Register: reg1}, cmpReg(false, be16(53)),
		}, nil
	case stCtReply:
		return []expr.Any{&expr.Ct{Key: expr.CtKeyDIRECTION, Register: reg1}, cmpReg(false, []byte{1})}, nil
	case stSource:
		v6 := s.prefix.Addr().Is6()
		mask := net.CIDRMask(s.prefix.Bits(), s.prefix.Addr().BitLen())
		return append(family(v6), nhAddr(v6, true, reg1), masked(mask, make([]byte, len(mask))), cmpReg(false, s.prefix.Addr().AsSlice())), nil
	case stICMPType:
		out := append(family(s.v6), l4(protoICMP)...)
		if s.v6 {
			out = append(family(true), l4(protoICMPv6)...)
		}
		out = append(out, &expr.Payload{DestRegister: reg1, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 1})
		if s.from == s.to {
			return append(out, cmpReg(false, []byte{s.from})), nil
		}
		return append(out, &expr.Range{Op: expr.CmpOpEq, Register: reg1, FromData: []byte{s.from}, ToData: []byte{s.to}}), nil
	case stTTL:
		offset := uint32(8)
		if s.v6 {
			offset = 7
		}
		return append(family(s.v6), &expr.Payload{DestRegister: reg1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: 1}, cmpReg(false, []byte{s.ttl})), nil
	case stSetHopLimit:
		return append(family(true), &expr.Immediate{Register: reg1, Data: []byte{uint8(s)}},
			&expr.Payload{OperationType: expr.PayloadWrite, SourceRegister: reg1, Base: expr.PayloadBaseNetworkHeader, Offset: 7, Len: 1}), nil
	case stSYNACK:
		flags := &expr.Payload{DestRegister: reg1, Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1}
		return append(l4(protoTCP), flags, masked([]byte{0x17}, []byte{0}), cmpReg(false, []byte{0x12})), nil
	case stHops255:
		return append(family(true), &expr.Payload{DestRegister: reg1, Base: expr.PayloadBaseNetworkHeader, Offset: 7, Len: 1}, cmpReg(false, []byte{255})), nil
	case stCounter:
		return []expr.Any{&expr.Objref{Type: unix.NFT_OBJECT_COUNTER, Name: s.name}}, nil
	case stDNAT:
		return []expr.Any{&expr.Immediate{Register: reg1, Data: be16(s.port)}, &expr.Redir{RegisterProtoMin: reg1, Flags: unix.NF_NAT_RANGE_PROTO_SPECIFIED}}, nil
	case stDNATTo:
		family := uint32(unix.NFPROTO_IPV4)
		if s.addr.Is6() {
			family = unix.NFPROTO_IPV6
		}
		return []expr.Any{&expr.Immediate{Register: reg1, Data: s.addr.AsSlice()}, &expr.NAT{Type: expr.NATTypeDestNAT, Family: family, RegAddrMin: reg1}}, nil
	case stClampMSS:
		const maxseg = 2 // the kind of the option, RFC 9293 section 3.2; the size is behind kind and length
		flags := &expr.Payload{DestRegister: reg1, Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1}
		return append(l4(protoTCP), flags, masked([]byte{0x06}, []byte{0}), cmpReg(false, []byte{0x02}),
			&expr.Rt{Register: reg1, Key: expr.RtTCPMSS},
			&expr.Byteorder{SourceRegister: reg1, DestRegister: reg1, Op: expr.ByteorderHton, Len: 2, Size: 2},
			&expr.Exthdr{SourceRegister: reg1, Type: maxseg, Offset: 2, Len: 2, Op: expr.ExthdrOpTcpopt}), nil
	case stVerdict:
		kind, ok := map[string]expr.VerdictKind{
			"accept": expr.VerdictAccept, "drop": expr.VerdictDrop, "return": expr.VerdictReturn, "jump": expr.VerdictJump, "goto": expr.VerdictGoto,
		}[s.verb]
		if ok {
			return []expr.Any{&expr.Verdict{Kind: kind, Chain: s.chain}}, nil
		}
	}
	return nil, fmt.Errorf("nft statement %q has no translation", s)
}

// ifaceExprs compares the index of lo, which is the same everywhere, at a third of the cost of its name: most packets are asked for it.
func ifaceExprs(s stIface) []expr.Any {
	switch {
	case s.name == loopback && s.out:
		return []expr.Any{&expr.Meta{Key: expr.MetaKeyOIF, Register: reg1}, cmpReg(s.not, native32(loopbackIndex))}
	case s.name == loopback:
		return []expr.Any{&expr.Meta{Key: expr.MetaKeyIIF, Register: reg1}, cmpReg(s.not, native32(loopbackIndex))}
	case s.out:
		return []expr.Any{&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: reg1}, cmpReg(s.not, ifName(s.name))}
	}
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: reg1}, cmpReg(s.not, ifName(s.name))}
}

// ifName is a device's name, or kind, as the kernel compares it. What is too long for one is cut off: no device is called so.
func ifName(s string) []byte {
	out := make([]byte, unix.IFNAMSIZ)
	copy(out[:unix.IFNAMSIZ-1], s)
	return out
}

func loadMark(ct bool) expr.Any {
	if ct {
		return &expr.Ct{Key: expr.CtKeyMARK, Register: reg1}
	}
	return &expr.Meta{Key: expr.MetaKeyMARK, Register: reg1}
}

func masked(mask, xor []byte) expr.Any {
	return &expr.Bitwise{SourceRegister: reg1, DestRegister: reg1, Len: uint32(len(mask)), Mask: mask, Xor: xor}
}

func cmpReg(not bool, data []byte) expr.Any {
	if not {
		return &expr.Cmp{Op: expr.CmpOpNeq, Register: reg1, Data: data}
	}
	return &expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: data}
}

func l4(proto uint8) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg1}, cmpReg(false, []byte{proto})}
}

func family(v6 bool) []expr.Any {
	f := byte(unix.NFPROTO_IPV4)
	if v6 {
		f = unix.NFPROTO_IPV6
	}
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: reg1}, cmpReg(false, []byte{f})}
}

func thPort(src bool, reg uint32) expr.Any {
	offset := uint32(2)
	if src {
		offset = 0
	}
	return &expr.Payload{DestRegister: reg, Base: expr.PayloadBaseTransportHeader, Offset: offset, Len: 2}
}

func nhAddr(v6, src bool, reg uint32) expr.Any {
	offset, size := uint32(16), uint32(4)
	switch {
	case v6 && src:
		offset, size = 8, 16
	case v6:
		offset, size = 24, 16
	case src:
		offset = 12
	}
	return &expr.Payload{DestRegister: reg, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: size}
}

// tupleIn loads local address, local port, remote address, remote port side by side, each padded to four bytes.
func tupleIn(s stTupleIn) []expr.Any {
	words := uint32(1)
	if s.v6 {
		words = 4
	}
	local, remote := !s.in, s.in // whether the end is the packet's source
	return append(append(family(s.v6), l4(protoTCP)...),
		nhAddr(s.v6, local, reg32), thPort(local, reg32+words),
		nhAddr(s.v6, remote, reg32+words+1), thPort(remote, reg32+2*words+1),
		&expr.Lookup{SourceRegister: reg32, SetName: s.set})
}

// setKey is what a set of a kind looks like to the kernel: nft's type number (for its own listings) and the key's length.
func setKey(k nfSetKind) (typ, size uint32, interval bool) {
	const addr4, addr6, service, index, name, typeBits = 7, 8, 13, 20, 41, 6 // libnftables datatype.h
	switch k {
	case kindAddr4:
		return addr4, 4, true
	case kindAddr6:
		return addr6, 16, true
	case kindTuple4:
		return ((addr4<<typeBits|service)<<typeBits|addr4)<<typeBits | service, 16, false
	case kindTuple6:
		return ((addr6<<typeBits|service)<<typeBits|addr6)<<typeBits | service, 40, false
	case kindIndex:
		return index, 4, false
	case kindName:
		return name, unix.IFNAMSIZ, false
	}
	return service, 2, false
}

// element is one set element; end marks the first address behind an interval.
type element struct {
	key []byte
	end bool
}

func (s nfSet) elements() []element {
	var out []element
	for _, r := range s.ranges {
		out = append(out, element{key: r.from.AsSlice()})
		if next := r.to.Next(); next.IsValid() {
			out = append(out, element{key: next.AsSlice(), end: true})
		}
	}
	for _, t := range s.tuples {
		key := tupleEnd(nil, t.Local)
		out = append(out, element{key: tupleEnd(key, t.Remote)})
	}
	for _, p := range s.ports {
		out = append(out, element{key: be16(p)})
	}
	for _, i := range s.index {
		out = append(out, element{key: native32(uint32(i))})
	}
	for _, n := range s.names {
		out = append(out, element{key: ifName(n)})
	}
	return out
}

func tupleEnd(key []byte, ap netip.AddrPort) []byte {
	key = append(key, ap.Addr().AsSlice()...)
	return append(binary.BigEndian.AppendUint16(key, ap.Port()), 0, 0)
}
