// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"fmt"
	"math/bits"
)

// conflicts finds rules and routes of others where ours must go. Rules and routes that carry our protocol number are ours.
func conflicts(s Spec, snap Snapshot) error {
	tables := func(t int) bool { return t >= s.TableBase && t < s.TableBase+tablesPerSlot*MaxContexts }
	for _, r := range snap.Rules {
		if r.Protocol == Protocol {
			continue
		}
		who := named("rule", r, ownerOf(r))
		switch {
		case r.Priority >= s.RulePriority && r.Priority < s.RulePriority+ruleBlock:
			return fmt.Errorf("%w: %s is among the priorities %d-%d: set kernel.rule_priority to a free block of %d",
				ErrConflict, who, s.RulePriority, s.RulePriority+ruleBlock-1, ruleBlock)
		case tables(r.Table):
			return fmt.Errorf("%w: %s uses a table of ours: set kernel.table_base to a free block of %d", ErrConflict, who, tablesPerSlot*MaxContexts)
		case overlaps(s.Mask, r):
			return fmt.Errorf("%w: %s uses a mark of ours: set kernel.mark_mask to eight free bits", ErrConflict, who)
		}
	}
	for _, r := range snap.Routes {
		if tables(r.Table) && r.Protocol != Protocol {
			return fmt.Errorf("%w: %s is in a table of ours: set kernel.table_base to a free block of %d", ErrConflict, named("route", r, ownerOfRoute(r)), tablesPerSlot*MaxContexts)
		}
	}
	return nil
}

// named describes a foreign object, by the name of its owner if that is known.
func named(kind string, object fmt.Stringer, owner string) string {
	if owner == "" {
		return fmt.Sprintf("a foreign %s %q", kind, object)
	}
	return fmt.Sprintf("a %s of %s, %q,", kind, owner, object)
}

// overlaps reports whether a foreign rule that looks at our bits would take packets with one of our marks for its own.
func overlaps(mask uint32, r Rule) bool {
	common := r.Mask & mask
	if common == 0 {
		return false
	}
	for _, v := range ourValues() {
		if v<<bits.TrailingZeros32(mask)&common == r.Mark&common && r.Mark&common != 0 {
			return true
		}
	}
	return false
}

// ourValues are the values that we give within the mask.
func ourValues() []uint32 {
	out := []uint32{markBypass, markInbound, markAccel}
	for v := range uint32(MaxContexts) {
		out = append(out, markFirst+v)
	}
	return out
}

// ourMark reports whether the bits of a foreign mark inside our mask are a value that we give.
func ourMark(mask, mark uint32) bool {
	v := mark & mask >> bits.TrailingZeros32(mask)
	return v == markBypass || v == markInbound || v == markAccel || v >= markFirst && v < markFirst+MaxContexts
}
