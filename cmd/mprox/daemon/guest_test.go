// SPDX-License-Identifier: GPL-3.0-or-later

package daemon

import (
	"errors"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/mutex-proxy/mutex/policy/process"
)

// TestWhoIs: a number is a process, unless there is none; a thread of the kernel, whose network is the machine's, is nobody's container.
func TestWhoIs(t *testing.T) {
	containers, err := process.NewContainers("unix:///nonexistent")
	if err != nil {
		t.Fatal(err)
	}
	d := &Daemon{containers: containers}
	if pid, byPID, err := d.whoIs(t.Context(), strconv.Itoa(os.Getpid())); pid != os.Getpid() || !byPID || err != nil {
		t.Errorf("this process: %d, %v, %v", pid, byPID, err)
	}
	for _, name := range []string{"web", "4194304"} {
		if _, byPID, err := d.whoIs(t.Context(), name); byPID || !errors.Is(err, process.ErrNoRuntime) {
			t.Errorf("%s: %v, %v", name, byPID, err)
		}
	}
	if comm, err := os.ReadFile("/proc/2/comm"); err != nil || strings.TrimSpace(string(comm)) != "kthreadd" {
		t.Skip("no thread of the kernel is to be seen in this PID namespace")
	}
	if _, _, err := d.whoIs(t.Context(), "2"); !errors.Is(err, process.ErrKernel) {
		t.Errorf("a thread of the kernel: %v", err)
	}
}

// TestLetIn: who is in no container that the runtime knows stays outside, and so does a chosen one, even with others beside it.
func TestLetIn(t *testing.T) {
	inventory := process.Inventory{Containers: []process.Container{{ID: "a"}, {ID: "b"}}}
	for _, tt := range []struct {
		ids  []string
		want bool
	}{
		{nil, false}, {[]string{"x"}, false}, {[]string{"a"}, true}, {[]string{"x", "a"}, true}, {[]string{"b"}, false}, {[]string{"a", "b"}, false},
	} {
		if got := letIn(tt.ids, inventory, map[string]bool{"b": true}); got != tt.want {
			t.Errorf("%v: want %v, got %v", tt.ids, tt.want, got)
		}
	}
}
