// SPDX-License-Identifier: GPL-3.0-or-later

package tun

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Receiver takes the packets of one queue. All its methods are called from the goroutine that runs Queue.Receive.
type Receiver interface {
	// Buffer returns the room for the next packet: at least MaxPacket bytes, or longer packets are cut and so fail their length checks.
	Buffer() []byte
	// Packet is called when n bytes of the last Buffer hold a packet. It must not block: nothing else is read meanwhile.
	Packet(h *Header, n int)
	// Idle is called when no packet waits: the moment to pass on what was batched.
	Idle()
}

// Queue is one file descriptor of a device. The kernel keeps a flow on the queue that last wrote to it.
type Queue struct {
	file *os.File
	raw  syscall.RawConn
	fd   int // of file; for Write, which must not take the poller's lock nor allocate a closure a packet
	skip int // 1 = the device has no virtio-net header: system calls are given all pieces but that

	stopped atomic.Bool

	mu     sync.RWMutex // held for reading during a write, so that fd cannot be closed and reused under it
	closed bool
}

func newQueue(f *os.File, plain bool) (*Queue, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	q := &Queue{file: f, raw: raw}
	if plain {
		q.skip = 1
	}
	if err := raw.Control(func(fd uintptr) { q.fd = int(fd) }); err != nil {
		return nil, err
	}
	return q, nil
}

// Receive reads packets into r until Stop or Close, which make it return nil, or until the device is gone. The goroutine waits in the
// runtime's poller and, once awake, reads until the queue is empty.
func (q *Queue) Receive(r Receiver) error {
	var (
		fail error
		h    Header // here, not in the loop: it escapes, and would be allocated for each packet
		wire [HeaderLen]byte
	)
	err := q.raw.Read(func(uintptr) bool {
		for !q.stopped.Load() {
			n, err := q.readv(&wire, r.Buffer())
			switch {
			case err == unix.EAGAIN:
				r.Idle()
				return q.stopped.Load()
			case err == unix.EINTR:
				continue
			case err != 0:
				fail = fmt.Errorf("tun: read: %w", err)
				return true
			case n < HeaderLen || n == HeaderLen && q.skip != 0: // 0: the other end of a fake link was closed
				fail = fmt.Errorf("tun: read: %w", os.ErrClosed)
				return true
			}
			h.Decode(&wire)
			r.Packet(&h, n-HeaderLen)
		}
		return true
	})
	if q.stopped.Load() {
		return nil
	}
	return errors.Join(fail, err)
}

// Stop makes Receive return nil soon. Packets can still be written: a stack that closes says goodbye to its connections.
func (q *Queue) Stop() {
	q.stopped.Store(true)
	_ = q.file.SetReadDeadline(time.Unix(1, 0)) // only wakes the poller; fails if the file is closed already, which does so too
}

// maxIovecs bounds the pieces of one packet. The kernel's limit is 1024; a packet of netstack is a header and a view for each write
// that went into it, so that more than this are rare.
const maxIovecs = 32

// Write sends one packet: its header, and its bytes in pieces. It does not block, does not keep the pieces and does not allocate (unless
// there are more than 31 pieces). Errors: os.ErrClosed, EIO while the link is down, ENOBUFS and EAGAIN when the kernel has no room.
func (q *Queue) Write(h *Header, pieces ...[]byte) error {
	var wire [HeaderLen]byte
	h.Encode(&wire)
	var iov [maxIovecs]unix.Iovec
	iov[0].Base = &wire[0]
	iov[0].SetLen(HeaderLen)
	n := 1
	for i, p := range pieces {
		if len(p) == 0 {
			continue
		}
		if n == maxIovecs-1 && i < len(pieces)-1 {
			p = join(pieces[i:])
			iov[n].Base = &p[0]
			iov[n].SetLen(len(p))
			n++
			break
		}
		iov[n].Base = &p[0]
		iov[n].SetLen(len(p))
		n++
	}
	q.mu.RLock()
	defer q.mu.RUnlock()
	if q.closed {
		return os.ErrClosed
	}
	for {
		_, _, err := unix.RawSyscall(unix.SYS_WRITEV, uintptr(q.fd), uintptr(unsafe.Pointer(&iov[q.skip])), uintptr(n-q.skip))
		switch err {
		case 0:
			return nil
		case unix.EINTR:
		default:
			return err
		}
	}
}

func (q *Queue) close() error {
	q.stopped.Store(true)
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return nil
	}
	q.closed = true
	return q.file.Close()
}

func join(pieces [][]byte) []byte {
	var all []byte
	for _, p := range pieces {
		all = append(all, p...)
	}
	return all
}

// readv reads one packet, its header into wire, and returns the length of both: of a device without headers the header is always zero. Unlike
// unix.Readv it does not allocate.
func (q *Queue) readv(wire *[HeaderLen]byte, buf []byte) (int, unix.Errno) {
	iov := [2]unix.Iovec{{Base: &wire[0]}, {Base: unsafe.SliceData(buf)}}
	iov[0].SetLen(HeaderLen)
	iov[1].SetLen(len(buf))
	n, _, err := unix.RawSyscall(unix.SYS_READV, uintptr(q.fd), uintptr(unsafe.Pointer(&iov[q.skip])), uintptr(len(iov)-q.skip))
	if err != 0 {
		return 0, err
	}
	return int(n) + q.skip*HeaderLen, 0
}
