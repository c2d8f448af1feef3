// SPDX-License-Identifier: GPL-3.0-or-later

package demo

import (
	"errors"
	"fmt"
	"net"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The demo's own network. All of it is from the documentation ranges, and none of it is connected to the machine's network.
const (
	clientLink = "uplink0"
	farLink    = "demo0"
	clientV4   = "198.51.100.2/24"
	farV4      = "198.51.100.1/24"
	clientV6   = "2001:db8:100::2/64"
	farV6      = "2001:db8:100::1/64"
	originV4   = "203.0.113.10/32"
	originV6   = "2001:db8:200::10/128"
)

// network is two namespaces joined by a veth pair: the client's, with a default route, and the far side with the proxy and the origin.
type network struct {
	client, far *namespace
}

func newNetwork() (*network, error) {
	client, err := newNamespace()
	if err != nil {
		return nil, err
	}
	far, err := newNamespace()
	if err != nil {
		client.Close()
		return nil, err
	}
	n := &network{client: client, far: far}
	if err := n.connect(); err != nil {
		n.Close()
		return nil, err
	}
	return n, nil
}

// Close ends the namespaces and kills every process started in them.
func (n *network) Close() {
	n.client.Close()
	n.far.Close()
}

func (n *network) connect() error {
	c, err := netlink.NewHandleAt(n.client.handle)
	if err != nil {
		return fmt.Errorf("demo: netlink: %w", err)
	}
	defer c.Close()
	f, err := netlink.NewHandleAt(n.far.handle)
	if err != nil {
		return fmt.Errorf("demo: netlink: %w", err)
	}
	defer f.Close()
	veth := &netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: clientLink}, PeerName: farLink, PeerNamespace: netlink.NsFd(n.far.handle),
	}
	if err := c.LinkAdd(veth); err != nil {
		return fmt.Errorf("demo: veth: %w", err)
	}
	if err := errors.Join(
		raise(c, "lo"), raise(f, "lo"),
		raise(c, clientLink, clientV4, clientV6), raise(f, farLink, farV4, farV6),
		raise(f, "lo", originV4, originV6),
	); err != nil {
		return err
	}
	link, err := c.LinkByName(clientLink)
	if err != nil {
		return err
	}
	for _, gw := range []string{farV4, farV6} {
		ip, _, _ := net.ParseCIDR(gw)
		if err := c.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: ip}); err != nil {
			return fmt.Errorf("demo: default route via %s: %w", ip, err)
		}
	}
	return nil
}

// raise sets a link up with the addresses; IPv6 ones without duplicate detection, so that they are usable at once.
func raise(h *netlink.Handle, name string, addrs ...string) error {
	link, err := h.LinkByName(name)
	if err != nil {
		return fmt.Errorf("demo: link %s: %w", name, err)
	}
	for _, s := range addrs {
		a, err := netlink.ParseAddr(s)
		if err != nil {
			return err
		}
		if a.IP.To4() == nil {
			a.Flags = unix.IFA_F_NODAD
		}
		if err := h.AddrAdd(link, a); err != nil {
			return fmt.Errorf("demo: address %s: %w", s, err)
		}
	}
	return h.LinkSetUp(link)
}
