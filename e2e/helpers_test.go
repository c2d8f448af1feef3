// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"errors"
	"net/netip"
	"syscall"

	"github.com/mutex-proxy/mutex/e2e/lab"
)

func netipAddrPort(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

func addrPorts(s *lab.Server) []netip.AddrPort { return []netip.AddrPort{s.Addr} }

func isErrno(err error, want ...syscall.Errno) bool {
	for _, w := range want {
		if errors.Is(err, w) {
			return true
		}
	}
	return false
}

// noNetfilterScript installs a classic BPF seccomp filter and executes its arguments. socket(2) is 41 on amd64 and 198 on arm64; its
// arguments are AF_NETLINK = 16 and NETLINK_NETFILTER = 12; the answer is EPROTONOSUPPORT = 93.
const noNetfilterScript = `
import ctypes, os, platform, struct, sys
nr = {"x86_64": 41, "aarch64": 198}[platform.machine()]
def ins(code, jt, jf, k): return struct.pack("HBBI", code, jt, jf, k)
LD, JEQ, RET = 0x20, 0x15, 0x06
prog = b"".join([
    ins(LD, 0, 0, 0), ins(JEQ, 0, 5, nr),
    ins(LD, 0, 0, 16), ins(JEQ, 0, 3, 16),
    ins(LD, 0, 0, 32), ins(JEQ, 0, 1, 12),
    ins(RET, 0, 0, 0x00050000 | 93), ins(RET, 0, 0, 0x7fff0000)])
buf = ctypes.create_string_buffer(prog)
fprog = struct.pack("HxxxxxxP", len(prog) // 8, ctypes.addressof(buf))
libc = ctypes.CDLL(None, use_errno=True)
# No PR_SET_NO_NEW_PRIVS: root may install filters without it.
if libc.prctl(22, 2, ctypes.create_string_buffer(fprog), 0, 0) != 0:
    sys.exit("seccomp: " + os.strerror(ctypes.get_errno()))
os.execvp(sys.argv[1], sys.argv[1:])
`
