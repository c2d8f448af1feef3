// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestStop: every way to stop leaves what it says, and nothing else.
func TestStop(t *testing.T) {
	l := newLab(t)
	l.sh(`nft add table inet other; nft 'add chain inet other c { type filter hook output priority 0; }'; ip rule add priority 5000 fwmark 0xca6c lookup 51820
		ip route add 203.0.113.0/24 via 10.9.0.1 table 51820`)
	before, _ := l.up()
	if err := l.m.Close(t.Context(), StopBlock); err != nil {
		t.Fatal(err)
	}
	l.host.Close()
	l.tun.Close()
	l.noLeaks(captured())
	l.noLeaks(escapes())
	l.m = nil
	l.cleanup()
	l.awaitState(func(s string) bool { return s == before })
	before, _ = l.up()
	if err := l.m.Close(t.Context(), StopConfigured); err != nil {
		t.Fatal(err)
	}
	l.tun.Close()
	l.awaitState(func(s string) bool { return s == before })
	entries, err := os.ReadDir(l.dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(entries) > 0 {
		t.Errorf("left in the directory: %v", entries)
	}
}

// TestAdopt: the next daemon takes over what a killed one has left, without an open moment, and undoes all of it.
func TestAdopt(t *testing.T) {
	l := newLab(t)
	before, _ := l.up()
	l.die()
	stop := make(chan struct{})
	sending := make(chan struct{})
	h := l.spawn(l.outside())
	go func() { // the whole time, one datagram after the other
		defer close(sending)
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
				h.do("udp %s 6000", remote4)
				h.do("udp %s 6001 0 c0", remote6)
			}
		}
	}()
	l.farSeen.reset()
	l.start()
	spec := l.spec(ModeGlobal)
	l.enforce(&spec)
	l.tunSeen.await(t, "> 198.51.100.1:6000")
	close(stop)
	<-sending
	l.marker()
	if l.farSeen.has(":6000") || l.farSeen.has(":6001") {
		t.Errorf("leaked: %v", l.farSeen.list())
	}
	l.mustCapture(captured())
	if err := l.m.Close(t.Context(), StopOpen); err != nil {
		t.Fatal(err)
	}
	l.tun.Close()
	l.awaitState(func(s string) bool { return s == before })
}

// TestRepair: what others delete is back within a second.
func TestRepair(t *testing.T) {
	l := newLab(t)
	l.up()
	whole := l.state()
	for object, remove := range map[string]string{
		"rule":  "ip rule del priority 8813; ip -6 rule del priority 8810",
		"route": `ip route del unreachable default table 19760 metric 9999; ip route flush table 19920; ip -6 route flush table 19760`,
		"nft":   "nft flush ruleset",
		"link":  "ip link set mprox0 down",
	} {
		was := l.m.Stats().Restored[object]
		l.sh(remove)
		start := time.Now()
		l.awaitState(func(s string) bool { return s == whole })
		if d := time.Since(start); d > time.Second {
			t.Errorf("%s: took %s", object, d)
		}
		if got := l.m.Stats().Restored[object]; got == was {
			t.Errorf("%s: not counted", object)
		}
	}
	l.mustCapture(captured())
	l.noLeaks(escapes())
}

// TestFollow: routes and addresses of the links are followed.
func TestFollow(t *testing.T) {
	l := newLab(t)
	l.up()
	l.sh("ip addr add 192.168.7.2/24 dev c0")
	l.awaitState(func(s string) bool {
		return strings.Contains(s, "192.168.7.0/24 dev c0 table 19920") && strings.Contains(s, "10.9.0.0/24, 192.168.7.0/24")
	})
	l.sh("ip addr del 10.9.0.2/24 dev c0; ip route replace default via 192.168.7.1")
	l.awaitState(func(s string) bool {
		return strings.Contains(s, "default dev mprox0 table 19760 proto 77 scope link src 192.168.7.2")
	})
}

// TestConflict: whoever was there first stays, and is named.
func TestConflict(t *testing.T) {
	for _, tt := range []struct{ name, add, want string }{
		{"priority", "ip rule add priority 8100 lookup 77", "8100"},
		{"mark", "ip rule add priority 100 fwmark 0x51000000/0xff000000 lookup 77", "0x51000000"},
		{"table", "ip route add 203.0.113.0/24 via 10.9.0.1 table 19800", "203.0.113.0/24"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l := newLab(t)
			l.sh(tt.add)
			before := l.start()
			err := l.m.Prepare(t.Context(), l.spec(ModeGlobal))
			if !errors.Is(err, ErrConflict) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want a conflict with %s", err, tt.want)
			}
			if after := l.state(); after != before {
				t.Errorf("changed something:\n%s", after)
			}
		})
	}
}

// TestSecond: one daemon a namespace, whatever its socket is called.
func TestSecond(t *testing.T) {
	l := newLab(t)
	l.up()
	spec := l.spec(ModeGlobal)
	spec.Instance = InstanceFor(filepath.Join(l.dir, "other", "b.sock"))
	m := NewManager(Config{Host: l.host, LockDir: l.dir})
	if err := m.Prepare(t.Context(), spec); !errors.Is(err, ErrConflict) || !strings.Contains(err.Error(), "mprox.sock") {
		t.Errorf("got %v, want a conflict that names the first", err)
	}
	r, err := Cleanup(t.Context(), Config{Host: l.host, LockDir: l.dir}, l.spec(ModeGlobal).Instance)
	if err != nil || r.Skipped == "" {
		t.Errorf("cleanup beside a living daemon: %+v, %v", r, err)
	}
	l.mustCapture(captured())
}

// TestDamagedJournal: cleanup says so, and removes what carries our marks.
func TestDamagedJournal(t *testing.T) {
	l := newLab(t)
	l.up()
	l.die()
	file := l.spec(ModeGlobal).Instance.Journal
	good, err := readJournal(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(`{"version": 1, "socket": `), 0o600); err != nil {
		t.Fatal(err)
	}
	host, err := NewLinuxHost()
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	_, err = Cleanup(t.Context(), Config{Host: host, LockDir: l.dir}, l.spec(ModeGlobal).Instance)
	if !errors.Is(err, ErrJournal) {
		t.Errorf("got %v, want ErrJournal", err)
	}
	if s := l.state(); strings.Contains(s, "proto 77") || strings.Contains(s, "inet mprox") {
		t.Errorf("left:\n%s", s)
	}
	// This process is still in the daemon's cgroup; the good journal knows.
	if err := good.write(file); err != nil {
		t.Fatal(err)
	}
}
