// SPDX-License-Identifier: GPL-3.0-or-later

package lab

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"
)

// probeTimeout is how long one probe waits for an answer: what leaks has left at once.
const probeTimeout = 400 * time.Millisecond

// probePort is a port of the origin that is never the upstream's nor DNS.
const probePort = PortEcho

// Probe is one way in which a program tries to send past the proxy. It runs in the namespace of the calling thread; its error only says
// whether something answered, what has left is for the capture and the traps to say.
type Probe struct {
	Name string
	Run  func() error
}

// Probes are all ways known to us. The loopback resolvers asked must be trapped by the test.
func Probes() []Probe {
	return append(SocketProbes(),
		Probe{"packet4", func() error { return packetProbe(OriginV4, probePort) }},
		Probe{"packet6", func() error { return packetProbe(OriginV6, probePort) }})
}

// SocketProbes are the ways of sockets that speak IP. AF_PACKET is closed only where the whole machine is captured (README).
func SocketProbes() []Probe {
	var ps []Probe
	add := func(name string, run func() error) { ps = append(ps, Probe{name, run}) }
	for _, dst := range []netip.Addr{OriginV4, OriginV6} {
		fam := family(dst)
		for how, control := range map[string]func(fd int) error{
			"plain":         nil,
			"SO_BINDTODEV":  bindToDevice,
			"UNICAST_IF":    unicastIf(dst),
			"bypass mark":   setMark(0x4d000000),
			"inbound mark":  setMark(0x4e000000),
			"context mark":  setMark(0x6f000000), // of one that is not there
			"IP_TRANSPARNT": nil,
		} {
			if how == "IP_TRANSPARNT" {
				control = transparent(dst)
			}
			add("tcp"+fam+" "+how, func() error { return dialProbe("tcp"+fam, netip.AddrPortFrom(dst, probePort), control) })
			add("udp"+fam+" "+how, func() error { return dialProbe("udp"+fam, netip.AddrPortFrom(dst, probePort), control) })
		}
		add("icmp"+fam, func() error { return ping(dst, nil) })
		add("icmp"+fam+" SO_BINDTODEV", func() error { return ping(dst, bindToDevice) })
		add("udp"+fam+" PKTINFO", func() error { return pktinfo(dst) })
		add("raw"+fam+" protocol 132", func() error { return raw(dst, 132, nil) })
		add("raw"+fam+" protocol 47 SO_BINDTODEV", func() error { return raw(dst, 47, bindToDevice) })
		for how, control := range map[string]func(fd int) error{"": nil, " SO_BINDTODEV": bindToDevice, " bypass mark": setMark(0x4d000000)} {
			add("raw"+fam+" HDRINCL"+how, func() error { return headerIncluded(dst, control, datagram(clientOf(dst), dst, probePort)) })
			add("raw"+fam+" fragments"+how, func() error { return headerIncluded(dst, control, fragments(clientOf(dst), dst, probePort)...) })
		}
		add("udp"+fam+" large", func() error { return sendUDP("udp"+fam, netip.AddrPortFrom(dst, probePort), make([]byte, 4000), nil) })
		add("udp"+fam+" large SO_BINDTODEV", func() error {
			return sendUDP("udp"+fam, netip.AddrPortFrom(dst, probePort), make([]byte, 4000), bindToDevice)
		})
	}
	add("udp4 multicast", func() error { return sendUDP("udp4", netip.MustParseAddrPort("239.1.2.3:9999"), []byte("x"), nil) })
	return append(ps, DNSProbes()...)
}

// DNSProbes ask resolvers everywhere, each for a name of its own below probe.test.
func DNSProbes() []Probe {
	var ps []Probe
	for _, a := range []netip.Addr{
		LANV4, LANULA, GatewayV4, OriginV4, OriginV6, netip.MustParseAddr("127.0.0.53"), netip.MustParseAddr("127.0.0.11"), netip.IPv6Loopback(),
	} {
		for _, network := range []string{"udp", "tcp"} {
			for how, control := range map[string]func(fd int) error{"plain": nil, "SO_BINDTODEV": bindToDevice} {
				if control != nil && a.IsLoopback() {
					continue
				}
				name := fmt.Sprintf("dns %s %s %s", network, a, how)
				ps = append(ps, Probe{name, func() error { return dnsProbe(network, netip.AddrPortFrom(a, 53), control) }})
			}
		}
	}
	return ps
}

// LoopbackResolvers are where stub resolvers listen on a machine.
func LoopbackResolvers() []netip.AddrPort {
	return []netip.AddrPort{netip.MustParseAddrPort("127.0.0.53:53"), netip.MustParseAddrPort("127.0.0.11:53"), netip.MustParseAddrPort("[::1]:53")}
}

// RunProbes runs the probes at the same time, in the namespace of the calling process, and returns the names of those that were answered.
func RunProbes(probes []Probe) []string {
	var mu sync.Mutex
	var answered []string
	var wg sync.WaitGroup
	for _, p := range probes {
		wg.Go(func() {
			if p.Run() == nil {
				mu.Lock()
				answered = append(answered, p.Name)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	slices.Sort(answered)
	return answered
}

// Probe runs the probes in the namespace and returns the names of those that were answered.
func (n *NS) Probe(probes []Probe) []string {
	in := make([]Probe, len(probes))
	for i, p := range probes {
		in[i] = Probe{p.Name, func() error { return n.Do(p.Run) }}
	}
	return RunProbes(in)
}

// Helper runs the part of a test that must be a process of its own, when the environment asks for it, and ends. TestMain calls it first.
func Helper() {
	switch os.Getenv(helperEnv) {
	case "":
		return
	case "probe":
		fmt.Println(strings.Join(RunProbes(SocketProbes()), "\n"))
	case "norepair":
		_ = os.Unsetenv(helperEnv)
		fmt.Fprintln(os.Stderr, norepair(os.Args[1:]))
		os.Exit(1)
	case "crowd":
		crowd()
	case "prober":
		prober()
	default:
		fmt.Fprintln(os.Stderr, "unknown helper")
		os.Exit(1)
	}
	os.Exit(0)
}

const helperEnv = "MPROX_E2E_HELPER"

// HelperCommand returns a command line that runs a part of the tests as a process of its own.
func HelperCommand(name string) ([]string, error) {
	exe, err := os.Executable()
	return []string{"env", helperEnv + "=" + name, exe}, err
}

func family(a netip.Addr) string {
	if a.Is4() {
		return "4"
	}
	return "6"
}

func dialProbe(network string, dst netip.AddrPort, control func(fd int) error) error {
	d := net.Dialer{Timeout: probeTimeout, Control: rawControl(control)}
	c, err := d.Dial(network, dst.String())
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(probeTimeout))
	if _, err := c.Write([]byte("probe")); err != nil {
		return err
	}
	_, err = c.Read(make([]byte, 16))
	return err
}

func dnsProbe(network string, dst netip.AddrPort, control func(fd int) error) error {
	name := strings.NewReplacer(".", "-", ":", "-").Replace(dst.Addr().String()) + "-" + network + ".probe.test."
	d := net.Dialer{Timeout: probeTimeout, Control: rawControl(control)}
	c, err := d.Dial(network, dst.String())
	if err != nil {
		return err
	}
	defer c.Close()
	dc := &dns.Conn{Conn: c}
	_ = dc.SetDeadline(time.Now().Add(probeTimeout))
	if err := dc.WriteMsg(new(dns.Msg).SetQuestion(name, dns.TypeA)); err != nil {
		return err
	}
	_, err = dc.ReadMsg()
	return err
}

func rawControl(control func(fd int) error) func(_, _ string, rc syscall.RawConn) error {
	if control == nil {
		return nil
	}
	return func(_, _ string, rc syscall.RawConn) error {
		var cerr error
		if err := rc.Control(func(fd uintptr) { cerr = control(int(fd)) }); err != nil {
			return err
		}
		return cerr
	}
}

func sendUDP(network string, dst netip.AddrPort, b []byte, control func(fd int) error) error {
	d := net.Dialer{Control: rawControl(control)}
	c, err := d.Dial(network, dst.String())
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(probeTimeout))
	if _, err := c.Write(b); err != nil {
		return err
	}
	_, err = c.Read(make([]byte, len(b)))
	return err
}

func bindToDevice(fd int) error { return unix.BindToDevice(fd, "eth0") }

func setMark(mark int) func(fd int) error {
	return func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, mark) }
}

// unicastIf sets IP_UNICAST_IF or IPV6_UNICAST_IF, which take the interface's index in network byte order.
func unicastIf(dst netip.Addr) func(fd int) error {
	return func(fd int) error {
		ifi, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		var be [4]byte
		binary.BigEndian.PutUint32(be[:], uint32(ifi.Index))
		v := int(int32(binary.NativeEndian.Uint32(be[:])))
		if dst.Is4() {
			return unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_UNICAST_IF, v)
		}
		return unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_UNICAST_IF, v)
	}
}

func transparent(dst netip.Addr) func(fd int) error {
	return func(fd int) error {
		if dst.Is4() {
			return unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_TRANSPARENT, 1)
		}
		return unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_TRANSPARENT, 1)
	}
}

func sockaddr(a netip.Addr, port int) (int, unix.Sockaddr) {
	if a.Is4() {
		return unix.AF_INET, &unix.SockaddrInet4{Addr: a.As4(), Port: port}
	}
	return unix.AF_INET6, &unix.SockaddrInet6{Addr: a.As16(), Port: port}
}

// raw sends a datagram of another protocol.
func raw(dst netip.Addr, proto int, control func(fd int) error) error {
	af, sa := sockaddr(dst, 0)
	fd, err := unix.Socket(af, unix.SOCK_RAW|unix.SOCK_CLOEXEC, proto)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if control != nil {
		if err := control(fd); err != nil {
			return err
		}
	}
	if err := unix.Sendto(fd, []byte("probe of another protocol"), 0, sa); err != nil {
		return err
	}
	return unix.ETIMEDOUT // nobody answers these
}

// ping sends an echo request by a ping socket and waits for the reply.
func ping(dst netip.Addr, control func(fd int) error) error {
	af, sa := sockaddr(dst, 0)
	proto, typ := unix.IPPROTO_ICMP, byte(8)
	if dst.Is6() {
		proto, typ = unix.IPPROTO_ICMPV6, 128
	}
	fd, err := unix.Socket(af, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, proto)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if control != nil {
		if err := control(fd); err != nil {
			return err
		}
	}
	tv := unix.NsecToTimeval(probeTimeout.Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		return err
	}
	if err := unix.Sendto(fd, []byte{typ, 0, 0, 0, 0, 0, 0, 1, 'p', 'r', 'o', 'b', 'e'}, 0, sa); err != nil {
		return err
	}
	_, _, err = unix.Recvfrom(fd, make([]byte, 64), 0)
	return err
}

// pktinfo sends a datagram whose control message names the uplink.
func pktinfo(dst netip.Addr) error {
	ifi, err := net.InterfaceByName("eth0")
	if err != nil {
		return err
	}
	af, sa := sockaddr(dst, probePort)
	fd, err := unix.Socket(af, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var oob []byte
	if dst.Is4() {
		oob = unix.PktInfo4(&unix.Inet4Pktinfo{Ifindex: int32(ifi.Index)})
	} else {
		oob = unix.PktInfo6(&unix.Inet6Pktinfo{Ifindex: uint32(ifi.Index)})
	}
	if err := unix.Sendmsg(fd, []byte("probe"), oob, sa, 0); err != nil {
		return err
	}
	return unix.ETIMEDOUT // the answer is of no interest
}
