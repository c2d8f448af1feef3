// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// nftDumpBuffer holds what the kernel puts into one answer to a dump: NLMSG_GOODSIZE, or as much as the reader has shown to take, 32 KiB at most.
const nftDumpBuffer = 64 << 10

// nlmsgAlign is NLMSG_ALIGNTO.
const nlmsgAlign = 4

// tables returns a fingerprint of every table of ours whose name starts with prefix. As long as the rule set's generation is what it was, no
// table of the inet family has changed since it was read; those of devices change with the devices, too.
func (n *nftConn) tables(prefix string) (map[string]string, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	generation, err := n.generationLocked()
	if err != nil {
		return nil, err
	}
	if generation != n.generation {
		n.generation, n.prints = generation, map[string]string{}
	}
	list, err := n.listLocked(unix.AF_UNSPEC, unix.NFT_MSG_GETTABLE, nil)
	if err != nil {
		return nil, err
	}
	out := map[string]string{}
	for _, m := range list {
		name := attrString(m, unix.NFTA_TABLE_NAME)
		if m[0] != familyOf(name) || !strings.HasPrefix(name, prefix) {
			continue
		}
		if p, known := n.prints[name]; known && !ofNetdev(name) {
			out[name] = p
			continue
		}
		if out[name], err = n.fingerprintLocked(name); err != nil {
			return nil, err
		}
		n.prints[name] = out[name]
	}
	if generation, err = n.generationLocked(); err != nil || generation != n.generation {
		n.generation, n.prints = 0, map[string]string{} // read while it changed
	}
	return out, err
}

// generationLocked is the number of the last transaction in this namespace, anybody's.
func (n *nftConn) generationLocked() (uint32, error) {
	list, err := n.askLocked(nftMsg(unix.AF_UNSPEC, unix.NFT_MSG_GETGEN, 0, nil))
	if err != nil {
		return 0, nftError(err)
	}
	for _, m := range list {
		for _, a := range attrs(m[4:]) {
			if a.typ == unix.NFTA_GEN_ID && len(a.data) == 4 {
				return binary.BigEndian.Uint32(a.data), nil
			}
		}
	}
	return 0, errors.New("nftables: no generation")
}

// listLocked dumps objects: each is the message's data, nfgenmsg first.
func (n *nftConn) listLocked(family byte, get uint16, filter func(*netlink.AttributeEncoder)) ([][]byte, error) {
	e := netlink.NewAttributeEncoder()
	e.ByteOrder = binary.BigEndian
	if filter != nil {
		filter(e)
	}
	b, err := e.Encode()
	if err != nil {
		return nil, err
	}
	list, err := n.askLocked(nftMsg(family, get, netlink.Dump, b))
	if errors.Is(err, unix.ENOENT) {
		return nil, nil // gone since it was listed
	}
	if err != nil {
		return nil, nftError(err)
	}
	return list, nil
}

// askLocked sends a request and reads its answers. The kernel has them ready when the request, or the read before, returns: nothing waits, and
// with hundreds of sets the ways through the runtime's poller would take most of the time.
func (n *nftConn) askLocked(m netlink.Message) ([][]byte, error) {
	raw, err := n.dump.SyscallConn()
	if err != nil {
		return nil, err
	}
	n.seq++
	m.Header.Sequence = n.seq
	m.Header.Length = uint32(nlmsgHeader + len(m.Data))
	b, err := m.MarshalBinary()
	if err != nil {
		return nil, err
	}
	if n.buf == nil {
		n.buf = make([]byte, nftDumpBuffer)
	}
	var out [][]byte
	cerr := raw.Control(func(fd uintptr) {
		if err = unix.Sendto(int(fd), b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
			return
		}
		for done := false; !done && err == nil; {
			var size, flags int
			if size, _, flags, _, err = unix.Recvmsg(int(fd), n.buf, nil, unix.MSG_DONTWAIT); err != nil {
				return
			}
			if flags&unix.MSG_TRUNC != 0 {
				err = errors.New("netlink: an answer does not fit")
				return
			}
			out, done, err = splitAnswers(n.buf[:size], n.seq, m.Header.Flags&netlink.Dump != 0, out)
		}
	})
	return out, errors.Join(cerr, err)
}

// nlmsgHeader is the size of struct nlmsghdr.
const nlmsgHeader = 16

// splitAnswers appends copies of the data of messages with this sequence number to out; done says that no more come.
func splitAnswers(b []byte, seq uint32, dump bool, out [][]byte) (_ [][]byte, done bool, err error) {
	ne := binary.NativeEndian
	for len(b) >= nlmsgHeader {
		size := int(ne.Uint32(b))
		if size < nlmsgHeader || size > len(b) {
			return out, true, fmt.Errorf("netlink: a message of %d bytes", size)
		}
		typ, data := ne.Uint16(b[4:]), b[nlmsgHeader:size]
		if ne.Uint32(b[8:]) == seq { // else of a dump that was given up
			switch {
			case typ == unix.NLMSG_ERROR || typ == unix.NLMSG_DONE:
				if len(data) >= 4 {
					if code := int32(ne.Uint32(data)); code < 0 {
						return out, true, unix.Errno(-code)
					}
				}
				return out, true, nil
			case len(data) >= 4:
				out = append(out, append([]byte(nil), data...))
			}
			done = !dump
		}
		b = b[min(len(b), (size+nlmsgAlign-1)&^(nlmsgAlign-1)):]
	}
	return out, done, nil
}
