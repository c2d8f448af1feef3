// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"context"
	"errors"
	"time"
)

// race makes up to n attempts at the same thing and returns the first success. The next attempt starts when one has failed in a way that
// again accepts, or when the last one started stagger ago (0 = never for that reason); the earlier ones go on, since a slow answer is still
// an answer. It returns after every attempt has ended: losers are cancelled, and their late successes closed with discard.
//
// errs holds the failures in the order in which they happened.
func race[T any](
	ctx context.Context, n int, stagger time.Duration, attempt func(ctx context.Context, i int) (T, error), again func(error) bool,
	discard func(T),
) (won T, errs []error) {
	if n == 1 { // the common case costs no goroutine
		won, err := attempt(ctx, 0)
		if err != nil {
			errs = append(errs, err)
		}
		return won, errs
	}
	type result struct {
		v   T
		err error
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	results := make(chan result, n)
	started, running, ok := 0, 0, false
	start := func() {
		i := started
		started++
		running++
		go func() {
			v, err := attempt(ctx, i)
			results <- result{v, err}
		}()
	}
	timer := time.NewTimer(stagger)
	if stagger <= 0 {
		timer.Stop()
	}
	defer timer.Stop()
	start()
	for running > 0 {
		select {
		case <-timer.C:
			if started < n && !ok && ctx.Err() == nil {
				start()
				timer.Reset(stagger)
			}
		case r := <-results:
			running--
			switch {
			case r.err == nil && ok:
				discard(r.v)
			case r.err == nil:
				won, ok = r.v, true
				cancel(errLost)
			case ok: // a loser that was cancelled
			default:
				errs = append(errs, r.err)
				if !again(r.err) {
					n = started // the truth about the destination: nobody else needs to be asked
				}
				if started < n && ctx.Err() == nil {
					start()
					if stagger > 0 {
						timer.Reset(stagger)
					}
				}
			}
		}
	}
	if ok {
		return won, nil
	}
	return won, errs
}

var errLost = errors.New("another attempt was faster")
