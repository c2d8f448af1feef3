// SPDX-License-Identifier: GPL-3.0-or-later

// Package lab builds closed networks for black-box tests: namespaces joined by veth, real proxy servers, an origin that counts, resolvers
// that trap queries, a link with delay and loss, and a capture of the client's uplink.
//
//	lan 192.168.77.53 ──┐
//	                    br0 ── router ════════ proxy ──────── origin
//	client 192.168.77.2 ┘  .1      203.0.113.1   .10   198.51.100.1   .80
//	  (eth0 is captured)          (veth, or a relay that delays and loses)
//
// Everything is routed, so that what is not captured reaches the origin directly: a leak is seen, it does not merely fail. No namespace
// has a way out of the machine. It is not part of the product; only the tests of package e2e use it.
package lab

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The addresses of every lab. The LAN is private and so is a direct destination; all others are not.
var (
	ClientV4  = netip.MustParseAddr("192.168.77.2")
	ClientV6  = netip.MustParseAddr("2001:db8:1::2")
	ClientULA = netip.MustParseAddr("fd77::2")
	GatewayV4 = netip.MustParseAddr("192.168.77.1")
	GatewayV6 = netip.MustParseAddr("2001:db8:1::1")
	LANV4     = netip.MustParseAddr("192.168.77.53")
	LANULA    = netip.MustParseAddr("fd77::53")
	ProxyV4   = netip.MustParseAddr("203.0.113.10")
	ProxyV6   = netip.MustParseAddr("2001:db8:2::10")
	ExitV4    = netip.MustParseAddr("198.51.100.1") // the proxy host as the origin sees it
	ExitV6    = netip.MustParseAddr("2001:db8:3::1")
	Exit2V4   = netip.MustParseAddr("198.51.100.2") // a second address of the proxy host, for a second upstream
	OriginV4  = netip.MustParseAddr("198.51.100.80")
	OriginV6  = netip.MustParseAddr("2001:db8:3::80")

	// UnreachableV4 and V6 answer the proxy host with "no route to host" at once.
	UnreachableV4 = netip.MustParseAddr("198.51.100.99")
	UnreachableV6 = netip.MustParseAddr("2001:db8:3::99")
	// NoNetV4 and V6 are in no table of the proxy host.
	NoNetV4 = netip.MustParseAddr("192.0.2.1")
	NoNetV6 = netip.MustParseAddr("2001:db8:ffff::1")
	// BlackholeV4 swallows everything: seen from the client, a dead server; seen from the proxy, a destination that never answers.
	BlackholeV4 = netip.MustParseAddr("203.0.113.200")
	BlackholeV6 = netip.MustParseAddr("2001:db8:2::200")

	// LANPrefixes are the private on-link prefixes of the client.
	LANPrefixes = []netip.Prefix{netip.MustParsePrefix("192.168.77.0/24"), netip.MustParsePrefix("fd77::/64")}
)

// Options says how a lab differs from the usual one.
type Options struct {
	RTT        time.Duration // round trip between router and proxy; 0 = a plain veth unless Loss is set
	Loss       float64       // fraction of packets lost between router and proxy, each way
	ResolvConf string        // the client's /etc/resolv.conf; default: the resolver on the LAN
}

// Lab is one closed network.
type Lab struct {
	Client, Router, LAN, Proxy, OriginNS *NS

	Dir    string // short, private, removed at the end
	Origin *Origin
	t      *testing.T
	name   string
}

// slots bounds how many labs exist at the same time on a machine, whatever process they are of: servers, engine and clients of two already
// fill two cores.
const slots = 2

// takeSlot waits until there are less labs, and gives the slot back at the end of the test. The locks end with their process.
func takeSlot(t *testing.T) {
	t.Helper()
	var files []*os.File
	for i := range slots {
		f, err := os.OpenFile(fmt.Sprintf("/run/%s-slot%d", namePrefix, i), os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		files = append(files, f)
	}
	Eventually(t, 10*time.Minute, "a slot for a lab is free", func() bool {
		return slices.ContainsFunc(files, func(f *os.File) bool { return unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil })
	})
}

var sweepOnce sync.Once

// New builds a lab that lives as long as the test. It needs root: without it the test is skipped, in CI it fails.
func New(t *testing.T, o Options) *Lab {
	t.Helper()
	RequireRoot(t)
	takeSlot(t)
	sweepOnce.Do(sweep)

	l := &Lab{t: t, name: fmt.Sprintf("%s%d-%d", namePrefix, os.Getpid(), labSeq.Add(1))}
	dir, err := os.MkdirTemp("", l.name+"-") //nolint:usetesting // a socket's path has at most 107 bytes, t.TempDir's may have more
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil { // servers drop to other users
		t.Fatal(err)
	}
	l.Dir = dir
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	started := time.Now()
	if err := l.build(o); err != nil {
		t.Fatalf("lab: %v", err)
	}
	l.Origin = newOrigin(t, l.OriginNS)
	Progress("%s: lab %s is up after %v", t.Name(), l.name, time.Since(started).Round(time.Millisecond))
	t.Cleanup(func() { Progress("%s: %v", t.Name(), time.Since(started).Round(time.Millisecond)) })
	return l
}

// RequireRoot ends the test when it cannot make namespaces: skipped at a developer's, failed in CI.
func RequireRoot(t *testing.T) {
	t.Helper()
	Require(t, os.Geteuid() == 0, "root")
	_, err := os.Stat("/dev/net/tun")
	Require(t, err == nil, "/dev/net/tun")
}

// Require skips the test when something it needs is missing, and fails it where CI is set: there, nothing may be missing.
func Require(t *testing.T, ok bool, what string) {
	t.Helper()
	switch {
	case ok:
	case os.Getenv("CI") != "":
		t.Fatalf("needs %s", what)
	default:
		t.Skipf("needs %s", what)
	}
}

// Progress says on standard error what is going on; a run of the whole suite takes minutes.
func Progress(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "e2e %s "+format+"\n", append([]any{time.Now().Format("15:04:05")}, args...)...)
}

// newNS makes one namespace of the lab and has it removed at the end of the test.
func (l *Lab) newNS(role string, m Mounts) (*NS, error) {
	n, err := newNS(l.name+"-"+role, l.Dir, m)
	if n != nil {
		l.t.Cleanup(func() {
			if err := n.close(); err != nil {
				l.t.Errorf("lab: %v", err)
			}
		})
	}
	return n, err
}

func (l *Lab) build(o Options) (err error) {
	if o.ResolvConf == "" {
		o.ResolvConf = "nameserver " + LANV4.String() + "\noptions timeout:2 attempts:1\n"
	}
	type part struct {
		role string
		ns   **NS
		m    Mounts
	}
	passwd, shadow := accounts()
	for _, p := range []part{
		{"client", &l.Client, Mounts{Files: map[string]string{"/etc/resolv.conf": o.ResolvConf}}},
		{"router", &l.Router, Mounts{}},
		{"lan", &l.LAN, Mounts{}},
		{"proxy", &l.Proxy, Mounts{Files: map[string]string{
			"/etc/passwd": passwd, "/etc/shadow": shadow,
			"/etc/resolv.conf": "nameserver " + OriginV4.String() + "\noptions timeout:2 attempts:1\n",
		}, Tmpfs: []string{"/run"}}},
		{"origin", &l.OriginNS, Mounts{}},
	} {
		if *p.ns, err = l.newNS(p.role, p.m); err != nil {
			return err
		}
	}
	for _, n := range []*NS{l.Router, l.Proxy} {
		if err := n.Sysctl(map[string]string{"net/ipv4/ip_forward": "1", "net/ipv6/conf/all/forwarding": "1"}); err != nil {
			return err
		}
	}
	if err := l.wire(); err != nil {
		return err
	}
	// The router answers for everything, so that a packet sent "on link" in despair (a socket bound to the device, no route) gets away.
	if err := l.Router.Sysctl(map[string]string{"net/ipv4/conf/br0/proxy_arp": "1", "net/ipv4/neigh/br0/proxy_delay": "0"}); err != nil {
		return err
	}
	if o.RTT > 0 || o.Loss > 0 {
		return newRelay(l.t, l.Router, l.Proxy, "wan0", o.RTT/2, o.Loss, l.wanUp)
	}
	if err := l.Router.ip("link add wan0 type veth peer name wan0 netns " + l.Proxy.Name); err != nil {
		return err
	}
	return l.wanUp()
}

// wire joins client, LAN host and router by a bridge, and proxy and origin by a cable.
func (l *Lab) wire() error {
	steps := []struct {
		ns    *NS
		lines []string
	}{
		{l.Router, []string{
			"link add br0 type bridge mcast_snooping 0",
			"link add c0 type veth peer name eth0 netns " + l.Client.Name,
			"link add l0 type veth peer name eth0 netns " + l.LAN.Name,
			"link set c0 master br0 up", "link set l0 master br0 up",
			"link set br0 up", "addr add " + GatewayV4.String() + "/24 dev br0", "addr add " + GatewayV6.String() + "/64 dev br0 nodad",
			"addr add fd77::1/64 dev br0 nodad",
		}},
		{l.Client, []string{
			"link set eth0 up", "addr add " + ClientV4.String() + "/24 dev eth0", "addr add " + ClientV6.String() + "/64 dev eth0 nodad",
			"addr add " + ClientULA.String() + "/64 dev eth0 nodad",
			"route add default via " + GatewayV4.String(), "route add default via " + GatewayV6.String(),
		}},
		{l.LAN, []string{
			"link set eth0 up", "addr add " + LANV4.String() + "/24 dev eth0", "addr add 2001:db8:1::53/64 dev eth0 nodad",
			"addr add " + LANULA.String() + "/64 dev eth0 nodad",
			"route add default via " + GatewayV4.String(), "route add default via " + GatewayV6.String(),
		}},
		{l.Proxy, []string{
			"link add eth1 type veth peer name eth0 netns " + l.OriginNS.Name,
			"link set eth1 up", "addr add " + ExitV4.String() + "/24 dev eth1", "addr add " + ExitV6.String() + "/64 dev eth1 nodad",
			"addr add " + Exit2V4.String() + "/24 dev eth1",
			"route add unreachable " + UnreachableV4.String() + "/32", "route add unreachable " + UnreachableV6.String() + "/128",
		}},
		{l.OriginNS, []string{
			"link set eth0 up", "addr add " + OriginV4.String() + "/24 dev eth0", "addr add " + OriginV6.String() + "/64 dev eth0 nodad",
			"route add default via " + ExitV4.String(), "route add default via " + ExitV6.String(),
		}},
	}
	for _, s := range steps {
		if err := s.ns.ip(s.lines...); err != nil {
			return err
		}
	}
	return nil
}

// wanUp gives wan0 of router and proxy their addresses and routes.
func (l *Lab) wanUp() error {
	if err := l.Router.ip(
		"link set wan0 up", "addr add 203.0.113.1/24 dev wan0", "addr add 2001:db8:2::1/64 dev wan0 nodad",
		"route add 198.51.100.0/24 via "+ProxyV4.String(), "route add 2001:db8:3::/64 via "+ProxyV6.String(),
		"route add blackhole "+BlackholeV4.String()+"/32", "route add blackhole "+BlackholeV6.String()+"/128",
	); err != nil {
		return err
	}
	return l.Proxy.ip(
		"link set wan0 up", "addr add "+ProxyV4.String()+"/24 dev wan0", "addr add "+ProxyV6.String()+"/64 dev wan0 nodad",
		"route add 192.168.77.0/24 via 203.0.113.1", "route add 2001:db8:1::/64 via 2001:db8:2::1",
		// Sent to the router, which swallows it: a destination that never answers the proxy.
		"route add "+BlackholeV4.String()+"/32 via 203.0.113.1", "route add "+BlackholeV6.String()+"/128 via 2001:db8:2::1",
	)
}

// File writes a file into the lab's directory, readable by every server, and returns its path.
func (l *Lab) File(name, content string) string {
	l.t.Helper()
	p := filepath.Join(l.Dir, name)
	if err := os.WriteFile(p, []byte(content), 0o644); err != nil {
		l.t.Fatal(err)
	}
	return p
}
