// SPDX-License-Identifier: GPL-3.0-or-later

// Package delay is a link with a delay and a loss: two TUN devices, usually in two namespaces, between which every packet takes its time
// and a fraction of them is lost. It stands in for netem, which many kernels lack; tests and benchmarks use it.
package delay

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// queue bounds the packets in flight one way: 200 ms of 1500-byte packets at 2 Gbit/s are 33,000. Trains are bounded by the windows of TCP.
	queue = 1 << 16
	// mtu is the largest packet of a device without offloads, which keeps the kernel's default.
	mtu = 1500
	// train is the largest packet of a device with them, and its header.
	train = 1<<16 + 10
)

// Link says what happens to packets, the same in both directions.
type Link struct {
	Delay time.Duration // one way
	Loss  float64       // fraction of packets lost one way, 0 to 1
}

// Join moves packets between two devices until both are closed.
func (l Link) Join(a, b *os.File) {
	var wg sync.WaitGroup
	pool := &pools{}
	for _, d := range [][2]*os.File{{a, b}, {b, a}} {
		ch := make(chan packet, queue)
		wg.Go(func() { l.read(d[0], ch, pool) })
		wg.Go(func() { write(d[1], ch, pool) })
	}
	wg.Wait()
}

// pools are buffers for packets of both sizes: most of what comes back is small.
type pools struct{ small, large sync.Pool }

// clone copies a packet.
func (p *pools) clone(b []byte) *[]byte {
	pool, size := &p.small, mtu
	if len(b) > mtu {
		pool, size = &p.large, train
	}
	c, ok := pool.Get().(*[]byte)
	if !ok {
		fresh := make([]byte, size)
		c = &fresh
	}
	*c = append((*c)[:0], b...)
	return c
}

func (p *pools) put(b *[]byte) {
	if cap(*b) > mtu {
		p.large.Put(b)
		return
	}
	p.small.Put(b)
}

// packet is one on its way. The delay is the same for all packets, so that a queue in order of arrival is also one in order of departure.
type packet struct {
	due time.Time
	b   *[]byte
}

func (l Link) read(f *os.File, ch chan<- packet, pool *pools) {
	defer close(ch)
	var buf [train]byte
	for {
		n, err := f.Read(buf[:])
		if err != nil {
			return
		}
		if l.Loss > 0 && rand.Float64() < l.Loss {
			continue
		}
		p := packet{time.Now().Add(l.Delay), pool.clone(buf[:n])}
		select {
		case ch <- p:
		default: // the queue of a real link has an end too
			pool.put(p.b)
		}
	}
}

func write(f *os.File, ch <-chan packet, pool *pools) {
	wait := time.NewTimer(0)
	defer wait.Stop()
	for p := range ch { // to the end, so that the reader ends at its own closed device
		if left := time.Until(p.due); left > 0 {
			wait.Reset(left)
			<-wait.C
		}
		_, err := f.Write(*p.b)
		pool.put(p.b)
		if errors.Is(err, os.ErrClosed) {
			continue
		}
	}
}

// OpenTUN makes a TUN device in the network namespace of the calling thread. It vanishes when the file is closed. With trains, what TCP sends
// together stays together, as between two veths, and is not cut into packets of the MTU: what is measured is then not how fast they are carried.
// The other device must be of the same kind.
func OpenTUN(name string, trains bool) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("/dev/net/tun: %w", err)
	}
	var req struct {
		name  [unix.IFNAMSIZ]byte
		flags uint16
		_     [22]byte
	}
	copy(req.name[:], name)
	req.flags = unix.IFF_TUN | unix.IFF_NO_PI
	if trains {
		req.flags |= unix.IFF_VNET_HDR
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TUNSETIFF, uintptr(unsafe.Pointer(&req))); errno != 0 {
		unix.Close(fd)
		return nil, fmt.Errorf("tun %s: %w", name, errno)
	}
	if trains {
		if err := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, unix.TUN_F_CSUM|unix.TUN_F_TSO4|unix.TUN_F_TSO6); err != nil {
			unix.Close(fd)
			return nil, fmt.Errorf("tun %s: offload: %w", name, err)
		}
	}
	return os.NewFile(uintptr(fd), "tun-"+name), nil
}
