// SPDX-License-Identifier: GPL-3.0-or-later

package delay

import (
	"bytes"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// pair returns the two ends of something that keeps the bounds of packets, as a TUN device does.
func pair(t *testing.T) (near, far *os.File) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	near, far = os.NewFile(uintptr(fds[0]), "near"), os.NewFile(uintptr(fds[1]), "far")
	t.Cleanup(func() { near.Close(); far.Close() })
	return near, far
}

func TestJoin(t *testing.T) {
	for _, c := range []struct {
		name string
		link Link
		want int // packets of 100
	}{
		{"delay", Link{Delay: 20 * time.Millisecond}, 100},
		{"all lost", Link{Loss: 1}, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, ends0 := pair(t)
			b, ends1 := pair(t)
			done := make(chan struct{})
			go func() {
				defer close(done)
				c.link.Join(ends0, ends1)
			}()
			begin := time.Now()
			for i := range 100 {
				if _, err := a.Write(bytes.Repeat([]byte{byte(i)}, i+1)); err != nil {
					t.Fatal(err)
				}
			}
			buf := make([]byte, mtu)
			got := 0
			for _ = b.SetReadDeadline(begin.Add(200 * time.Millisecond)); got < 100; got++ {
				n, err := b.Read(buf)
				if err != nil {
					break
				}
				if n != got+1 || buf[0] != byte(got) {
					t.Fatalf("packet %d: %d bytes of %d", got, n, buf[0])
				}
				if took := time.Since(begin); took < c.link.Delay {
					t.Fatalf("packet %d after %v", got, took)
				}
			}
			if got != c.want {
				t.Errorf("%d packets, want %d", got, c.want)
			}
			ends0.Close()
			ends1.Close()
			<-done
		})
	}
}
