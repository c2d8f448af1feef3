// SPDX-License-Identifier: GPL-3.0-or-later

package process

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestFindOwnListener finds this process by a socket of its own, which needs no privilege.
func TestFindOwnListener(t *testing.T) {
	for _, addr := range []string{"127.0.0.1:0", "[::1]:0"} {
		ln, err := net.Listen("tcp", addr)
		if err != nil {
			t.Skip(err)
		}
		defer ln.Close()
		c, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		d, err := OpenDiag(0)
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		socks, err := d.Dump(unix.IPPROTO_TCP, AllStates)
		if err != nil {
			t.Fatal(err)
		}
		want, inodes := netip.MustParseAddrPort(ln.Addr().String()), map[uint32]bool{}
		connected := false
		for _, s := range socks {
			if s.State == StateListen && s.Local == want {
				inodes[s.Inode] = true
			}
			connected = connected || s.Remote == want && s.State == StateEstablished && s.Local.String() == c.LocalAddr().String()
		}
		if len(inodes) != 1 || !connected {
			t.Fatalf("%s: listeners %v, connected %v in %v", addr, inodes, connected, socks)
		}
		holders, err := Holders(t.Context(), inodes)
		if err != nil {
			t.Fatal(err)
		}
		if len(holders[os.Getpid()]) != 1 {
			t.Errorf("holders %v, want this process", holders)
		}
	}
}

func TestTreeAndStat(t *testing.T) {
	pids, err := Tree(os.Getppid())
	if err != nil {
		t.Fatal(err)
	}
	found := false
	for _, p := range pids {
		found = found || p == os.Getpid()
	}
	if parent, start, err := Stat(os.Getpid()); !found || err != nil || parent != os.Getppid() || start == 0 {
		t.Errorf("found %v, parent %d, start %d, %v", found, parent, start, err)
	}
	if Name(os.Getpid()) == "" || Name(1<<30) != "" {
		t.Error("names")
	}
}

func TestParse(t *testing.T) {
	for s, want := range map[string][2]uint64{
		"5 (a) S 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 777 22":            {3, 777},
		"5 (a ) (b) 9) S 4 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 778 22 23": {4, 778},
	} {
		parent, start, err := parseStat(s)
		if err != nil || uint64(parent) != want[0] || start != want[1] {
			t.Errorf("%q: %d %d %v", s, parent, start, err)
		}
	}
	for s, want := range map[string]string{
		"12:pids:/x\n0::/user.slice/a b\n": "/user.slice/a b", "0::/\n": "/", "1:name=systemd:/x\n": "", "0::/gone (deleted)\n": "/gone",
	} {
		if got, _ := parseCgroup(s); got != want {
			t.Errorf("%q: got %q", s, got)
		}
	}
	hybrid := "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n" +
		"32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n41 31 0:31 /a\\040b /sys/fs/cgroup/uni\\040fied rw shared:3 - cgroup2 cgroup2 rw\n"
	if mount, root, ok := parseMountinfo(hybrid); !ok || mount != "/sys/fs/cgroup/uni fied" || root != "/a b" {
		t.Errorf("%q %q %v", mount, root, ok)
	}
	if _, _, ok := parseMountinfo("32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"); ok {
		t.Error("cgroup v1 taken for v2")
	}
}

func FuzzProc(f *testing.F) {
	for _, s := range []string{
		"5 (a ) (b) 9) S 4 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 778 22", "0::/user.slice\n", "socket:[123]",
		"41 31 0:31 / /sys/fs/cgroup/uni\\040fied rw - cgroup2 cgroup2 rw\n", "\\", "socket:[", ")",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		_, _, _ = parseStat(s)
		_, _, _ = parseState(s)
		_, _ = parseSocketLink(s)
		if p, ok := parseCgroup(s); ok && !strings.HasPrefix(p, "/") {
			t.Fatalf("cgroup %q", p)
		}
		_, _, _ = parseMountinfo(s)
	})
}

func FuzzDiag(f *testing.F) {
	good := make([]byte, sizeofMessage+8)
	good[0], good[1] = unix.AF_INET, StateListen
	binary.NativeEndian.PutUint16(good[sizeofMessage:], 8)
	binary.NativeEndian.PutUint16(good[sizeofMessage+2:], attrMark)
	binary.NativeEndian.PutUint32(good[sizeofMessage+4:], 0x4d000000)
	f.Add(good)
	f.Add(good[:sizeofMessage])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		if s, ok := parse(b, unix.IPPROTO_TCP); ok && (!s.Local.Addr().IsValid() || s.Local.Addr().Is4In6()) {
			t.Fatalf("%+v", s)
		}
	})
}

func FuzzFound(f *testing.F) {
	good := make([]byte, nlmsgHeader+sizeofMessage+12)
	binary.NativeEndian.PutUint32(good, uint32(len(good)))
	binary.NativeEndian.PutUint16(good[4:], sockDiagByFamily)
	binary.NativeEndian.PutUint16(good[nlmsgHeader+sizeofMessage:], 12)
	binary.NativeEndian.PutUint16(good[nlmsgHeader+sizeofMessage+2:], attrCgroupID)
	binary.NativeEndian.PutUint64(good[nlmsgHeader+sizeofMessage+4:], 77)
	f.Add(good)
	f.Add(good[:nlmsgHeader+4])
	f.Add([]byte{})
	if got, err := parseFound(good); err != nil || got.Cgroup != 77 {
		f.Fatalf("%+v, %v", got, err)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if got, err := parseFound(b); err != nil && got != (Found{}) {
			t.Fatalf("%+v with %v", got, err)
		}
	})
}

func TestLives(t *testing.T) {
	if err := Lives(os.Getpid()); err != nil {
		t.Errorf("this one: %v", err)
	}
	if err := Lives(1 << 22); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("nobody: %v", err)
	}
	for stat, want := range map[string][2]bool{
		"12 (a) b) Z 1 12 12 0 -1 4228108 0":  {true, false},
		"2 (kthreadd) S 0 0 0 0 -1 2129984 0": {false, true},
		"7 (x) R 1 7 7 0 -1 4194304 0":        {false, false},
	} {
		zombie, kernel, err := parseState(stat)
		if err != nil || zombie != want[0] || kernel != want[1] {
			t.Errorf("%s: zombie %v, kernel %v, %v", stat, zombie, kernel, err)
		}
	}
	for _, bad := range []string{"", "1 (x) S", "1 (x) S 0 0 0 0 -1 flags 0"} {
		if _, _, err := parseState(bad); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}
