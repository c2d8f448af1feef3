// SPDX-License-Identifier: GPL-3.0-or-later

package flow

import "context"

// FlowDialer is implemented by a Dialer for which more of a flow counts than where it goes to: a pool that keeps the flows of one source
// together.
type FlowDialer interface {
	// DialFlow is Dial to f.Dst. f is read-only, and not kept.
	DialFlow(ctx context.Context, f *Flow) (Conn, error)
}
