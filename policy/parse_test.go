// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"golang.org/x/sys/unix"
)

func goodJournal() journal {
	j := newJournal(globalSpec().withDefaults(), Netns{Inode: 1, Cookie: 2, Boot: "b"})
	j.addContexts(runSpec().Contexts)
	j.Sysctls["net/ipv4/conf/eth0.5/src_valid_mark"] = "0"
	j.Cgroups = []string{"/user.slice/mprox-1-run-77"}
	j.Moved = []movedProcess{{PID: 5, From: "/", To: "/mprox-1-daemon-5"}}
	j.Sockets = deskSnapshot().Sockets
	return j
}

func TestJournalRoundTrip(t *testing.T) {
	file := filepath.Join(t.TempDir(), "sub", "state.json")
	want := goodJournal()
	for range 2 { // also over one that is there
		if err := want.write(file); err != nil {
			t.Fatal(err)
		}
	}
	got, err := readJournal(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.AddrPort{})); diff != "" {
		t.Error(diff)
	}
	if st, err := os.Stat(file); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
	if entries, _ := os.ReadDir(filepath.Dir(file)); len(entries) != 1 {
		t.Errorf("left: %v", entries)
	}
}

// TestJournalRefuses: what a journal could be made to say to have root touch something else.
func TestJournalRefuses(t *testing.T) {
	for name, change := range map[string]func(*journal){
		"version":              func(j *journal) { j.Version = 2 },
		"sysctl":               func(j *journal) { j.Sysctls["kernel/core_pattern"] = "1" },
		"sysctl path":          func(j *journal) { j.Sysctls["net/ipv4/conf/../ip_forward/src_valid_mark"] = "1" },
		"sysctl up":            func(j *journal) { j.Sysctls["net/ipv4/conf/../src_valid_mark"] = "1" },
		"sysctl value":         func(j *journal) { j.Sysctls["net/ipv4/tcp_fwmark_accept"] = "|sh" },
		"cgroup":               func(j *journal) { j.Cgroups = []string{"/system.slice"} },
		"cgroup up":            func(j *journal) { j.Cgroups = []string{"/../mprox-x"} },
		"cgroup in the middle": func(j *journal) { j.Cgroups = []string{"/mprox-1/system.slice"} },
		"moved to":             func(j *journal) { j.Moved[0].To = "/system.slice" },
		"moved from":           func(j *journal) { j.Moved[0].From = "../../x" },
		"moved pid":            func(j *journal) { j.Moved[0].PID = -1 },
		"nft":                  func(j *journal) { j.NFT = "filter" },
		"slot":                 func(j *journal) { j.Contexts[0].Slot = 160 },
		"mask":                 func(j *journal) { j.Mask = 3 },
	} {
		t.Run(name, func(t *testing.T) {
			j := goodJournal()
			change(&j)
			b, err := json.Marshal(j)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := parseJournal(b); !errors.Is(err, ErrJournal) {
				t.Errorf("got %v", err)
			}
		})
	}
}

func FuzzJournal(f *testing.F) {
	j := goodJournal()
	b, err := json.Marshal(j)
	if err != nil {
		f.Fatal(err)
	}
	for _, s := range []string{string(b), string(b[:len(b)/2]), string(b) + "{}", "", "null", "[]", `{"version":1}`, `{"version":1,"x":1}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		j, err := parseJournal(b)
		if err != nil {
			if !errors.Is(err, ErrJournal) {
				t.Fatalf("%v is not ErrJournal", err)
			}
			return
		}
		for _, c := range j.Cgroups {
			if !strings.Contains(c, "/"+cgroupPrefix) || strings.Contains(c, "..") && filepath.Clean(c) != c {
				t.Fatalf("cgroup %q", c)
			}
		}
		for k := range j.Sysctls {
			if !strings.HasPrefix(k, "net/ipv4/") || strings.Contains(k, "/../") {
				t.Fatalf("sysctl %q", k)
			}
		}
	})
}

func TestResolvConf(t *testing.T) {
	got := parseResolvConf("# nameserver 9.9.9.9\nsearch lan\nnameserver 127.0.0.53\n nameserver\tfe80::1%eth0 \nnameserver x\nnameserver ::ffff:192.0.2.1\nnameserver 192.0.2.2\n")
	want := []netip.AddrPort{
		netip.MustParseAddrPort("127.0.0.53:53"), netip.MustParseAddrPort("[fe80::1%eth0]:53"), netip.MustParseAddrPort("192.0.2.1:53"),
	}
	if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.AddrPort{})); diff != "" {
		t.Error(diff)
	}
}

func FuzzResolvConf(f *testing.F) {
	f.Add("nameserver 192.0.2.1\nnameserver fe80::1%eth0\n")
	f.Fuzz(func(t *testing.T, s string) {
		got := parseResolvConf(s)
		if len(got) > 3 {
			t.Fatalf("%d nameservers", len(got))
		}
		for _, a := range got {
			if !a.IsValid() || a.Port() != 53 {
				t.Fatalf("%v", a)
			}
		}
	})
}

func FuzzAttrs(f *testing.F) {
	f.Add([]byte{8, 0, 1, 0, 1, 2, 3, 4, 5, 0, 2, 0x80, 9, 0, 0, 0})
	f.Add([]byte{3, 0, 1, 0})
	f.Add([]byte{255, 255, 1, 0, 1})
	f.Fuzz(func(t *testing.T, b []byte) {
		total := 0
		for _, a := range attrs(b) {
			total += len(a.data) + 4
		}
		if total > len(b) {
			t.Fatalf("%d bytes from %d", total, len(b))
		}
	})
}

// FuzzSplitAnswers: what the kernel answers is split into copies of what it holds, and an answer that ends in the middle of a message says so.
func FuzzSplitAnswers(f *testing.F) {
	message := func(typ uint16, seq uint32, data ...byte) []byte {
		ne := binary.NativeEndian
		b := ne.AppendUint32(nil, uint32(nlmsgHeader+len(data)))
		b = ne.AppendUint16(ne.AppendUint16(b, typ), 0)
		b = append(ne.AppendUint32(ne.AppendUint32(b, seq), 0), data...)
		return append(b, make([]byte, -len(data)&(nlmsgAlign-1))...)
	}
	f.Add(slices.Concat(message(0xa00, 7, 1, 2, 3, 4, 5), message(0xa00, 6, 1, 2, 3, 4), message(unix.NLMSG_DONE, 7, 0, 0, 0, 0)), true)
	f.Add(message(unix.NLMSG_ERROR, 7, 0xfe, 0xff, 0xff, 0xff), false)
	f.Add(message(0xa00, 7, 1, 2, 3, 4)[:18], false)
	f.Fuzz(func(t *testing.T, b []byte, dump bool) {
		given := slices.Clone(b)
		out, done, err := splitAnswers(b, 7, dump, nil)
		total := 0
		for _, data := range out {
			if len(data) < 4 {
				t.Fatalf("%d bytes of data", len(data))
			}
			total += len(data) + nlmsgHeader
			clear(data) // a copy
		}
		if total > len(b) || !bytes.Equal(b, given) {
			t.Fatalf("%d bytes from %d, or not copies", total, len(b))
		}
		if err != nil && !done || dump && done && len(b) < nlmsgHeader {
			t.Fatalf("done %v, %v", done, err)
		}
	})
}

func TestPopulated(t *testing.T) {
	for s, want := range map[string]bool{"populated 0\nfrozen 0\n": false, "populated 1\nfrozen 0\n": true, "": true, "frozen 0\npopulated 0": false} {
		if got := populated(s); got != want {
			t.Errorf("%q: got %v", s, got)
		}
	}
}

func TestOwnService(t *testing.T) {
	for p, want := range map[string]string{
		"/": "", "/user.slice/user-1000.slice/session-2.scope": "", "/system.slice/tor@default.service": "/system.slice/tor@default.service",
		"/system.slice/a.service/sub": "/system.slice/a.service", "/user.slice/user-1000.slice/user@1000.service/init.scope": "",
		"/user.slice/user-1000.slice/user@1000.service/app.slice/ssh.service": "/user.slice/user-1000.slice/user@1000.service/app.slice/ssh.service",
	} {
		if got := ownService(p); got != want {
			t.Errorf("%s: got %q, want %q", p, got, want)
		}
	}
}
