// SPDX-License-Identifier: GPL-3.0-or-later

package config

import (
	"errors"
	"fmt"
	"math"
	"math/bits"
	"net/netip"
	"reflect"
	"strconv"
	"strings"
	"time"

	"github.com/tailscale/hujson"
)

// Mark is a mask of packet mark bits.
type Mark uint32

// String returns the mark in hexadecimal.
func (m Mark) String() string { return fmt.Sprintf("0x%08x", uint32(m)) }

// MarshalText implements encoding.TextMarshaler.
func (m Mark) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

// contiguous reports whether the set bits form one run of at least 8, as the mark layout needs.
func (m Mark) contiguous() bool {
	n := bits.OnesCount32(uint32(m))
	return n >= 8 && uint64(m)>>bits.TrailingZeros32(uint32(m)) == 1<<n-1
}

// Bandwidth is bytes a second; 0 is no limit.
type Bandwidth uint64

// String returns the bandwidth as it can be written in a configuration.
func (b Bandwidth) String() string {
	if b == 0 {
		return "0"
	}
	return strconv.FormatUint(uint64(b), 10) + "B"
}

// MarshalText implements encoding.TextMarshaler.
func (b Bandwidth) MarshalText() ([]byte, error) { return []byte(b.String()), nil }

// String returns the range as it is written in a configuration.
func (p PortRange) String() string {
	if p.From == p.To {
		return strconv.Itoa(int(p.From))
	}
	return fmt.Sprintf("%d-%d", p.From, p.To)
}

// MarshalText implements encoding.TextMarshaler.
func (p PortRange) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

// hinted is an error of a value that comes with advice.
type hinted struct{ msg, hint string }

func (h *hinted) Error() string { return h.msg }

func hujsonKind(boolean string) hujson.Kind {
	if boolean == "true" {
		return 't'
	}
	return 'f'
}

// isTextual reports whether a scalar type is written as a string.
func isTextual(t reflect.Type) bool {
	switch reflect.Zero(t).Interface().(type) {
	case Duration, Bandwidth, Mark, PortRange, netip.Prefix, netip.Addr:
		return true
	}
	return t.Kind() == reflect.String
}

// setScalar converts the node into v, whose type is a scalar of the schema. Strings have their ${ENV} expanded already.
func setScalar(v reflect.Value, n *node) error {
	switch p := v.Addr().Interface().(type) {
	case *Duration:
		return set(p, n, '"', "a duration such as \"30s\"", parseDuration)
	case *Bandwidth:
		if n.kind == '0' && n.text == "0" {
			*p = 0
			return nil
		}
		return set(p, n, '"', "a bandwidth such as \"10MB\"", parseBandwidth)
	case *Mark:
		if n.kind == '0' {
			return set(p, n, '0', "", parseMark)
		}
		return set(p, n, '"', "a mask such as \"0xff000000\"", parseMark)
	case *PortRange:
		if n.kind == '0' {
			return set(p, n, '0', "", parsePorts)
		}
		return set(p, n, '"', "a port or a range such as \"1000-2000\"", parsePorts)
	case *netip.Prefix:
		return set(p, n, '"', "an address or a CIDR such as \"192.0.2.0/24\"", parsePrefix)
	case *netip.Addr:
		return set(p, n, '"', "an address such as \"192.0.2.1\"", parseAddr)
	}
	return setBasic(v, n)
}

func set[T any](p *T, n *node, kind hujson.Kind, want string, parse func(string) (T, error)) error {
	if n.kind != kind {
		return fmt.Errorf("want %s, got %s", want, n.describe())
	}
	t, err := parse(n.text)
	if err != nil {
		return err
	}
	*p = t
	return nil
}

func setBasic(v reflect.Value, n *node) error {
	switch v.Kind() {
	case reflect.String:
		if n.kind != '"' {
			return fmt.Errorf("want a string, got %s", n.describe())
		}
		v.SetString(n.text)
	case reflect.Bool:
		if n.kind != 't' && n.kind != 'f' {
			return fmt.Errorf("want true or false, got %s", n.describe())
		}
		v.SetBool(n.kind == 't')
	case reflect.Int:
		i, err := parseInt(n)
		if err != nil {
			return err
		}
		v.SetInt(i)
	case reflect.Uint32:
		i, err := parseInt(n)
		if err != nil {
			return err
		}
		if i < 0 || i > math.MaxUint32 {
			return fmt.Errorf("%s is not between 0 and %d", n.text, uint32(math.MaxUint32))
		}
		v.SetUint(uint64(i))
	default:
		return fmt.Errorf("no value can be written here")
	}
	return nil
}

func parseInt(n *node) (int64, error) {
	if n.kind != '0' {
		return 0, fmt.Errorf("want a number, got %s", n.describe())
	}
	i, err := strconv.ParseInt(n.text, 10, 64)
	switch {
	case errors.Is(err, strconv.ErrRange):
		return 0, fmt.Errorf("%s is out of range", n.text)
	case err != nil:
		return 0, fmt.Errorf("want a whole number, got %s", n.text)
	}
	return i, nil
}

func parseDuration(s string) (Duration, error) {
	d, err := time.ParseDuration(s)
	switch {
	case err != nil:
		return 0, fmt.Errorf("%q is not a duration: write a number and a unit, such as 300ms, 30s, 5m, 24h", s)
	case d < 0:
		return 0, fmt.Errorf("%q: a duration cannot be negative", s)
	}
	return Duration(d), nil
}

// bandwidthUnits: a lower-case unit ending in bit counts bits, the others bytes, as in tc(8) and in everyday writing.
func bandwidthUnit(unit string) (bytes float64, ok bool) {
	switch strings.TrimSuffix(unit, "/s") {
	case "bit":
		return 1.0 / 8, true
	case "kbit":
		return 1e3 / 8, true
	case "mbit":
		return 1e6 / 8, true
	case "gbit":
		return 1e9 / 8, true
	case "B":
		return 1, true
	case "kB", "KB":
		return 1e3, true
	case "MB":
		return 1e6, true
	case "GB":
		return 1e9, true
	case "KiB":
		return 1 << 10, true
	case "MiB":
		return 1 << 20, true
	case "GiB":
		return 1 << 30, true
	}
	return 0, false
}

func parseBandwidth(s string) (Bandwidth, error) {
	if s == "0" {
		return 0, nil
	}
	end := strings.LastIndexAny(s, "0123456789.") + 1
	num, err := strconv.ParseFloat(s[:end], 64)
	scale, ok := bandwidthUnit(strings.TrimSpace(s[end:]))
	if err != nil || !ok || strings.ContainsAny(s[:end], "xXpPeE_+") {
		return 0, fmt.Errorf("%q is not a bandwidth: write bytes (10MB, 10MiB) or bits (100mbit) a second, or 0 for no limit", s)
	}
	// 2^53 bytes a second: beyond that a float64 no longer counts bytes, and no link is that fast.
	b := num * scale
	if b < 1 || b > 1<<53 {
		return 0, fmt.Errorf("%q is not between 1 byte and 9 PB a second", s)
	}
	return Bandwidth(b), nil
}

func parseMark(s string) (Mark, error) {
	u, err := strconv.ParseUint(s, 0, 32)
	if err != nil {
		return 0, fmt.Errorf("%q is not a 32-bit mask such as 0xff000000", s)
	}
	return Mark(u), nil
}

func parsePort(s string) (uint16, error) {
	p, err := strconv.ParseUint(s, 10, 16)
	if err != nil || p == 0 {
		return 0, fmt.Errorf("%q is not a port: ports are 1 to 65535", s)
	}
	return uint16(p), nil
}

// parsePorts reads 22, 1000-2000, 1000:2000, :1023 and 1024: .
func parsePorts(s string) (PortRange, error) {
	i := strings.IndexAny(s, "-:")
	if i < 0 {
		p, err := parsePort(s)
		return PortRange{p, p}, err
	}
	r := PortRange{1, math.MaxUint16}
	var err error
	if from := s[:i]; from != "" {
		if r.From, err = parsePort(from); err != nil {
			return PortRange{}, err
		}
	}
	if to := s[i+1:]; to != "" {
		if r.To, err = parsePort(to); err != nil {
			return PortRange{}, err
		}
	}
	switch {
	case len(s) == 1:
		return PortRange{}, fmt.Errorf("%q is not a port range", s)
	case r.From > r.To:
		return PortRange{}, &hinted{fmt.Sprintf("%q: the range ends before it starts", s), fmt.Sprintf("did you mean \"%d-%d\"?", r.To, r.From)}
	}
	return r, nil
}

func parseAddr(s string) (netip.Addr, error) {
	a, err := netip.ParseAddr(s)
	if err != nil || a.Zone() != "" {
		return netip.Addr{}, fmt.Errorf("%q is not an IP address", s)
	}
	return a.Unmap(), nil
}

// parsePrefix reads a CIDR or an address. Host bits must be zero: 10.1.2.3/8 is more often a mistake than a way to write 10.0.0.0/8.
func parsePrefix(s string) (netip.Prefix, error) {
	if !strings.Contains(s, "/") {
		a, err := parseAddr(s)
		if err != nil {
			return netip.Prefix{}, fmt.Errorf("%q is not an IP address or CIDR", s)
		}
		return netip.PrefixFrom(a, a.BitLen()), nil
	}
	p, err := netip.ParsePrefix(s)
	switch {
	case err != nil:
		return netip.Prefix{}, fmt.Errorf("%q is not a CIDR", s)
	case p.Addr().Is4In6():
		return netip.Prefix{}, fmt.Errorf("%q: write v4-mapped prefixes as IPv4", s)
	case p != p.Masked():
		return netip.Prefix{}, &hinted{fmt.Sprintf("%q has bits set after the prefix", s), fmt.Sprintf("did you mean %q?", p.Masked())}
	}
	return p, nil
}
