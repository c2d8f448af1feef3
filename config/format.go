// SPDX-License-Identifier: GPL-3.0-or-later

package config

import (
	"bytes"
	"embed"
	"fmt"
	"strings"

	"github.com/tailscale/hujson"
)

// maxPasses bounds Format: hujson settles in one or two passes.
const maxPasses = 4

// Format returns the text with the layout of `mprox fmt`: comments stay, order stays, only white space changes. Formatting the result
// again changes nothing. The error is an Errors with positions.
func Format(data []byte) ([]byte, error) {
	src := newSource("", data)
	if root, errs := parseTree(src); root == nil {
		return nil, errs
	}
	out := endLine(data)
	for range maxPasses {
		// hujson works inside the buffer that it is given.
		next, err := hujson.Format(bytes.Clone(out))
		if err != nil {
			return nil, Errors{syntaxError(src, err)}
		}
		if next = endLine(next); bytes.Equal(next, out) {
			break
		}
		out = next
	}
	return out, nil
}

// endLine returns a copy of the text that ends with exactly one newline.
func endLine(data []byte) []byte {
	return append(bytes.Clone(bytes.TrimRight(data, " \t\r\n")), '\n')
}

//go:embed templates/*.json
var templates embed.FS

// TemplateNames returns the names that Template knows, for help and completion.
func TemplateNames() []string {
	return []string{"minimal", "desktop", "server", "sidecar", "gateway"}
}

// Template returns a commented configuration to start from. It passes Load as it is; 203.0.113.10:1080 stands for the proxy.
func Template(name string) ([]byte, error) {
	data, err := templates.ReadFile("templates/" + name + ".json")
	if err != nil {
		return nil, fmt.Errorf("unknown template %q: there are %s", name, strings.Join(TemplateNames(), ", "))
	}
	return data, nil
}
