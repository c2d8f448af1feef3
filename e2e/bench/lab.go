// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/mutex-proxy/mutex/e2e/delay"
)

// The network: every subject has a client namespace of its own, so that all are up at the same time and can be measured in turns.
//
//	client of plain ─────┐ 192.168.k.2
//	client of upstream ──┤             far: SOCKS5 server 203.0.113.10:1080 ─ lo ─ origin 198.51.100.80
//	client of mprox ─────┘ 192.168.k.1
const (
	originV4  = "198.51.100.80"
	originV6  = "2001:db8:80::80"
	proxyV4   = "203.0.113.10"
	proxyV6   = "2001:db8:10::10"
	socksPort = 1080
	idlePort  = 1081 // of a server that echoes by itself: holding 10,000 connections open takes it one descriptor each, not six
)

// socksAt is the address of a SOCKS5 server.
func socksAt(port int) string { return net.JoinHostPort(proxyV4, strconv.Itoa(port)) }

// startTimeout is how long a program may take to be ready.
const startTimeout = 15 * time.Second

// lab is the network, its servers and the subjects.
type lab struct {
	o        options
	self     string // this program
	dir      string
	link     delay.Link // between clients and server; zero = veth
	names    []string   // of namespaces
	far      string
	cc       string // congestion control
	port     int    // of the SOCKS5 server that engines use
	servers  []*process
	subjects []*subject
}

// subject is one way from client to origin.
type subject struct {
	name  string
	ns    string
	socks string                   // the load generator is to ask this SOCKS5 server itself
	start func() (*process, error) // of its engine; nil = none
	proc  *process
}

func newLab(ctx context.Context, o options, link delay.Link) (*lab, error) {
	l := &lab{o: o, link: link, port: socksPort, far: fmt.Sprintf("mpb%d-far", os.Getpid())}
	sweep()
	var err error
	if l.dir, err = os.MkdirTemp("", "mpb"); err != nil {
		return l, err
	}
	if l.self, err = os.Executable(); err != nil {
		return l, err
	}
	if l.o.binary == "" {
		l.o.binary = filepath.Join(l.dir, "mprox")
		if err := build(ctx, l.o.binary); err != nil {
			return l, err
		}
	}
	if err := l.namespace(l.far); err != nil {
		return l, err
	}
	addresses := []string{originV4 + "/32", proxyV4 + "/32", originV6 + "/128", proxyV6 + "/128"}
	for _, a := range addresses {
		if err := ip(l.far, "addr", "add", a, "dev", "lo"); err != nil {
			return l, err
		}
	}
	if err := l.startFar(); err != nil {
		return l, err
	}
	return l, l.addSubjects()
}

// build makes the program that is measured.
func build(ctx context.Context, out string, args ...string) error {
	args = append([]string{"build", "-trimpath", "-ldflags", "-s -w"}, args...)
	cmd := exec.CommandContext(ctx, "go", append(args, "-o", out, "./cmd/mprox")...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if b, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go build ./cmd/mprox: %w\n%s", err, b)
	}
	return nil
}

// startFar starts the origin and the SOCKS5 server.
func (l *lab) startFar() error {
	p, err := l.spawn(l.far, nil, l.self, "origin")
	if err != nil {
		return err
	}
	l.servers = append(l.servers, p)
	if err := l.startIperf(); err != nil {
		return err
	}
	var args []string
	switch l.o.server {
	case "mprox":
		args = []string{l.o.binary, "serve", "--log-level", "error", "--listen", fmt.Sprintf("%s:%d", proxyV4, socksPort)}
	case "microsocks":
		args = []string{"microsocks", "-i", proxyV4, "-p", strconv.Itoa(socksPort)}
	case "danted":
		file := filepath.Join(l.dir, "danted.conf")
		conf := fmt.Sprintf("logoutput: /dev/null\ninternal: %s port = %d\nexternal: %s\nexternal: %s\nclientmethod: none\nsocksmethod: none\n"+
			"client pass { from: 0/0 to: 0/0 }\nsocks pass { from: 0/0 to: 0/0 protocol: tcp udp }\n", proxyV4, socksPort, proxyV4, proxyV6)
		if err := os.WriteFile(file, []byte(conf), 0o600); err != nil {
			return err
		}
		args = []string{"danted", "-f", file}
	default:
		return fmt.Errorf("no SOCKS5 server %q", l.o.server)
	}
	if p, err = l.spawn(l.far, nil, args...); err != nil {
		return err
	}
	l.servers = append(l.servers, p)
	for _, port := range []int{portIperf, portEcho, portWho} {
		if err := l.listening(originV4, port); err != nil {
			return err
		}
	}
	return l.listening(proxyV4, socksPort)
}

// listening waits until somebody accepts connections at an address of the far namespace.
func (l *lab) listening(host string, port int) error {
	return until(startTimeout, fmt.Sprintf("%s:%d answers", host, port), func() bool {
		out, err := inNS(l.far, "ss", "-Hltn", "sport", "=", fmt.Sprintf(":%d", port)).Output()
		return err == nil && len(out) > 0
	})
}

// addSubjects makes the client namespaces and starts what runs in them.
func (l *lab) addSubjects() error {
	all := []*subject{{name: subPlain}, {name: subUpstream, socks: socksAt(socksPort)}, {name: subFloor}, {name: subSplice}, {name: subTPROXY}, {name: subEngine}, {name: subNetstack}}
	if l.o.other != "" {
		all = append(all, &subject{name: subOther})
	}
	if l.o.peer != "" {
		all = append(all, &subject{name: subPeer})
	}
	for k, s := range all {
		if slices.Contains(l.o.skip, s.name) {
			continue
		}
		s.ns = fmt.Sprintf("mpb%d-%s", os.Getpid(), s.name)
		if err := l.client(s.ns, k+1); err != nil {
			return err
		}
		switch s.name {
		case subFloor, subSplice, subTPROXY:
			s.start = func() (*process, error) { return l.startRedirect(s) }
		case subEngine, subNetstack, subOther:
			s.start = func() (*process, error) { return l.startEngine(s) }
		case subPeer:
			s.start = func() (*process, error) { return l.startPeer(s, k+1) }
		}
		l.subjects = append(l.subjects, s)
		if err := s.restart(); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}
	return nil
}

// restart starts the subject's engine anew.
func (s *subject) restart() error {
	if s.start == nil {
		return nil
	}
	s.proc.stop()
	p, err := s.start()
	s.proc = p
	return err
}

// client makes the k-th client namespace and its way to the far one.
func (l *lab) client(ns string, k int) error {
	if err := l.namespace(ns); err != nil {
		return err
	}
	dev := fmt.Sprintf("c%d", k)
	var err error
	if l.link == (delay.Link{}) {
		err = ip(ns, "link", "add", "up0", "type", "veth", "peer", "name", dev, "netns", l.far)
	} else {
		err = l.join(ns, "up0", dev)
	}
	if err != nil {
		return err
	}
	for _, args := range [][]string{
		{ns, "addr", "add", fmt.Sprintf("192.168.%d.2/24", k), "dev", "up0"},
		{ns, "addr", "add", fmt.Sprintf("fd00:%d::2/64", k), "dev", "up0", "nodad"},
		{l.far, "addr", "add", fmt.Sprintf("192.168.%d.1/24", k), "dev", dev},
		{l.far, "addr", "add", fmt.Sprintf("fd00:%d::1/64", k), "dev", dev, "nodad"},
		{ns, "link", "set", "up0", "up", "txqueuelen", "10000"},
		{l.far, "link", "set", dev, "up", "txqueuelen", "10000"},
		{ns, "route", "add", "default", "via", fmt.Sprintf("192.168.%d.1", k)},
		{ns, "-6", "route", "add", "default", "via", fmt.Sprintf("fd00:%d::1", k)},
	} {
		if err := ip(args[0], args[1:]...); err != nil {
			return err
		}
	}
	return nil
}

// startRedirect starts a relay that gets its connections from nftables, by REDIRECT or TPROXY, instead of from a TUN.
func (l *lab) startRedirect(s *subject) (*process, error) {
	const port = 12345
	rules := fmt.Sprintf("table inet bench {\n chain out {\n  type nat hook output priority -100;\n"+
		"  ip daddr %s meta l4proto tcp redirect to :%d\n  ip6 daddr %s meta l4proto tcp redirect to :%d\n }\n}\n", originV4, port, originV6, port)
	if s.name == subTPROXY {
		var err error
		if rules, err = divert(s.ns, port); err != nil {
			return nil, err
		}
	}
	cmd := inNS(s.ns, "nft", "-f", "-")
	cmd.Stdin = strings.NewReader("add table inet bench\ndelete table inet bench\n" + rules)
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("nft: %w: %s", err, out)
	}
	return l.spawnReady(s.ns, nil, func() bool { return l.reaches(s) }, l.self, "redirect", s.name, strconv.Itoa(port), socksAt(l.port))
}

// divert returns the rules that lead to a TPROXY listener, and makes the routes: what goes to the origin comes in again by the loopback device.
func divert(ns string, port int) (rules string, err error) {
	const mark, table = "1", "100"
	for _, family := range []string{"-4", "-6"} {
		_ = ip(ns, family, "rule", "del", "fwmark", mark) // of the last start
		for _, args := range [][]string{
			{family, "rule", "add", "fwmark", mark, "lookup", table},
			{family, "route", "replace", "local", "default", "dev", "lo", "table", table},
		} {
			if err := ip(ns, args...); err != nil {
				return "", err
			}
		}
	}
	return fmt.Sprintf("table inet bench {\n chain out {\n  type route hook output priority -150;\n"+
		"  ip daddr %s meta l4proto tcp meta mark set %s\n  ip6 daddr %s meta l4proto tcp meta mark set %s\n }\n"+
		" chain pre {\n  type filter hook prerouting priority -150;\n"+
		"  meta mark %s ip daddr %s meta l4proto tcp tproxy ip to :%d accept\n"+
		"  meta mark %s ip6 daddr %s meta l4proto tcp tproxy ip6 to :%d accept\n }\n}\n",
		originV4, mark, originV6, mark, mark, originV4, port, mark, originV6, port), nil
}

// startEngine starts mprox and waits until it carries traffic.
func (l *lab) startEngine(s *subject) (*process, error) {
	return l.spawnReady(s.ns, l.profileEnv(), func() bool { return l.reaches(s) }, l.engineArgs(s)...)
}

func (l *lab) engineArgs(s *subject) []string {
	binary := l.o.binary
	if s.name == subOther {
		binary = l.o.other
	}
	args := []string{binary, "up", "--socket", filepath.Join(l.dir, s.name+".sock"), "-D", filepath.Join(l.dir, s.name), "--log-level", "error"}
	if s.name == subNetstack {
		return append(args, "-c", l.netstackConfig())
	}
	return append(args, "--proxy", "socks5h://"+socksAt(l.port))
}

// netstackConfig is what the command line says for the engine, and offload off.
func (l *lab) netstackConfig() string {
	file := filepath.Join(l.dir, "netstack.json")
	config := fmt.Sprintf(`{"upstreams": {"proxy": {"url": "socks5h://%s"}}, "contexts": {"default": {"default": "proxy", "offload": "off"}}}`, socksAt(l.port))
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		return os.DevNull // the engine will say that it is not a configuration
	}
	return file
}

// startPeer starts another program and, when its device is there, routes everything but the SOCKS5 server into it.
func (l *lab) startPeer(s *subject, k int) (*process, error) {
	before := links(s.ns)
	env := []string{"SOCKS=" + socksAt(l.port), "SOCKS_HOST=" + proxyV4, fmt.Sprintf("SOCKS_PORT=%d", l.port)}
	routed := false
	return l.spawnReady(s.ns, env, func() bool {
		if !routed {
			for name := range links(s.ns) {
				if !before[name] {
					routed = l.routePeer(s.ns, name, k) == nil
				}
			}
		}
		return routed && l.reaches(s)
	}, "sh", "-c", "exec "+l.o.peer)
}

func (l *lab) routePeer(ns, dev string, k int) error {
	_ = ip(ns, "addr", "add", "172.31.255.1/30", "dev", dev) // it may have one
	_ = ip(ns, "addr", "add", "fd01::1/126", "dev", dev)
	for _, args := range [][]string{
		{"link", "set", dev, "up"},
		{"route", "replace", proxyV4 + "/32", "via", fmt.Sprintf("192.168.%d.1", k)},
		{"route", "replace", originV4 + "/32", "dev", dev},
		{"-6", "route", "replace", originV6 + "/128", "dev", dev},
	} {
		if err := ip(ns, args...); err != nil {
			return err
		}
	}
	return nil
}

func links(ns string) map[string]bool {
	out, _ := exec.Command("ip", "-n", ns, "-o", "link", "show").Output()
	names := map[string]bool{}
	for line := range strings.Lines(string(out)) {
		if f := strings.Fields(line); len(f) > 1 {
			names[strings.TrimSuffix(f[1], ":")] = true
		}
	}
	return names
}

// reaches says whether what a client sends now goes through the SOCKS5 server.
func (l *lab) reaches(s *subject) bool {
	r, err := l.load(context.Background(), s, loadSpec{Kind: kindWho, Seconds: 0.2 + 10*l.link.Delay.Seconds()})
	return err == nil && r.Count > 0
}

// namespace makes one with loopback and the sysctls of all.
func (l *lab) namespace(name string) error {
	if out, err := exec.Command("ip", "netns", "add", name).CombinedOutput(); err != nil {
		return fmt.Errorf("ip netns add: %w: %s", err, out)
	}
	l.names = append(l.names, name)
	for _, kv := range []string{
		"net/ipv4/ip_forward=0",
		"net/ipv4/conf/all/rp_filter=0",
		"net/ipv4/conf/default/rp_filter=0",
		"net/ipv6/conf/all/disable_ipv6=0",
		"net/ipv6/conf/default/accept_dad=0",
		"net/ipv6/conf/default/accept_ra=0",
		"net/ipv6/conf/default/router_solicitations=0",
		"net/ipv4/ip_local_port_range=1100 65500",
		// Thousands of connections a second to one port: without these the ports run out, not the engine. dante binds each connection to an
		// address of its own, where the kernel gives no port that has been used within the minute.
		"net/ipv4/tcp_tw_reuse=1",
		"net/ipv4/tcp_max_tw_buckets=4096",
		"net/core/somaxconn=65535",
		"net/ipv4/tcp_max_syn_backlog=65535",
	} {
		key, value, _ := strings.Cut(kv, "=")
		if err := sysctl(name, key, value); err != nil {
			return err
		}
	}
	// The machine's own may be bbr, whose pacing makes every figure over veth meaningless. A namespace chooses among the allowed.
	for _, cc := range []string{"cubic", "reno"} {
		if l.cc = cc; sysctl(name, "net/ipv4/tcp_congestion_control", cc) == nil {
			break
		}
	}
	return ip(name, "link", "set", "lo", "up")
}

func sysctl(ns, key, value string) error {
	cmd := inNS(ns, "tee", "/proc/sys/"+key)
	cmd.Stdin = strings.NewReader(value)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("sysctl %s=%s: %w: %s", key, value, err, out)
	}
	return nil
}

func ip(ns string, args ...string) error {
	if out, err := exec.Command("ip", append([]string{"-n", ns}, args...)...).CombinedOutput(); err != nil {
		return fmt.Errorf("ip %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return nil
}

// inNS is a command in a namespace. nsenter becomes the command, so that its pid is the command's; /sys, and so cgroups, stay visible.
func inNS(ns string, args ...string) *exec.Cmd {
	return exec.Command("nsenter", append([]string{"--net=/run/netns/" + ns, "--"}, args...)...)
}

// close ends what was started and removes the namespaces.
func (l *lab) close() {
	for _, s := range l.subjects {
		s.proc.stop()
	}
	for _, p := range l.servers {
		p.stop()
	}
	for _, n := range l.names {
		_ = exec.Command("ip", "netns", "del", n).Run()
	}
	if l.dir != "" {
		_ = os.RemoveAll(l.dir)
	}
}

// sweep removes what runs that were killed have left: namespaces that carry the pid of a process that no longer lives.
func sweep() {
	entries, _ := os.ReadDir("/run/netns")
	for _, e := range entries {
		var pid int
		if n, err := fmt.Sscanf(e.Name(), "mpb%d-", &pid); n != 1 || err != nil || syscall.Kill(pid, 0) == nil {
			continue
		}
		out, _ := exec.Command("ip", "netns", "pids", e.Name()).Output()
		for f := range strings.FieldsSeq(string(out)) {
			if p, err := strconv.Atoi(f); err == nil && p > 1 {
				_ = syscall.Kill(p, syscall.SIGKILL)
			}
		}
		_ = exec.Command("ip", "netns", "del", e.Name()).Run()
	}
}

// until polls for a condition.
func until(limit time.Duration, what string, ok func() bool) error {
	end := time.After(limit)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-end:
			return fmt.Errorf("not within %v: %s", limit, what)
		case <-tick.C:
		}
	}
	return nil
}

// originOf is the origin's address of a family.
func originOf(v6 bool) netip.Addr {
	if v6 {
		return netip.MustParseAddr(originV6)
	}
	return netip.MustParseAddr(originV4)
}
