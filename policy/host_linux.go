// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"

	"github.com/mdlayher/netlink"
	vnl "github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/policy/process"
)

// LinuxHost is the real Host. All its descriptors are opened in one network namespace, so its methods may be called from any thread.
type LinuxHost struct {
	ns   *os.File
	id   Netns
	rt   *vnl.Handle
	nft  *nftConn
	diag *process.Diag

	bpfMu  sync.Mutex // guards what follows
	bpf    *bpfState  // nil = no programs of ours
	owners *Owners    // nil = nobody asks
}

var _ Host = (*LinuxHost)(nil)

// NewLinuxHost opens everything in the calling thread's network namespace. It changes nothing. ErrPrivilege, ErrFeature.
func NewLinuxHost() (*LinuxHost, error) {
	// The thread's, not the process's: they differ in a thread that has called setns.
	ns, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return nil, fmt.Errorf("%w: /proc must be mounted: %w", ErrFeature, err)
	}
	h := &LinuxHost{ns: ns}
	if err := h.open(); err != nil {
		closeQuietly(h)
		return nil, err
	}
	return h, nil
}

func (h *LinuxHost) open() error {
	if err := requireNetAdmin(); err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(h.ns.Fd()), &st); err != nil {
		return fmt.Errorf("network namespace: %w", err)
	}
	h.id = Netns{Inode: st.Ino, Cookie: netnsCookie(), Boot: readString("/proc/sys/kernel/random/boot_id")}
	return h.here(func(ns int) (err error) {
		if ns == 0 {
			h.rt, err = vnl.NewHandle(unix.NETLINK_ROUTE)
		} else {
			h.rt, err = vnl.NewHandleAt(netns.NsHandle(ns), unix.NETLINK_ROUTE)
		}
		if err != nil {
			return fmt.Errorf("route netlink socket: %w", err)
		}
		if h.nft, err = newNFTConn(ns); err != nil {
			return err
		}
		h.diag, err = process.OpenDiag(ns)
		return err
	})
}

// here calls f with the descriptor of the Host's namespace, or with 0 when this thread is in it: then nothing has to be switched, which takes
// CAP_SYS_ADMIN, and a container has none.
func (h *LinuxHost) here(f func(ns int) error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var here, want unix.Stat_t
	if unix.Stat("/proc/thread-self/ns/net", &here) == nil && unix.Fstat(int(h.ns.Fd()), &want) == nil && here.Ino == want.Ino && here.Dev == want.Dev {
		return f(0)
	}
	return f(int(h.ns.Fd()))
}

// requireNetAdmin says so in one line, before anything half works.
func requireNetAdmin() error {
	var hdr unix.CapUserHeader
	var data [2]unix.CapUserData
	hdr.Version = unix.LINUX_CAPABILITY_VERSION_3
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return fmt.Errorf("capget: %w", err)
	}
	if data[0].Effective&(1<<unix.CAP_NET_ADMIN) == 0 {
		return fmt.Errorf("%w: CAP_NET_ADMIN: run as root (sudo), or in a container with cap_add: [NET_ADMIN]", ErrPrivilege)
	}
	return nil
}

// netnsCookie is the namespace's number that is never used again; 0 on kernels before 5.14.
func netnsCookie() uint64 {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0
	}
	defer closeFD(fd)
	c, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if err != nil {
		return 0
	}
	return c
}

// Close closes the descriptors. Tables with the owner flag go with them.
func (h *LinuxHost) Close() error {
	var errs error
	h.closeBPF()
	if h.rt != nil {
		h.rt.Close()
	}
	if h.nft != nil {
		errs = errors.Join(errs, h.nft.Close())
	}
	if h.diag != nil {
		errs = errors.Join(errs, h.diag.Close())
	}
	return errors.Join(errs, h.ns.Close())
}

// Netns implements Host.
func (h *LinuxHost) Netns() Netns { return h.id }

// inside runs f with /proc/sys/net and new sockets of the Host's namespace, whatever thread it is called on.
func (h *LinuxHost) inside(f func() error) error {
	var here, want unix.Stat_t
	runtime.LockOSThread()
	if unix.Stat("/proc/thread-self/ns/net", &here) == nil && unix.Fstat(int(h.ns.Fd()), &want) == nil && here.Ino == want.Ino {
		defer runtime.UnlockOSThread()
		return f()
	}
	runtime.UnlockOSThread()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		old, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			done <- err
			return // still locked: the thread ends with the goroutine
		}
		defer old.Close()
		if err := unix.Setns(int(h.ns.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("setns: %w", err)
			return
		}
		err = f()
		if unix.Setns(int(old.Fd()), unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
		done <- err
	}()
	return <-done
}

// ApplyNFT implements Host.
func (h *LinuxHost) ApplyNFT(replace []NFTable, remove []string) error {
	return h.nft.apply(replace, remove)
}

// NFTables implements Host.
func (h *LinuxHost) NFTables(prefix string) (map[string]string, error) { return h.nft.tables(prefix) }

// NFCounter implements Host.
func (h *LinuxHost) NFCounter(table, name string) (uint64, error) { return h.nft.counter(table, name) }

// Sysctl implements Host.
func (h *LinuxHost) Sysctl(key string) (string, error) {
	var out string
	err := h.inside(func() error {
		b, err := os.ReadFile(filepath.Join("/proc/sys", key))
		out = strings.TrimSpace(string(b))
		return err
	})
	return out, err
}

// SetSysctl implements Host.
func (h *LinuxHost) SetSysctl(key, value string) error {
	return h.inside(func() error { return os.WriteFile(filepath.Join("/proc/sys", key), []byte(value), 0o644) })
}

// Features implements Host: what is missing and cannot be done without is ErrFeature.
func (h *LinuxHost) Features() (Features, error) {
	var f Features
	if mount, _, err := process.Cgroup2Mount(); err == nil {
		f.Cgroup2 = unix.Access(mount, unix.W_OK) == nil
	}
	needed := []struct {
		what string
		stmt nfStmt
	}{
		{"connection tracking in nftables (CONFIG_NFT_CT, nf_conntrack)", stMark{ct: true, mask: DefaultMask}},
		{"fib look-ups in nftables (CONFIG_NFT_FIB_INET)", stToLocal{}},
	}
	for _, n := range needed {
		t := probeTable(nfChain{name: "p", typ: "filter", hook: "prerouting", rules: []nfRule{rule(n.stmt)}})
		if err := h.nft.probe(t); err != nil {
			return f, missing(err, n.what)
		}
	}
	nat := probeTable(nfChain{name: "p", typ: "nat", hook: "output", priority: prioNAT, rules: []nfRule{rule(stProto{protoUDP}, stDNAT{1})}})
	if err := h.nft.probe(nat); err != nil {
		return f, missing(err, "redirects in nftables (CONFIG_NFT_REDIR, CONFIG_NF_NAT)")
	}
	sock := nfChain{name: "p", typ: "route", hook: "output", rules: []nfRule{rule(stCgroup{CgroupRef{Path: "/x", ID: 1, Level: 1}})}}
	f.NFTSocket = h.nft.probe(probeTable(sock)) == nil
	owned := probeTable()
	owned.owner = true
	f.NFTOwner = h.nft.probe(owned) == nil
	// lo is in every namespace, and nothing of this transaction stays.
	out := NFTable{Name: "mprox-probe" + egressSuffix, chains: []nfChain{{name: "p", typ: "filter", hook: "egress", device: loopback, rules: []nfRule{rule(stOwned{}, accept())}}}}
	f.NFTEgress = h.nft.probe(out) == nil
	f.BPFSockMark = f.Cgroup2 && probeSockMark(h.id.Cookie) == nil
	return f, nil
}

func probeTable(chains ...nfChain) NFTable { return NFTable{Name: "mprox-probe", chains: chains} }

func missing(err error, what string) error {
	if errors.Is(err, ErrPrivilege) || errors.Is(err, ErrFeature) {
		return err
	}
	return fmt.Errorf("%w: %s: %w", ErrFeature, what, err)
}

// Watch implements Host.
func (h *LinuxHost) Watch(ctx context.Context, changed func()) error {
	g, ctx := errgroup.WithContext(ctx)
	for _, w := range []struct {
		family int
		groups []uint32
	}{
		{unix.NETLINK_ROUTE, []uint32{
			unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE,
			unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE,
		}},
		{unix.NETLINK_NETFILTER, []uint32{unix.NFNLGRP_NFTABLES}},
	} {
		var c *netlink.Conn
		err := h.here(func(ns int) (err error) {
			c, err = netlink.Dial(w.family, &netlink.Config{NetNS: ns})
			return err
		})
		if err != nil {
			return fmt.Errorf("netlink events: %w", err)
		}
		stop := context.AfterFunc(ctx, func() { closeQuietly(c) })
		g.Go(func() error {
			defer stop()
			defer closeQuietly(c)
			for _, group := range w.groups {
				if err := c.JoinGroup(group); err != nil {
					return fmt.Errorf("netlink events: %w", err)
				}
			}
			changed() // whatever happened before the groups were joined
			for {
				if _, err := c.Receive(); err != nil && !errors.Is(err, unix.ENOBUFS) {
					if ctx.Err() != nil {
						return context.Cause(ctx)
					}
					return fmt.Errorf("netlink events: %w", err)
				}
				changed()
			}
		})
	}
	return g.Wait()
}

// nameservers are the machine's real resolvers: behind the stub of systemd-resolved, its own list.
func nameservers() []netip.AddrPort {
	ns := readResolvConf("/etc/resolv.conf")
	if len(ns) == 1 && ns[0].Addr() == netip.AddrFrom4([4]byte{127, 0, 0, 53}) {
		if real := readResolvConf("/run/systemd/resolve/resolv.conf"); len(real) > 0 {
			return real
		}
	}
	return ns
}

func readResolvConf(path string) []netip.AddrPort {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil
	}
	return parseResolvConf(string(b))
}

// parseResolvConf reads the nameserver lines of resolv.conf(5), three at most (MAXNS).
func parseResolvConf(s string) []netip.AddrPort {
	var out []netip.AddrPort
	for sc := bufio.NewScanner(strings.NewReader(s)); sc.Scan() && len(out) < 3; {
		f := strings.Fields(sc.Text())
		if len(f) < 2 || f[0] != "nameserver" {
			continue
		}
		if a, err := netip.ParseAddr(f[1]); err == nil {
			out = append(out, netip.AddrPortFrom(a.Unmap(), 53))
		}
	}
	return out
}

func readString(path string) string {
	b, _ := os.ReadFile(path)
	return strings.TrimSpace(string(b))
}

func readInt(path string) int {
	n, _ := strconv.Atoi(readString(path))
	return n
}

// closeQuietly closes what only reads, or what an error has been returned about already.
func closeQuietly(c io.Closer) { _ = c.Close() }

func closeFD(fd int) { _ = unix.Close(fd) }
