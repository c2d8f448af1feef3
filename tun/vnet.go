// SPDX-License-Identifier: GPL-3.0-or-later

package tun

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// HeaderLen is the size in bytes of the virtio-net header in front of every packet of a device opened with IFF_VNET_HDR. The kernel's
// default for TUN is the short form, without num_buffers (struct virtio_net_hdr, include/uapi/linux/virtio_net.h).
const HeaderLen = 10

// MaxPacket is the largest packet in bytes, without its virtio-net header, that a device can carry: IPv4's total length has 16 bits, and
// BIG TCP is off on a TUN unless somebody turns it on.
const MaxPacket = 65535

// Header is the virtio-net header: what the sender of a packet left for the receiver to do. From the kernel it says which checksums
// are still missing and that a packet is a train of TCP segments or UDP datagrams; towards the kernel it asks for the same.
type Header struct {
	Flags      uint8  // NeedsChecksum, ChecksumValid
	GSOType    uint8  // GSONone, GSOTCP4, GSOTCP6, GSOUDP
	HdrLen     uint16 // bytes of network and transport header; the kernel's own value is a hint only and may be too large
	GSOSize    uint16 // payload bytes of each segment of the train
	CsumStart  uint16 // offset of the transport header
	CsumOffset uint16 // offset of the checksum field from CsumStart
}

// Flags and GSO types, as the kernel numbers them.
const (
	NeedsChecksum = unix.VIRTIO_NET_HDR_F_NEEDS_CSUM // the field holds only the pseudo-header's sum
	ChecksumValid = unix.VIRTIO_NET_HDR_F_DATA_VALID // somebody below has verified it

	GSONone = unix.VIRTIO_NET_HDR_GSO_NONE
	GSOTCP4 = unix.VIRTIO_NET_HDR_GSO_TCPV4
	GSOTCP6 = unix.VIRTIO_NET_HDR_GSO_TCPV6
	GSOUDP  = unix.VIRTIO_NET_HDR_GSO_UDP_L4 // of both families; Linux 6.2
)

// Decode reads the header from its wire form. A TUN uses the machine's byte order unless TUNSETVNETLE or TUNSETVNETBE is set.
func (h *Header) Decode(b *[HeaderLen]byte) {
	h.Flags = b[0]
	h.GSOType = b[1]
	h.HdrLen = binary.NativeEndian.Uint16(b[2:])
	h.GSOSize = binary.NativeEndian.Uint16(b[4:])
	h.CsumStart = binary.NativeEndian.Uint16(b[6:])
	h.CsumOffset = binary.NativeEndian.Uint16(b[8:])
}

// Encode writes the header in its wire form.
func (h *Header) Encode(b *[HeaderLen]byte) {
	b[0] = h.Flags
	b[1] = h.GSOType
	binary.NativeEndian.PutUint16(b[2:], h.HdrLen)
	binary.NativeEndian.PutUint16(b[4:], h.GSOSize)
	binary.NativeEndian.PutUint16(b[6:], h.CsumStart)
	binary.NativeEndian.PutUint16(b[8:], h.CsumOffset)
}
