// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	vnl "github.com/vishvananda/netlink"
	"go.uber.org/zap/zaptest"
	"golang.org/x/sys/unix"
)

// The lab: a client namespace, which the test's thread is in, and a far one that everything not captured arrives in.
//
//	client c0 10.9.0.2/24, 2001:db8:9::2/64, fd09::2/64 ──── c1 .1 far, which also is 198.51.100.1, 2001:db8:ff::1
var (
	client4 = netip.MustParseAddr("10.9.0.2")
	client6 = netip.MustParseAddr("2001:db8:9::2")
	lan4    = netip.MustParseAddr("10.9.0.1")
	lan6    = netip.MustParseAddr("fd09::1")
	remote4 = netip.MustParseAddr("198.51.100.1")
	remote6 = netip.MustParseAddr("2001:db8:ff::1")
)

type lab struct {
	t       *testing.T
	dir     string
	client  *os.File
	far     *os.File
	host    *LinuxHost
	m       *Manager
	tun     *os.File
	tunSeen *seen
	farSeen *seen
	marking Marking
}

// seen collects packets, as `proto src > dst:port`.
type seen struct {
	mu   sync.Mutex
	all  []string
	wake chan struct{}
}

func newSeen() *seen { return &seen{wake: make(chan struct{}, 1)} }

func (s *seen) add(p string) {
	s.mu.Lock()
	s.all = append(s.all, p)
	s.mu.Unlock()
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

func (s *seen) list() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.all...)
}

func (s *seen) reset() {
	s.mu.Lock()
	s.all = nil
	s.mu.Unlock()
}

func (s *seen) has(sub string) bool {
	for _, p := range s.list() {
		if strings.Contains(p, sub) {
			return true
		}
	}
	return false
}

// await waits until a packet with sub has been seen.
func (s *seen) await(t *testing.T, sub string) {
	t.Helper()
	for deadline := time.After(3 * time.Second); !s.has(sub); {
		select {
		case <-s.wake:
		case <-deadline:
			t.Fatalf("no packet %q; seen:\n%s", sub, strings.Join(s.list(), "\n"))
		}
	}
}

// requireRoot skips without root, and fails where root must be there.
func requireRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("CI") == "true" {
		t.Fatal("this test needs root")
	}
	t.Skip("this test needs root")
}

func newNetns(t *testing.T) *os.File {
	t.Helper()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// newLab leaves the test's goroutine on a locked thread in the client namespace.
func newLab(t *testing.T) *lab {
	t.Helper()
	requireRoot(t)
	runtime.LockOSThread()
	orig, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Setns(int(orig.Fd()), unix.CLONE_NEWNET); err == nil {
			runtime.UnlockOSThread()
		}
		orig.Close()
	})
	l := &lab{t: t, dir: t.TempDir(), farSeen: newSeen(), tunSeen: newSeen()}
	l.far = newNetns(t)
	l.client = newNetns(t)
	l.inside()
	const noDAD = "for d in default all; do echo 0 > /proc/sys/net/ipv6/conf/$d/accept_dad; echo 0 > /proc/sys/net/ipv6/conf/$d/dad_transmits; done; "
	l.sh(noDAD + "ip link set lo up")
	veth := &vnl.Veth{LinkAttrs: vnl.LinkAttrs{Name: "c0"}, PeerName: "c1", PeerNamespace: vnl.NsFd(int(l.far.Fd()))}
	if err := vnl.LinkAdd(veth); err != nil {
		t.Fatal(err)
	}
	l.inFar(func() {
		l.sh(noDAD + `for i in accept_dad dad_transmits; do echo 0 > /proc/sys/net/ipv6/conf/c1/$i; done
			ip link set lo up; ip link set c1 up; ip addr add 10.9.0.1/24 dev c1; ip addr add 10.9.0.53/24 dev c1
			ip addr add 2001:db8:9::1/64 dev c1 nodad; ip addr add fd09::1/64 dev c1 nodad; ip addr add fd09::53/64 dev c1 nodad
			ip addr add 198.51.100.1/32 dev lo; ip addr add 2001:db8:ff::1/128 dev lo; ip route add default via 10.9.0.2; ip -6 route add default via 2001:db8:9::2`)
		l.capture("c1")
	})
	l.sh(`for i in accept_dad dad_transmits; do echo 0 > /proc/sys/net/ipv6/conf/c0/$i; done
		ip link set c0 up; ip addr add 10.9.0.2/24 dev c0; ip addr add 2001:db8:9::2/64 dev c0 nodad; ip addr add fd09::2/64 dev c0 nodad
		ip route add default via 10.9.0.1; ip -6 route add default via 2001:db8:9::1`)
	// The kernel adds the routes of IPv6 addresses on its own time: not after a test has looked what was before.
	l.await("the routes of c0's addresses", func() bool {
		return strings.TrimSpace(l.sh("ip -6 route show table local dev c0 | grep -c '^local' || true")) == "3"
	})
	return l
}

// start makes host and manager, and gives the namespace as it was.
func (l *lab) start() (before string) {
	l.t.Helper()
	before = l.state()
	var err error
	if l.host, err = NewLinuxHost(); err != nil {
		l.t.Fatal(err)
	}
	l.m = NewManager(Config{Host: l.host, Log: zaptest.NewLogger(l.t), LockDir: l.dir, Marking: l.marking})
	l.t.Cleanup(func() {
		if l.m != nil {
			if err := l.m.Close(context.Background(), StopOpen); err != nil {
				l.t.Error(err)
			}
		} else {
			l.cleanup()
		}
		l.host.Close()
	})
	return before
}

func (l *lab) spec(mode Mode) Spec {
	s := Spec{Instance: InstanceFor(filepath.Join(l.dir, "mprox.sock")), Contexts: []ContextSpec{{Name: "default", Mode: mode, Fake: []netip.Prefix{
		netip.MustParsePrefix("198.18.0.0/15"), netip.MustParsePrefix("fd4d:5554:4558::/64"),
	}}}}
	return s.withDefaults()
}

// enforce makes the kernel as spec says, in the order of the daemon: closed first, then with the device, which it puts into spec.
func (l *lab) enforce(spec *Spec) {
	l.t.Helper()
	if err := l.m.Prepare(l.t.Context(), *spec); err != nil {
		l.t.Fatal(err)
	}
	l.openTUN("mprox0")
	spec.Contexts[0].TUN = "mprox0"
	if err := l.m.Apply(l.t.Context(), *spec); err != nil {
		l.t.Fatal(err)
	}
}

// up goes all the way for a global context.
func (l *lab) up(change ...func(*ContextSpec)) (before string, spec Spec) {
	l.t.Helper()
	before = l.start()
	spec = l.spec(ModeGlobal)
	for _, f := range change {
		f(&spec.Contexts[0])
	}
	l.enforce(&spec)
	return before, spec
}

// die is kill -9: descriptors close, nothing is undone.
func (l *lab) die() {
	l.t.Helper()
	l.m.stopWatch()
	l.m.watching.Wait()
	l.m.locks.slots.Close()
	for _, f := range []*os.File{l.m.locks.daemon, l.m.locks.journal} {
		if f != nil {
			f.Close()
		}
	}
	l.m = nil
	l.host.Close()
	if l.tun != nil {
		l.tun.Close()
	}
	l.tun = nil
	l.awaitState(func(s string) bool { return !strings.Contains(s, "dev mprox0") })
}

func (l *lab) awaitState(ok func(string) bool) {
	l.t.Helper()
	l.await("state", func() bool { return ok(l.state()) })
}

// await polls a condition of the kernel that brings no event here, for three seconds at most.
func (l *lab) await(what string, ok func() bool) {
	l.t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(3 * time.Second); !ok(); <-tick.C {
		if time.Now().After(deadline) {
			l.t.Fatalf("timed out: %s\n%s", what, l.state())
		}
	}
}

// sh runs shell commands in the thread's namespace.
func (l *lab) sh(script string) string {
	l.t.Helper()
	l.inside()
	out, err := exec.Command("/bin/sh", "-ec", script).CombinedOutput()
	if err != nil {
		l.t.Fatalf("%s: %v\n%s", script, err, out)
	}
	return string(out)
}

// inside makes sure that the thread is in a namespace of the lab: a subtest runs on a thread of its own, which is not.
func (l *lab) inside() {
	l.t.Helper()
	var here, client, far unix.Stat_t
	err := errors.Join(unix.Stat("/proc/thread-self/ns/net", &here), unix.Fstat(int(l.client.Fd()), &client), unix.Fstat(int(l.far.Fd()), &far))
	if err != nil || here.Ino != client.Ino && here.Ino != far.Ino {
		l.t.Fatalf("not in the lab's namespaces (%v): make the lab in the subtest", err)
	}
}

// state is everything that cleanup must leave as it was.
func (l *lab) state() string {
	l.t.Helper()
	// ip sometimes says on stderr that it cannot name the peer's namespace.
	return l.sh(`exec 2>/dev/null; ip rule; ip -6 rule; ip route show table all; ip -6 route show table all | sed '/^multicast/d';
		nft list tables | sort | while read -r t; do nft list $t || true; done; ip -o link
		for f in tcp_fwmark_accept conf/*/src_valid_mark conf/*/rp_filter; do echo $f $(cat /proc/sys/net/ipv4/$f); done`)
}

func (l *lab) inFar(f func()) {
	l.t.Helper()
	if err := unix.Setns(int(l.far.Fd()), unix.CLONE_NEWNET); err != nil {
		l.t.Fatal(err)
	}
	defer func() {
		if err := unix.Setns(int(l.client.Fd()), unix.CLONE_NEWNET); err != nil {
			l.t.Error(err)
		}
	}()
	f()
}

// capture records what arrives at a device, until the test ends.
func (l *lab) capture(dev string) {
	l.t.Helper()
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(htons(unix.ETH_P_ALL)))
	if err != nil {
		l.t.Fatal(err)
	}
	ifi, err := net.InterfaceByName(dev)
	if err != nil {
		l.t.Fatal(err)
	}
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL), Ifindex: ifi.Index}); err != nil {
		l.t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "packet")
	var wg sync.WaitGroup
	raw, err := f.SyscallConn()
	if err != nil {
		l.t.Fatal(err)
	}
	wg.Go(func() {
		b := make([]byte, 65536)
		for {
			var n int
			var from unix.Sockaddr
			rerr := raw.Read(func(fd uintptr) bool {
				n, from, err = unix.Recvfrom(int(fd), b, 0)
				return !errors.Is(err, unix.EAGAIN)
			})
			if rerr != nil || err != nil {
				return
			}
			if ll, ok := from.(*unix.SockaddrLinklayer); ok && ll.Pkttype != unix.PACKET_OUTGOING {
				l.farSeen.add(describe(b[:n]))
			}
		}
	})
	l.t.Cleanup(func() { f.Close(); wg.Wait() })
}

func htons(v uint16) uint16 { return binary.NativeEndian.Uint16(be16(v)) }

// describe names a packet.
func describe(b []byte) string {
	if len(b) < 20 {
		return "other"
	}
	var proto uint8
	var src, dst netip.Addr
	switch b[0] >> 4 {
	case 4:
		proto, src, dst = b[9], netip.AddrFrom4([4]byte(b[12:])), netip.AddrFrom4([4]byte(b[16:]))
		b = b[(b[0]&15)*4:]
	case 6:
		if len(b) < 40 {
			return "other"
		}
		proto, src, dst = b[6], netip.AddrFrom16([16]byte(b[8:])), netip.AddrFrom16([16]byte(b[24:]))
		b = b[40:]
	default:
		return "other"
	}
	name := nfProto(proto)
	if (proto == protoTCP || proto == protoUDP) && len(b) >= 4 {
		return fmt.Sprintf("%s %s:%d > %s:%d", name, src, binary.BigEndian.Uint16(b), dst, binary.BigEndian.Uint16(b[2:]))
	}
	if len(b) > 0 {
		name = fmt.Sprintf("%s/%d", name, b[0])
	}
	return fmt.Sprintf("%s %s > %s", name, src, dst)
}

// openTUN is the daemon's device, and a goroutine that records what comes out of it.
func (l *lab) openTUN(name string) {
	l.t.Helper()
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		l.t.Fatal(err)
	}
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		l.t.Fatal(err)
	}
	ifr.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		l.t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "tun")
	l.tun = f
	to := l.tunSeen
	var wg sync.WaitGroup
	wg.Go(func() {
		b := make([]byte, 65536)
		for {
			n, err := f.Read(b)
			if err != nil {
				if errors.Is(err, os.ErrClosed) || errors.Is(err, syscall.EBADFD) {
					return
				}
				continue // EIO while the device is down
			}
			to.add(describe(b[:n]))
		}
	})
	l.t.Cleanup(func() { f.Close(); wg.Wait() })
}
