// SPDX-License-Identifier: GPL-3.0-or-later

package flow

import "context"

// turns bounds, by its capacity, how many may do something at a time.
type turns chan struct{}

// take waits for a turn. Its error is the cause why ctx was done first.
func (t turns) take(ctx context.Context) error {
	select {
	case t <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// tryTake takes a turn if one is left.
func (t turns) tryTake() bool {
	select {
	case t <- struct{}{}:
		return true
	default:
		return false
	}
}

// give ends a turn that was taken.
func (t turns) give() { <-t }
