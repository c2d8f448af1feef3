// SPDX-License-Identifier: GPL-3.0-or-later

package lab

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// relayQueue bounds the packets in flight one way: 200 ms of 1500-byte packets at 2 Gbit/s are 33,000.
const relayQueue = 1 << 16

// newRelay joins two namespaces by a pair of TUN devices of the same name between which every packet takes delay, and a fraction of them
// is lost. The delay is the same for all packets one way, so a queue in order of arrival is also one in order of departure.
func newRelay(t *testing.T, a, b *NS, name string, delay time.Duration, loss float64, configure func() error) error {
	t.Helper()
	fa, err := openTUN(a, name)
	if err != nil {
		return err
	}
	fb, err := openTUN(b, name)
	if err != nil {
		fa.Close()
		return err
	}
	var wg sync.WaitGroup
	t.Cleanup(func() {
		fa.Close()
		fb.Close()
		wg.Wait()
	})
	if err := errors.Join(configure(), a.ip("link set "+name+" txqueuelen 10000"), b.ip("link set "+name+" txqueuelen 10000")); err != nil {
		return err
	}
	for _, d := range [][2]*os.File{{fa, fb}, {fb, fa}} {
		ch := make(chan delayed, relayQueue)
		wg.Go(func() { readDelayed(d[0], ch, delay, loss) })
		wg.Go(func() { writeDelayed(d[1], ch) })
	}
	return nil
}

// delayed is a packet on its way.
type delayed struct {
	due    time.Time
	packet []byte
}

func readDelayed(f *os.File, ch chan<- delayed, delay time.Duration, loss float64) {
	defer close(ch)
	buf := make([]byte, 65536)
	for {
		n, err := f.Read(buf)
		if err != nil {
			return
		}
		if loss > 0 && rand.Float64() < loss {
			continue
		}
		select {
		case ch <- delayed{time.Now().Add(delay), append([]byte(nil), buf[:n]...)}:
		default: // the queue of a real link has an end too
		}
	}
}

func writeDelayed(f *os.File, ch <-chan delayed) {
	wait := time.NewTimer(0)
	defer wait.Stop()
	for d := range ch {
		if left := time.Until(d.due); left > 0 {
			wait.Reset(left)
			<-wait.C
		}
		if _, err := f.Write(d.packet); errors.Is(err, os.ErrClosed) {
			// Drain, so that the reader ends at its own closed device.
			continue
		}
	}
}

// openTUN makes a TUN device in a namespace. It vanishes when the file is closed.
func openTUN(n *NS, name string) (*os.File, error) {
	var f *os.File
	err := n.Do(func() error {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return fmt.Errorf("/dev/net/tun: %w", err)
		}
		var req struct {
			name  [unix.IFNAMSIZ]byte
			flags uint16
			_     [22]byte
		}
		copy(req.name[:], name)
		req.flags = unix.IFF_TUN | unix.IFF_NO_PI
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TUNSETIFF, uintptr(unsafe.Pointer(&req))); errno != 0 {
			unix.Close(fd)
			return fmt.Errorf("tun %s: %w", name, errno)
		}
		f = os.NewFile(uintptr(fd), "tun-"+name)
		return nil
	})
	return f, err
}
