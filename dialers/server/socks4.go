// SPDX-License-Identifier: GPL-3.0-or-later

package server

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"

	"github.com/mutex-proxy/mutex/flow"
)

const (
	socks4Version  = 4
	socks4Granted  = 90
	socks4Rejected = 91
	socks4Ident    = 93
	// maxString bounds user id and name, as in SOCKS5.
	maxString = 255
)

var errTooLong = errors.New("string too long")

// socks4 serves SOCKS4 and SOCKS4a. Neither has a password, so with users it is refused.
func (c *session) socks4() error {
	cmd, dst, err := readRequest4(c.in)
	switch {
	case errors.Is(err, errName):
		c.refuse(reply4(socks4Rejected, netip.AddrPort{}))
	case err != nil:
	case c.s.auth != nil:
		c.refuse(reply4(socks4Ident, netip.AddrPort{}))
		err = errAuth
	case cmd == cmdBind:
		return c.bind4(dst)
	case cmd != cmdConnect:
		c.refuse(reply4(socks4Rejected, netip.AddrPort{}))
		err = fmt.Errorf("command %d: %w", cmd, errors.ErrUnsupported)
	default:
		return c.connect4(dst)
	}
	return fmt.Errorf("socks4: %w", err)
}

func (c *session) connect4(dst flow.Addr) error {
	if isOverTCP(dst) {
		return c.overTCP(dst, reply4(socks4Granted, netip.AddrPort{}), func(error) []byte { return reply4(socks4Rejected, netip.AddrPort{}) })
	}
	c.dst = dst.String()
	out, err := c.dial(dst)
	if err != nil {
		c.refuse(reply4(socks4Rejected, netip.AddrPort{}))
		return err
	}
	var bound netip.AddrPort
	if a, ok := out.LocalAddr().(*net.TCPAddr); ok {
		bound = a.AddrPort()
	}
	return c.relay(out, reply4(socks4Granted, bound))
}

// readRequest4 reads a request. An address 0.0.0.x, x not 0, means that a name follows (SOCKS4a).
func readRequest4(in *bufio.Reader) (cmd byte, dst flow.Addr, err error) {
	var head [8]byte
	if _, err = io.ReadFull(in, head[:]); err != nil {
		return 0, dst, err
	}
	if head[0] != socks4Version {
		return 0, dst, errVersion
	}
	if _, err = readZero(in); err != nil { // the user id: a claim, not a credential
		return 0, dst, err
	}
	dst.IP = netip.AddrFrom4([4]byte(head[4:]))
	if head[4] == 0 && head[5] == 0 && head[6] == 0 && head[7] != 0 {
		var name string
		if name, err = readZero(in); err != nil {
			return 0, dst, err
		}
		dst, err = nameAddr(name)
	}
	dst.Port = binary.BigEndian.Uint16(head[2:])
	return head[1], dst, err
}

// readZero reads a string up to its zero byte.
func readZero(in *bufio.Reader) (string, error) {
	var b []byte
	for len(b) <= maxString {
		c, err := in.ReadByte()
		if err != nil {
			return "", err
		}
		if c == 0 {
			return string(b), nil
		}
		b = append(b, c)
	}
	return "", errTooLong
}

// reply4 returns a reply; addresses that are not IPv4 are sent as 0.0.0.0.
func reply4(code byte, bound netip.AddrPort) []byte {
	b := binary.BigEndian.AppendUint16([]byte{0, code}, bound.Port())
	var v4 [4]byte
	if ip := bound.Addr().Unmap(); ip.Is4() {
		v4 = ip.As4()
	}
	return append(b, v4[:]...)
}
