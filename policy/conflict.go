// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"fmt"
	"math/bits"
)

// conflicts finds rules and routes of others where ours must go. Rules and routes that carry our protocol number are ours.
func conflicts(s Spec, snap Snapshot) error {
	tables := func(t int) bool { return t >= s.TableBase && t < s.TableBase+2*MaxContexts }
	for _, r := range snap.Rules {
		if r.Protocol == Protocol {
			continue
		}
		switch {
		case r.Priority >= s.RulePriority && r.Priority < s.RulePriority+ruleBlock:
			return fmt.Errorf("%w: a foreign rule %q is among the priorities %d-%d: set kernel.rule_priority to a free block of %d",
				ErrConflict, r, s.RulePriority, s.RulePriority+ruleBlock-1, ruleBlock)
		case tables(r.Table):
			return fmt.Errorf("%w: a foreign rule %q uses a table of ours: set kernel.table_base to a free block of %d", ErrConflict, r, 2*MaxContexts)
		case r.Mask != 0 && ourMark(s.Mask, r.Mark&r.Mask):
			return fmt.Errorf("%w: a foreign rule %q uses a mark of ours: set kernel.mark_mask to eight free bits", ErrConflict, r)
		}
	}
	for _, r := range snap.Routes {
		if tables(r.Table) && r.Protocol != Protocol {
			return fmt.Errorf("%w: a foreign route %q is in a table of ours: set kernel.table_base to a free block of %d", ErrConflict, r, 2*MaxContexts)
		}
	}
	return nil
}

// ourMark reports whether the bits of a foreign mark inside our mask are a value that we give.
func ourMark(mask, mark uint32) bool {
	v := mark & mask >> bits.TrailingZeros32(mask)
	return v == markBypass || v == markInbound || v >= markFirst && v < markFirst+MaxContexts
}
