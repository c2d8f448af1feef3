// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"os"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// The messages and attributes of include/uapi/linux/netfilter/nfnetlink_conntrack.h in use here.
const (
	ctSubsystem = unix.NFNL_SUBSYS_CTNETLINK << 8
	ctDelete    = ctSubsystem | 2 // IPCTNL_MSG_CT_DELETE
	ctTuple     = 1               // CTA_TUPLE_ORIG
	ctIP        = 1               // CTA_TUPLE_IP
	ctProto     = 2               // CTA_TUPLE_PROTO
)

// ForgetConnection makes conntrack forget a TCP connection, so that it learns of it anew from the next packet. A connection that it does not know
// is no error. It needs CAP_NET_ADMIN.
func (h *LinuxHost) ForgetConnection(src, dst netip.AddrPort) error {
	family, first := byte(unix.AF_INET), uint16(1) // CTA_IP_V4_SRC, followed by DST
	if src.Addr().Is6() {
		family, first = unix.AF_INET6, 3 // CTA_IP_V6_SRC
	}
	e := netlink.NewAttributeEncoder()
	e.ByteOrder = binary.BigEndian
	e.Nested(ctTuple, func(t *netlink.AttributeEncoder) error {
		t.Nested(ctIP, func(a *netlink.AttributeEncoder) error {
			a.Bytes(first, src.Addr().AsSlice())
			a.Bytes(first+1, dst.Addr().AsSlice())
			return nil
		})
		t.Nested(ctProto, func(a *netlink.AttributeEncoder) error {
			a.ByteOrder = binary.BigEndian
			a.Uint8(1, unix.IPPROTO_TCP) // CTA_PROTO_NUM
			a.Uint16(2, src.Port())      // CTA_PROTO_SRC_PORT
			a.Uint16(3, dst.Port())      // CTA_PROTO_DST_PORT
			return nil
		})
		return nil
	})
	attrs, err := e.Encode()
	if err != nil {
		return err
	}
	_, err = h.nft.track.Execute(netlink.Message{
		Header: netlink.Header{Type: ctDelete, Flags: netlink.Request | netlink.Acknowledge},
		Data:   append([]byte{family, 0, 0, 0}, attrs...), // struct nfgenmsg
	})
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}
