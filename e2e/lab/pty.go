// SPDX-License-Identifier: GPL-3.0-or-later

package lab

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Terminal is a program on a pseudo-terminal of its own, as in a terminal window.
type Terminal struct {
	*Proc
	ptm *os.File
	mu  sync.Mutex
	out strings.Builder
	wg  sync.WaitGroup
}

// StartTerminal runs a command as the leader of a session whose controlling terminal is new.
func StartTerminal(t *testing.T, cmd *exec.Cmd) *Terminal {
	t.Helper()
	ptm, err := os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	rc, err := ptm.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var n int
	var ierr error
	if err := rc.Control(func(fd uintptr) {
		if ierr = unix.IoctlSetPointerInt(int(fd), unix.TIOCSPTLCK, 0); ierr == nil {
			n, ierr = unix.IoctlGetInt(int(fd), unix.TIOCGPTN)
		}
	}); err != nil || ierr != nil {
		t.Fatal(err, ierr)
	}
	pts, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer pts.Close()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = pts, pts, pts
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	tm := &Terminal{ptm: ptm}
	tm.Proc = Start(t, "terminal", cmd)
	tm.wg.Go(func() {
		buf := make([]byte, 4096)
		for {
			n, err := ptm.Read(buf)
			tm.mu.Lock()
			tm.out.Write(buf[:n])
			tm.mu.Unlock()
			if err != nil {
				return
			}
		}
	})
	t.Cleanup(func() {
		tm.Stop()
		ptm.Close()
		tm.wg.Wait()
		if t.Failed() {
			t.Logf("terminal:\n%s", tm.Output())
		}
	})
	return tm
}

// Type writes to the terminal as a keyboard does: "\x03" is Ctrl-C, "\x1a" Ctrl-Z.
func (tm *Terminal) Type(s string) { _, _ = tm.ptm.WriteString(s) }

// Resize changes the size of the window.
func (tm *Terminal) Resize(rows, cols uint16) {
	rc, err := tm.ptm.SyscallConn()
	if err != nil {
		return
	}
	_ = rc.Control(func(fd uintptr) {
		_ = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: cols})
	})
}

// Output is what the terminal shows, with plain line ends.
func (tm *Terminal) Output() string {
	tm.mu.Lock()
	defer tm.mu.Unlock()
	return strings.ReplaceAll(tm.out.String(), "\r\n", "\n")
}

// Expect waits until the terminal has shown a text.
func (tm *Terminal) Expect(t *testing.T, text string) {
	t.Helper()
	Eventually(t, 15*time.Second, fmt.Sprintf("the terminal shows %q", text), func() bool { return strings.Contains(tm.Output(), text) })
}
