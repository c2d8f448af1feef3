// SPDX-License-Identifier: GPL-3.0-or-later

package daemon

import (
	"context"
	"math"
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// The runtime gives memory back only after a collection, and collects only when something is allocated: after a burst of connections, the
// daemon would keep what they took for minutes, doing nothing. So a collection is made when a burst is over.
const (
	// memoryLook is how often the amount of allocations is looked at. A burst is over when in one such time almost nothing was allocated.
	memoryLook = time.Second
	// memoryStart is when what only the start needed is given back: not while the applications that have waited for it connect.
	memoryStart = 300 * time.Millisecond
	// memoryStartGC is the GOGC of the start: what it needs is less than what a daemon at work has, and collections took a sixth of it.
	memoryStartGC = 400
	// memoryQuiet is "almost nothing" in bytes: 200 connections' worth.
	memoryQuiet = 2 << 20
	// memoryWorth is how many bytes must have been allocated since the last time for a collection, a few milliseconds of CPU, to be worth it;
	// or a quarter of what is alive, whose marking is what a collection costs.
	memoryWorth = 16 << 20
	// memoryAgain is after how many looks a collection is repeated: connections linger.
	memoryAgain = 15
)

// memoryKeeper decides when to give memory back.
type memoryKeeper struct {
	last  uint64 // bytes allocated at the last look
	freed uint64 // the same at the last collection of ours
	again int    // looks until it is repeated; 0 = it has been
}

// due is told the bytes allocated since the start of the process, and those alive at the end of the last collection.
func (k *memoryKeeper) due(allocated, alive uint64) bool {
	quiet := allocated-k.last < memoryQuiet
	k.last = allocated
	switch {
	case !quiet:
		return false
	case allocated-k.freed >= max(memoryWorth, alive/4):
		k.freed, k.again = allocated, memoryAgain
		return true
	case k.again > 0:
		k.again--
		return k.again == 0
	}
	return false
}

// keepMemory gives memory back to the kernel after bursts, until ctx is done. percent is the GOGC that holds once the start is over.
func keepMemory(ctx context.Context, percent int) {
	defer debug.SetGCPercent(percent)
	samples := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}, {Name: "/gc/heap/live:bytes"}}
	tick := time.NewTicker(memoryLook)
	defer tick.Stop()
	var k memoryKeeper
	start := time.After(memoryStart)
	for {
		select {
		case <-ctx.Done():
			return
		case <-start:
			debug.SetGCPercent(percent)
			giveBack() // what only the start needed
			continue
		case <-tick.C:
		}
		metrics.Read(samples)
		if k.due(samples[0].Value.Uint64(), samples[1].Value.Uint64()) {
			giveBack()
		}
	}
}

// giveBack gives back what is free, and the program's own pages: of 16 MB of code and tables that a start touches, an idle daemon uses a
// few. Those come back from the page cache, 64 KiB at a time and without I/O.
func giveBack() {
	runtime.GC() // twice: each halves stacks that have become too large, and only the second frees what sync.Pools hold
	debug.FreeOSMemory()
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return
	}
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return
	}
	for _, m := range programMaps(string(maps), exe) {
		// Private and never written to: read again from the file when they are used. That it fails costs nothing but memory.
		_, _, _ = unix.Syscall(unix.SYS_MADVISE, m.start, m.end-m.start, unix.MADV_DONTNEED)
	}
}

// mapping is a range of addresses.
type mapping struct{ start, end uintptr }

// programMaps finds the mappings of exe in /proc/self/maps (proc_pid_maps(5)) that are private and cannot be written to.
func programMaps(maps, exe string) []mapping {
	var out []mapping
	for line := range strings.Lines(maps) {
		f := strings.Fields(line)
		if len(f) < 6 || !strings.HasSuffix(strings.TrimSuffix(line, "\n"), " "+exe) || len(f[1]) != 4 || f[1][1] != '-' || f[1][3] != 'p' {
			continue
		}
		from, to, _ := strings.Cut(f[0], "-")
		start, err1 := strconv.ParseUint(from, 16, 64)
		end, err2 := strconv.ParseUint(to, 16, 64)
		if err1 == nil && err2 == nil && start < end {
			out = append(out, mapping{uintptr(start), uintptr(end)})
		}
	}
	return out
}

// spareFiles is the part of the limit of open files, 1/spareFiles, that flows leave to the control socket and to whatever else opens files.
const spareFiles = 32

// maxFD is the first descriptor that no flow may have; 0 = all may be used.
func maxFD() int {
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
		return 0
	}
	return int(min(files.Cur, math.MaxInt32) / spareFiles * (spareFiles - 1))
}
