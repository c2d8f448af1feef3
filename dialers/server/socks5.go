// SPDX-License-Identifier: GPL-3.0-or-later

package server

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/mutex-proxy/mutex/flow"
)

// Protocol numbers of RFC 1928 and RFC 1929.
const (
	socksVersion = 5
	authVersion  = 1

	methodNone     = 0x00
	methodPassword = 0x02
	methodRefused  = 0xff

	cmdConnect = 1
	cmdUDP     = 3

	atypIPv4   = 1
	atypDomain = 3
	atypIPv6   = 4

	repSucceeded    = 0
	repGeneral      = 1
	repProhibited   = 2
	repNet          = 3
	repHost         = 4
	repRefused      = 5
	repTTL          = 6
	repCommand      = 7
	repAddressType  = 8
	maxSOCKSRequest = 3 + 1 + 1 + 255 + 2
)

var (
	errVersion = errors.New("wrong version")
	errAtyp    = errors.New("unknown address type")
	errName    = errors.New("invalid name")
)

// socks5 serves RFC 1928. Clients may send greeting, authentication, request and payload without waiting: bytes are taken one message at
// a time from the buffered reader.
func (c *session) socks5() error {
	if err := c.greet(); err != nil {
		return fmt.Errorf("socks5: %w", err)
	}
	cmd, dst, err := readRequest(c.in)
	switch {
	case errors.Is(err, errAtyp):
		c.refuse(socksReply(repAddressType, netip.AddrPort{}))
	case errors.Is(err, errName):
		c.refuse(socksReply(repHost, netip.AddrPort{}))
	case err != nil:
	case cmd == cmdConnect:
		return c.socksConnect(dst)
	case cmd == cmdBind:
		return c.bind5(dst)
	case cmd == cmdUDP:
		return c.associate(dst)
	default:
		c.refuse(socksReply(repCommand, netip.AddrPort{}))
		err = fmt.Errorf("command %d: %w", cmd, errors.ErrUnsupported)
	}
	return fmt.Errorf("socks5: %w", err)
}

// greet chooses a method and authenticates.
func (c *session) greet() error {
	methods, err := readGreeting(c.in)
	if err != nil {
		return err
	}
	method := byte(methodRefused)
	switch {
	case c.s.auth == nil && slices.Contains(methods, methodNone):
		method = methodNone
	case slices.Contains(methods, methodPassword): // also if we want none: some clients offer nothing else
		method = methodPassword
	}
	if method == methodRefused {
		c.refuse([]byte{socksVersion, methodRefused})
		return errors.New("no common authentication method")
	}
	if _, err := c.conn.Write([]byte{socksVersion, method}); err != nil || method == methodNone {
		return err
	}
	user, password, err := readPassword(c.in)
	if err != nil {
		return err
	}
	if c.s.auth != nil && !c.s.auth(user, password) {
		c.refuse([]byte{authVersion, 1})
		return errAuth
	}
	c.user = user
	_, err = c.conn.Write([]byte{authVersion, 0})
	return err
}

func readGreeting(r io.Reader) ([]byte, error) {
	var head [2]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	if head[0] != socksVersion {
		return nil, errVersion
	}
	methods := make([]byte, head[1])
	_, err := io.ReadFull(r, methods)
	return methods, err
}

func readPassword(r io.Reader) (user, password string, err error) {
	var head [1]byte
	if _, err = io.ReadFull(r, head[:]); err != nil {
		return "", "", err
	}
	if head[0] != authVersion {
		return "", "", errVersion
	}
	if user, err = readString(r); err != nil {
		return "", "", err
	}
	password, err = readString(r)
	return user, password, err
}

func readString(r io.Reader) (string, error) {
	var n [1]byte
	if _, err := io.ReadFull(r, n[:]); err != nil {
		return "", err
	}
	b := make([]byte, n[0])
	_, err := io.ReadFull(r, b)
	return string(b), err
}

func readRequest(r io.Reader) (cmd byte, dst flow.Addr, err error) {
	var head [4]byte
	if _, err = io.ReadFull(r, head[:]); err != nil {
		return 0, dst, err
	}
	if head[0] != socksVersion {
		return 0, dst, errVersion
	}
	dst, err = readAddrOf(r, head[3])
	return head[1], dst, err
}

// readAddr reads type, address and port.
func readAddr(r io.Reader) (flow.Addr, error) {
	var atyp [1]byte
	if _, err := io.ReadFull(r, atyp[:]); err != nil {
		return flow.Addr{}, err
	}
	return readAddrOf(r, atyp[0])
}

// readAddrOf reads address and port.
func readAddrOf(r io.Reader, atyp byte) (dst flow.Addr, err error) {
	var ip4 [4]byte
	var ip6 [16]byte
	switch atyp {
	case atypIPv4:
		_, err = io.ReadFull(r, ip4[:])
		dst.IP = netip.AddrFrom4(ip4)
	case atypIPv6:
		_, err = io.ReadFull(r, ip6[:])
		dst.IP = netip.AddrFrom16(ip6).Unmap()
	case atypDomain:
		var name string
		if name, err = readString(r); err == nil {
			dst, err = nameAddr(name)
		}
	default:
		return dst, errAtyp
	}
	if err != nil {
		return dst, err
	}
	var port [2]byte
	_, err = io.ReadFull(r, port[:])
	dst.Port = binary.BigEndian.Uint16(port[:])
	return dst, err
}

// nameAddr turns what a client calls a name into an address: names that are IP literals become that.
func nameAddr(name string) (flow.Addr, error) {
	if ip, err := netip.ParseAddr(name); err == nil {
		return flow.Addr{IP: ip.Unmap().WithZone("")}, nil
	}
	name = strings.ToLower(strings.TrimSuffix(name, "."))
	if name == "" || len(name) > 253 {
		return flow.Addr{}, errName
	}
	for _, c := range []byte(name) {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' && c != '_' && c != '.' {
			return flow.Addr{}, errName
		}
	}
	return flow.Addr{Host: name}, nil
}

// socksReply returns a reply with an address; the zero AddrPort is sent as 0.0.0.0:0.
func socksReply(rep byte, bound netip.AddrPort) []byte {
	return appendAddr([]byte{socksVersion, rep, 0}, bound)
}

func appendAddr(b []byte, a netip.AddrPort) []byte {
	switch ip := a.Addr().Unmap(); {
	case ip.Is6():
		b = append(append(b, atypIPv6), ip.AsSlice()...)
	case ip.Is4():
		b = append(append(b, atypIPv4), ip.AsSlice()...)
	default:
		b = append(b, atypIPv4, 0, 0, 0, 0)
	}
	return binary.BigEndian.AppendUint16(b, a.Port())
}

// repOf maps a dial error to the code of RFC 1928 section 6 that comes nearest.
func repOf(err error) byte {
	if errors.Is(err, flow.ErrUpstream) {
		return repGeneral // ours, when we are a link of a chain
	}
	switch flow.ReasonOf(err) {
	case flow.ReasonRefused:
		return repRefused
	case flow.ReasonNetUnreachable:
		return repNet
	case flow.ReasonTimeout:
		return repTTL
	case flow.ReasonProhibited:
		return repProhibited
	}
	return repHost
}

// socksConnect is CONNECT. The success reply carries the address that we connect from.
func (c *session) socksConnect(dst flow.Addr) error {
	if isOverTCP(dst) {
		return c.overTCP(dst, socksReply(repSucceeded, netip.AddrPort{}), func(err error) []byte { return socksReply(repOf(err), netip.AddrPort{}) })
	}
	c.dst = dst.String()
	out, err := c.dial(dst)
	if err != nil {
		c.refuse(socksReply(repOf(err), netip.AddrPort{}))
		return err
	}
	var bound netip.AddrPort
	if a, ok := out.LocalAddr().(*net.TCPAddr); ok {
		bound = a.AddrPort()
	}
	return c.relay(out, socksReply(repSucceeded, bound))
}
