// SPDX-License-Identifier: GPL-3.0-or-later

package config

import (
	"fmt"
	"testing"
)

// Whatever of a proxy's URL may be a secret is not printed.
func TestProxyURLIsMasked(t *testing.T) {
	for raw, want := range map[ProxyURL]string{
		"http://h": "http://h",
		"http://u:hush@h?header=X-A:hush&header=B:hush&weight=2": "http://u:***@h?header=***&header=***&weight=2",
		"http://h?weight=2&header=X-A:hush":                      "http://h?weight=2&header=***",
		"http://h?header=":                                       "http://h?header=***",
	} {
		if got := raw.String(); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
		if got := fmt.Sprintf("%v %q", raw, raw); got != want+" "+want {
			t.Errorf("formatted: %s", got)
		}
	}
}
