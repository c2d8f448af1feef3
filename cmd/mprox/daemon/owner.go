// SPDX-License-Identifier: GPL-3.0-or-later

package daemon

import (
	"errors"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/control"
	"github.com/mutex-proxy/mutex/flow"
	"github.com/mutex-proxy/mutex/policy"
)

// owner is policy.Owners as a flow asks it.
type owner struct {
	*policy.Owners
	metrics *control.Metrics
}

var _ flow.Owner = owner{}

// Lookup implements flow.Owner. Nobody knows whose an ICMP echo is.
func (o owner) Lookup(network flow.Network, src, dst netip.AddrPort) (flow.App, error) {
	var proto uint8
	switch network {
	case flow.TCP:
		proto = unix.IPPROTO_TCP
	case flow.UDP:
		proto = unix.IPPROTO_UDP
	default:
		return flow.App{}, flow.ErrNotSupported
	}
	start := time.Now()
	w, err := o.Owners.Lookup(proto, src, dst)
	result := control.AttributionFound
	switch {
	case errors.Is(err, os.ErrNotExist):
		result = control.AttributionNotFound
	case err != nil:
		result = control.AttributionError
	}
	o.metrics.Attributed(w.Method, result, time.Since(start))
	if err != nil {
		return flow.App{}, err
	}
	return flow.App{PID: w.PID, UID: w.UID, GID: w.GID, Exe: w.Exe, Cgroup: w.Cgroup, Method: w.Method}, nil
}
