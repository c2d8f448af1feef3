// SPDX-License-Identifier: GPL-3.0-or-later

package flow

import (
	"context"
	"fmt"
	"testing"
)

// sourceDialer is a SourceDialer: it must be told the flow, not its destination alone.
type sourceDialer struct {
	dialer
	got *Flow
}

func (d *sourceDialer) DialFlow(_ context.Context, f *Flow) (Conn, error) {
	d.got = f
	return nil, fmt.Errorf("x: %w", ErrRefused)
}

func TestDialFlow(t *testing.T) {
	h := NewHandler(HandlerConfig{Table: NewTable(TableConfig{})})
	defer h.Close()
	d, f := new(sourceDialer), &Flow{Src: webAddr, Dst: AddrFrom(webAddr)}
	if _, err := h.dial(t.Context(), d, f); ReasonOf(err) != ReasonRefused || d.got != f {
		t.Errorf("%v, %v", err, d.got)
	}
}
