// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/mutex-proxy/mutex/e2e/lab"
)

// TestUnits has systemd read the units. It exits with 0 on keys that it does not know, so whatever it says is a failure.
func TestUnits(t *testing.T) {
	t.Parallel()
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Skip("no systemd on this machine")
	}
	units, err := filepath.Glob("../packaging/systemd/*.service")
	if err != nil || len(units) != 2 {
		t.Fatalf("units: %v, %v", units, err)
	}
	dir := t.TempDir()
	var paths []string
	for _, u := range units {
		b, err := os.ReadFile(u)
		if err != nil {
			t.Fatal(err)
		}
		p := filepath.Join(dir, filepath.Base(u))
		// The program must exist; the manual pages need not.
		text := strings.ReplaceAll(string(b), "/usr/local/bin/mprox", lab.Binary(t))
		if err := os.WriteFile(p, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		paths = append(paths, p)
	}
	var said bytes.Buffer
	cmd := exec.Command(analyze, append([]string{"verify", "--man=no"}, paths...)...)
	cmd.Stderr, cmd.Stdout = &said, &said
	if err := cmd.Run(); err != nil || said.Len() > 0 {
		t.Errorf("%v: %s", err, said.String())
	}
}
