// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"math/bits"
	"net/netip"
	"slices"

	"github.com/mutex-proxy/mutex/flow"
)

// HashBy is what a pool by hash keeps together.
type HashBy uint8

// What can be kept together. The zero value is the destination.
const (
	ByDestination HashBy = iota // flows to the same name, or the same address where there is no name; the port does not count
	BySource                    // flows of the same source address
	ByBoth                      // flows of the same source to the same destination
)

const (
	// ringPoints is how many points of the ring a member has for each unit of weight: shares then differ by some 8 % (1/sqrt(160)).
	ringPoints = 160
	// maxRing bounds the ring. Above, every member has half as many points, or a quarter and so on.
	maxRing = 1 << 16
	// ringWalk is how far the ring is followed past members that are out. Beyond, most are, and any order will do.
	ringWalk = 256
)

// ring is consistent hashing: each member owns points on a ring, and a flow belongs to the next point. A member that goes leaves its flows to
// its neighbours, and all others where they were. Points depend on the member's name alone, so that a restart changes nothing.
type ring struct {
	points []uint64 // sorted
	owners []uint16 // of the points
	index  []uint32 // the first point of each of a power of two of equal arcs
	shift  uint
}

func newRing(members []*member) ring {
	total := 0
	for _, m := range members {
		total += m.weight
	}
	per := ringPoints
	for per > 1 && total*per > maxRing {
		per /= 2
	}
	type point struct {
		at    uint64
		owner uint16
	}
	var ps []point
	for i, m := range members {
		n := max(1, m.weight*per)
		if total > maxRing { // weights in the thousands: in proportion
			n = max(1, m.weight*maxRing/total)
		}
		for k := range n {
			ps = append(ps, point{mix(hashString(fnvOffset, m.Name()) + uint64(k)*0x9e3779b97f4a7c15), uint16(i)})
		}
	}
	slices.SortFunc(ps, func(a, b point) int {
		if a.at != b.at {
			if a.at < b.at {
				return -1
			}
			return 1
		}
		return int(a.owner) - int(b.owner)
	})
	r := ring{shift: uint(64 - bits.Len(uint(len(ps))))}
	r.index = make([]uint32, 1<<(64-r.shift))
	for _, p := range ps {
		r.points, r.owners = append(r.points, p.at), append(r.owners, p.owner)
	}
	next := 0
	for arc := range r.index {
		for next < len(r.points) && r.points[next]>>r.shift < uint64(arc) {
			next++
		}
		r.index[arc] = uint32(next)
	}
	return r
}

// at returns the place of the point that a key belongs to. About two steps whatever the size.
func (r *ring) at(key uint64) int {
	i := int(r.index[key>>r.shift])
	for i < len(r.points) && r.points[i] < key {
		i++
	}
	return i % len(r.points)
}

// owner returns the member at a place; places go round.
func (r *ring) owner(place int) int { return int(r.owners[place%len(r.owners)]) }

// key is what of a flow counts for the pool. It does not allocate.
func (p *poolState) key(src netip.Addr, dst *flow.Addr) uint64 {
	if p.strategy != Hash {
		return 0
	}
	h := uint64(fnvOffset)
	if p.cfg.HashBy != ByDestination {
		h = hashAddr(h, src)
	}
	if p.cfg.HashBy != BySource {
		if dst.Host != "" {
			h = hashString(h, dst.Host)
		} else {
			h = hashAddr(h, dst.IP)
		}
	}
	return mix(h)
}

// FNV-1a, and the finalizer of MurmurHash3, which spreads its weak high bits.
const (
	fnvOffset = 14695981039346656037
	fnvPrime  = 1099511628211
)

func hashString(h uint64, s string) uint64 {
	for i := range len(s) {
		h = (h ^ uint64(s[i])) * fnvPrime
	}
	return h
}

func hashAddr(h uint64, ip netip.Addr) uint64 {
	for _, c := range ip.Unmap().As16() {
		h = (h ^ uint64(c)) * fnvPrime
	}
	return h
}

func mix(h uint64) uint64 {
	h = (h ^ h>>33) * 0xff51afd7ed558ccd
	h = (h ^ h>>33) * 0xc4ceb9fe1a85ec53
	return h ^ h>>33
}
