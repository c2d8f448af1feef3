// SPDX-License-Identifier: GPL-3.0-or-later

package lab

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// CanAdopt reports whether flows can be adopted into the kernel. MPROX_E2E_OFFLOAD=off runs every daemon of the tests where TCP_REPAIR is refused,
// as on a kernel or in a sandbox without it: then netstack has all flows.
func CanAdopt() bool { return os.Getenv("MPROX_E2E_OFFLOAD") != "off" }

// withoutRepair puts a helper in front of a command line that starts a daemon. The helper replaces itself, so that pid and name stay right.
func withoutRepair(args []string) []string {
	if CanAdopt() || !slices.Contains(args, "up") && !slices.Contains(args, "run") {
		return args
	}
	pre, err := HelperCommand("norepair")
	if err != nil {
		return args
	}
	return append(pre, args...)
}

// norepair forbids setsockopt(TCP_REPAIR) by a seccomp filter and executes its arguments.
func norepair(args []string) error {
	const (
		load, jumpEq, ret = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, unix.BPF_RET | unix.BPF_K
		nr, level, option = 0, 24, 32 // offsets in struct seccomp_data: the number, the low halves of the second and third argument
		allow, refuse     = 0x7fff0000, 0x00050000 | uint32(unix.EPERM)
	)
	filter := []unix.SockFilter{
		{Code: load, K: nr},
		{Code: jumpEq, Jf: 5, K: unix.SYS_SETSOCKOPT},
		{Code: load, K: level},
		{Code: jumpEq, Jf: 3, K: unix.IPPROTO_TCP},
		{Code: load, K: option},
		{Code: jumpEq, Jf: 1, K: unix.TCP_REPAIR},
		{Code: ret, K: refuse},
		{Code: ret, K: allow},
	}
	runtime.LockOSThread() // the filter is the thread's, and execve keeps it
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if err := unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&prog)), 0, 0); err != nil {
		return fmt.Errorf("seccomp: %w", err)
	}
	path, err := exec.LookPath(args[0])
	if err != nil {
		return err
	}
	return syscall.Exec(path, args, os.Environ())
}
