// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// hammer sends captured packets from another process until the returned function is called.
func (l *lab) hammer() (stop func()) {
	l.t.Helper()
	h := l.spawn(l.outside())
	done, end := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-end:
				return
			default:
				h.do("udp %s 6000", remote4)
				h.do("tcp %s 6001", remote6)
				h.do("udp %s 6002 0 c0", remote6)
				h.do("udp 10.9.0.53 53")
			}
		}
	}()
	return func() { close(end); <-done }
}

func (l *lab) noHammer(when string) {
	l.t.Helper()
	for _, p := range l.farSeen.list() {
		if strings.Contains(p, ":600") || strings.Contains(p, "10.9.0.53:53") {
			l.t.Errorf("%s: leaked %s", when, p)
		}
	}
	l.farSeen.reset()
}

// TestNoOpenMoment: from the end of Prepare on nothing captured leaves, whatever is changed, by us or by others.
func TestNoOpenMoment(t *testing.T) {
	l := newLab(t)
	l.start()
	stop := l.hammer()
	defer stop()
	spec := l.spec(ModeGlobal)
	if err := l.m.Prepare(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	l.marker()
	l.farSeen.reset()
	l.openTUN("mprox0")
	spec.Contexts[0].TUN = "mprox0"
	for i := range 20 {
		spec.Contexts[0].Direct = []netip.Prefix{netip.MustParsePrefix(fmt.Sprintf("203.0.113.%d/32", i))}
		if i%3 == 0 {
			spec.Contexts[0].DNSPort4 = uint16(5000 + i)
		}
		if err := l.m.Apply(t.Context(), spec); err != nil {
			t.Fatal(err)
		}
		l.noHammer(fmt.Sprintf("apply %d", i))
	}
	l.tunSeen.await(t, ":6000")
	for _, change := range []string{
		"ip route add 0.0.0.0/1 via 10.9.0.1; ip route add 128.0.0.0/1 via 10.9.0.1; ip -6 route add 2000::/3 via 2001:db8:9::1",
		"ip addr add 192.168.9.1/24 dev c0", "ip addr del 10.9.0.2/24 dev c0", "ip addr add 10.9.0.2/24 dev c0; ip route add default via 10.9.0.1 metric 7",
		"ip link set c0 down", "ip link set c0 up; ip route add default via 10.9.0.1", "ip link set mprox0 down", "ip rule del priority 8813", "ip route flush table 19760",
		"nft delete chain inet mprox-x 2>/dev/null || true",
	} {
		l.sh(change)
		l.await("settled", func() bool { return !strings.Contains(l.state(), "state DOWN") || change == "ip link set c0 down" })
		l.noHammer(change)
	}
	if err := l.m.Close(t.Context(), StopBlock); err != nil {
		t.Fatal(err)
	}
	l.tun.Close()
	l.m = nil
	l.awaitState(func(s string) bool { return !strings.Contains(s, "mprox0") })
	l.noHammer("stopped, blocked")
}

// TestManyContexts: all marks there are, in one plan, in bounded time.
func TestManyContexts(t *testing.T) {
	l := newLab(t)
	before := l.start()
	spec := l.spec(ModeGlobal)
	for slot := 1; slot < MaxContexts; slot++ {
		spec.Contexts = append(spec.Contexts, ContextSpec{
			Name: fmt.Sprint(slot), Mode: ModeCgroup, Slot: slot, Cgroups: []CgroupRef{{Path: fmt.Sprintf("/no-such-%d", slot), ID: uint64(1e9 + slot), Level: 1}},
		})
	}
	start := time.Now()
	if err := l.m.Prepare(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	t.Logf("160 contexts prepared in %s", time.Since(start))
	start = time.Now()
	if err := l.m.Apply(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	t.Logf("applied again, nothing to do, in %s", time.Since(start))
	l.noLeaks(captured())
	if _, err := l.m.AcquireSlot(t.Context()); !errors.Is(err, ErrConflict) {
		t.Errorf("a 161st: %v", err)
	}
	start = time.Now()
	if err := l.m.Close(t.Context(), StopOpen); err != nil {
		t.Fatal(err)
	}
	t.Logf("undone in %s", time.Since(start))
	l.awaitState(func(s string) bool { return s == before })
}

// TestPrivilege: without CAP_NET_ADMIN there is one line that says so.
func TestPrivilege(t *testing.T) {
	requireRoot(t)
	got := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread without the capability ends with the goroutine
		var hdr unix.CapUserHeader
		var data [2]unix.CapUserData
		hdr.Version = unix.LINUX_CAPABILITY_VERSION_3
		err := unix.Capget(&hdr, &data[0])
		data[0].Effective &^= 1 << unix.CAP_NET_ADMIN
		if err = errors.Join(err, unix.Capset(&hdr, &data[0])); err == nil {
			_, err = NewLinuxHost()
		}
		got <- err
	}()
	err := <-got
	if !errors.Is(err, ErrPrivilege) || !strings.Contains(err.Error(), "CAP_NET_ADMIN") || strings.Contains(err.Error(), "\n") {
		t.Errorf("got %v", err)
	}
}

// TestHostStaysInItsNamespace: whatever thread calls, the namespace the Host was made in is meant.
func TestHostStaysInItsNamespace(t *testing.T) {
	l := newLab(t)
	l.start()
	done := make(chan error)
	go func() { // on a thread of the machine's own namespace, where nothing may be changed
		defer close(done)
		s, err := l.host.Snapshot(t.Context(), DefaultTableBase)
		if err != nil {
			done <- err
			return
		}
		if len(s.Links) != 2 || s.Links[1].Name != "c0" {
			done <- fmt.Errorf("links %+v", s.Links)
		}
		if err := l.host.SetSysctl("net/ipv4/conf/c0/src_valid_mark", "1"); err != nil {
			done <- err
		}
		if err := l.host.ApplyNFT([]NFTable{{Name: "mprox-elsewhere"}}, nil); err != nil {
			done <- err
		}
	}()
	for err := range done {
		t.Error(err)
	}
	if s := l.state(); !strings.Contains(s, "table inet mprox-elsewhere") || !strings.Contains(l.sh("cat /proc/sys/net/ipv4/conf/c0/src_valid_mark"), "1") {
		t.Errorf("not here:\n%s", s)
	}
	if got, err := filepath.Glob("/proc/sys/net/ipv4/conf/c0"); err != nil || len(got) != 1 {
		t.Errorf("%v %v", got, err)
	}
}

// withoutCgroups is a container: no writable cgroup v2.
type withoutCgroups struct{ Host }

func (h withoutCgroups) Features() (Features, error) {
	f, err := h.Host.Features()
	return Features{NFTOwner: f.NFTOwner}, err
}

// TestByUID: without cgroups the daemon is told by its uid.
func TestByUID(t *testing.T) {
	l := newLab(t)
	l.start()
	l.m.host = withoutCgroups{l.host}
	spec := l.spec(ModeGlobal)
	l.enforce(&spec)
	bypass := mark(BypassMark(DefaultMask))
	l.mustPass([]way{{"udp4", "> 198.51.100.1:8001", udp(remote4, 8001, bypass)}, {"tcp6", "> 2001:db8:ff::1:8002", tcp(remote6, 8002, bypass)}})
	l.mustCapture(captured())
	l.noLeaks(escapes())
	if _, err := l.m.NewCgroup(t.Context(), "x", 9); !errors.Is(err, ErrFeature) {
		t.Errorf("NewCgroup: %v", err)
	}
}

// TestNoIPv6: switched off by sysctl, as Docker does; then nothing of it leaves, and IPv4 works.
func TestNoIPv6(t *testing.T) {
	l := newLab(t)
	l.sh("for d in all default c0 lo; do echo 1 > /proc/sys/net/ipv6/conf/$d/disable_ipv6; done")
	before, _ := l.up()
	var v4 []way
	for _, w := range captured() {
		if !strings.Contains(w.want, "::") {
			v4 = append(v4, w)
		}
	}
	l.mustCapture(v4)
	l.noLeaks(captured())
	l.noLeaks(escapes())
	l.die()
	l.noLeaks(captured())
	l.cleanup()
	l.awaitState(func(s string) bool { return s == before })
}

// TestOffline: started without any uplink, captured from the first packet when one comes.
func TestOffline(t *testing.T) {
	l := newLab(t)
	l.sh("ip link set c0 down")
	l.up()
	stop := l.hammer()
	defer stop()
	l.sh(`ip link set c0 up; ip addr replace 10.9.0.2/24 dev c0; ip addr replace 2001:db8:9::2/64 dev c0 nodad; ip addr replace fd09::2/64 dev c0 nodad
		ip route replace default via 10.9.0.1; ip -6 route replace default via 2001:db8:9::1`)
	l.awaitState(func(s string) bool {
		return strings.Contains(s, "default dev mprox0 table 19760 proto 77 scope link src 10.9.0.2") &&
			strings.Contains(s, "default dev mprox0 table 19760 proto 77 src 2001:db8:9::2")
	})
	l.noHammer("uplink came")
	l.mustCapture(captured())
}
