// SPDX-License-Identifier: GPL-3.0-or-later

// Package process finds the sockets of this machine and the processes behind them: by SOCK_DIAG, which knows every socket of a network
// namespace, and by /proc, which knows who holds it.
//
// It changes nothing but for Destroy, decides nothing, and is called by package policy only.
package process

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Socket states of TCP (include/net/tcp_states.h). UDP uses the first when it is connected and the second when it is not.
const (
	StateEstablished = 1
	StateClose       = 7
	StateListen      = 10
)

// AllStates asks for sockets in any state.
const AllStates = ^uint32(0)

const (
	sockDiagByFamily = 20
	sockDestroy      = 21
	sizeofRequest    = 56 // struct inet_diag_req_v2
	sizeofMessage    = 72 // struct inet_diag_msg
	sizeofID         = 48 // struct inet_diag_sockid
	idOffset         = 4  // of the id in inet_diag_msg
	attrMark         = 15 // INET_DIAG_MARK: shown to CAP_NET_ADMIN
	timeout          = 5 * time.Second
)

// Socket is one socket as SOCK_DIAG shows it. v4-mapped addresses are IPv4: that is what its packets are.
type Socket struct {
	Proto  uint8
	State  uint8
	Local  netip.AddrPort
	Remote netip.AddrPort // 0.0.0.0:0 or [::]:0 when not connected
	UID    uint32
	Inode  uint32 // 0: the kernel's own, or closed and only finishing
	Mark   uint32
	Cookie uint64
	family uint8
	id     [sizeofID]byte
}

// Diag asks the kernel about sockets of one network namespace.
type Diag struct{ conn *netlink.Conn }

// OpenDiag opens SOCK_DIAG in a network namespace, given by an open descriptor of it; 0 = the calling thread's.
func OpenDiag(netns int) (*Diag, error) {
	c, err := netlink.Dial(unix.NETLINK_SOCK_DIAG, &netlink.Config{NetNS: netns})
	if err != nil {
		return nil, fmt.Errorf("sock_diag: %w", err)
	}
	return &Diag{conn: c}, nil
}

// Close closes the socket.
func (d *Diag) Close() error { return d.conn.Close() }

// Dump lists the sockets of a protocol (unix.IPPROTO_TCP or UDP) in both families whose state is in states, a bit each.
func (d *Diag) Dump(proto uint8, states uint32) ([]Socket, error) {
	var out []Socket
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		if err := d.conn.SetDeadline(time.Now().Add(timeout)); err != nil {
			return nil, err
		}
		msgs, err := d.conn.Execute(netlink.Message{
			Header: netlink.Header{Type: sockDiagByFamily, Flags: netlink.Request | netlink.Dump},
			Data:   request(family, proto, states, nil),
		})
		if err != nil {
			if family == unix.AF_INET6 && errors.Is(err, unix.ENOENT) {
				continue // no IPv6
			}
			return nil, fmt.Errorf("sock_diag: %w", err)
		}
		for _, m := range msgs {
			if s, ok := parse(m.Data, proto); ok {
				out = append(out, s)
			}
		}
	}
	return out, nil
}

// Destroy ends a socket as if a reset had come in. A socket that is gone is no error.
func (d *Diag) Destroy(s Socket) error {
	if err := d.conn.SetDeadline(time.Now().Add(timeout)); err != nil {
		return err
	}
	_, err := d.conn.Execute(netlink.Message{
		Header: netlink.Header{Type: sockDestroy, Flags: netlink.Request | netlink.Acknowledge},
		Data:   request(s.family, s.Proto, AllStates, s.id[:]),
	})
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("sock_destroy %s: %w", s.Local, err)
	}
	return nil
}

func request(family, proto uint8, states uint32, id []byte) []byte {
	b := make([]byte, sizeofRequest)
	b[0], b[1] = family, proto
	binary.NativeEndian.PutUint32(b[4:], states)
	copy(b[8:], id)
	return b
}

// parse reads one inet_diag_msg with its attributes.
func parse(b []byte, proto uint8) (Socket, bool) {
	if len(b) < sizeofMessage {
		return Socket{}, false
	}
	s := Socket{
		Proto: proto, family: b[0], State: b[1],
		UID: binary.NativeEndian.Uint32(b[64:]), Inode: binary.NativeEndian.Uint32(b[68:]),
	}
	copy(s.id[:], b[idOffset:])
	s.Cookie = binary.NativeEndian.Uint64(s.id[cookieOffset:])
	addr := func(b []byte) netip.Addr {
		if s.family == unix.AF_INET {
			return netip.AddrFrom4([4]byte(b[:4]))
		}
		return netip.AddrFrom16([16]byte(b[:16])).Unmap()
	}
	if s.family != unix.AF_INET && s.family != unix.AF_INET6 {
		return Socket{}, false
	}
	s.Local = netip.AddrPortFrom(addr(s.id[4:]), binary.BigEndian.Uint16(s.id[0:]))
	s.Remote = netip.AddrPortFrom(addr(s.id[20:]), binary.BigEndian.Uint16(s.id[2:]))
	for rest := b[sizeofMessage:]; len(rest) >= 4; {
		size := int(binary.NativeEndian.Uint16(rest))
		if size < 4 || size > len(rest) {
			break
		}
		if binary.NativeEndian.Uint16(rest[2:]) == attrMark && size == 8 {
			s.Mark = binary.NativeEndian.Uint32(rest[4:])
		}
		rest = rest[min(len(rest), (size+3)&^3):]
	}
	return s, true
}
