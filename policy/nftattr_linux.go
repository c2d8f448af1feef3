// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"encoding/binary"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

type attr struct {
	typ  uint16
	data []byte
}

// attrs splits netlink attributes; what is cut off is left out.
func attrs(b []byte) []attr {
	var out []attr
	for len(b) >= 4 {
		size := int(binary.NativeEndian.Uint16(b))
		if size < 4 || size > len(b) {
			break
		}
		out = append(out, attr{binary.NativeEndian.Uint16(b[2:]) &^ (unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER), b[4:size]})
		b = b[min(len(b), (size+3)&^3):]
	}
	return out
}

func attrString(msg []byte, typ uint16) string {
	for _, a := range attrs(msg[4:]) {
		if a.typ == typ {
			return strings.TrimRight(string(a.data), "\x00")
		}
	}
	return ""
}

// attrBytes joins the attributes of some types, each with its type and length.
func attrBytes(msg []byte, keep []uint16) []byte {
	var out []byte
	for _, a := range attrs(msg[4:]) {
		if slices.Contains(keep, a.typ) {
			out = binary.BigEndian.AppendUint16(out, a.typ)
			out = binary.BigEndian.AppendUint32(out, uint32(len(a.data)))
			out = append(out, a.data...)
		}
	}
	return out
}
