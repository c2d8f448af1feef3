// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"os"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"

	"github.com/mutex-proxy/mutex/control"
	"github.com/mutex-proxy/mutex/control/controltest"
)

// TestOperationsDocument looks for every command, exit code and metric in docs/operations.md.
func TestOperationsDocument(t *testing.T) {
	data, err := os.ReadFile("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	text := string(data)
	everyCommand(newRootCommand(newGlobals()), func(cmd *cobra.Command) {
		if cmd.HasParent() && !strings.Contains(text, "`"+cmd.CommandPath()) {
			t.Errorf("no word about %s", cmd.CommandPath())
		}
	})
	m, err := control.NewMetrics(controltest.New(), "v1")
	if err != nil {
		t.Fatal(err)
	}
	descs := make(chan *prometheus.Desc, 100)
	m.Describe(descs)
	close(descs)
	for d := range descs {
		_, rest, _ := strings.Cut(d.String(), `fqName: "`)
		name, _, _ := strings.Cut(rest, `"`)
		if !strings.HasPrefix(name, "mprox_") || !strings.Contains(text, "| `"+name+"` |") {
			t.Errorf("no word about the metric %s", name)
		}
	}
}
