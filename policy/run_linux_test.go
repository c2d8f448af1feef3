// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"context"
	"encoding/binary"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// run is what `mprox run` without a daemon does, up to starting the command.
func (l *lab) run(name, tun string) (spec Spec, cg *Cgroup) {
	l.t.Helper()
	spec = Spec{Instance: InstanceFor(filepath.Join(l.dir, name+".sock"))}
	if err := l.m.Prepare(l.t.Context(), spec); err != nil {
		l.t.Fatal(err)
	}
	slot, err := l.m.AcquireSlot(l.t.Context())
	if err != nil {
		l.t.Fatal(err)
	}
	if cg, err = l.m.NewCgroup(l.t.Context(), name, slot); err != nil {
		l.t.Fatal(err)
	}
	l.openTUN(tun)
	spec.Contexts = []ContextSpec{{Name: name, Mode: ModeCgroup, Slot: slot, TUN: tun, Cgroups: []CgroupRef{cg.Ref()}, Fake: l.spec(ModeGlobal).Contexts[0].Fake}}
	if err := l.m.Apply(l.t.Context(), spec); err != nil {
		l.t.Fatal(err)
	}
	return spec, cg
}

// helperWays are captured() and escapes(), done by a helper.
func helperWays(h *helper) (captured, escapes, direct []way) {
	bypass, inbound := BypassMark(DefaultMask), InboundMark(DefaultMask)
	captured = []way{
		h.way("udp4", "> 198.51.100.1:5001", "udp %s 5001", remote4), h.way("udp6", "> 2001:db8:ff::1:5002", "udp %s 5002", remote6),
		h.way("tcp4", "> 198.51.100.1:5003", "tcp %s 5003", remote4), h.way("tcp6", "> 2001:db8:ff::1:5004", "tcp %s 5004", remote6),
		h.way("icmp4", "icmp/8 10.9.0.2 > 198.51.100.1", "ping %s", remote4), h.way("icmp6", "> 2001:db8:ff::1", "ping %s", remote6),
		h.way("mark 0x123", "> 198.51.100.1:5007", "udp %s 5007 %d", remote4, 0x123),
		h.way("bypass", "> 198.51.100.1:5008", "tcp %s 5008 %d", remote4, bypass),
		h.way("inbound 6", "> 2001:db8:ff::1:5009", "udp %s 5009 %d", remote6, inbound),
		h.way("fake", "> 198.18.0.9:5010", "tcp 198.18.0.9 5010"),
	}
	escapes = []way{
		h.way("bound udp4", "> 198.51.100.1:5101", "udp %s 5101 0 c0", remote4), h.way("bound udp6", "> 2001:db8:ff::1:5102", "udp %s 5102 0 c0", remote6),
		h.way("bound tcp6", "> 2001:db8:ff::1:5103", "tcp %s 5103 0 c0", remote6), h.way("bound icmp6", "> 2001:db8:ff::1", "ping %s 0 0 c0", remote6),
		h.way("bound, bypass", "> 2001:db8:ff::1:5104", "udp %s 5104 %d c0", remote6, bypass),
		h.way("bound, bypass 4", "> 198.51.100.1:5105", "udp %s 5105 %d c0", remote4, bypass),
		h.way("bound dns", "> 10.9.0.53:53", "udp 10.9.0.53 53 0 c0"), h.way("dns, marked", "> 10.9.0.53:53", "udp 10.9.0.53 53 %d", bypass),
	}
	direct = []way{h.way("LAN", "> 10.9.0.1:5200", "udp %s 5200", lan4), h.way("LAN 6", "> fd09::1:5201", "tcp %s 5201", lan6)}
	return captured, escapes, direct
}

func TestRun(t *testing.T) {
	for _, method := range []string{"bpf+nft", "nft"} {
		t.Run(method, func(t *testing.T) {
			l := newLab(t)
			before := l.start()
			if method == "nft" {
				l.m.host = withoutBPF{l.host}
			}
			spec, cg := l.run("run-77", "mprox-r0")
			if cg.Method() != method {
				t.Fatalf("method %s", cg.Method())
			}
			h := l.spawn(cg.FD())
			other := l.spawn(l.outside())
			captured, escapes, direct := helperWays(h)
			if method == "bpf+nft" {
				captured = append(captured, h.way("dns to the LAN", "> 10.9.0.53:53", "udp 10.9.0.53 53"))
			}
			l.mustCapture(captured)
			l.noLeaks(escapes)
			l.mustPass(direct)
			// Everybody else is not concerned.
			free, _, _ := helperWays(other)
			l.mustPass(free[:7])
			l.mustPass(captured2())
			l.resetStays()

			// The engine is killed: the survivor is blocked.
			ino := l.host.Netns().Inode
			l.die()
			l.noLeaks(captured)
			l.noLeaks(escapes)
			l.mustPass(direct)
			l.mustPass(free[:7])
			host, err := NewLinuxHost()
			if err != nil {
				t.Fatal(err)
			}
			defer host.Close()
			if host.Netns().Inode != ino {
				t.Fatal("another namespace")
			}

			// The next engine takes another slot, and cleanup frees the survivor.
			l.host = host
			m2 := NewManager(Config{Host: host, LockDir: l.dir})
			if err := m2.Prepare(t.Context(), Spec{Instance: InstanceFor(filepath.Join(l.dir, "run-78.sock"))}); err != nil {
				t.Fatal(err)
			}
			if slot, err := m2.AcquireSlot(t.Context()); err != nil || slot == spec.Contexts[0].Slot {
				t.Errorf("slot %d, %v", slot, err)
			}
			if err := m2.Close(t.Context(), StopConfigured); err != nil {
				t.Fatal(err)
			}
			r, err := Cleanup(context.Background(), Config{Host: host, LockDir: l.dir}, spec.Instance)
			if err != nil || r.Skipped != "" {
				t.Fatalf("%+v, %v", r, err)
			}
			if err := cg.Remove(); err != nil { // closes the descriptor
				t.Error(err)
			}
			l.awaitState(func(s string) bool { return s == before })
		})
	}
}

// resetStays: what the kernel answers without any socket goes back into the TUN it came out of.
func (l *lab) resetStays() {
	l.t.Helper()
	syn := []byte{
		0x45, 0, 0, 40, 0, 1, 0, 0, 64, 6, 0, 0, 198, 51, 100, 1, 10, 9, 0, 2,
		0x1f, 0x90, 0x30, 0x39, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0, // ACK from port 8080 to 12345
	}
	binary.BigEndian.PutUint16(syn[10:], checksum(syn[:20]))
	pseudo := append(append([]byte(nil), syn[12:20]...), 0, 6, 0, 20)
	binary.BigEndian.PutUint16(syn[36:], checksum(append(pseudo, syn[20:]...)))
	l.farSeen.reset()
	if _, err := l.tun.Write(syn); err != nil {
		l.t.Fatal(err)
	}
	l.tunSeen.await(l.t, "tcp 10.9.0.2:12345 > 198.51.100.1:8080")
	if l.farSeen.has(":8080") {
		l.t.Error("the reset leaked")
	}
}

func checksum(b []byte) uint16 {
	sum := uint32(0)
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// captured2 are ways of this process, which is in no captured cgroup.
func captured2() []way {
	return []way{{"udp4", "> 198.51.100.1:5301", udp(remote4, 5301)}, {"tcp6", "> 2001:db8:ff::1:5302", tcp(remote6, 5302)}}
}

// withoutBPF is a kernel without cgroup programs.
type withoutBPF struct{ Host }

func (h withoutBPF) Features() (Features, error) {
	f, err := h.Host.Features()
	f.BPFSockMark = false
	return f, err
}

// TestTwoRuns: two engines at the same time do not mix, and each undoes only what is its own.
func TestTwoRuns(t *testing.T) {
	l := newLab(t)
	before := l.start()
	_, a := l.run("run-1", "mprox-r1")
	tunA, seenA, ma := l.tun, l.tunSeen, l.m
	t.Cleanup(func() { _ = ma.Close(context.Background(), StopOpen) })
	l.tunSeen = newSeen()
	l.m = NewManager(Config{Host: l.host, LockDir: l.dir})
	_, b := l.run("run-2", "mprox-r2")
	ha, hb := l.spawn(a.FD()), l.spawn(b.FD())
	if s := ha.do("udp %s 7001", remote4); s != "ok" {
		t.Fatal(s)
	}
	if s := hb.do("udp %s 7002", remote4); s != "ok" {
		t.Fatal(s)
	}
	seenA.await(t, ":7001")
	l.tunSeen.await(t, ":7002")
	if seenA.has(":7002") || l.tunSeen.has(":7001") || l.farSeen.has(":700") {
		t.Error("mixed")
	}
	ha.stop()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	if err := a.Wait(ctx); err != nil {
		t.Fatal(err)
	}
	if err := ma.Close(t.Context(), StopConfigured); err != nil {
		t.Fatal(err)
	}
	if err := a.Remove(); err != nil {
		t.Fatal(err)
	}
	tunA.Close()
	l.mustCapture([]way{hb.way("still captured", ":7003", "tcp %s 7003", remote4)})
	// The command of the second has ended, but a child of it lives: it stays blocked.
	if err := l.m.Close(t.Context(), StopConfigured); err != nil {
		t.Fatal(err)
	}
	l.tun.Close()
	l.noLeaks([]way{hb.way("survivor", ":7004", "udp %s 7004", remote4), hb.way("survivor, bound", ":7005", "udp %s 7005 0 c0", remote6)})
	hb.stop()
	l.m = nil
	if _, err := Cleanup(t.Context(), Config{Host: l.host, LockDir: l.dir}, InstanceFor(filepath.Join(l.dir, "run-2.sock"))); err != nil {
		t.Fatal(err)
	}
	if err := b.Remove(); err != nil {
		t.Fatal(err)
	}
	l.awaitState(func(s string) bool { return s == before })
}

// TestLease: a context that ends while its process lives blocks it until it has gone.
func TestLease(t *testing.T) {
	l := newLab(t)
	_, spec := l.up()
	slot, err := l.m.AcquireSlot(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	cg, err := l.m.NewCgroup(t.Context(), "lease", slot)
	if err != nil {
		t.Fatal(err)
	}
	global, globalTUN := l.tunSeen, l.tun
	l.tunSeen = newSeen()
	l.openTUN("mprox-l")
	spec.Contexts = append(spec.Contexts, ContextSpec{Name: "lease", Mode: ModeCgroup, Slot: slot, TUN: "mprox-l", Cgroups: []CgroupRef{cg.Ref()}})
	if err := l.m.Apply(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	h := l.spawn(cg.FD())
	captured, escapes, _ := helperWays(h)
	l.mustCapture(captured)
	if global.has(":500") {
		t.Error("the global context has seen it")
	}
	spec.Contexts[1].TUN = ""
	l.tun.Close()
	if err := l.m.Apply(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	global.reset()
	l.noLeaks(captured)
	l.noLeaks(escapes)
	if global.has(":500") {
		t.Error("the global context took over")
	}
	h.stop()
	if err := cg.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	spec.Contexts = spec.Contexts[:1]
	if err := l.m.Apply(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	if err := cg.Remove(); err != nil {
		t.Fatal(err)
	}
	l.m.ReleaseSlot(slot)
	l.tunSeen, l.tun = global, globalTUN
	l.mustCapture([]way{{"still global", ":7100", udp(remote4, 7100)}})
}

// TestGhost: the survivor of a crashed daemon's lease stays blocked under the next daemon.
func TestGhost(t *testing.T) {
	l := newLab(t)
	_, spec := l.up()
	slot, err := l.m.AcquireSlot(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	cg, err := l.m.NewCgroup(t.Context(), "lease", slot)
	if err != nil {
		t.Fatal(err)
	}
	spec.Contexts = append(spec.Contexts, ContextSpec{Name: "lease", Mode: ModeCgroup, Slot: slot, Cgroups: []CgroupRef{cg.Ref()}})
	if err := l.m.Apply(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	h := l.spawn(cg.FD())
	captured, escapes, _ := helperWays(h)
	l.die()
	l.noLeaks(captured)
	l.up()
	l.tunSeen.reset()
	l.noLeaks(captured)
	l.noLeaks(escapes)
	if l.tunSeen.has(":500") {
		t.Error("the global context took over")
	}
	h.stop()
	l.sh("ip link set c0 mtu 1400") // any event
	l.awaitState(func(s string) bool { return !strings.Contains(s, "guard_159") })
	if err := cg.Remove(); err != nil {
		t.Fatal(err)
	}
}

// TestExclude: the process behind an upstream on loopback is left alone, its old connection included, and put back at the end.
func TestExclude(t *testing.T) {
	l := newLab(t)
	l.start()
	h := l.spawn(l.outside())
	from, err := l.host.Cgroup(h.cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	l.inFar(func() { l.listenFar("198.51.100.1:7200") })
	if s := h.do("listen 1080"); s != "ok" {
		t.Fatal(s)
	}
	if s := h.do("keep 198.51.100.1 7200"); s != "ok" {
		t.Fatal(s)
	}
	l.up()
	if err := l.m.ExcludeListeners(t.Context(), []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:1080")}); err != nil {
		t.Fatal(err)
	}
	ways := []way{
		h.way("new udp4", ":7201", "udp %s 7201", remote4), h.way("new tcp6", ":7202", "tcp %s 7202", remote6), h.way("dns", "> 10.9.0.53:53", "udp 10.9.0.53 53"),
		h.way("old connection", "> 198.51.100.1:7200", "write"),
	}
	l.mustPass(ways)
	l.mustCapture(captured())
	err = l.m.ExcludeListeners(t.Context(), []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:1081")})
	if err == nil || !strings.Contains(err.Error(), "127.0.0.1:1081") {
		t.Errorf("nobody listens there: %v", err)
	}
	l.die()
	l.cleanup()
	if at, err := l.host.Cgroup(h.cmd.Process.Pid); err != nil || at != from {
		t.Errorf("in cgroup %s, was in %s", at, from)
	}
}
