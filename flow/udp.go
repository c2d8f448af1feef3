// SPDX-License-Identifier: GPL-3.0-or-later

package flow

import (
	"context"
	"net/netip"
)

// UDP is the life of one application socket.
func (h *Handler) UDP(_ context.Context, _ netip.AddrPort, _ PacketSource, _ PacketSink) {
}
