// SPDX-License-Identifier: GPL-3.0-or-later

package control

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/mutex-proxy/mutex/control/client"
)

func TestAppsOf(t *testing.T) {
	curl, none := client.App{PID: 7, Exe: "/usr/bin/curl", Method: "bpf"}, client.App{UID: -1, GID: -1}
	got := appsOf([]Flow{{App: none, BytesUp: 5}, {App: curl, BytesUp: 1, BytesDown: 2}, {App: curl, BytesDown: 100}})
	want := []client.AppUsage{{App: curl, Flows: 2, BytesUp: 1, BytesDown: 102}, {App: none, Flows: 1, BytesUp: 5}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if got := appsOf(nil); got == nil || len(got) != 0 {
		t.Errorf("nobody: %#v", got)
	}
}
