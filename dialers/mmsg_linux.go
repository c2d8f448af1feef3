// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"errors"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/flow"
)

const (
	// batchSize is how many datagrams one system call moves. More gains nothing: at 64 the call is 2 % of the cost of the datagrams.
	batchSize = 64
	// headFixed is the size of the SOCKS5 UDP header for an IPv4 address: received in front of the caller's buffer, so that the payload
	// lands where it belongs.
	headFixed = 3 + 1 + 4 + 2
	// headMax is the size of the header for the longest name.
	headMax = 3 + maxSOCKSAddr
)

// mmsghdr is struct mmsghdr of recvmmsg(2); the compiler pads it as C does.
type mmsghdr struct {
	hdr unix.Msghdr
	n   uint32
}

// batch is the scratch memory of one recvmmsg or sendmmsg: 28 KB, kept in Net.batches while no call runs.
type batch struct {
	hdrs  [batchSize]mmsghdr
	iovs  [batchSize][3]unix.Iovec
	heads [batchSize][headMax]byte
	names [batchSize]unix.RawSockaddrInet6

	counts   [batchSize]uint8 // datagrams in each message; see segmenter
	controls [batchSize]segmentControl
}

func (n *Net) getBatch() *batch {
	if b, ok := n.batches.Get().(*batch); ok {
		return b
	}
	return new(batch)
}

// putBatch forgets the callers' buffers: a pooled batch must not keep them alive.
func (n *Net) putBatch(b *batch, used int) {
	for i := range used {
		b.iovs[i] = [3]unix.Iovec{}
		b.hdrs[i] = mmsghdr{}
	}
	n.batches.Put(b)
}

// codec is what lies between a payload and a datagram on the wire.
type codec interface {
	// send fills message i of b for d. An error means that d cannot be sent.
	send(b *batch, i int, d *flow.Datagram) error
	// prepare fills message i of b to receive into buf.
	prepare(b *batch, i int, buf []byte)
	// received turns message i, of n bytes, into d, and reports whether it is fit to be delivered.
	received(b *batch, i, n int, d *flow.Datagram) bool
}

// batchConn moves datagrams between a socket and callers' buffers, many a system call, without allocating. One goroutine may read while
// another writes.
type batchConn struct {
	*net.UDPConn
	net     *Net
	raw     syscall.RawConn
	codec   codec
	dropped *atomic.Uint64 // datagrams that could not be delivered or sent

	rd, wr struct {
		mu    sync.Mutex
		ds    []flow.Datagram
		n     int
		err   error
		ready func(fd uintptr) bool // made once: a closure a call would be an allocation a call

		readable func(fd uintptr) bool // of the reading side, see WaitRead
		asked    bool
		pause    pause
	}
	segments segmenter // guarded by wr.mu
}

func (c *batchConn) init(n *Net, u *net.UDPConn, cd codec, dropped *atomic.Uint64) (err error) {
	c.UDPConn, c.net, c.codec, c.dropped = u, n, cd, dropped
	if c.raw, err = u.SyscallConn(); err != nil {
		return err
	}
	c.rd.ready, c.wr.ready, c.rd.readable = c.recv, c.send, c.readable
	return c.raw.Control(func(fd uintptr) {
		if !n.cfg.NoSegment && canSegment(int(fd)) {
			c.segments.limit = maxTrain
		}
	})
}

// ReadBatch waits for at least one datagram and takes what else is there.
func (c *batchConn) ReadBatch(ds []flow.Datagram) (int, error) {
	r := &c.rd
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(ds) == 0 {
		return 0, nil
	}
	r.ds, r.n, r.err = ds, 0, nil
	err := c.raw.Read(r.ready)
	r.ds = nil
	if err == nil {
		err = r.err
	}
	return r.n, err
}

// recv is called when the socket may have something to read; false waits for more.
func (c *batchConn) recv(fd uintptr) bool {
	r := &c.rd
	k := min(len(r.ds), batchSize)
	b := c.net.getBatch()
	defer c.net.putBatch(b, k)
	for {
		for i := range k {
			b.hdrs[i] = mmsghdr{hdr: unix.Msghdr{Iov: &b.iovs[i][0]}}
			c.codec.prepare(b, i, r.ds[i].Buf)
		}
		got, errno := mmsg(unix.SYS_RECVMMSG, fd, b.hdrs[:k])
		switch errno {
		case 0:
		case unix.EINTR:
			continue
		case unix.EAGAIN:
			return false
		default:
			r.err = errno
			return true
		}
		for i := range got {
			c.accept(b, i)
		}
		if r.n > 0 {
			return true
		}
	}
}

// accept makes message i the next of the datagrams returned, or drops it.
func (c *batchConn) accept(b *batch, i int) {
	r, h, d := &c.rd, &b.hdrs[i], &c.rd.ds[i]
	room := len(d.Buf)
	if h.hdr.Flags&unix.MSG_TRUNC != 0 || !c.codec.received(b, i, int(h.n), d) {
		d.Buf = d.Buf[:room]
		c.dropped.Add(1)
		return
	}
	if to := &r.ds[r.n]; to != d { // one before it was dropped
		if len(to.Buf) < len(d.Buf) {
			d.Buf = d.Buf[:room]
			c.dropped.Add(1)
			return
		}
		to.Addr, to.Buf = d.Addr, to.Buf[:copy(to.Buf, d.Buf)]
		d.Buf = d.Buf[:room]
	}
	r.n++
}

// WriteBatch sends the datagrams in order. If one cannot be sent (too large, no route to its destination), it returns how many went before
// it and why: the next call may go on behind it. Any other error means that the socket is of no more use.
func (c *batchConn) WriteBatch(ds []flow.Datagram) (int, error) {
	w := &c.wr
	w.mu.Lock()
	defer w.mu.Unlock()
	for done := 0; done < len(ds); {
		w.ds, w.n, w.err = ds[done:min(len(ds), done+batchSize)], 0, nil
		err := c.raw.Write(w.ready)
		done += w.n
		w.ds = nil
		if err == nil {
			err = w.err
		}
		if err != nil {
			return done, err
		}
	}
	return len(ds), nil
}

// send is called when the socket may have room; false waits for it. w.n counts the datagrams that are dealt with.
func (c *batchConn) send(fd uintptr) bool {
	w := &c.wr
	b := c.net.getBatch()
	defer c.net.putBatch(b, len(w.ds))
	for w.n < len(w.ds) && w.err == nil {
		k := 0
		for k < len(w.ds)-w.n {
			b.hdrs[k] = mmsghdr{hdr: unix.Msghdr{Iov: &b.iovs[k][0]}}
			if w.err = c.codec.send(b, k, &w.ds[w.n+k]); w.err != nil {
				break
			}
			k++
		}
		if k == 0 {
			break
		}
		k = c.segments.join(b, k)
		sent, errno := mmsg(unix.SYS_SENDMMSG, fd, b.hdrs[:k])
		if errno != 0 || sent < k {
			w.err = nil // the datagram that cannot be sent is not the next one yet
		}
		switch {
		case errno == 0:
			for _, n := range b.counts[:sent] {
				w.n += int(n)
			}
		case errno == unix.EINTR, c.segments.failed(b, errno):
		case errno == unix.EAGAIN:
			return false
		case errno == unix.ENOBUFS: // the device's queue is full: a loss like any other on the way
			c.dropped.Add(uint64(b.counts[0]))
			w.n += int(b.counts[0])
		default:
			w.err = errno // the first of them is at fault; the others have not been tried
		}
	}
	return true
}

// mmsg is recvmmsg(2) or sendmmsg(2); x/sys has neither. Raw, since it never blocks: the scheduler need not be told, nor its monitor woken up.
func mmsg(call uintptr, fd uintptr, hdrs []mmsghdr) (int, unix.Errno) {
	n, _, errno := unix.RawSyscall6(call, fd, uintptr(unsafe.Pointer(&hdrs[0])), uintptr(len(hdrs)), unix.MSG_DONTWAIT, 0, 0)
	return int(n), errno
}

// setIov points an iovec at a buffer, which may be empty.
func setIov(v *unix.Iovec, p []byte) {
	v.Base = unsafe.SliceData(p)
	v.SetLen(len(p))
}

// plainCodec carries payloads as they are, with the peer's address in the socket address.
type plainCodec struct {
	v4    bool                      // the socket is of AF_INET; else AF_INET6 with v4-mapped addresses
	allow func(netip.AddrPort) bool // nil = all
}

func (p *plainCodec) prepare(b *batch, i int, buf []byte) {
	setIov(&b.iovs[i][0], buf)
	h := &b.hdrs[i].hdr
	h.SetIovlen(1)
	h.Name, h.Namelen = (*byte)(unsafe.Pointer(&b.names[i])), unix.SizeofSockaddrInet6
}

func (p *plainCodec) received(b *batch, i, n int, d *flow.Datagram) bool {
	var ip netip.Addr
	sa := &b.names[i]
	switch sa.Family {
	case unix.AF_INET:
		ip = netip.AddrFrom4((*unix.RawSockaddrInet4)(unsafe.Pointer(sa)).Addr)
	case unix.AF_INET6:
		ip = netip.AddrFrom16(sa.Addr).Unmap()
	default:
		return false
	}
	port := (*[2]byte)(unsafe.Pointer(&sa.Port)) // at the same offset in both families
	d.Addr = flow.Addr{IP: ip, Port: uint16(port[0])<<8 | uint16(port[1])}
	d.Buf = d.Buf[:n]
	return true
}

func (p *plainCodec) send(b *batch, i int, d *flow.Datagram) error {
	switch {
	case !d.Addr.IP.IsValid() || d.Addr.Port == 0:
		return flow.ErrHostUnreachable
	case p.v4 && !d.Addr.IP.Unmap().Is4():
		return flow.ErrNetUnreachable
	case p.allow != nil && !p.allow(netip.AddrPortFrom(d.Addr.IP.Unmap(), d.Addr.Port)):
		return flow.ErrProhibited
	}
	sa := &b.names[i]
	h := &b.hdrs[i].hdr
	if p.v4 {
		sa4 := (*unix.RawSockaddrInet4)(unsafe.Pointer(sa))
		*sa4 = unix.RawSockaddrInet4{Family: unix.AF_INET, Addr: d.Addr.IP.Unmap().As4()}
		h.Namelen = unix.SizeofSockaddrInet4
	} else {
		*sa = unix.RawSockaddrInet6{Family: unix.AF_INET6, Addr: d.Addr.IP.As16()}
		h.Namelen = unix.SizeofSockaddrInet6
	}
	port := (*[2]byte)(unsafe.Pointer(&sa.Port))
	port[0], port[1] = byte(d.Addr.Port>>8), byte(d.Addr.Port)
	h.Name = (*byte)(unsafe.Pointer(sa))
	setIov(&b.iovs[i][0], d.Buf)
	h.SetIovlen(1)
	return nil
}

// plainUDP is an unconnected socket of our own: the association of Direct.
type plainUDP struct {
	batchConn
	once    sync.Once
	onClose func()
}

func newPlainUDP(d *Direct, c *net.UDPConn) (*plainUDP, error) {
	p := new(plainUDP)
	cd := &plainCodec{allow: d.allow}
	if err := p.init(d.net, c, cd, &d.dropped); err != nil {
		return nil, err
	}
	var domain int
	var err error
	if cerr := p.raw.Control(func(fd uintptr) { domain, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_DOMAIN) }); cerr != nil {
		err = cerr
	}
	cd.v4 = domain == unix.AF_INET
	return p, err
}

// ReadBatch fills ds with what anybody sent.
func (p *plainUDP) ReadBatch(ds []flow.Datagram) (int, error) {
	n, err := p.batchConn.ReadBatch(ds)
	return n, closedErr(err)
}

// Close closes the socket; ReadBatch then returns net.ErrClosed.
func (p *plainUDP) Close() error {
	err := net.ErrClosed
	p.once.Do(func() {
		err = p.UDPConn.Close()
		if p.onClose != nil {
			p.onClose()
		}
	})
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// closedErr unwraps the poller's own error for a closed descriptor.
func closedErr(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return net.ErrClosed
	}
	return err
}
