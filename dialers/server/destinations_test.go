// SPDX-License-Identifier: GPL-3.0-or-later

package server

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/mutex-proxy/mutex/dialers/dialertest"
	"github.com/mutex-proxy/mutex/flow"
)

func TestDestinations(t *testing.T) {
	for _, tt := range []struct {
		name        string
		allow, deny string
		yes, no     string
	}{
		{
			"by default", "", "", "64:ff9b::192.0.2.1 2002:c000:201::1 192.0.2.1 10.0.0.1 2001:db8::1 fd00::1 100.64.0.1 128.0.0.1",
			"127.0.0.1 127.255.255.255 ::1 ::ffff:127.0.0.1 0.0.0.0 0.0.0.1 :: ::ffff:0.0.0.0 169.254.169.254 fe80::1 fe80::1%eth0 224.0.0.251 ff02::fb 255.255.255.255 " +
				"64:ff9b::127.0.0.1 64:ff9b:1::169.254.169.254 2002:7f00:1::1 ::127.0.0.1 ::ffff:0:127.0.0.1 64:ff9b::0.0.0.0",
		},
		{"one of loopback", "127.0.0.1", "", "127.0.0.1 ::ffff:127.0.0.1", "127.0.0.2 ::1"},
		{"all of loopback", "loopback", "", "127.0.0.1 ::1", "169.254.1.1"},
		{"any is less than what is denied by default", "any", "", "192.0.2.1", "127.0.0.1 169.254.169.254"},
		{"only some", "192.0.2.0/24 2001:db8::/32", "any", "192.0.2.1 2001:db8::1", "198.51.100.1 2001:db9::1 127.0.0.1"},
		{"but one", "192.0.2.0/24", "any 192.0.2.7", "192.0.2.6", "192.0.2.7"},
		{"deny before allow", "192.0.2.0/24", "192.0.2.0/24", "198.51.100.1", "192.0.2.1"},
		{"both an address and what it stands for", "127.0.0.1", "", "64:ff9b::127.0.0.1", "64:ff9b::127.0.0.2"},
		{"private", "", "private", "192.0.2.1", "64:ff9b::10.0.0.1 10.1.2.3 192.168.1.1 172.31.0.1 fd00::1"},
	} {
		f, err := Destinations(strings.Fields(tt.allow), strings.Fields(tt.deny))
		if err != nil {
			t.Fatal(err)
		}
		for want, list := range map[bool]string{true: tt.yes, false: tt.no} {
			for s := range strings.FieldsSeq(list) {
				if got := f(netip.AddrPortFrom(netip.MustParseAddr(s), 80)); got != want {
					t.Errorf("%s: %s allowed: %v", tt.name, s, got)
				}
			}
		}
		if f(netip.AddrPort{}) {
			t.Errorf("%s: no address is allowed", tt.name)
		}
	}
	for _, bad := range []string{"", "a", "192.0.2.1/24", "192.0.2.0/33", "fe80::1%eth0", "::ffff:127.0.0.0/104"} {
		if _, err := Destinations(nil, []string{bad}); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
	if _, err := Destinations(make([]string, maxDestinations+1), nil); err == nil {
		t.Error("no bound")
	}
}

// A name that leads to loopback is no way around, with any protocol.
func TestDestinationsByName(t *testing.T) {
	allow, err := Destinations(nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	_, at := start(t, Config{Allow: allow})
	origin := dialertest.Start(t, dialertest.Send("secret"))
	for _, raw := range []string{"socks5h://", "socks4a://", "http://"} {
		for _, dst := range []flow.Addr{{Host: "localhost", Port: origin.Addr.Port()}, flow.AddrFrom(origin.Addr), {IP: netip.IPv4Unspecified(), Port: origin.Addr.Port()}} {
			if raw == "socks4a://" && dst.Host == "" && dst.IP.IsUnspecified() {
				continue // the mark of a name
			}
			if _, err := dialer(t, raw+at.String()).Dial(t.Context(), dst); err == nil {
				t.Errorf("%s reaches %v", raw, dst)
			}
		}
	}
	if origin.Accepted() != 0 {
		t.Error("the origin was connected to")
	}
}
