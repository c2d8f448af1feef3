// SPDX-License-Identifier: GPL-3.0-or-later

package control

import (
	"errors"
	"fmt"
	"net"
	"os/user"
	"slices"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Peer is the process at the other end of a connection, as the kernel recorded it when it connected. A process that changes its uid later
// keeps what it had: it could as well have handed the descriptor on.
type Peer struct {
	PID    int // 0 when it lives in a pid namespace that this one cannot see
	UID    uint32
	GID    uint32
	Groups []uint32 // supplementary
	// Trusted: it may do everything. The server sets it for the Backend.
	Trusted bool
}

// In reports whether the peer is a member of the group.
func (p Peer) In(gid uint32) bool { return p.GID == gid || slices.Contains(p.Groups, gid) }

// peerOf asks the kernel who is at the other end (unix(7): SO_PEERCRED, SO_PEERGROUPS).
func peerOf(conn *net.UnixConn) (Peer, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return Peer{}, err
	}
	var p Peer
	var inner error
	err = raw.Control(func(fd uintptr) {
		cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		if err != nil {
			inner = fmt.Errorf("SO_PEERCRED: %w", err)
			return
		}
		p = Peer{PID: int(cred.Pid), UID: cred.Uid, GID: cred.Gid}
		p.Groups, inner = peerGroups(fd)
	})
	return p, errors.Join(err, inner)
}

// peerGroups reads SO_PEERGROUPS (since Linux 4.13), which x/sys has no wrapper for: an array of gid_t, ERANGE and the needed length if short.
func peerGroups(fd uintptr) ([]uint32, error) {
	const size = uint32(unsafe.Sizeof(uint32(0)))
	gids := make([]uint32, 32)
	for {
		n := uint32(len(gids)) * size
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, fd, unix.SOL_SOCKET, unix.SO_PEERGROUPS,
			uintptr(unsafe.Pointer(&gids[0])), uintptr(unsafe.Pointer(&n)), 0)
		switch {
		case errno == 0:
			return gids[:n/size], nil
		case errno == unix.ERANGE && n/size > uint32(len(gids)):
			gids = make([]uint32, n/size) // NGROUPS_MAX bounds it: 65,536
		default:
			return nil, fmt.Errorf("SO_PEERGROUPS: %w", errno)
		}
	}
}

// groupID finds the gid of control.group, a name or a number. Without such a group only root has authority, which is no error: the packages
// make the group, a bare binary has none.
func groupID(name string) (gid uint32, ok bool) {
	if name == "" {
		return 0, false
	}
	if n, err := strconv.ParseUint(name, 10, 32); err == nil {
		return uint32(n), true
	}
	g, err := user.LookupGroup(name)
	if err != nil {
		return 0, false
	}
	n, err := strconv.ParseUint(g.Gid, 10, 32)
	return uint32(n), err == nil
}
