// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"math/bits"
	"sync/atomic"
	"time"
)

const (
	// quantileBuckets are four an octave from 1 ms on: each is 19 to 25 % wider than the last, and the longest is 16 s.
	quantileBuckets = 4 * 14
	// minSamples is how many connections a percentile takes: 1 of 20 is above p95.
	minSamples = 20
	// maxSamples is when all counts are halved, so that what was long ago counts less and less.
	maxSamples = 1000
)

// quantile is a histogram of durations that forgets. Adding is one atomic increment; a count lost while halving does not matter.
type quantile struct {
	total   atomic.Uint32
	buckets [quantileBuckets]atomic.Uint32
}

func (q *quantile) add(d time.Duration) {
	q.buckets[bucketOf(d)].Add(1)
	if q.total.Add(1) == maxSamples {
		sum := uint32(0)
		for i := range q.buckets {
			half := q.buckets[i].Load() / 2
			q.buckets[i].Store(half)
			sum += half
		}
		q.total.Store(sum)
	}
}

// at returns the duration that percent of those added did not exceed, rounded up to the end of its bucket; false while there are too few.
func (q *quantile) at(percent int) (time.Duration, bool) {
	total := q.total.Load()
	if total < minSamples {
		return 0, false
	}
	want, sum := (total*uint32(percent)+99)/100, uint32(0)
	for i := range q.buckets {
		if sum += q.buckets[i].Load(); sum >= want {
			return bucketEnd(i), true
		}
	}
	return bucketEnd(quantileBuckets - 1), true
}

func bucketOf(d time.Duration) int {
	ms4 := max(4, uint64(d)*4/uint64(time.Millisecond)) // in quarters of a millisecond, so that the first octave has four steps
	octave := bits.Len64(ms4) - 3                       // 4..7 is octave 0
	return min(4*octave+int(ms4>>octave)-4, quantileBuckets-1)
}

func bucketEnd(i int) time.Duration {
	return time.Duration(4+i%4+1) << (i / 4) * time.Millisecond / 4
}
