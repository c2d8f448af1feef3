// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/mutex-proxy/mutex/"

// imports is the import rule of docs/ARCHITECTURE.md: what a package may import of ours. A package that is not named here may not exist.
// A path ending in /... stands for the packages below it.
var imports = map[string][]string{
	"flow":           {"flow/sniff"},
	"flow/sniff":     {},
	"tun":            {},
	"tun/tuntest":    {"tun"},
	"stack":          {"flow", "stack/offload", "tun"},
	"stack/offload":  {"flow"},
	"dialers":        {"dialers/uot", "flow"},
	"dialers/server": {"dialers", "dialers/uot", "flow"},
	"dialers/uot":    {"flow"},
	// The fakes beside the interfaces: used by tests alone.
	"dialers/dialertest": {"flow"},
	"dns":                {"flow"},
	"routing":            {"flow"},
	"policy":             {"policy/process"},
	"policy/process":     {},
	"config":             {},
	"control":            {"flow", "config", "control/client"},
	"control/client":     {},
	// A daemon's side of the API without a daemon: used by tests and examples alone.
	"control/controltest": {"control", "control/client", "flow"},
	"control/web":         {},
	"cmd/mprox":           {"..."},
	"cmd/mprox/daemon":    {"..."},
	"cmd/mprox/demo":      {"..."},
	"cmd/mprox/leak":      {"..."},
	"e2e":                 {"control/client", "e2e/lab"},
	"e2e/delay":           {},
	"e2e/lab":             {"control/client", "e2e/delay"},
	"e2e/bench":           {"control/client", "e2e/delay", "e2e/lab"},
}

// TestImportRule compares `go list` with the table.
func TestImportRule(t *testing.T) {
	t.Parallel()
	root := moduleRoot(t)
	cmd := exec.Command("go", "list", "-json=ImportPath,Imports,TestImports,XTestImports", "./...")
	cmd.Dir = root
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	dec := json.NewDecoder(bytes.NewReader(out))
	for {
		var p struct {
			ImportPath                         string
			Imports, TestImports, XTestImports []string
		}
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		name := strings.TrimPrefix(p.ImportPath, module)
		allowed, known := imports[name]
		if !known {
			t.Errorf("package %s is in no line of the import rule", name)
			continue
		}
		for _, i := range p.Imports {
			if sub, ours := strings.CutPrefix(i, module); ours && !slices.Contains(allowed, sub) && !slices.Contains(allowed, "...") {
				t.Errorf("%s imports %s", name, sub)
			}
			if strings.HasPrefix(i, "gvisor.dev/") && name != "stack" {
				t.Errorf("%s imports %s: only stack may", name, i)
			}
		}
	}
}

// maxFile and its unit are those of CONTRIBUTING.md: a file a reader can hold.
const maxFile = 500

// TestFileSize finds Go files that have grown too long, and such as lack the licence's line.
func TestFileSize(t *testing.T) {
	t.Parallel()
	root := moduleRoot(t)
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && strings.HasPrefix(d.Name(), ".") && path != root {
			return fs.SkipDir
		}
		if d.IsDir() || !strings.HasSuffix(path, ".go") {
			return nil
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(root, path)
		if n := bytes.Count(b, []byte("\n")); n > maxFile {
			t.Errorf("%s has %d lines, more than %d", name, n, maxFile)
		}
		if !bytes.HasPrefix(b, []byte("// SPDX-License-Identifier: GPL-3.0-or-later\n\n")) {
			t.Errorf("%s does not begin with the licence", name)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func moduleRoot(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Dir(strings.TrimSpace(string(out)))
}
