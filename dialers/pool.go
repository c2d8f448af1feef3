// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"errors"
	"time"

	"go.uber.org/zap"

	"github.com/mutex-proxy/mutex/flow"
)

// PoolConfig is how a pool behaves. The zero value of a field means its default.
type PoolConfig struct {
	Retry    int           // how many other members are tried for one flow; 2, negative = none
	Hedge    time.Duration // start of the next attempt while one still runs; 0 = an even share of the dial time
	Failures int           // consecutive failures that eject a member; 3
	Eject    time.Duration // for how long; 30 s
	Log      *zap.Logger
	Now      func() time.Time
}

// NewPool returns a pool of upstreams under one name.
func NewPool(name, strategy string, members []flow.Dialer, cfg PoolConfig) (flow.Dialer, error) {
	_, _, _, _ = name, strategy, members, cfg
	return nil, errors.ErrUnsupported
}

// bestError returns the error that says most about the destination: that of an upstream that works, if there is one.
func bestError(errs []error) error {
	for i := len(errs) - 1; i >= 0; i-- {
		if !errors.Is(errs[i], flow.ErrUpstream) {
			return errs[i]
		}
	}
	if len(errs) > 0 {
		return errs[0]
	}
	return flow.ErrUpstream
}
