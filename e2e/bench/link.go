// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"fmt"
	"maps"
	"os"
	"runtime"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/e2e/delay"
)

// The links between client and server besides a plain veth: round trips of a continent and of a planet, without and with loss.
func slowLinks() map[string]delay.Link {
	return map[string]delay.Link{
		"rtt50":       {Delay: 25 * time.Millisecond},
		"rtt50-loss":  {Delay: 25 * time.Millisecond, Loss: .01},
		"rtt200":      {Delay: 100 * time.Millisecond},
		"rtt200-loss": {Delay: 100 * time.Millisecond, Loss: .01},
	}
}

// linkNames lists all links, the plain veth first.
func linkNames() []string {
	return append([]string{""}, slices.Sorted(maps.Keys(slowLinks()))...)
}

// join makes a slow link between a device of the client's namespace and one of the far one. It lives as long as its process.
func (l *lab) join(ns, dev, farDev string) error {
	p, err := l.spawnReady(l.far, nil, func() bool { return links(ns)[dev] && links(l.far)[farDev] },
		l.self, "link", ns, dev, l.far, farDev, l.link.Delay.String(), strconv.FormatFloat(l.link.Loss, 'g', -1, 64))
	if err != nil {
		return err
	}
	l.servers = append(l.servers, p)
	return nil
}

// runLink is the process of a slow link: namespace and device at each end, the delay one way, and the loss.
func runLink(args []string) error {
	if len(args) != 6 {
		return fmt.Errorf("link NAMESPACE DEVICE NAMESPACE DEVICE DELAY LOSS")
	}
	d, err := time.ParseDuration(args[4])
	if err != nil {
		return err
	}
	loss, err := strconv.ParseFloat(args[5], 64)
	if err != nil {
		return err
	}
	runtime.LockOSThread() // for good: the thread changes its namespace
	var ends [2]*os.File
	for i := range ends {
		ns, err := os.Open("/run/netns/" + args[2*i])
		if err != nil {
			return err
		}
		err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET)
		ns.Close()
		if err != nil {
			return fmt.Errorf("setns %s: %w", args[2*i], err)
		}
		if ends[i], err = delay.OpenTUN(args[2*i+1], loss == 0); err != nil {
			return err
		}
	}
	delay.Link{Delay: d, Loss: loss}.Join(ends[0], ends[1])
	return nil
}
