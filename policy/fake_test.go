// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// fakeHost is a machine in memory. Every change is written down in order, so that tests can say what must come before what.
type fakeHost struct {
	mu      sync.Mutex
	snap    Snapshot
	feat    Features
	tables  map[string]string // name → text
	sysctl  map[string]string
	cgroups map[string][]int
	procs   map[string][]Process // by listening address
	log     []string
	fail    string // the first change whose log line contains this fails
	changed func()
	bpf     map[string]string
}

var errFake = errors.New("made to fail")

func newFakeHost() *fakeHost {
	return &fakeHost{
		snap: deskSnapshot(), feat: Features{Cgroup2: true, NFTSocket: true, NFTOwner: true, BPFSockMark: true}, tables: map[string]string{},
		sysctl:  map[string]string{"net/ipv4/tcp_fwmark_accept": "0", "net/ipv4/conf/eth0/src_valid_mark": "0", "net/ipv4/conf/docker0/src_valid_mark": "0"},
		cgroups: map[string][]int{"/": {1}, "/user.slice/session-1.scope": {os.Getpid(), 42}},
		procs:   map[string][]Process{},
		bpf:     map[string]string{},
	}
}

// did writes a change down, or fails it. The caller holds mu.
func (h *fakeHost) did(format string, args ...any) error {
	line := fmt.Sprintf(format, args...)
	if h.fail != "" && strings.Contains(line, h.fail) {
		h.fail = ""
		return errFake
	}
	h.log = append(h.log, line)
	return nil
}

func (h *fakeHost) Netns() Netns { return Netns{Inode: 4026531840, Cookie: 1, Boot: "boot"} }

func (h *fakeHost) Snapshot(context.Context, int) (Snapshot, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	s := h.snap
	s.Rules, s.Routes, s.Links = slices.Clone(s.Rules), slices.Clone(s.Routes), slices.Clone(s.Links)
	return s, nil
}

func (h *fakeHost) Features() (Features, error) { return h.feat, nil }

func (h *fakeHost) AddRule(r Rule) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.did("add rule %s", family46(r.V6)+r.String()); err != nil {
		return err
	}
	h.snap.Rules = append(h.snap.Rules, r)
	return nil
}

func (h *fakeHost) DeleteRule(r Rule) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.snap.Rules = slices.DeleteFunc(slices.Clone(h.snap.Rules), func(x Rule) bool { return x == r })
	return h.did("del rule %s", family46(r.V6)+r.String())
}

func (h *fakeHost) AddRoute(r Route) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.did("add route %s", r); err != nil {
		return err
	}
	h.snap.Routes = append(h.snap.Routes, r)
	return nil
}

func (h *fakeHost) DeleteRoute(r Route) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.snap.Routes = slices.DeleteFunc(slices.Clone(h.snap.Routes), func(x Route) bool { return x == r })
	return h.did("del route %s", r)
}

func (h *fakeHost) SetLink(l LinkSpec) (bool, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return false, h.did("link %s", l.Name)
}

func (h *fakeHost) ApplyNFT(replace []NFTable, remove []string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.did("nft %s", nftSummary(replace, remove)); err != nil {
		return err
	}
	for _, n := range remove {
		delete(h.tables, n)
	}
	for _, t := range replace {
		h.tables[t.Name] = t.String()
	}
	return nil
}

func nftSummary(replace []NFTable, remove []string) string {
	var words []string
	for _, t := range replace {
		words = append(words, "+"+t.Name)
	}
	for _, n := range remove {
		words = append(words, "-"+n)
	}
	return strings.Join(words, " ")
}

func (h *fakeHost) NFTables(prefix string) (map[string]string, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	out := maps.Clone(h.tables)
	maps.DeleteFunc(out, func(name, _ string) bool { return !strings.HasPrefix(name, prefix) })
	return out, nil
}

func (h *fakeHost) NFCounter(string, string) (uint64, error) { return 7, nil }

func (h *fakeHost) Sysctl(key string) (string, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if v, ok := h.sysctl[key]; ok {
		return v, nil
	}
	if strings.Contains(key, "mprox") {
		return "0", nil
	}
	return "", os.ErrNotExist
}

func (h *fakeHost) SetSysctl(key, value string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if _, ok := h.sysctl[key]; ok {
		h.sysctl[key] = value
	}
	return h.did("sysctl %s=%s", key, value)
}

func (h *fakeHost) Sockets(context.Context) (Sockets, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.snap.Sockets, nil
}

func (h *fakeHost) DestroySockets([]uint32, uint32) error { return nil }

func (h *fakeHost) ResetSockets(context.Context, Existing) (int, error) { return 0, nil }

func (h *fakeHost) RunsAs(int, uint32) bool { return true }

func (h *fakeHost) Process(pid int) (ProcessFacts, error) { return ProcessFacts{PID: pid}, nil }

func (h *fakeHost) OpenCgroup(string) (int, error) {
	return unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
}

func (h *fakeHost) MarkCgroup(p string, v, _ uint32) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.did("bpf %s %#x", path.Base(p), v)
}

func (h *fakeHost) BPFDir(instance string) (string, error) {
	return "/sys/fs/bpf/mprox-1-1-" + instance, nil
}

func (h *fakeHost) ApplyBPF(dir string, sel *Selection, _ []string) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.bpf[dir] == sel.String() {
		return 0, nil
	}
	if err := h.did("bpf +%s", path.Base(dir)); err != nil {
		return 0, err
	}
	h.bpf[dir] = sel.String()
	return 0, nil
}

func (h *fakeHost) RemoveBPF(dir string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.bpf, dir)
	return h.did("bpf -%s", path.Base(dir))
}

func (h *fakeHost) SelectState() (SelectState, error) { return SelectState{}, nil }

func (h *fakeHost) WaitCgroupEmpty(context.Context, string) error { return nil }

func (h *fakeHost) Listener(_ context.Context, a netip.AddrPort) ([]Process, error) {
	procs := slices.Clone(h.procs[a.String()])
	for i := range procs {
		if at, err := h.Cgroup(procs[i].PID); err == nil {
			procs[i].Cgroup = at
		}
	}
	return procs, nil
}

func (h *fakeHost) Cgroup(pid int) (string, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if pid == 0 {
		pid = os.Getpid()
	}
	for p, pids := range h.cgroups {
		if slices.Contains(pids, pid) {
			return p, nil
		}
	}
	return "", os.ErrNotExist
}

func (h *fakeHost) MakeCgroup(p string) (CgroupRef, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if _, ok := h.cgroups[p]; !ok {
		if err := h.did("mkdir %s", p); err != nil {
			return CgroupRef{}, err
		}
		h.cgroups[p] = nil
	}
	return CgroupRef{Path: p, ID: uint64(1000 + len(p)), Level: strings.Count(p, "/")}, nil
}

func (h *fakeHost) RemoveCgroup(p string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.cgroups[p]) > 0 {
		return fmt.Errorf("%s is busy", p)
	}
	delete(h.cgroups, p)
	return h.did("rmdir %s", p)
}

func (h *fakeHost) CgroupProcs(p string) ([]int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if pids, ok := h.cgroups[p]; ok {
		return slices.Clone(pids), nil
	}
	return nil, os.ErrNotExist
}

func (h *fakeHost) ProcessTree(_ context.Context, pid int) (uint64, []int, error) {
	if _, err := h.Cgroup(pid); err != nil {
		return 0, nil, err
	}
	return uint64(pid), []int{pid}, nil
}

func (h *fakeHost) FindCgroups(names []string) (map[string][]CgroupRef, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	out := map[string][]CgroupRef{}
	for _, n := range names {
		for p := range h.cgroups {
			if p == n || path.Base(p) == n {
				out[n] = append(out[n], CgroupRef{Path: p, ID: uint64(1000 + len(p)), Level: strings.Count(p, "/")})
			}
		}
	}
	return out, nil
}

func (h *fakeHost) MoveProcess(pid int, p string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	for from, pids := range h.cgroups {
		h.cgroups[from] = slices.DeleteFunc(slices.Clone(pids), func(x int) bool { return x == pid })
	}
	h.cgroups[p] = append(h.cgroups[p], pid)
	if pid == os.Getpid() {
		return h.did("move self to %s", path.Base(p))
	}
	return h.did("move %d to %s", pid, path.Base(p))
}

func (h *fakeHost) Watch(ctx context.Context, changed func()) error {
	h.mu.Lock()
	h.changed = changed
	h.mu.Unlock()
	<-ctx.Done()
	return context.Cause(ctx)
}

func (h *fakeHost) Close() error { return nil }

// take returns what was changed since the last call.
func (h *fakeHost) take() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	out := h.log
	h.log = nil
	return out
}

func family46(v6 bool) string {
	if v6 {
		return "-6 "
	}
	return ""
}

// deskSnapshot is a desktop with an uplink, a Docker bridge, a second LAN behind a gateway, and one ssh session.
func deskSnapshot() Snapshot {
	pfx, addr := netip.MustParsePrefix, netip.MustParseAddr
	return Snapshot{
		IPv6:  true,
		Links: []Link{{1, "lo", true, true, false}, {2, "eth0", true, false, true}, {3, "docker0", true, false, true}},
		Addrs: []IfAddr{
			{Link: 1, Prefix: pfx("127.0.0.1/8"), Unusable: true},
			{Link: 2, Prefix: pfx("192.168.1.20/24")},
			{Link: 2, Prefix: pfx("203.0.113.7/29")},
			{Link: 2, Prefix: pfx("2001:db8:1::20/64")},
			{Link: 2, Prefix: pfx("fe80::20/64"), Unusable: true},
			{Link: 3, Prefix: pfx("172.17.0.1/16")},
		},
		Routes: []Route{
			{Table: 254, Dst: pfx("0.0.0.0/0"), Dev: "eth0", Via: addr("192.168.1.1"), Metric: 100},
			{Table: 254, Dst: pfx("192.168.1.0/24"), Dev: "eth0", LinkOnly: true, Src: addr("192.168.1.20"), Metric: 100},
			{Table: 254, Dst: pfx("203.0.113.0/29"), Dev: "eth0", LinkOnly: true, Src: addr("203.0.113.7")},
			{Table: 254, Dst: pfx("172.17.0.0/16"), Dev: "docker0", LinkOnly: true, Src: addr("172.17.0.1")},
			{Table: 254, Dst: pfx("10.0.0.0/8"), Dev: "eth0", Via: addr("192.168.1.9")},
			{Table: 254, Dst: pfx("0.0.0.0/1"), Dev: "eth0", Via: addr("192.168.1.66")},
			{Table: 254, Dst: pfx("::/0"), Dev: "eth0", Via: addr("fe80::1"), Metric: 1024},
			{Table: 254, Dst: pfx("2001:db8:1::/64"), Dev: "eth0", Metric: 256},
			{Table: 254, Dst: pfx("fe80::/64"), Dev: "eth0", Metric: 256},
			{Table: 254, Dst: pfx("fd00:1::/64"), Dev: "eth0", Metric: 256},
		},
		Rules: []Rule{
			{Table: 255},
			{Priority: 32766, Table: 254},
			{V6: true, Table: 255},
			{V6: true, Priority: 32766, Table: 254},
			{Priority: 5210, Mark: 0x80000, Mask: 0xff0000, Table: 254},
			{Priority: 32765, Mark: 0xca6c, Mask: 0xffffffff, Table: 51820, Other: "not"},
		},
		RPFilter: map[string]int{"all": 0, "eth0": 2, "docker0": 0}, SrcValid: map[string]int{},
		Sockets: Sockets{
			Inbound: []Tuple{
				{Local: netip.MustParseAddrPort("192.168.1.20:22"), Remote: netip.MustParseAddrPort("198.51.100.9:50000")},
				{Local: netip.MustParseAddrPort("[2001:db8:1::20]:22"), Remote: netip.MustParseAddrPort("[2001:db8:9::9]:50001")},
			},
			Clients: []uint16{40123},
		},
	}
}
