// SPDX-License-Identifier: GPL-3.0-or-later

package dns

import (
	"encoding/binary"
	"fmt"
	"math"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
)

const (
	// maxFakes bounds the names that have a fake IP at a time, as many as there can be flows in a context: at most 24 bytes a slot and
	// about 100 a name.
	maxFakes = 65536
	// fakeReserved addresses at the start of each range are never handed out: room for the addresses of the TUN device itself, which the
	// kernel would deliver locally. Ranges smaller than an IPv4 /24 have none.
	fakeReserved = 15
	// none ends a list of slots.
	none = -1
)

// fakePool maps names to addresses of the fake ranges and back. A name has one slot, and the slot's number is the offset of its address
// in both ranges.
//
//	used slots:  not held ──Hold──▶ held (in no list, never given to another name)
//	             ▲ list by use ◀──last Release──┘      the tail of the list is the next slot to be given away
type fakePool struct {
	v4, v6 netip.Prefix
	base4  uint32
	base6  uint64 // the low half of the first address
	slots  []fakeSlot

	mu     sync.Mutex
	byName map[string]int32
	head   int32 // newest slot that is not held
	tail   int32 // oldest
	used   int32 // slots from here on have never been given away
	noted  func(slot int32)
}

type fakeSlot struct {
	name       atomic.Pointer[string] // nil = free. Atomic so that flows look names up without the lock
	holds      int32                  // flows that use it
	prev, next int32                  // towards head, towards tail; meaningless while held
}

func newFakePool(v4, v6 netip.Prefix) (*fakePool, error) {
	v4, err := fakeRange(v4, DefaultFakeV4)
	if err != nil {
		return nil, err
	}
	v6, err = fakeRange(v6, DefaultFakeV6)
	if err != nil {
		return nil, err
	}
	p := &fakePool{v4: v4, v6: v6, byName: make(map[string]int32), head: none, tail: none}
	if !v4.Addr().Is4() || v4.Bits() < 8 || v4.Bits() > 29 {
		return nil, fmt.Errorf("fake range %s: want an IPv4 prefix from /8 to /29", v4)
	}
	if !v6.Addr().Is6() || v6.Addr().Is4In6() || v6.Bits() < 16 || v6.Bits() > 112 {
		return nil, fmt.Errorf("fake range %s: want an IPv6 prefix from /16 to /112", v6)
	}
	b4, b6 := v4.Addr().As4(), v6.Addr().As16()
	p.base4, p.base6 = binary.BigEndian.Uint32(b4[:]), binary.BigEndian.Uint64(b6[8:])
	size := 1<<(32-v4.Bits()) - 2
	if v4.Bits() <= 24 {
		size = 1<<(24-v4.Bits())*254 - fakeReserved
	}
	p.slots = make([]fakeSlot, min(size, 1<<min(128-v6.Bits(), 30)-1-fakeReserved, maxFakes))
	return p, nil
}

func fakeRange(p netip.Prefix, standard string) (netip.Prefix, error) {
	if p == (netip.Prefix{}) {
		return netip.ParsePrefix(standard)
	}
	if !p.IsValid() {
		return p, fmt.Errorf("fake range: invalid prefix")
	}
	return p.Masked(), nil
}

// addr4 skips .0 and .255, which some software takes for network and broadcast addresses whatever the mask is.
func (p *fakePool) addr4(slot int32) netip.Addr {
	n := uint32(slot)
	if p.v4.Bits() <= 24 {
		n += fakeReserved
		n = n/254*256 + n%254
	}
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], p.base4+n+1)
	return netip.AddrFrom4(b)
}

func (p *fakePool) addr6(slot int32) netip.Addr {
	b := p.v6.Addr().As16()
	binary.BigEndian.PutUint64(b[8:], p.base6+uint64(slot)+fakeReserved+1)
	return netip.AddrFrom16(b)
}

// contains reports whether the address lies in the ranges.
func (p *fakePool) contains(ip netip.Addr) bool {
	return p.v4.Contains(ip) || p.v6.Contains(ip)
}

// slotOf is the inverse of addr4 and addr6; none if the address is never handed out.
func (p *fakePool) slotOf(ip netip.Addr) int32 {
	var n uint64
	switch {
	case p.v4.Contains(ip):
		b := ip.As4()
		off := binary.BigEndian.Uint32(b[:]) - p.base4
		if p.v4.Bits() > 24 {
			n = uint64(off) - 1 // network address: wraps round, out of range
			break
		}
		if last := off % 256; last == 0 || last == 255 {
			return none
		}
		n = uint64(off/256*254+off%256-1) - fakeReserved
	case p.v6.Contains(ip):
		b, base := ip.As16(), p.v6.Addr().As16()
		if binary.BigEndian.Uint64(b[:8]) != binary.BigEndian.Uint64(base[:8]) {
			return none
		}
		n = binary.BigEndian.Uint64(b[8:]) - p.base6 - fakeReserved - 1
	default:
		return none
	}
	if n >= uint64(len(p.slots)) {
		return none
	}
	return int32(n)
}

// hostOf returns the name that the address stands for. It takes no lock and does not allocate.
func (p *fakePool) hostOf(ip netip.Addr) (string, bool) {
	slot := p.slotOf(ip)
	if slot == none {
		return "", false
	}
	name := p.slots[slot].name.Load()
	if name == nil {
		return "", false
	}
	return *name, true
}

// assign returns the addresses that stand for host, the same ones for as long as the name is in use. ok is false when a flow holds every
// slot.
func (p *fakePool) assign(host string) (v4, v6 netip.Addr, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	slot, known := p.byName[host]
	if known {
		if p.slots[slot].holds == 0 {
			p.unlinkLocked(slot)
			p.pushLocked(slot)
		}
		return p.addr4(slot), p.addr6(slot), true
	}
	switch {
	case int(p.used) < len(p.slots):
		slot = p.used
		p.used++
	case p.tail != none:
		slot = p.tail
		p.unlinkLocked(slot)
		if old := p.slots[slot].name.Load(); old != nil {
			delete(p.byName, *old)
		}
	default:
		return netip.Addr{}, netip.Addr{}, false
	}
	p.nameLocked(slot, strings.Clone(host))
	p.pushLocked(slot)
	if p.noted != nil {
		p.noted(slot)
	}
	return p.addr4(slot), p.addr6(slot), true
}

func (p *fakePool) nameLocked(slot int32, host string) {
	p.slots[slot].name.Store(&host)
	p.byName[host] = slot
}

// hold takes the address's slot out of the list, so that it cannot be given to another name.
func (p *fakePool) hold(ip netip.Addr) {
	slot := p.slotOf(ip)
	if slot == none {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	s := &p.slots[slot]
	if s.name.Load() == nil || s.holds == math.MaxInt32 {
		return
	}
	if s.holds == 0 {
		p.unlinkLocked(slot)
	}
	s.holds++
}

// release undoes one hold; the slot becomes the newest of the list with the last one.
func (p *fakePool) release(ip netip.Addr) {
	slot := p.slotOf(ip)
	if slot == none {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	s := &p.slots[slot]
	if s.holds == 0 {
		return
	}
	if s.holds--; s.holds == 0 {
		p.pushLocked(slot)
	}
}

func (p *fakePool) len() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.byName)
}

func (p *fakePool) pushLocked(slot int32) {
	s := &p.slots[slot]
	s.prev, s.next = none, p.head
	if p.head != none {
		p.slots[p.head].prev = slot
	} else {
		p.tail = slot
	}
	p.head = slot
}

func (p *fakePool) unlinkLocked(slot int32) {
	s := &p.slots[slot]
	if s.prev != none {
		p.slots[s.prev].next = s.next
	} else {
		p.head = s.next
	}
	if s.next != none {
		p.slots[s.next].prev = s.prev
	} else {
		p.tail = s.prev
	}
}

// fakeRecord says that a slot stands for a name.
type fakeRecord struct {
	slot int32
	name string
}

// snapshot returns all that is mapped, the least recently used first.
func (p *fakePool) snapshot() []fakeRecord {
	p.mu.Lock()
	defer p.mu.Unlock()
	rs := make([]fakeRecord, 0, len(p.byName))
	for slot := p.tail; slot != none; slot = p.slots[slot].prev {
		if name := p.slots[slot].name.Load(); name != nil {
			rs = append(rs, fakeRecord{slot, *name})
		}
	}
	for slot := range p.used {
		if s := &p.slots[slot]; s.holds > 0 {
			rs = append(rs, fakeRecord{slot, *s.name.Load()})
		}
	}
	return rs
}

// restore fills an empty pool from records, the least recently used first. A later record of a slot or a name outdoes an earlier one.
func (p *fakePool) restore(rs []fakeRecord) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, r := range rs {
		if r.slot < 0 || int(r.slot) >= len(p.slots) {
			continue
		}
		for ; p.used <= r.slot; p.used++ {
			p.pushLocked(p.used)
		}
		if slot, ok := p.byName[r.name]; ok {
			p.slots[slot].name.Store(nil)
		}
		if old := p.slots[r.slot].name.Load(); old != nil {
			delete(p.byName, *old)
		}
		p.nameLocked(r.slot, r.name)
		p.unlinkLocked(r.slot)
		p.pushLocked(r.slot)
	}
}
