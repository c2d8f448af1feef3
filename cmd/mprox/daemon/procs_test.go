// SPDX-License-Identifier: GPL-3.0-or-later

package daemon

import (
	"os"
	"path/filepath"
	"testing"
)

func TestProcsKeeper(t *testing.T) {
	idle := procsLook{spare: 2}
	for _, c := range []struct {
		name string
		all  bool
		look procsLook
		want bool
	}{
		{"nothing to do", false, idle, false},
		{"a flow", false, procsLook{used: .5, spare: .1}, false},
		{"more than one processor can do", false, procsLook{used: .95, spare: 1}, true},
		{"but there is no other", false, procsLook{used: .95, spare: 0}, false},
		{"many connections", false, procsLook{used: .3, flows: 1000}, true},
		{"goes on, and takes what was spare", true, procsLook{used: 1.9}, true},
	} {
		k := procsKeeper{all: c.all}
		if got := k.look(c.look); got != c.want {
			t.Errorf("%s: %v", c.name, got)
		}
	}
	k := procsKeeper{all: true}
	for i := range procsCalm - 1 {
		if !k.look(idle) {
			t.Fatalf("calm after %d looks", i+1)
		}
	}
	if k.look(idle) {
		t.Error("not calm")
	}
}

func TestSeeProcs(t *testing.T) {
	before := seeProcs(100)
	for l := (procsLook{}); l.used == 0; l = seeProcs(100).since(before) { // until it has used some
	}
	if l := seeProcs(200).since(before); l.flows <= 0 || l.used <= 0 || l.spare < 0 {
		t.Errorf("%+v", l)
	}
	if l := seeProcs(50).since(before); l.flows != 0 {
		t.Errorf("fewer flows than before: %+v", l)
	}
	file := filepath.Join(t.TempDir(), "stat")
	for text, want := range map[string]float64{"cpu  1 2 3 450 5 6\ncpu0 1\n": 4.5, "cpu 1 2": 0, "cpu a b c d e f\n": 0, "": 0} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := idleProcs(file); got != want {
			t.Errorf("%q: %v", text, got)
		}
	}
}
