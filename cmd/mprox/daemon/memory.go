// SPDX-License-Identifier: GPL-3.0-or-later

package daemon

import (
	"context"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

// The runtime gives memory back only after a collection, and collects only when something is allocated: after a burst of connections, the
// daemon would keep what they took for minutes, doing nothing. So a collection is made when a burst is over.
const (
	// memoryLook is how often the amount of allocations is looked at. A burst is over when in one such time almost nothing was allocated.
	memoryLook = 5 * time.Second
	// memoryQuiet is "almost nothing" in bytes: 200 connections' worth.
	memoryQuiet = 2 << 20
	// memoryWorth is how many bytes must have been allocated since the last time for a collection, a few milliseconds of CPU, to be worth it;
	// or a quarter of what is alive, whose marking is what a collection costs.
	memoryWorth = 16 << 20
	// memoryAgain is after how many looks a collection is repeated: the first only ages what sync.Pools hold, and connections linger.
	memoryAgain = 3
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

// keepMemory gives memory back to the kernel after bursts, until ctx is done.
func keepMemory(ctx context.Context) {
	samples := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}, {Name: "/gc/heap/live:bytes"}}
	tick := time.NewTicker(memoryLook)
	defer tick.Stop()
	var k memoryKeeper
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		metrics.Read(samples)
		if k.due(samples[0].Value.Uint64(), samples[1].Value.Uint64()) {
			debug.FreeOSMemory()
		}
	}
}
