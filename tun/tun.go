// SPDX-License-Identifier: GPL-3.0-or-later

// Package tun opens and configures TUN devices and moves packets through them, each with its virtio-net header.
//
// It knows nothing of IP. Addresses, routes, link state and the queue length of a device are policy's; stack reads and writes the
// packets; cmd/mprox/daemon opens the devices. The data path is Queue: one system call a packet, up to 64 KiB each, no copy beside the
// kernel's and no allocation.
package tun

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
	wgtun "golang.zx2c4.com/wireguard/tun"
)

const clonePath = "/dev/net/tun"

// DefaultMTU is the MTU of a device whose Config says none. With segmentation offload a larger one gains next to nothing, and 1500 is
// what applications and the hosts behind a gateway are tested with.
const DefaultMTU = 1500

// The limits of Config.MTU: IPv6 works with nothing smaller (RFC 8200 section 5), TUN takes nothing larger.
const (
	MinMTU = 1280
	MaxMTU = 65535
)

// maxQueues is the kernel's bound (MAX_TAP_QUEUES, drivers/net/tun.c).
const maxQueues = 256

// What Open's error wraps. Its text is one line, and ends with the remedy.
var (
	// ErrNoDevice: /dev/net/tun is missing, or the kernel has no TUN support.
	ErrNoDevice = errors.New("no TUN support")
	// ErrNoPermission: the process may not open /dev/net/tun or create a device.
	ErrNoPermission = errors.New("not permitted to create a TUN device")
	// ErrBusy: a device of that name exists already.
	ErrBusy = errors.New("the TUN device exists already")
)

// Config says which device to open.
type Config struct {
	Name   string // at most 15 bytes; may contain one %d, which the kernel replaces by the first free number; "" = "tun%d"
	MTU    int    // bytes, MinMTU to MaxMTU; 0 = DefaultMTU
	Queues int    // descriptors to spread flows over, 1 to 256; 0 = 1

	// The fall-backs, which are taken by themselves where the kernel has less; set, they are forced. Each implies the ones before it.
	//
	// NoUSO leaves trains of UDP datagrams off, which Linux has since 6.2. NoOffload leaves checksum and TCP segmentation offload off too:
	// every packet is then complete and no longer than the MTU. NoHeader goes without the virtio-net header.
	NoUSO, NoOffload, NoHeader bool
}

// Device is an open TUN device. It is not persistent: the kernel removes it, with its addresses and routes, when it is closed or when the
// process ends.
type Device struct {
	name    string
	index   int
	mtu     int
	offload bool
	uso     bool
	plain   bool // without virtio-net header
	queues  []*Queue
	owner   wgtun.Device // nil for a device made by New; owns the first queue's file

	closeOnce sync.Once
	closeErr  error
}

// Open creates the device in the network namespace of the calling thread (lock the goroutine to it if that is not the process's own), and
// leaves the link down and without addresses. The error wraps ErrNoDevice, ErrNoPermission or ErrBusy where the cause is known.
func Open(cfg Config) (*Device, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	plain := cfg.NoHeader
	fd, name, err := attach(cfg.Name, cfg.Queues > 1, plain, true)
	if errors.Is(err, unix.EINVAL) && !plain {
		plain = true
		fd, name, err = attach(cfg.Name, cfg.Queues > 1, plain, true)
	}
	if err != nil {
		return nil, err
	}
	// Unmonitored, because the monitoring of CreateTUNFromFile writes to the device once a second and blocks, for ever, on an event
	// channel of 5; policy watches the link by netlink anyway.
	owner, _, err := wgtun.CreateUnmonitoredTUNFromFD(fd)
	if err != nil {
		return nil, fmt.Errorf("tun %s: %w", name, err)
	}
	d := &Device{name: name, mtu: cfg.MTU, owner: owner, plain: plain}
	if err := d.setUp(cfg); err != nil {
		_ = d.Close()
		return nil, fmt.Errorf("tun %s: %w", name, err)
	}
	return d, nil
}

// Available reports what is missing before anything is changed: the same errors as Open's, but for those of the device itself.
func Available() error {
	fd, err := unix.Open(clonePath, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return explain("", err)
	}
	return unix.Close(fd)
}

func (c Config) withDefaults() (Config, error) {
	if c.Name == "" {
		c.Name = "tun%d"
	}
	if c.MTU == 0 {
		c.MTU = DefaultMTU
	}
	if c.Queues == 0 {
		c.Queues = 1
	}
	switch {
	case len(c.Name) >= unix.IFNAMSIZ:
		return c, fmt.Errorf("tun %s: the name is longer than %d bytes", c.Name, unix.IFNAMSIZ-1)
	case c.MTU < MinMTU || c.MTU > MaxMTU:
		return c, fmt.Errorf("tun %s: mtu %d is not in %d..%d", c.Name, c.MTU, MinMTU, MaxMTU)
	case c.Queues < 1 || c.Queues > maxQueues:
		return c, fmt.Errorf("tun %s: %d queues are not in 1..%d", c.Name, c.Queues, maxQueues)
	}
	return c, nil
}

// setUp adopts the first queue, opens the others and sets offloads and MTU.
func (d *Device) setUp(cfg Config) error {
	q, err := newQueue(d.owner.File(), d.plain)
	if err != nil {
		return err
	}
	d.queues = append(d.queues, q)
	for len(d.queues) < cfg.Queues {
		fd, _, err := attach(d.name, true, d.plain, false)
		if err != nil {
			return err
		}
		q, err := newQueue(os.NewFile(uintptr(fd), clonePath), d.plain)
		if err != nil {
			return err
		}
		d.queues = append(d.queues, q)
	}
	if err := d.setOffload(cfg); err != nil {
		return err
	}
	return d.setMTU()
}

// setOffload asks for as much as the kernel has and the configuration allows.
func (d *Device) setOffload(cfg Config) error {
	const (
		tso = unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6
		uso = tso | unix.TUN_F_USO4 | unix.TUN_F_USO6
	)
	wants := []int{uso, tso, 0}
	switch {
	case cfg.NoOffload || d.plain: // without a header the kernel could not say what it has left to us
		wants = wants[2:]
	case cfg.NoUSO:
		wants = wants[1:]
	}
	var err error
	for _, want := range wants {
		if err = unix.IoctlSetInt(d.queues[0].fd, unix.TUNSETOFFLOAD, want); err == nil {
			d.uso, d.offload = want == uso, want != 0
			return nil
		}
	}
	return fmt.Errorf("set offloads: %w", err)
}

// setMTU also learns the interface index. The socket is only a handle for the ioctls; it sends nothing.
func (d *Device) setMTU() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	ifr, err := unix.NewIfreq(d.name)
	if err != nil {
		return err
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, ifr); err != nil {
		return fmt.Errorf("interface index: %w", err)
	}
	d.index = int(ifr.Uint32())
	ifr.SetUint32(uint32(d.mtu))
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFMTU, ifr); err != nil {
		return fmt.Errorf("set mtu %d: %w", d.mtu, err)
	}
	return nil
}

// attach opens one descriptor on the device, creating the device if create is set, and returns it with the device's real name.
func attach(name string, multi, plain, create bool) (int, string, error) {
	fd, err := unix.Open(clonePath, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return -1, "", explain(name, err)
	}
	flags := uint16(unix.IFF_TUN | unix.IFF_NO_PI)
	if !plain {
		flags |= unix.IFF_VNET_HDR
	}
	if multi {
		flags |= unix.IFF_MULTI_QUEUE
	}
	if create {
		// Without it a multi-queue device of another process with the same name would hand us half of its packets.
		flags |= unix.IFF_TUN_EXCL
	}
	ifr, err := unix.NewIfreq(name)
	if err == nil {
		ifr.SetUint16(flags)
		// Before the descriptor goes to the poller: one that is not attached yet reports an error there at once.
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr)
	}
	if err != nil {
		_ = unix.Close(fd)
		return -1, "", explain(name, err)
	}
	return fd, ifr.Name(), nil
}

// explain turns what /dev/net/tun answered into an error that names what is missing and the remedy.
func explain(name string, err error) error {
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return fmt.Errorf("%w: %s is missing: run `modprobe tun`, or give the container devices: [/dev/net/tun] (%w)", ErrNoDevice, clonePath, err)
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return fmt.Errorf("%w: run as root, or give the process or container CAP_NET_ADMIN and access to %s (%w)", ErrNoPermission, clonePath, err)
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("%w: %s: choose another name, or remove it with `ip link del %s` (%w)", ErrBusy, name, name, err)
	}
	return fmt.Errorf("tun %s: %w", name, err)
}

// New makes a device of descriptors that are open already: a TUN that a privileged helper passed, or a fake link (tuntest). The files must
// be non-blocking, move one packet with its virtio-net header a system call, and belong to the device from now on, also on error. offload
// says that packets may come, and may be sent, as trains of TCP segments and without checksums.
func New(name string, mtu int, offload bool, files ...*os.File) (*Device, error) {
	d := &Device{name: name, mtu: mtu, offload: offload}
	for _, f := range files {
		q, err := newQueue(f, false)
		if err != nil {
			for _, f := range files {
				_ = f.Close()
			}
			return nil, fmt.Errorf("tun %s: %w", name, err)
		}
		d.queues = append(d.queues, q)
	}
	return d, nil
}

// Name returns the interface's name.
func (d *Device) Name() string { return d.name }

// Index returns the interface's index in its network namespace, 0 for a device made by New.
func (d *Device) Index() int { return d.index }

// MTU returns the MTU in bytes that the device was opened with.
func (d *Device) MTU() int { return d.mtu }

// Offload reports whether the kernel passes, and takes, packets without checksums and trains of TCP segments.
func (d *Device) Offload() bool { return d.offload }

// USO reports whether the kernel passes, and takes, trains of UDP datagrams.
func (d *Device) USO() bool { return d.uso }

// Queues returns the device's queues, at least one. Each is to be read by one goroutine.
func (d *Device) Queues() []*Queue { return d.queues }

// Close removes the device and makes each Receive return. It is idempotent.
func (d *Device) Close() error {
	d.closeOnce.Do(func() {
		var errs []error
		for _, q := range d.queues {
			errs = append(errs, q.close())
		}
		if d.owner != nil {
			if err := d.owner.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
				errs = append(errs, err)
			}
		}
		d.closeErr = errors.Join(errs...)
	})
	return d.closeErr
}
