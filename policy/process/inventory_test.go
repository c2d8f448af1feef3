// SPDX-License-Identifier: GPL-3.0-or-later

package process

import (
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const (
	someContainers = `[{"Id":"abc123","Names":["/other/alias","/web"],"State":"running"},{"Id":"abd","Names":[]},{"Id":"../x","Names":["/x"]},{"Id":"e1","Names":["/abd1"]}]`
	someNetworks   = `[{"Id":"0123456789abcdef","Driver":"bridge","Options":{}},{"Id":"f","Driver":"bridge","Options":{"com.docker.network.bridge.name":"docker0"}},
		{"Id":"1123456789abcdef","Driver":"macvlan"},{"Id":"2","Driver":"bridge"}]`
)

func TestInventory(t *testing.T) {
	c := &Containers{sockets: []string{"/nonexistent", newRuntime(t)}}
	got, err := c.Inventory(t.Context())
	want := Inventory{Containers: []Container{{ID: "abc123", Name: "web"}, {ID: "abd"}, {ID: "e1", Name: "abd1"}}, Bridges: []string{"br-0123456789ab", "docker0"}}
	if err != nil || !cmp.Equal(got, want) {
		t.Errorf("%v %s", err, cmp.Diff(want, got))
	}
	none := &Containers{sockets: []string{"/nonexistent"}}
	if _, err := none.Inventory(t.Context()); !errors.Is(err, ErrNoRuntime) {
		t.Errorf("without a runtime: %v", err)
	}
	for name, ids := range map[string][]string{"web": {"abc123"}, "abc123": {"abc123"}, "ab": {"abc123", "abd"}, "abd": {"abd"}, "abd1": {"e1"}, "": nil, "no": nil} {
		var have []string
		for _, c := range got.Named(name) {
			have = append(have, c.ID)
		}
		if !cmp.Equal(have, ids) {
			t.Errorf("%q: want %v, got %v", name, ids, have)
		}
	}
}

func TestRuntimeBridge(t *testing.T) {
	for name, want := range map[string]bool{
		"docker0": true, "docker_gwbridge": true, "br-0123456789ab": true, "podman0": true, "cni-podman12": true,
		"br-lan": false, "br-0123456789aX": false, "br0": false, "virbr0": false, "podman": false, "podmanx": false, "docker1": false, "lxcbr0": false, "": false,
	} {
		if got := RuntimeBridge(name); got != want {
			t.Errorf("%q: want %v, got %v", name, want, got)
		}
	}
}

func TestContainerIDs(t *testing.T) {
	a, b := strings.Repeat("a1", 32), strings.Repeat("0f", 32)
	for text, want := range map[string][]string{
		"1:name=systemd:/docker/" + a + "\n0::/docker/" + a + "\n":       {a},
		"0::/system.slice/docker-" + a + ".scope":                        {a},
		"0::/machine.slice/libpod-" + b + ".scope/docker/" + a + "/init": {b, a},
		"0::/user.slice":        nil,
		"0::/x/" + a + "0":      nil,
		"0::/x/" + a[:63] + "g": nil,
	} {
		if got := idsIn(text); !cmp.Equal(got, want) {
			t.Errorf("%q: want %v, got %v", text, want, got)
		}
	}
	if got := ContainerIDs(os.Getpid()); len(got) > 4 {
		t.Errorf("of this process: %v", got)
	}
}

func FuzzInventory(f *testing.F) {
	f.Add([]byte(someContainers), []byte(someNetworks))
	f.Add([]byte(`[]`), []byte(`null`))
	f.Fuzz(func(t *testing.T, containers, networks []byte) {
		in, err := parseInventory(containers, networks)
		for _, c := range in.Containers {
			if err != nil || CheckContainer(c.ID) != nil || c.Name != "" && CheckContainer(c.Name) != nil {
				t.Errorf("%+v, %v", c, err)
			}
		}
	})
}
