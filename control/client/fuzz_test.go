// SPDX-License-Identifier: GPL-3.0-or-later

package client

import (
	"strings"
	"testing"
)

// FuzzEvents: a stream yields flows and at most one error, which is the last.
func FuzzEvents(f *testing.F) {
	for _, seed := range []string{
		"event: flow\ndata: {\"id\":1,\"state\":\"new\"}\n\n", ":\n\n", "data: {\n", "data:[]\n", "data: null\n\n", "\r\ndata: {}\r\n", "data", "\x00",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, stream string) {
		n, failed := 0, false
		for _, err := range events[Flow](strings.NewReader(stream)) {
			if failed {
				t.Fatal("it goes on after an error")
			}
			failed = err != nil
			n++
		}
		if n > strings.Count(stream, "data:") {
			t.Fatalf("%d events in %q", n, stream)
		}
	})
}
