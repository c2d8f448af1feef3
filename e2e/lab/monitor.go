// SPDX-License-Identifier: GPL-3.0-or-later

package lab

import (
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Monitor notes when rules and routes of the client's namespace change. nftables is left out: asking what the kernel can do makes and
// removes a table, too.
type Monitor struct {
	mu      sync.Mutex
	changes []time.Time
	closed  bool
}

// StartMonitor listens for changes until the end of the test.
func (l *Lab) StartMonitor(t *testing.T) *Monitor {
	t.Helper()
	m := &Monitor{}
	var fds []int
	err := l.Client.Do(func() error {
		const routing = 1<<(unix.RTNLGRP_IPV4_RULE-1) | 1<<(unix.RTNLGRP_IPV6_RULE-1) | 1<<(unix.RTNLGRP_IPV4_ROUTE-1) | 1<<(unix.RTNLGRP_IPV6_ROUTE-1)
		fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		fds = append(fds, fd)
		if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: routing}); err != nil {
			return err
		}
		return unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 50_000})
	})
	var wg sync.WaitGroup
	t.Cleanup(func() {
		m.mu.Lock()
		m.closed = true
		m.mu.Unlock()
		wg.Wait()
		for _, fd := range fds {
			unix.Close(fd)
		}
	})
	if err != nil {
		t.Fatalf("monitor: %v", err)
	}
	for _, fd := range fds {
		wg.Go(func() { m.loop(fd) })
	}
	return m
}

func (m *Monitor) loop(fd int) {
	buf := make([]byte, 1<<16)
	for {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		m.mu.Lock()
		if m.closed {
			m.mu.Unlock()
			return
		}
		if err == nil && n > 0 && len(m.changes) < 1<<16 {
			m.changes = append(m.changes, time.Now())
		}
		m.mu.Unlock()
	}
}

// First returns when the first change after a point in time was, or the zero time.
func (m *Monitor) First(after time.Time) time.Time {
	m.mu.Lock()
	defer m.mu.Unlock()
	var first time.Time
	for _, c := range m.changes {
		if c.After(after) && (first.IsZero() || c.Before(first)) {
			first = c
		}
	}
	return first
}
