// SPDX-License-Identifier: GPL-3.0-or-later

package tuntest

import (
	"net/netip"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/tun"
)

// Namespace is a network namespace of a test's own, with its loopback up. It is gone when the test ends, and every socket and device in it.
type Namespace struct {
	tb   testing.TB
	work chan func()
}

// NewNamespace makes a namespace. It needs root: without, the test is skipped, or, if CI is set, fails.
func NewNamespace(tb testing.TB) *Namespace {
	tb.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("CI") != "" {
			tb.Fatal("this test needs root")
		}
		tb.Skip("this test needs root")
	}
	n := &Namespace{tb: tb, work: make(chan func())}
	ready, ended := make(chan error), make(chan struct{})
	go func() {
		defer close(ended)
		// Never unlocked: the thread belongs to the namespace, and ends with the goroutine.
		runtime.LockOSThread()
		err := unix.Unshare(unix.CLONE_NEWNET)
		ready <- err
		if err != nil {
			return
		}
		for f := range n.work {
			f()
		}
	}()
	if err := <-ready; err != nil {
		tb.Fatalf("unshare: %v", err)
	}
	tb.Cleanup(func() {
		close(n.work)
		<-ended
	})
	n.Do(func() {
		// The machine's default may be bbr, which makes every figure on a virtual link meaningless. Of this namespace only.
		_ = os.WriteFile("/proc/sys/net/ipv4/tcp_congestion_control", []byte("cubic"), 0)
		n.up("lo")
	})
	return n
}

// Do calls f on the namespace's thread and waits for it. Sockets that f opens, with the net package too if the address is a literal, belong
// to the namespace wherever they are used later. f must not call Do, nor end the test.
func (n *Namespace) Do(f func()) {
	n.tb.Helper()
	done := make(chan struct{})
	n.work <- func() {
		defer close(done)
		f()
	}
	<-done
}

// Configure brings the device up with the addresses, and makes it the default route of both families.
func (n *Namespace) Configure(d *tun.Device, addrs ...netip.Prefix) {
	n.tb.Helper()
	n.Do(func() {
		link := n.up(d.Name())
		if link == nil {
			return
		}
		for _, a := range addrs {
			addr, err := netlink.ParseAddr(a.String())
			if err == nil {
				addr.Flags = unix.IFA_F_NODAD // usable at once
				err = netlink.AddrAdd(link, addr)
			}
			if err != nil {
				n.tb.Errorf("address %s: %v", a, err)
			}
			n.awaitLocal(a.Addr())
		}
		for _, dst := range []string{"0.0.0.0/0", "::/0"} {
			ipnet, err := netlink.ParseIPNet(dst)
			if err == nil {
				err = netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipnet, Scope: netlink.SCOPE_LINK})
			}
			if err != nil {
				n.tb.Errorf("route %s: %v", dst, err)
			}
		}
	})
}

// awaitLocal waits until the kernel takes packets for the address: IPv6's are put to use by a work queue, also without duplicate detection.
func (n *Namespace) awaitLocal(a netip.Addr) {
	n.tb.Helper()
	for deadline := time.Now().Add(5 * time.Second); ; runtime.Gosched() {
		routes, err := netlink.RouteGet(a.AsSlice())
		if err == nil && len(routes) > 0 && routes[0].Type == unix.RTN_LOCAL {
			return
		}
		if time.Now().After(deadline) {
			n.tb.Errorf("address %s is not in use: %v", a, err)
			return
		}
	}
}

func (n *Namespace) up(name string) netlink.Link {
	n.tb.Helper()
	link, err := netlink.LinkByName(name)
	if err == nil {
		err = netlink.LinkSetUp(link)
	}
	if err != nil {
		n.tb.Errorf("link %s: %v", name, err)
		return nil
	}
	return link
}
