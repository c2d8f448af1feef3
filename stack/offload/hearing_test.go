// SPDX-License-Identifier: GPL-3.0-or-later

package offload

import (
	"errors"
	"testing"
	"time"

	"go.uber.org/zap"
)

func TestHearing(t *testing.T) {
	now := time.Unix(1000, 0)
	h := hearing{log: zap.NewNop(), now: func() time.Time { return now }}
	may := func(want bool) {
		t.Helper()
		if err := h.try(); (err == nil) != want || err != nil && !errors.Is(err, errDeaf) {
			t.Fatalf("%v, want %v", err, want)
		}
	}
	may(true) // the first
	second := make(chan error)
	go func() { second <- h.try() }()
	select {
	case err := <-second:
		t.Fatalf("%v before the first was heard", err)
	case <-time.After(20 * time.Millisecond):
	}
	h.yes()
	if err := <-second; err != nil {
		t.Fatal(err)
	}
	h.unknown()
	for range 3 { // it was heard: as many as there are
		may(true)
	}
	h.unknown()
	h.no()
	may(false)
	h.no() // of the same time
	now = now.Add(deafFirst)
	may(true) // one is tried
	may(false)
	h.no()
	now = now.Add(deafFirst)
	may(false) // twice as long
	now = now.Add(deafFirst)
	may(true)
	h.yes()
	may(true)
	may(true)
	if h.pause != 0 || h.waiting != 2 {
		t.Errorf("pause %v, %d wait", h.pause, h.waiting)
	}
}
