// SPDX-License-Identifier: GPL-3.0-or-later

package dns

import (
	"bytes"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

func pool(tb testing.TB, v4, v6 string) *fakePool {
	tb.Helper()
	var p4, p6 netip.Prefix
	if v4 != "" {
		p4 = netip.MustParsePrefix(v4)
	}
	if v6 != "" {
		p6 = netip.MustParsePrefix(v6)
	}
	p, err := newFakePool(p4, p6)
	if err != nil {
		tb.Fatal(err)
	}
	return p
}

func TestFakeRanges(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		v4, v6      string
		size        int
		first, last string
	}{
		{"", "", 65536, "198.18.0.16", "198.19.2.19"},
		{"198.51.100.0/24", "", 239, "198.51.100.16", "198.51.100.254"},
		{"198.51.100.128/25", "", 126, "198.51.100.129", "198.51.100.254"},
		{"198.51.100.8/29", "", 6, "198.51.100.9", "198.51.100.14"},
		{"10.0.0.0/8", "fd00::/112", 65520, "10.0.0.16", "10.1.2.3"},
		{"198.18.3.4/23", "", 493, "198.18.2.16", "198.18.3.254"}, // not masked
	} {
		p := pool(t, tt.v4, tt.v6)
		last := int32(len(p.slots) - 1)
		if len(p.slots) != tt.size || p.addr4(0) != addr(tt.first) || p.addr4(last) != addr(tt.last) {
			t.Errorf("%s: %d addresses, %s to %s", tt.v4, len(p.slots), p.addr4(0), p.addr4(last))
		}
		if !p.v6.Contains(p.addr6(0)) || !p.v6.Contains(p.addr6(last)) {
			t.Errorf("%s: %s to %s", p.v6, p.addr6(0), p.addr6(last))
		}
		for slot := range last + 1 {
			v4, v6 := p.addr4(slot), p.addr6(slot)
			if b := v4.As4()[3]; b == 0 || b == 255 || !p.contains(v4) || !p.contains(v6) || p.slotOf(v4) != slot || p.slotOf(v6) != slot {
				t.Fatalf("slot %d: %s is slot %d, %s is slot %d", slot, v4, p.slotOf(v4), v6, p.slotOf(v6))
			}
		}
		for _, ip := range []netip.Addr{p.v4.Addr(), p.v6.Addr(), addr("192.0.2.1"), addr("2001:db8::1"), addr("198.18.255.255"), addr("198.51.100.255"), {}} {
			if slot := p.slotOf(ip); slot != none {
				t.Errorf("%s is slot %d", ip, slot)
			}
		}
	}
}

// slowPool is what a fakePool is meant to do, written for reading: a list of names in order of use.
type slowPool struct {
	size  int
	order []string // least recently used first
	slot  map[string]int
	holds map[string]int
}

func (p *slowPool) touch(host string) {
	p.order = append(slices.DeleteFunc(p.order, func(h string) bool { return h == host }), host)
}

func (p *slowPool) assign(host string) (int, bool) {
	if slot, ok := p.slot[host]; ok {
		if p.holds[host] == 0 {
			p.touch(host)
		}
		return slot, true
	}
	slot := len(p.slot)
	if slot == p.size {
		i := slices.IndexFunc(p.order, func(h string) bool { return p.holds[h] == 0 })
		if i < 0 {
			return 0, false
		}
		slot = p.slot[p.order[i]]
		delete(p.slot, p.order[i])
		p.order = slices.Delete(p.order, i, i+1)
	}
	p.slot[host] = slot
	p.touch(host)
	return slot, true
}

func TestFakePoolAgainstSlow(t *testing.T) {
	t.Parallel()
	for seed := range uint64(20) {
		r := rand.New(rand.NewPCG(seed, 0))
		p := pool(t, "198.51.100.8/29", "")
		if seed%2 == 0 {
			p = pool(t, "198.51.100.0/26", "")
		}
		slow := &slowPool{size: len(p.slots), slot: map[string]int{}, holds: map[string]int{}}
		for i := range 3000 {
			host := fmt.Sprintf("h%d.example", r.IntN(len(p.slots)*2))
			slot, known := slow.slot[host]
			switch op := r.IntN(6); {
			case op == 0 && known:
				p.hold([]netip.Addr{p.addr4(int32(slot)), p.addr6(int32(slot))}[r.IntN(2)])
				slow.holds[host]++
			case op <= 2 && known:
				p.release(p.addr4(int32(slot)))
				if slow.holds[host] == 1 {
					slow.touch(host)
				}
				slow.holds[host] = max(0, slow.holds[host]-1)
			default:
				v4, v6, ok := p.assign(host)
				want, wantOK := slow.assign(host)
				if ok != wantOK || ok && (v4 != p.addr4(int32(want)) || v6 != p.addr6(int32(want))) {
					t.Fatalf("seed %d, step %d: assign(%s) = %s, %s, %v; want slot %d, %v", seed, i, host, v4, v6, ok, want, wantOK)
				}
			}
			for slot := range p.slots {
				host, ok := p.hostOf(p.addr4(int32(slot)))
				if want, known := slow.slot[host]; ok && (!known || want != slot) {
					t.Fatalf("seed %d, step %d: slot %d is %q", seed, i, slot, host)
				}
			}
			if p.len() != len(slow.slot) {
				t.Fatalf("seed %d, step %d: %d names, want %d", seed, i, p.len(), len(slow.slot))
			}
		}
	}
}

// An address that a flow uses is never given to another name, whatever else happens at the same time.
func TestFakePoolConcurrent(t *testing.T) {
	t.Parallel()
	p := pool(t, "198.51.100.0/26", "")
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(g), 1))
			for range 3000 {
				host := fmt.Sprintf("h%d.example", r.IntN(200))
				v4, v6, ok := p.assign(host)
				if !ok {
					continue
				}
				p.hold(v4)
				if got, _ := p.hostOf(v6); got == host { // else it was given away before hold
					p.assign(fmt.Sprintf("x%d.example", r.IntN(200)))
					if got, _ := p.hostOf(v4); got != host {
						t.Errorf("%s was %s while held", v4, got)
					}
				}
				p.release(v4)
			}
		})
	}
	wg.Wait()
}

func TestFakeFileKeeps(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state", "fakeip.db")
	cfg := Config{Fake: FakeConfig{Path: path}}
	want := map[string]string{}
	for round := range 3 {
		s := start(t, cfg)
		for i := range 3000 { // enough to overflow what waits for the writer
			host := fmt.Sprintf("r%d-%d.example", round, i)
			want[host] = ask(t, s, host, "A")
		}
		for host, a := range want {
			if got := ask(t, s, host, "A"); got != a {
				t.Fatalf("round %d: %s, was %s", round, got, a)
			}
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Error(fi, err)
	}
	if left, err := os.ReadDir(filepath.Dir(path)); err != nil || len(left) != 1 {
		t.Error(left, err)
	}
}

// What was answered is in the file without Close: the process may be killed.
func TestFakeFileKilled(t *testing.T) {
	path := filepath.Join(t.TempDir(), "fakeip.db")
	p := pool(t, "", "")
	w, err := openFakeFile(path, p, zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	for i := range 10 {
		p.assign(fmt.Sprintf("h%d.example", i))
	}
	var b []byte
	for bytes.Count(b, []byte("\n")) < 11 { // the test's own time-out ends this
		<-time.After(time.Millisecond)
		if b, err = os.ReadFile(path); err != nil {
			t.Fatal(err)
		}
	}
	rs, err := parseFakeFile(bytes.NewReader(b[:len(b)-3]), pool(t, "", "")) // and the last line is torn
	if err != nil || len(rs) != 9 {
		t.Errorf("%d records, %v", len(rs), err)
	}
	w.close()
}

func TestFakeFileUnusable(t *testing.T) {
	p := pool(t, "", "")
	good := fakeHeader(p) + "\n" + string(appendFakeRecord(nil, fakeRecord{3, "a.example"}))
	for name, tt := range map[string]struct {
		content string
		warn    bool
		want    string // what the next new name gets
	}{
		"good":            {good, false, "198.18.0.20"},
		"torn":            {good + "0000", false, "198.18.0.20"},
		"empty":           {"", false, "198.18.0.16"},
		"other ranges":    {"mprox fake ip mapping 1 198.18.0.0/16 fd4d:5554:4558::/64\n", true, "198.18.0.16"},
		"garbage":         {"\x00\x01\x02\xff", true, "198.18.0.16"},
		"zeros":           {good + strings.Repeat("\x00", 4096), true, "198.18.0.16"},
		"bad checksum":    {strings.Replace(good, "a.example", "b.example", 1), true, "198.18.0.16"},
		"slot too high":   {good + string(appendFakeRecord(nil, fakeRecord{70000, "b.example"})), true, "198.18.0.16"},
		"not a host name": {good + string(appendFakeRecord(nil, fakeRecord{1, "a b"})), true, "198.18.0.16"},
		"line of 1 MB":    {good + strings.Repeat("x", 1<<20), true, "198.18.0.16"},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "fakeip.db")
			if err := os.WriteFile(path, []byte(tt.content), 0o600); err != nil {
				t.Fatal(err)
			}
			core, logs := observer.New(zap.WarnLevel)
			s := start(t, Config{Log: zap.New(core), Fake: FakeConfig{Path: path}})
			if (logs.Len() > 0) != tt.warn {
				t.Errorf("warnings: %v", logs.All())
			}
			if got, want := ask(t, s, "new.example", "A"), "NOERROR; new.example. 1 IN A "+tt.want; got != want {
				t.Errorf("got %s, want %s", got, want)
			}
		})
	}
}

// A mapping that cannot be kept is a warning, and names still get addresses.
func TestFakeFileNotWritable(t *testing.T) {
	dir := t.TempDir()
	for name, path := range map[string]string{"a directory": dir, "below a file": filepath.Join(dir, "f", "x")} {
		if err := os.WriteFile(filepath.Join(dir, "f"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		core, logs := observer.New(zap.WarnLevel)
		s := start(t, Config{Log: zap.New(core), Fake: FakeConfig{Path: path}})
		if got := ask(t, s, "a.example", "A"); logs.Len() != 1 || !strings.HasPrefix(got, "NOERROR; a.") {
			t.Errorf("%s: %s, %v", name, got, logs.All())
		}
	}
	path := filepath.Join(dir, "locked")
	start(t, Config{Fake: FakeConfig{Path: path}})
	core, logs := observer.New(zap.WarnLevel)
	start(t, Config{Log: zap.New(core), Fake: FakeConfig{Path: path}})
	if logs.Len() != 1 {
		t.Errorf("two servers share a file: %v", logs.All())
	}
}

// After a failed write the mapping goes on in memory, and the file is whole again once it can be written.
func TestFakeFileDiskFull(t *testing.T) {
	path := filepath.Join(t.TempDir(), "fakeip.db")
	core, logs := observer.New(zap.WarnLevel)
	p := pool(t, "", "")
	w := &fakeFile{path: path, pool: p, log: zap.New(core), wake: make(chan struct{}, 1)}
	p.noted = w.note
	if err := w.write(); err != nil {
		t.Fatal(err)
	}
	w.file.Close() // every write fails from here on
	for i := range 3 {
		p.assign(fmt.Sprintf("h%d.example", i))
		w.flush(nil)
	}
	if logs.Len() != 1 || w.file != nil {
		t.Errorf("%d warnings", logs.Len())
	}
	w.retryAt = time.Time{}
	p.assign("h3.example")
	w.flush(nil)
	defer w.file.Close()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if rs, err := parseFakeFile(bytes.NewReader(b), p); err != nil || len(rs) != 4 {
		t.Errorf("%d records, %v", len(rs), err)
	}
}

func TestFakeFileStaysShort(t *testing.T) {
	path := filepath.Join(t.TempDir(), "fakeip.db")
	p := pool(t, "198.51.100.0/26", "")
	w, err := openFakeFile(path, p, zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	for i := range 20000 {
		p.assign(fmt.Sprintf("h%d.example", i))
	}
	w.close()
	fi, err := os.Stat(path)
	if err != nil || fi.Size() > 100*1200 {
		t.Errorf("%v bytes, %v", fi.Size(), err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	again := pool(t, "198.51.100.0/26", "")
	rs, err := parseFakeFile(bytes.NewReader(b), again)
	if err != nil {
		t.Fatal(err)
	}
	again.restore(rs)
	byName := func(rs []fakeRecord) []fakeRecord {
		return slices.SortedFunc(slices.Values(rs), func(a, b fakeRecord) int { return strings.Compare(a.name, b.name) })
	}
	if diff := cmp.Diff(byName(p.snapshot()), byName(again.snapshot()), cmp.AllowUnexported(fakeRecord{})); diff != "" {
		t.Error(diff)
	}
}

func FuzzFakeFile(f *testing.F) {
	p := pool(f, "198.51.100.0/26", "")
	var b bytes.Buffer
	if err := writeFakeFile(&b, p, []fakeRecord{{0, "a.example"}, {5, "b.example"}, {0, "c.example"}, {7, "b.example"}}); err != nil {
		f.Fatal(err)
	}
	f.Add(b.Bytes(), false)
	f.Add(b.Bytes()[:b.Len()-5], false)
	f.Add([]byte(fakeHeader(p)+"\n\x00\n"), false)
	f.Add([]byte("3 a.example\n3 b.example\n61 a.example\n0 x"), true)
	f.Fuzz(func(t *testing.T, b []byte, sum bool) {
		if sum { // lines that pass the checksum
			lines := []byte(fakeHeader(p) + "\n")
			for line := range bytes.Lines(b) {
				line = bytes.TrimSuffix(line, []byte("\n"))
				lines = fmt.Appendf(lines, "%08x %s\n", crc32.ChecksumIEEE(line), line)
			}
			b = lines
		}
		p := pool(t, "198.51.100.0/26", "")
		rs, err := parseFakeFile(bytes.NewReader(b), p)
		if err != nil {
			return
		}
		p.restore(rs)
		// Whatever was restored: no name has two addresses, every slot can still be given away, and the file it makes is read again.
		seen := map[string]bool{}
		for _, r := range p.snapshot() {
			if got, ok := p.hostOf(p.addr6(r.slot)); !ok || got != r.name || seen[r.name] || p.byName[r.name] != r.slot {
				t.Fatalf("slot %d: %q, %v", r.slot, got, ok)
			}
			seen[r.name] = true
		}
		for i := range len(p.slots) {
			if _, _, ok := p.assign(fmt.Sprintf("n%d", i)); !ok {
				t.Fatal("slots were lost")
			}
		}
		var out bytes.Buffer
		if err := writeFakeFile(&out, p, p.snapshot()); err != nil {
			t.Fatal(err)
		}
		if again, err := parseFakeFile(&out, p); err != nil || len(again) != len(p.slots) {
			t.Fatalf("%d records, %v", len(again), err)
		}
	})
}
