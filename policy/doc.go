// SPDX-License-Identifier: GPL-3.0-or-later

// Package policy is the kernel's side of capture: whose packets are led into which TUN device, what stays direct, and the guard that keeps
// captured packets from leaving unproxied, also when the daemon is dead.
//
// It does not open TUN devices (tun), sockets (dialers) or read configuration; cmd/mprox/daemon calls it. Everything that touches the
// world goes through Host; NewPlan is pure, and its text is tested against golden files.
//
//	Spec (what is wanted) ─┐
//	                       ├─ NewPlan ─▶ Plan ─▶ journal ─▶ Host (netlink, nftables, sysctl, cgroup, BPF)
//	Snapshot (what is) ────┘               ▲                  │
//	                                       └── reconcile ◀────┘ foreign changes, link and route events
//
// Order of calls for `up` (a context in ModeGlobal):
//
//	host, err := policy.NewLinuxHost()                 // ErrPrivilege, ErrFeature: exit 4
//	m := policy.NewManager(policy.Config{Host: host, Log: log})
//	snap, err := m.Snapshot(ctx)                       // snap.Nameservers for dialers, before anything is captured
//	spec := policy.Spec{Instance: policy.InstanceFor(socket), Contexts: []policy.ContextSpec{{Name: "default", Mode: policy.ModeGlobal, Slot: 0, TUN: "mprox0"}}}
//	err = m.Prepare(ctx, spec)                         // lock (ErrConflict: exit 6), journal, own cgroup, guard, unreachable routes, rules: all closed
//	err = m.ExcludeListeners(ctx, loopbackUpstreams)   // may be left out; again whenever such an upstream was restarted
//	dev, err := tun.Open(...)                          // spec.Contexts[0].TUN = dev.Name()
//	...listen for DNS on 127.0.0.1:0 and [::1]:0       // spec.Contexts[0].DNSPort4, DNSPort6
//	err = m.Apply(ctx, spec)                           // device up, addresses, routes, DNS redirect; again after each reload
//	...
//	err = m.Close(ctx, policy.StopConfigured)          // after the stack has ended its flows, before the device is closed
//	host.Close()
//
// Order of calls for `run` (one context in ModeCgroup), in a process of its own or for a lease in the daemon:
//
//	slot, err := m.AcquireSlot(ctx)                    // free of other instances in this namespace
//	spec.Contexts = append(spec.Contexts, policy.ContextSpec{Name: "run-1234", Mode: policy.ModeCgroup, Slot: slot})
//	err = m.Prepare(ctx, spec)                         // the first time; for a lease in a running daemon: m.Apply
//	cg, err := m.NewCgroup(ctx, "run-1234", slot)      // journal, mkdir, BPF mark
//	spec.Contexts[i].Cgroups = []policy.CgroupRef{cg.Ref()}; spec.Contexts[i].TUN = dev.Name()
//	err = m.Apply(ctx, spec)
//	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: cg.FD()}
//	err = cg.Wait(ctx)                                 // until the last process has gone
//	m.Close(ctx, policy.StopOpen)                      // or, for a lease: context taken out of spec, m.Apply, cg.Remove, m.ReleaseSlot
//
// Limits. AF_PACKET sockets (CAP_NET_RAW) pass routes, nftables' output and postrouting and cgroup programs. In ModeGlobal, where the kernel has
// an egress hook (5.16), IP packets that they send by an uplink are dropped unless they carry a mark; other contexts do not guard them. What
// is flushed from nftables is back within a second; until then SO_BINDTODEVICE over IPv6 and marks set by privileged processes get out, and
// with cgroups marked by nftables alone everything does. Without a writable cgroup v2 the bypass mark counts for every process of the
// daemon's uid. UDP servers on an ephemeral port that were bound before the start answer through the TUN: they look like clients. Traffic
// that is forwarded (containers, virtual machines) is not captured in global mode.
//
// ModeGateway captures what is forwarded for other hosts, and the DNS queries that they send to this machine itself; nothing else of the latter.
// It switches forwarding on, and off again at the end if it was. IPv6 forwarding makes the kernel ignore router advertisements on links whose
// accept_ra is 1 (2 keeps them): a default route learnt that way expires.
//
// Selectors (ContextSpec.Select, Exclude) are decided by BPF programs on the root of all cgroups (bpf*_linux.go), for sockets of this network
// namespace alone: when a socket is made and when it is connected, by whoever does it, so that the first look-up is right and no process has
// to be moved. They are pinned, so they mark on when the daemon is dead. A socket that is older than the start, unconnected and not TCP loses its first
// datagram (EPERM) when it gets its mark. An executable is the file (whatever it is called) or its directory and name when the process is
// started: an upgrade, a hard link and a bind mount are selected, a copy elsewhere and the same path in another container's file system are not. A script is its
// interpreter. Patterns with one * in the last element, and units with one *, are matched in the kernel; others are looked for every half
// second. When a map is full, whoever might be selected is denied sockets. Whom only BPF can exclude from a global context is let out by a mark that
// processes with CAP_NET_ADMIN or CAP_NET_RAW can set, too. With BPF the daemon must be in the first PID namespace.
//
// Where the kernel refuses them, nftables tells users, groups and cgroups apart (ContextSpec.Strict does both): the source address is
// chosen by the first look-up, and without any default route connecting fails before nftables sees a packet. A user is whoever made the
// socket. A cgroup that is made while the daemon runs is found by looking every half second; what it sends before that is not
// selected, and once the daemon is dead nobody looks. Whoever is excluded from a global context is blocked with everybody else while the
// daemon is dead. All of the selected's DNS is redirected to the context's listeners. A process selected by PID keeps the sockets it has:
// from them it goes on to send as before.
//
// A lease whose connection ends while processes live on stays in the Spec with TUN "": its marks and guard block them until Wait returns.
package policy
