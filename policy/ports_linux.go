// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"fmt"
	"slices"

	"github.com/mutex-proxy/mutex/policy/process"
)

// Port is the host's side of a veth that is a port of a bridge.
type Port struct {
	Index  int
	Bridge string
	// nsid is the number by which our namespace knows that of the other side; -1 = it is our own, or not there yet.
	nsid int
}

// Ports returns the bridges of the namespace and the veths that are ports of them, both in a fixed order.
func (h *LinuxHost) Ports() (bridges []string, ports []Port, err error) {
	links, err := h.rt.LinkList()
	if err != nil {
		return nil, nil, fmt.Errorf("ports of bridges: %w", err)
	}
	name := make(map[int]string)
	for _, l := range links {
		if l.Type() == "bridge" {
			name[l.Attrs().Index] = l.Attrs().Name
			bridges = append(bridges, l.Attrs().Name)
		}
	}
	for _, l := range links {
		a := l.Attrs()
		if bridge, ok := name[a.MasterIndex]; ok && l.Type() == "veth" {
			ports = append(ports, Port{Index: a.Index, Bridge: bridge, nsid: a.NetNsID})
		}
	}
	slices.Sort(bridges)
	slices.SortFunc(ports, func(a, b Port) int { return a.Index - b.Index })
	return bridges, ports, nil
}

// Behind finds the network namespaces (by inode) that ports lead to, and the processes in them. What has no process yet is left out.
func (h *LinuxHost) Behind(ports []Port) (netns map[int]uint64, in map[uint64][]int, err error) {
	pids, err := process.All()
	if err != nil {
		return nil, nil, err
	}
	in = make(map[uint64][]int)
	for _, pid := range pids {
		if inode, err := NetnsOf(pid); err == nil && inode != h.id.Inode {
			in[inode] = append(in[inode], pid)
		}
	}
	byID := make(map[int]uint64)
	for inode, pids := range in {
		// The kernel reads the thread's namespace again: one that has moved on meanwhile would be taken for another.
		nsid, err := h.rt.GetNetNsIdByPid(pids[0])
		if now, nerr := NetnsOf(pids[0]); err == nil && nerr == nil && now == inode && nsid >= 0 {
			byID[nsid] = inode
		}
	}
	netns = make(map[int]uint64)
	for _, p := range ports {
		if inode, ok := byID[p.nsid]; ok {
			netns[p.Index] = inode
		}
	}
	return netns, in, nil
}
