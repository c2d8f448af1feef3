// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
)

// Existing says which sockets that are older than the capture are meant: those of processes that match one of Who and none of Not, or, when
// All, everybody's but theirs.
type Existing struct {
	Who, Not []Selector
	All      bool
	Found    map[string][]CgroupRef // what the selectors' cgroups and units stand for
	Direct   []netip.Prefix         // destinations that stay direct
	Inbound  []Tuple                // connections that came in
	Ours     func(mark uint32) bool // sockets with such a mark are captured already, or never are
}

// ResetExisting ends the connections of those whom a context captures, by Select or by what is given in its place, that they have made
// before: the application is told at once (ECONNABORTED), and its next connection is captured. Connections that came in, over loopback and to
// direct destinations stay. It returns how many were ended. Apply must have come first, or what replaces them would be as they were.
func (m *Manager) ResetExisting(ctx context.Context, name string, who []Selector) (int, error) {
	m.mu.Lock()
	if m.closed || !m.prepared {
		m.mu.Unlock()
		return 0, ErrClosed
	}
	i := slices.IndexFunc(m.spec.Contexts, func(c ContextSpec) bool { return c.Name == name })
	if i < 0 {
		m.mu.Unlock()
		return 0, fmt.Errorf("no context %q", name)
	}
	spec, c := m.spec, m.spec.Contexts[i]
	e := Existing{Who: who, Not: c.Exclude, All: c.Mode == ModeGlobal, Inbound: m.base.Sockets.Inbound}
	found, err := m.findCgroupsLocked(spec)
	m.mu.Unlock()
	if err != nil || c.Mode == ModeGateway || c.Mode == ModeDisabled {
		return 0, err
	}
	snap, err := m.host.Snapshot(ctx, spec.TableBase)
	if err != nil {
		return 0, err
	}
	e.Found = found
	_, e.Direct = directRoutes(spec, c, snap)
	e.Ours = func(mark uint32) bool { return ourMark(spec.Mask, mark) }
	return m.host.ResetSockets(ctx, e)
}

// meant reports whether a socket's connection is one to end, whoever's it is.
func (e *Existing) meant(local, remote netip.AddrPort, mark uint32) bool {
	addr := remote.Addr().Unmap()
	switch {
	case remote.Port() == 0, addr.IsLoopback(), e.Ours(mark):
		return false
	case slices.ContainsFunc(e.Direct, func(p netip.Prefix) bool { return p.Contains(addr) }):
		return false
	}
	return !slices.ContainsFunc(e.Inbound, func(t Tuple) bool { return t.Local == local && t.Remote == remote })
}
