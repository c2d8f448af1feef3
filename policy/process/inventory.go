// SPDX-License-Identifier: GPL-3.0-or-later

package process

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
)

const (
	// maxInventory bounds each list: an entry has some KB, so thousands of containers fit.
	maxInventory = 32 << 20
	// idLen is the length of a container's ID, and of a network's: SHA-256 in hex.
	idLen = 64
	// bridgeOption names the bridge of a network that does not get its name from the network's ID.
	bridgeOption = "com.docker.network.bridge.name"
)

// Inventory is what the container runtimes know.
type Inventory struct {
	Containers []Container // whether they run or not; PID is not filled in
	Bridges    []string
}

// Inventory asks all runtimes. ErrNoRuntime when none answers.
func (c *Containers) Inventory(ctx context.Context) (Inventory, error) {
	ctx, cancel := context.WithTimeout(ctx, inspectTimeout)
	defer cancel()
	var out Inventory
	err := ErrNoRuntime
	for _, socket := range c.sockets {
		containers, cerr := list(ctx, socket, "/containers/json?all=1")
		networks, nerr := list(ctx, socket, "/networks")
		if ferr := errors.Join(cerr, nerr); ferr != nil {
			if !errors.Is(ferr, ErrNoRuntime) {
				return Inventory{}, ferr
			}
			continue
		}
		one, perr := parseInventory(containers, networks)
		if perr != nil {
			return Inventory{}, fmt.Errorf("container runtime at %s: %w", socket, perr)
		}
		out.Containers, out.Bridges, err = append(out.Containers, one.Containers...), append(out.Bridges, one.Bridges...), nil
	}
	return out, err
}

func list(ctx context.Context, socket, path string) ([]byte, error) {
	body, err := get(ctx, socket, path)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	b, err := io.ReadAll(io.LimitReader(body, maxInventory+1))
	if err == nil && len(b) > maxInventory {
		err = fmt.Errorf("container runtime at %s: a list of more than %d bytes", socket, maxInventory)
	}
	return b, err
}

// parseInventory reads the answers to GET /containers/json and GET /networks.
func parseInventory(containers, networks []byte) (Inventory, error) {
	var cs []struct {
		ID    string `json:"Id"`
		Names []string
	}
	var ns []struct {
		ID      string `json:"Id"`
		Driver  string
		Options map[string]string
	}
	if err := errors.Join(json.Unmarshal(containers, &cs), json.Unmarshal(networks, &ns)); err != nil {
		return Inventory{}, fmt.Errorf("not lists of containers and networks: %w", err)
	}
	var out Inventory
	for _, c := range cs {
		one := Container{ID: c.ID}
		for _, name := range c.Names {
			// What has two slashes is how another container calls it.
			if name = strings.TrimPrefix(name, "/"); CheckContainer(name) == nil {
				one.Name = name
			}
		}
		if CheckContainer(c.ID) == nil {
			out.Containers = append(out.Containers, one)
		}
	}
	for _, n := range ns {
		name, ok := n.Options[bridgeOption]
		if !ok && len(n.ID) >= shortID {
			name = bridgePrefix + n.ID[:shortID]
		}
		if n.Driver == "bridge" && name != "" {
			out.Bridges = append(out.Bridges, name)
		}
	}
	return out, nil
}

const (
	bridgePrefix = "br-"
	shortID      = 12
)

// RuntimeBridge reports whether a bridge is called as container runtimes call theirs when nobody has told them another name.
func RuntimeBridge(name string) bool {
	if name == "docker0" || name == "docker_gwbridge" {
		return true
	}
	for _, prefix := range []string{"podman", "cni-podman"} {
		if n, ok := strings.CutPrefix(name, prefix); ok && n != "" && strings.Trim(n, "0123456789") == "" {
			return true
		}
	}
	id, ok := strings.CutPrefix(name, bridgePrefix)
	return ok && len(id) == shortID && strings.Trim(id, hexDigits) == ""
}

const hexDigits = "0123456789abcdef"

// ContainerIDs returns what may be IDs of containers in the names of a process's cgroups: runtimes put them there before the process runs.
func ContainerIDs(pid int) []string {
	b, err := os.ReadFile(Dir(pid) + "/cgroup")
	if err != nil {
		return nil
	}
	return idsIn(string(b))
}

// idsIn finds the words of 64 hex digits, each once.
func idsIn(s string) []string {
	var out []string
	seen := make(map[string]bool)
	for _, word := range strings.FieldsFunc(s, func(r rune) bool { return !strings.ContainsRune(hexDigits, r) }) {
		if len(word) == idLen && !seen[word] {
			seen[word] = true
			out = append(out, word)
		}
	}
	return out
}

// Named returns the container that a name, an ID or an unambiguous beginning of one means, in the order in which runtimes look. Of an ambiguous
// beginning it returns all.
func (i Inventory) Named(name string) []Container {
	var exact, begins []Container
	for _, c := range i.Containers {
		switch {
		case c.ID == name:
			return []Container{c}
		case name == "":
		case c.Name == name:
			exact = append(exact, c)
		case strings.HasPrefix(c.ID, name):
			begins = append(begins, c)
		}
	}
	if len(exact) > 0 {
		return exact
	}
	return begins
}
