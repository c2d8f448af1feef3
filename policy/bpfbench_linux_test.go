// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// BenchmarkSocket makes and closes a UDP socket in a namespace: with no programs, with owners written down, with 100 selectors beside.
func BenchmarkSocket(b *testing.B) {
	for _, bb := range []struct {
		name      string
		on        bool
		selectors int
	}{{"off", false, 0}, {"owners", true, 0}, {"selectors=1", true, 1}, {"selectors=1000", true, 1000}} {
		b.Run(bb.name, func(b *testing.B) {
			h := benchHost(b)
			if bb.on {
				sel := &Selection{Mask: DefaultMask, Owners: true}
				var idx []int
				for i := range bb.selectors {
					sel.Selectors = append(sel.Selectors, Selector{UIDs: []uint32{uint32(70000 + i)}, Exes: []string{"/nonexistent/app"}})
					idx = append(idx, i)
				}
				if len(idx) > 0 {
					sel.Rules = []SelectRule{{Context: "x", Mark: ContextMark(DefaultMask, 0), Select: idx}}
				}
				benchApply(b, h, sel)
			}
			b.ReportAllocs()
			for b.Loop() {
				fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
				if err != nil {
					b.Fatal(err)
				}
				unix.Close(fd)
			}
		})
	}
}

// BenchmarkOwner looks up whose a UDP socket is, by its flow and by the socket, with nobody else and with many other processes.
func BenchmarkOwner(b *testing.B) {
	for _, others := range []int{0, 300, 3000} {
		for _, method := range []string{OwnerTCX, OwnerBPF} {
			b.Run(fmt.Sprintf("%s/others=%d", method, others), func(b *testing.B) { benchOwner(b, method, others) })
		}
	}
}

func benchOwner(b *testing.B, method string, others int) {
	b.Helper()
	h := benchHost(b)
	o, err := NewOwners(h)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { o.Close() })
	benchTUN(b)
	crowd(b, others)
	sel := &Selection{Mask: DefaultMask, Owners: true}
	if method == OwnerTCX {
		sel.Devices = []string{"bench0"}
	}
	benchApply(b, h, sel)
	dst := netip.MustParseAddrPort("198.51.100.1:9")
	c, err := net.Dial("udp4", dst.String())
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { c.Close() })
	if _, err := c.Write([]byte("x")); err != nil {
		b.Fatal(err)
	}
	src := c.LocalAddr().(*net.UDPAddr).AddrPort()
	took := make([]time.Duration, 0, 1<<16)
	b.ReportAllocs()
	for b.Loop() {
		from := time.Now()
		w, err := o.Lookup(unix.IPPROTO_UDP, src, dst)
		if d := time.Since(from); len(took) < cap(took) {
			took = append(took, d)
		}
		// Nobody sends by the flow meanwhile, which is forgotten after a while.
		if err != nil || w.Method != method && len(took) < 1000 {
			b.Fatal(w, err)
		}
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2]), "p50-ns")
	b.ReportMetric(float64(took[len(took)*99/100]), "p99-ns")
}

// benchTUN is a device that all addresses but local ones are behind.
func benchTUN(b *testing.B) {
	b.Helper()
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { unix.Close(fd) })
	ifr, err := unix.NewIfreq("bench0")
	if err != nil {
		b.Fatal(err)
	}
	ifr.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		b.Fatal(err)
	}
	if out, err := exec.Command("sh", "-c", "ip addr add 10.9.0.2/24 dev bench0; ip link set bench0 up; ip route add default dev bench0").CombinedOutput(); err != nil {
		b.Fatal(string(out), err)
	}
}

// crowd is n other processes, until the benchmark ends.
func crowd(b *testing.B, n int) {
	b.Helper()
	if n == 0 {
		return
	}
	c := exec.Command("sh", "-c", fmt.Sprintf("i=0; while [ $i -lt %d ]; do sleep 1000 & i=$((i+1)); done; echo; exec cat", n))
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	in, err := c.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	out, err := c.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := c.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		in.Close()
		if err := syscall.Kill(-c.Process.Pid, syscall.SIGKILL); err != nil { // the group that we have made
			b.Error(err)
		}
		_ = c.Wait()
	})
	if _, err := out.Read(make([]byte, 1)); err != nil {
		b.Fatal(err)
	}
}

// benchHost is a namespace of its own, which the benchmark's thread stays in.
func benchHost(b *testing.B) *LinuxHost {
	b.Helper()

	if unix.Geteuid() != 0 {
		b.Skip("this benchmark needs root")
	}
	runtime.LockOSThread() // never unlocked: the thread ends with the benchmark
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		b.Fatal(err)
	}
	if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
		b.Fatal(string(out), err)
	}
	h, err := NewLinuxHost()
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { h.Close() })
	return h
}

func benchApply(b *testing.B, h *LinuxHost, sel *Selection) {
	b.Helper()
	dir, err := h.BPFDir("bench")
	if err != nil {
		b.Fatal(err)
	}
	if _, err := h.ApplyBPF(dir, sel, nil); err != nil {
		b.Fatal(err)
	}
	// Not as the daemon, who is left alone at once.
	if err := h.bpf.maps.tasks.Delete(uint32(os.Getpid())); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := h.RemoveBPF(dir); err != nil {
			b.Error(err)
		}
	})
}
