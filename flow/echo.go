// SPDX-License-Identifier: GPL-3.0-or-later

package flow

import (
	"context"
	"net/netip"
)

type echoCache struct{}

// Echo decides whether an ICMP echo request is answered.
func (h *Handler) Echo(_ context.Context, _, _ netip.Addr) (alive bool, r Reason) {
	return false, ReasonHostUnreachable
}
