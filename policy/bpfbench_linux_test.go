// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// BenchmarkSocket makes and closes a UDP socket in a namespace: with no programs, with owners written down, with 100 selectors beside.
func BenchmarkSocket(b *testing.B) {
	for _, bb := range []struct {
		name      string
		on        bool
		selectors int
	}{{"off", false, 0}, {"owners", true, 0}, {"selectors=1", true, 1}, {"selectors=800", true, 800}} {
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

// BenchmarkOwner looks up whose a UDP socket is.
func BenchmarkOwner(b *testing.B) {
	h := benchHost(b)
	o, err := NewOwners(h)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { o.Close() })
	c, err := net.Dial("udp4", "127.0.0.1:9")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { c.Close() })
	benchApply(b, h, &Selection{Mask: DefaultMask, Owners: true}) // it writes down what is there
	src := c.LocalAddr().(*net.UDPAddr).AddrPort()
	dst := netip.MustParseAddrPort("127.0.0.1:9")
	b.ReportAllocs()
	for b.Loop() {
		if w, err := o.Lookup(unix.IPPROTO_UDP, src, dst); err != nil || w.Method != OwnerBPF {
			b.Fatal(w, err)
		}
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
