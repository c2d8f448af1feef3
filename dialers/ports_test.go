// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"reflect"
	"runtime"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// closedNet returns a Net inside a network namespace of the test's own, of which only loopback is up, with a range of source ports.
func closedNet(tb testing.TB, lo, hi int) *Net {
	tb.Helper()
	made := make(chan error, 1)
	var ns *os.File
	go func() { // its thread ends with it: it is not unlocked
		runtime.LockOSThread()
		made <- func() (err error) {
			if err = unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return err
			}
			if ns, err = os.Open("/proc/thread-self/ns/net"); err != nil {
				return err
			}
			link, err := netlink.LinkByName("lo")
			if err != nil {
				return err
			}
			return errors.Join(netlink.LinkSetUp(link),
				os.WriteFile("/proc/sys/net/ipv4/ip_local_port_range", fmt.Appendf(nil, "%d %d", lo, hi), 0),
				os.WriteFile("/proc/sys/net/ipv4/tcp_tw_reuse", []byte("0"), 0)) // the default, 2, is for loopback
		}()
	}()
	if err := <-made; err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { ns.Close() })
	return NewNet(NetConfig{Inside: func(f func() error) error {
		done := make(chan error, 1)
		go func() { // likewise
			runtime.LockOSThread()
			if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
				done <- err
				return
			}
			done <- f()
		}()
		return <-done
	}})
}

// listen accepts connections and closes each when its peer has.
func listen(tb testing.TB, n *Net, addr string) netip.AddrPort {
	tb.Helper()
	l, err := n.ListenTCP(tb.Context(), netip.MustParseAddrPort(addr))
	if err != nil {
		tb.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			c, err := l.AcceptTCP()
			if err != nil {
				return
			}
			_, _ = io.Copy(io.Discard, c)
			c.Close()
		}
	}()
	tb.Cleanup(func() { l.Close(); <-ended })
	return netip.MustParseAddrPort(l.Addr().String())
}

// once connects, closes and waits for the end of file, so that the port stays behind in TIME_WAIT.
func once(tb testing.TB, n *Net, to netip.AddrPort) {
	tb.Helper()
	c, err := n.dialTCP(tb.Context(), to)
	if err != nil {
		tb.Fatal(err)
	}
	_ = c.CloseWrite()
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		tb.Fatal(err)
	}
	c.Close()
}

// More connections than there are ports, each of which the kernel keeps for a minute.
func TestPortsAreReused(t *testing.T) {
	if !privileged(t) {
		t.Skip("needs root")
	}
	n := closedNet(t, 40000, 40199)
	for _, addr := range []string{"127.0.0.1:1080", "[::1]:1080"} {
		to := listen(t, n, addr)
		for range 1000 {
			once(t, n, to)
		}
	}
}

// Ports that are all in use are an error that says so, and costs no more than the tries that are stated.
func TestPortsInUse(t *testing.T) {
	if !privileged(t) {
		t.Skip("needs root")
	}
	n := closedNet(t, 40000, 40002)
	l, err := n.ListenTCP(t.Context(), netip.MustParseAddrPort("127.0.0.1:1080"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	to := netip.MustParseAddrPort("127.0.0.1:1080")
	for range 3 {
		c, err := n.dialTCP(t.Context(), to)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	c, err := n.dialTCP(t.Context(), to)
	if err == nil {
		c.Close()
	}
	if want := "no source address, or no source port of 40000 to 40002"; !errors.Is(err, unix.EADDRNOTAVAIL) || !strings.Contains(err.Error(), want) {
		t.Errorf("%v, want %q", err, want)
	}
}

func TestParsePorts(t *testing.T) {
	for list, want := range map[string][][2]uint16{
		"":                       nil,
		"8080":                   {{8080, 8080}},
		"8080,9000-9010":         {{8080, 8080}, {9000, 9010}},
		"9-1,x,70000,-,1-,5-6\n": nil,
	} {
		if got := parsePorts(list); !reflect.DeepEqual(got, want) {
			t.Errorf("%q: %v, want %v", list, got, want)
		}
	}
}

func TestReservedPorts(t *testing.T) {
	p := ports{lo: 100, hi: 103, reserved: [][2]uint16{{100, 101}}}
	for range 1000 {
		if port, ok := p.one(103); ok && port != 102 {
			t.Fatalf("port %d", port)
		}
	}
}

// BenchmarkDialAfterMany connects to a server to which 16,000 connections have ended within the last minute.
func BenchmarkDialAfterMany(b *testing.B) {
	n := closedNet(b, 32768, 60999)
	to := listen(b, n, "127.0.0.1:1080")
	for range 16_000 {
		once(b, n, to)
	}
	for b.Loop() {
		once(b, n, to)
	}
}
