// SPDX-License-Identifier: GPL-3.0-or-later

package daemon

// bell wakes the goroutine that receives from it: one ring that is pending stands for all.
type bell chan struct{}

func newBell() bell { return make(bell, 1) }

// ring does not block.
func (b bell) ring() {
	select {
	case b <- struct{}{}:
	default:
	}
}
