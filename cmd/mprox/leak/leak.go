// SPDX-License-Identifier: GPL-3.0-or-later

// Package leak tries every known way past the capture, against addresses that never leave the host: a device of its own, whose other end this
// process reads, is where packets for them would go if nothing captured them. The command leaktest calls it.
package leak

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	vnl "github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	// settle is how long packets have to arrive: the device is in memory.
	settle = 300 * time.Millisecond
	// metric is worse than that of any real default route: the device is one, so that the guard of default routes' devices holds for it too.
	metric = 4_000_000_000
	// firstPort is the destination port of the first way; each has its own, by which its packets are known.
	firstPort = 41000
)

// The results of a way.
const (
	Kept    = "kept in"
	Leaked  = "LEAKED"
	Skipped = "skipped"
)

// Result is what came of one way.
type Result struct {
	Way    string `json:"way"`
	Result string `json:"result"`
	Detail string `json:"detail"` // why it was refused or skipped
}

// Options say what is tried.
type Options struct {
	Mask uint32 // of marks; the values of bypass and inbound are those of package policy
	// NoPacket says why AF_PACKET is not tried: nobody can be expected to guard the device against it. "" = it is tried.
	NoPacket string
	// OwnMark says that the bypass mark counts for this process too: without a writable cgroup v2 (containers) it counts for the daemon's user.
	OwnMark bool
	// Ready is called when the device is there, before anything is tried, so that a living daemon can follow. May be nil.
	Ready func(context.Context)
}

// device is the TUN device that swallows what gets through.
type device struct {
	file *os.File
	link vnl.Link
	name string

	mu   sync.Mutex
	seen [][]byte
	done chan struct{}
}

// The addresses: the last of TEST-NET-1 (RFC 5737) and a prefix of documentation (RFC 3849). None is private, so none is ever direct.
func addresses() (own4, to4, own6, to6 netip.Prefix) {
	return netip.MustParsePrefix("192.0.2.249/29"), netip.MustParsePrefix("192.0.2.250/32"),
		netip.MustParsePrefix("2001:db8:6d70:726f::1/64"), netip.MustParsePrefix("2001:db8:6d70:726f::2/128")
}

// Run makes the device, tries everything, and removes it.
func Run(ctx context.Context, opt Options) (out []Result, err error) {
	d, err := open()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, d.close()) }()
	v6, err := d.configure()
	if err != nil {
		return nil, err
	}
	if opt.Ready != nil {
		opt.Ready(ctx)
	}
	ways := ways(d.name, opt, v6)
	errs := make([]error, len(ways))
	var wg sync.WaitGroup
	for i, w := range ways {
		if w.skip == "" {
			wg.Go(func() { errs[i] = w.try(uint16(firstPort + i)) })
		}
	}
	wg.Wait()
	if err := pause(ctx, settle); err != nil {
		return nil, err
	}
	seen := d.packets()
	for i, w := range ways {
		r := Result{Way: w.name, Result: Kept}
		switch {
		case w.skip != "":
			r.Result, r.Detail = Skipped, w.skip
		case errors.Is(errs[i], errReached), slices.ContainsFunc(seen, func(p []byte) bool { return w.is(p, uint16(firstPort+i)) }):
			r.Result = Leaked
		case errs[i] != nil:
			r.Detail = errs[i].Error()
		}
		out = append(out, r)
	}
	return out, nil
}

func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// open makes the TUN device (Documentation/networking/tuntap.rst in the kernel): packets without any header before them.
func open() (*device, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("/dev/net/tun: %w", err)
	}
	ifr, err := unix.NewIfreq("mprox-leak%d")
	if err == nil {
		ifr.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr)
	}
	if err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("TUN device: %w", err)
	}
	d := &device{file: os.NewFile(uintptr(fd), "tun"), name: ifr.Name(), done: make(chan struct{})}
	go d.read()
	return d, nil
}

// configure gives the device addresses and routes; v6 is whether the kernel has IPv6.
func (d *device) configure() (v6 bool, err error) {
	if d.link, err = vnl.LinkByName(d.name); err != nil {
		return false, err
	}
	own4, _, own6, _ := addresses()
	_, err = os.Stat("/proc/sys/net/ipv6/conf/" + d.name)
	v6 = err == nil
	if v6 {
		// Containers have it switched off by default; /proc/sys may be read-only.
		_ = os.WriteFile("/proc/sys/net/ipv6/conf/"+d.name+"/disable_ipv6", []byte("0"), 0o644)
	}
	if err := vnl.LinkSetUp(d.link); err != nil {
		return false, err
	}
	for _, p := range []netip.Prefix{own4, own6} {
		if p.Addr().Is6() && !v6 {
			continue
		}
		a, err := vnl.ParseAddr(p.String())
		if err != nil {
			return false, err
		}
		a.Flags = unix.IFA_F_NODAD
		if p.Addr().Is4() {
			a.Flags = 0
		}
		if err := vnl.AddrAdd(d.link, a); err != nil {
			if p.Addr().Is6() {
				v6 = false
				continue
			}
			return false, fmt.Errorf("address %s: %w", p, err)
		}
		bits := p.Addr().BitLen()
		all := &net.IPNet{IP: make(net.IP, bits/8), Mask: net.CIDRMask(0, bits)} // netlink takes the family from the length
		if err := vnl.RouteAdd(&vnl.Route{LinkIndex: d.link.Attrs().Index, Dst: all, Priority: metric, Scope: vnl.SCOPE_LINK}); err != nil {
			return false, fmt.Errorf("route: %w", err)
		}
	}
	return v6, nil
}

func (d *device) read() {
	defer close(d.done)
	b := make([]byte, 65536)
	for {
		n, err := d.file.Read(b)
		if err != nil {
			return
		}
		d.mu.Lock()
		if len(d.seen) < maxSeen {
			d.seen = append(d.seen, slices.Clone(b[:n]))
		}
		d.mu.Unlock()
	}
}

// maxSeen bounds what is kept: a hundred times what all ways together send.
const maxSeen = 10000

func (d *device) packets() [][]byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.seen)
}

// close removes the device, and with it addresses and routes.
func (d *device) close() error {
	err := d.file.Close()
	<-d.done
	return err
}

// packetOf reads what tells ways apart: protocol, destination, and the destination port where there is one.
func packetOf(p []byte) (proto uint8, dst netip.Addr, payload []byte) {
	switch {
	case len(p) >= 20 && p[0]>>4 == 4:
		size := int(p[0]&15) * 4
		if size < 20 || size > len(p) || binary.BigEndian.Uint16(p[6:])&0x1fff != 0 {
			return 0, dst, nil // not the first fragment: that one tells
		}
		return p[9], netip.AddrFrom4([4]byte(p[16:20])), p[size:]
	case len(p) >= 40 && p[0]>>4 == 6:
		proto, dst, payload = p[6], netip.AddrFrom16([16]byte(p[24:40])), p[40:]
		if proto == unix.IPPROTO_FRAGMENT && len(payload) >= 8 && binary.BigEndian.Uint16(payload[2:])&0xfff8 == 0 {
			proto, payload = payload[0], payload[8:]
		}
		return proto, dst, payload
	}
	return 0, dst, nil
}
