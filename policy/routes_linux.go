// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"

	vnl "github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// snapshotTries is how often a dump is repeated that a change has interrupted. What is missing in it would be taken for deleted.
const snapshotTries = 5

// Snapshot implements Host.
func (h *LinuxHost) Snapshot(ctx context.Context, base int) (s Snapshot, err error) {
	for range snapshotTries {
		if s, err = h.snapshot(ctx, base); !errors.Is(err, vnl.ErrDumpInterrupted) {
			return s, err
		}
	}
	return s, err
}

func (h *LinuxHost) snapshot(ctx context.Context, base int) (Snapshot, error) {
	s := Snapshot{Netns: h.id, Nameservers: nameservers(), RPFilter: map[string]int{}, SrcValid: map[string]int{}}
	links, err := h.rt.LinkList()
	if err != nil {
		return s, fmt.Errorf("list links: %w", err)
	}
	names := map[int]string{}
	for _, l := range links {
		a := l.Attrs()
		names[a.Index] = a.Name
		s.Links = append(s.Links, Link{Index: a.Index, Name: a.Name, Up: a.Flags&net.FlagUp != 0, Loopback: a.Flags&net.FlagLoopback != 0, Ethernet: a.EncapType == "ether"})
	}
	_, err = os.Stat("/proc/sys/net/ipv6")
	s.IPv6 = err == nil
	for _, v6 := range families(s) {
		if err := context.Cause(ctx); err != nil {
			return s, err
		}
		if err := h.snapshotFamily(&s, names, v6, base); err != nil {
			return s, err
		}
	}
	return s, h.inside(func() error {
		for _, dev := range append([]string{"all"}, linkNames(s.Links)...) {
			s.RPFilter[dev] = readInt("/proc/sys/net/ipv4/conf/" + dev + "/rp_filter")
			s.SrcValid[dev] = readInt("/proc/sys/net/ipv4/conf/" + dev + "/src_valid_mark")
		}
		return nil
	})
}

func (h *LinuxHost) snapshotFamily(s *Snapshot, names map[int]string, v6 bool, base int) error {
	fam := unix.AF_INET
	if v6 {
		fam = unix.AF_INET6
	}
	addrs, err := h.rt.AddrList(nil, fam)
	if err != nil {
		return fmt.Errorf("list addresses: %w", err)
	}
	for _, a := range addrs {
		if p, ok := prefixOf(a.IPNet); ok {
			const notASource = unix.IFA_F_TENTATIVE | unix.IFA_F_DEPRECATED | unix.IFA_F_TEMPORARY | unix.IFA_F_DADFAILED
			secondary := v6 && a.Flags&notASource != 0 // IFA_F_TEMPORARY is IFA_F_SECONDARY in IPv4
			s.Addrs = append(s.Addrs, IfAddr{Link: a.LinkIndex, Prefix: p, Unusable: secondary || a.Scope != unix.RT_SCOPE_UNIVERSE})
		}
	}
	rules, err := h.rt.RuleList(fam)
	if err != nil {
		return fmt.Errorf("list rules: %w", err)
	}
	for _, r := range rules {
		s.Rules = append(s.Rules, ruleFrom(r, v6))
	}
	err = h.rt.RouteListFilteredIter(fam, &vnl.Route{Table: unix.RT_TABLE_UNSPEC}, vnl.RT_FILTER_TABLE, func(r vnl.Route) bool {
		if r.Table == mainTable || r.Table >= base && r.Table < base+tablesPerSlot*MaxContexts {
			if route, ok := routeFrom(r, names, v6); ok {
				s.Routes = append(s.Routes, route)
			}
		}
		return true
	})
	if err != nil {
		return fmt.Errorf("list routes: %w", err)
	}
	return nil
}

func linkNames(links []Link) []string {
	var out []string
	for _, l := range links {
		out = append(out, l.Name)
	}
	return out
}

func prefixOf(n *net.IPNet) (netip.Prefix, bool) {
	if n == nil {
		return netip.Prefix{}, false
	}
	ip, ok := netip.AddrFromSlice(n.IP)
	if !ok {
		return netip.Prefix{}, false
	}
	ones, _ := n.Mask.Size()
	return netip.PrefixFrom(ip.Unmap(), ones), true
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func ruleFrom(r vnl.Rule, v6 bool) Rule {
	out := Rule{V6: v6, Priority: r.Priority, Mark: r.Mark, Local: r.IifName == loopback, IPProto: uint8(r.IPProto), Table: r.Table, Protocol: r.Protocol}
	if r.Mask != nil {
		out.Mask = *r.Mask
	}
	if r.Goto > 0 {
		out.Goto, out.Table = r.Goto, 0
	}
	out.Nop = r.Goto <= 0 && r.Table == 0 && r.Protocol == Protocol // the library does not tell the action; of ours, only nop has no table
	var other []string
	add := func(cond bool, format string, a ...any) {
		if cond {
			other = append(other, fmt.Sprintf(format, a...))
		}
	}
	port := func(name string, p *vnl.RulePortRange, to *uint16) {
		switch {
		case p == nil:
		case p.Start == p.End:
			*to = p.Start
		default:
			add(true, "%s %d-%d", name, p.Start, p.End)
		}
	}
	port("sport", r.Sport, &out.Sport)
	port("dport", r.Dport, &out.Dport)
	add(r.Invert, "not")
	add(r.Src != nil, "from %s", r.Src)
	add(r.Dst != nil, "to %s", r.Dst)
	add(r.IifName != "" && r.IifName != loopback, "iif %s", r.IifName)
	add(r.OifName != "", "oif %s", r.OifName)
	add(r.UIDRange != nil, "uidrange")
	add(r.Tos != 0, "tos %#x", r.Tos)
	add(r.TunID != 0, "tun_id %d", r.TunID)
	add(r.SuppressPrefixlen >= 0, "suppress_prefixlength %d", r.SuppressPrefixlen)
	add(r.SuppressIfgroup >= 0, "suppress_ifgroup %d", r.SuppressIfgroup)
	out.Other = strings.Join(other, " ")
	return out
}

func (r Rule) netlink() *vnl.Rule {
	out := vnl.NewRule()
	out.Family, out.Priority, out.Table, out.IPProto, out.Protocol = unix.AF_INET, r.Priority, r.Table, int(r.IPProto), r.Protocol
	if r.V6 {
		out.Family = unix.AF_INET6
	}
	if r.Mask != 0 {
		out.Mark, out.Mask = r.Mark, &r.Mask
	}
	if r.Local {
		out.IifName = loopback
	}
	if r.Sport != 0 {
		out.Sport = vnl.NewRulePortRange(r.Sport, r.Sport)
	}
	if r.Dport != 0 {
		out.Dport = vnl.NewRulePortRange(r.Dport, r.Dport)
	}
	if r.Goto != 0 {
		out.Goto = r.Goto
	}
	if r.Nop {
		out.Type = nl.FR_ACT_NOP
	}
	return out
}

// AddRule implements Host.
func (h *LinuxHost) AddRule(r Rule) error {
	if err := h.rt.RuleAdd(r.netlink()); err != nil && !errors.Is(err, unix.EEXIST) {
		return routeError("ip rule add "+r.String(), err)
	}
	return nil
}

// DeleteRule implements Host.
func (h *LinuxHost) DeleteRule(r Rule) error {
	if err := h.rt.RuleDel(r.netlink()); err != nil && !errors.Is(err, unix.ENOENT) {
		return routeError("ip rule del "+r.String(), err)
	}
	return nil
}

func routeError(what string, err error) error {
	if errors.Is(err, unix.EPERM) {
		return fmt.Errorf("%w: CAP_NET_ADMIN: %s", ErrPrivilege, what)
	}
	return fmt.Errorf("%s: %w", what, err)
}

// routeFrom leaves out what is cached, and keeps the first hop of several.
func routeFrom(r vnl.Route, names map[int]string, v6 bool) (Route, bool) {
	out := Route{Table: r.Table, Dst: defaultDst(v6), Dev: names[r.LinkIndex], Metric: r.Priority, Protocol: uint8(r.Protocol)}
	if p, ok := prefixOf(r.Dst); ok {
		out.Dst = p
	}
	if len(r.MultiPath) > 0 {
		out.Dev, r.Gw, r.Flags = names[r.MultiPath[0].LinkIndex], r.MultiPath[0].Gw, r.MultiPath[0].Flags
	}
	out.OnLink = r.Flags&int(vnl.FLAG_ONLINK) != 0
	if gw, ok := netip.AddrFromSlice(r.Gw); ok && !gw.IsUnspecified() {
		out.Via = gw.Unmap()
	}
	if src, ok := netip.AddrFromSlice(r.Src); ok {
		out.Src = src.Unmap()
	}
	out.LinkOnly = !v6 && r.Scope == unix.RT_SCOPE_LINK
	switch r.Type {
	case unix.RTN_UNICAST:
	case unix.RTN_UNREACHABLE:
		out.Type, out.Dev = RouteUnreachable, ""
	case unix.RTN_THROW:
		out.Type, out.Dev = RouteThrow, ""
	case unix.RTN_LOCAL:
		out.Type = RouteLocal
	default:
		out.Type = RouteOther
	}
	if r.Via != nil || r.Encap != nil || r.MPLSDst != nil {
		out.Type = RouteOther
	}
	return out, true
}

func (h *LinuxHost) route(r Route) (*vnl.Route, error) {
	out := &vnl.Route{Table: r.Table, Dst: ipNet(r.Dst), Priority: r.Metric, Protocol: vnl.RouteProtocol(r.Protocol), Family: unix.AF_INET}
	if r.V6() {
		out.Family = unix.AF_INET6
	}
	switch r.Type {
	case RouteUnreachable:
		out.Type = unix.RTN_UNREACHABLE
	case RouteThrow:
		out.Type = unix.RTN_THROW
	case RouteUnicast, RouteLocal:
		out.Type = unix.RTN_UNICAST
		if r.Type == RouteLocal {
			out.Type, out.Scope = unix.RTN_LOCAL, unix.RT_SCOPE_HOST
		}
		l, err := h.rt.LinkByName(r.Dev)
		if err != nil {
			return nil, err
		}
		out.LinkIndex = l.Attrs().Index
	default:
		return nil, fmt.Errorf("route type %d", r.Type)
	}
	if r.Via.IsValid() {
		out.Gw = r.Via.AsSlice()
	}
	if r.Src.IsValid() {
		out.Src = r.Src.AsSlice()
	}
	if r.LinkOnly {
		out.Scope = unix.RT_SCOPE_LINK
	}
	if r.OnLink {
		out.Flags = int(vnl.FLAG_ONLINK)
	}
	return out, nil
}

// AddRoute implements Host. Append, not replace: the kernel may hold the same prefix and metric over several devices.
func (h *LinuxHost) AddRoute(r Route) error {
	nlr, err := h.route(r)
	if err == nil {
		err = h.rt.RouteAppend(nlr)
	}
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return routeError("ip route add "+r.String(), err)
	}
	return nil
}

// DeleteRoute implements Host.
func (h *LinuxHost) DeleteRoute(r Route) error {
	nlr, err := h.route(r)
	if _, gone := errors.AsType[vnl.LinkNotFoundError](err); gone {
		return nil // routes go with their device
	}
	if err == nil {
		err = h.rt.RouteDel(nlr)
	}
	if err != nil && !errors.Is(err, unix.ESRCH) && !errors.Is(err, unix.ENOENT) {
		return routeError("ip route del "+r.String(), err)
	}
	return nil
}

// SetLink implements Host.
func (h *LinuxHost) SetLink(s LinkSpec) (bool, error) {
	l, err := h.rt.LinkByName(s.Name)
	if err != nil {
		if _, gone := errors.AsType[vnl.LinkNotFoundError](err); gone {
			return false, &DeviceGoneError{s.Name, err}
		}
		return false, fmt.Errorf("device %s: %w", s.Name, err)
	}
	a, changed := l.Attrs(), false
	do := func(needed bool, f func() error) {
		if needed && err == nil {
			changed, err = true, f()
		}
	}
	do(a.MTU != s.MTU, func() error { return h.rt.LinkSetMTU(l, s.MTU) })
	do(a.TxQLen != s.TxQLen, func() error { return h.rt.LinkSetTxQLen(l, s.TxQLen) })
	have, lerr := h.rt.AddrList(l, unix.AF_UNSPEC)
	if lerr != nil && !errors.Is(lerr, vnl.ErrDumpInterrupted) {
		return changed, fmt.Errorf("addresses of %s: %w", s.Name, lerr)
	}
	for _, ip := range []netip.Addr{s.Addr4, s.Addr6} {
		if !ip.IsValid() {
			continue
		}
		there := slices.ContainsFunc(have, func(h vnl.Addr) bool { p, ok := prefixOf(h.IPNet); return ok && p.Addr() == ip })
		do(!there, func() error {
			addr := &vnl.Addr{IPNet: ipNet(netip.PrefixFrom(ip, ip.BitLen()))}
			if ip.Is6() {
				addr.Flags = unix.IFA_F_NODAD
			}
			err := h.rt.AddrReplace(l, addr)
			if ip.Is6() && (errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM)) {
				return nil // IPv6 is switched off here (net.ipv6.conf.*.disable_ipv6): it stays closed
			}
			return err
		})
	}
	do(a.Flags&net.FlagUp == 0, func() error { return h.rt.LinkSetUp(l) })
	if err != nil {
		return changed, routeError("device "+s.Name, err)
	}
	return changed, nil
}
