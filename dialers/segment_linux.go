// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"errors"
	"unsafe"

	"golang.org/x/sys/unix"
)

// UDP_SEGMENT: datagrams of one size to one address leave as one message, and the kernel walks its way to the device once for all of them
// (udp(7); Linux 4.18). It is the larger part of what sending costs. The receiver sees what it always saw: single datagrams.
//
//	messages  [a 100][b 100][c 100][d 60][e 100]      by the codec, each a row of iovecs
//	joined    [a b c d, segments of 100]  [e]         the last of a train may be shorter, as d
//
// The fall-back is the messages as they were: where the kernel does not know the option, the device on the way cannot do it (EIO), or
// segments would have to be fragmented (they are larger than the path's MTU). segmenter remembers the size from which on it is of no use.
const (
	// maxSegments is the kernel's bound on the datagrams of one message (UDP_MAX_SEGMENTS; 128 since Linux 6.8).
	maxSegments = 64
	// maxTrain is the most a message can carry: what fits one IPv4 packet.
	maxTrain = 65535 - 20 - 8
	// segmentSpace is CMSG_SPACE(sizeof(uint16)).
	segmentSpace = (unix.SizeofCmsghdr + 2 + unix.SizeofPtr - 1) &^ (unix.SizeofPtr - 1)
)

// segmentControl is the control message of a train.
type segmentControl struct {
	unix.Cmsghdr
	size uint16
	_    [segmentSpace - unix.SizeofCmsghdr - 2]byte
}

// segmenter joins messages of one socket. Its zero value joins nothing.
type segmenter struct {
	limit int // segments of up to so many bytes
}

// join puts the messages of b together as far as it can, and returns how many are left. b.counts says what each stands for.
func (s *segmenter) join(b *batch, n int) int {
	out := 0
	for i := 0; i < n; {
		k := s.run(b, i, n)
		h := &b.hdrs[out]
		if out != i {
			*h = b.hdrs[i]
		}
		if b.counts[out] = uint8(k); k > 1 {
			// The rows of iovecs lie one behind the other; what a codec has left of a row is empty.
			h.hdr.SetIovlen(k * len(b.iovs[i]))
			c := &b.controls[out]
			*c = segmentControl{Cmsghdr: unix.Cmsghdr{Level: unix.SOL_UDP, Type: unix.UDP_SEGMENT}, size: uint16(length(b, i))}
			c.SetLen(unix.CmsgLen(2))
			h.hdr.Control = (*byte)(unsafe.Pointer(c))
			h.hdr.SetControllen(segmentSpace)
		}
		i += k
		out++
	}
	return out
}

// run returns how many messages from i on can be one: at least 1.
func (s *segmenter) run(b *batch, i, n int) int {
	size := length(b, i)
	if size == 0 || size > s.limit {
		return 1
	}
	total, k := size, 1
	for ; i+k < n && k < maxSegments; k++ {
		next := length(b, i+k)
		if next == 0 || next > size || total+next > maxTrain || !sameName(b, i, i+k) {
			break
		}
		if total += next; next < size {
			return k + 1
		}
	}
	return k
}

// failed reports whether a train was refused for being one: its datagrams are then to be sent one by one, and no such train again.
func (s *segmenter) failed(b *batch, errno unix.Errno) bool {
	if b.counts[0] < 2 {
		return false
	}
	switch errno {
	case unix.EINVAL, unix.EMSGSIZE: // segments larger than the MTU; also: a kernel without the option
		s.limit = int(b.controls[0].size) - 1
	case unix.EIO, unix.EOPNOTSUPP, unix.ENOPROTOOPT: // no checksum offload on the way
		s.limit = 0
	default:
		return false
	}
	return true
}

// length returns the bytes of message i.
func length(b *batch, i int) int {
	n := 0
	for k := range b.iovs[i] {
		n += int(b.iovs[i][k].Len)
	}
	return n
}

// sameName reports whether two messages go to the same address; those of a connected socket have none.
func sameName(b *batch, i, k int) bool {
	return b.hdrs[i].hdr.Name == nil && b.hdrs[k].hdr.Name == nil ||
		b.hdrs[i].hdr.Namelen == b.hdrs[k].hdr.Namelen && b.names[i] == b.names[k]
}

// canSegment reports whether the kernel knows UDP_SEGMENT for the socket.
func canSegment(fd int) bool {
	_, err := unix.GetsockoptInt(fd, unix.SOL_UDP, unix.UDP_SEGMENT)
	return err == nil || errors.Is(err, unix.EINTR)
}
