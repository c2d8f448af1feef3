// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// defaultLockDir is the same for all instances of a machine: what one must not share with another is told apart by the namespace.
const defaultLockDir = "/run/mprox"

// locks are what an instance holds for as long as it lives; the kernel lets go of them when it dies.
//
//	JOURNAL.lock        whoever may write this journal
//	netns-INODE.lock    the one daemon of the network namespace
//	netns-INODE.slots   a byte a slot, shared by the daemon and every `run` that is its own engine
type locks struct {
	journal *os.File
	daemon  *os.File
	slots   *os.File
}

// lockInstance takes the locks of an instance. ErrConflict names who has them.
func lockInstance(dir string, in Instance, ns Netns) (*locks, error) {
	l, err := tryLockInstance(dir, in, ns)
	// A watcher is done in milliseconds; whoever starts meanwhile adopts what it leaves.
	for end := time.Now().Add(openingPatience); errors.Is(err, ErrConflict) && strings.Contains(err.Error(), opening) && time.Now().Before(end); {
		wait(context.Background(), openingPause)
		l, err = tryLockInstance(dir, in, ns)
	}
	return l, err
}

const (
	openingPatience = 5 * time.Second
	openingPause    = 10 * time.Millisecond
)

// daemonLock is the lock of the one daemon of a network namespace.
func daemonLock(dir string, ns Netns) string {
	return filepath.Join(dir, fmt.Sprintf("netns-%d.lock", ns.Inode))
}

func tryLockInstance(dir string, in Instance, ns Netns) (*locks, error) {
	l := &locks{}
	var err error
	if l.journal, err = lockFile(in.Journal+".lock", in); err != nil {
		return nil, err
	}
	if !in.Run {
		if l.daemon, err = lockFile(daemonLock(dir, ns), in); err != nil {
			l.close()
			return nil, err
		}
	}
	name := filepath.Join(dir, fmt.Sprintf("netns-%d.slots", ns.Inode))
	if l.slots, err = openLock(name); err != nil {
		l.close()
		return nil, err
	}
	return l, nil
}

func openLock(name string) (*os.File, error) {
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return nil, err
	}
	return os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
}

// lockFile takes a lock, and writes into it who has it.
func lockFile(name string, in Instance) (*os.File, error) {
	for {
		f, err := openLock(name)
		if err != nil {
			return nil, err
		}
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			who := holder(f)
			f.Close()
			if errors.Is(err, unix.EWOULDBLOCK) {
				return nil, fmt.Errorf("%w: another mprox (%s) controls this network namespace: stop it with `mprox down`", ErrConflict, who)
			}
			return nil, fmt.Errorf("lock %s: %w", name, err)
		}
		// The one before us removes the file at its end: a lock on a file without a name locks nobody out.
		mine, err1 := f.Stat()
		there, err2 := os.Stat(name)
		if err1 == nil && err2 == nil && os.SameFile(mine, there) {
			if err := f.Truncate(0); err != nil {
				f.Close()
				return nil, err
			}
			who := fmt.Sprintf("pid %d, socket %s", os.Getpid(), in.Socket)
			if in.opening {
				who += ", " + opening
			}
			_, err := f.WriteAt([]byte(who+"\n"), 0)
			return f, err
		}
		f.Close()
	}
}

// holder reads who has a lock.
func holder(f *os.File) string {
	b := make([]byte, 4096)
	n, _ := f.ReadAt(b, 0)
	if who := strings.TrimSpace(string(b[:n])); who != "" {
		return who
	}
	return "starting"
}

// slot takes the lock of one slot; false when another instance has it.
func (l *locks) slot(n int) (bool, error) {
	for {
		ok, err := l.slotLock(n, 1, unix.F_WRLCK)
		if !ok || err != nil {
			return ok, err
		}
		// Whoever closes last removes the file; it can do so only before we hold any slot of it.
		mine, err1 := l.slots.Stat()
		there, err2 := os.Stat(l.slots.Name())
		if err1 == nil && err2 == nil && os.SameFile(mine, there) {
			return true, nil
		}
		f, err := openLock(l.slots.Name())
		if err != nil {
			return false, err
		}
		l.slots.Close()
		l.slots = f
	}
}

// release gives it back.
func (l *locks) release(n int) { _, _ = l.slotLock(n, 1, unix.F_UNLCK) } // unlocking a byte cannot fail

// slotLock uses open file description locks: they belong to this file, not to the process, and end with it.
func (l *locks) slotLock(start, count int, typ int16) (bool, error) {
	err := unix.FcntlFlock(l.slots.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: typ, Start: int64(start), Len: int64(count)})
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("lock slot %d: %w", start, err)
	}
	return true, nil
}

// close lets go of everything and removes the files that nobody else uses.
func (l *locks) close() {
	if l.slots != nil {
		if alone, err := l.slotLock(0, MaxContexts, unix.F_WRLCK); alone && err == nil {
			_ = os.Remove(l.slots.Name()) // it is in memory on every usual machine; a left-over harms nobody
		}
		l.slots.Close()
	}
	for _, f := range []*os.File{l.daemon, l.journal} {
		if f != nil {
			_ = os.Remove(f.Name())
			f.Close()
		}
	}
}
