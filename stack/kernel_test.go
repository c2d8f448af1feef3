// SPDX-License-Identifier: GPL-3.0-or-later

package stack

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/flow"
	"github.com/mutex-proxy/mutex/tun"
	"github.com/mutex-proxy/mutex/tun/tuntest"
)

// The tests in this file have the kernel's sockets as the application, through a real device in a namespace of the test's own.

// kernelApp is that namespace, with a Stack behind its default routes.
type kernelApp struct {
	*tuntest.Namespace
	t *testing.T
	s *Stack
}

func startKernel(t *testing.T, h Handler, cfg tun.Config) *kernelApp {
	t.Helper()
	k := &kernelApp{Namespace: tuntest.NewNamespace(t), t: t}
	var dev *tun.Device
	k.Do(func() {
		var err error
		if dev, err = tun.Open(cfg); err != nil {
			t.Error(err)
		}
	})
	if dev == nil {
		t.FailNow()
	}
	t.Cleanup(func() { _ = dev.Close() })
	s, err := New(Config{Device: dev, Handler: h})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	k.s = s
	k.Configure(dev, netip.MustParsePrefix("10.99.0.1/24"), netip.MustParsePrefix("fd99::1/64"))
	return k
}

// dial connects from inside the namespace.
func (k *kernelApp) dial(network string, to netip.AddrPort) (c net.Conn, err error) {
	k.Do(func() {
		c, err = net.DialTimeout(network, to.String(), wait)
	})
	if err == nil {
		_ = c.SetDeadline(time.Now().Add(wait))
		k.t.Cleanup(func() { _ = c.Close() })
	}
	return c, err
}

// bulk is the two ends of one transfer, joined by a relay.
type bulk struct {
	ups chan flow.Conn // sockets to the origin, opened in the namespace before they are needed
}

func (b *bulk) TCP(_ context.Context, _, _ netip.AddrPort, p flow.Pending) {
	up := <-b.ups
	defer up.Close()
	c, err := p.Accept()
	if err != nil {
		return
	}
	defer c.Close()
	var wg sync.WaitGroup
	wg.Go(func() {
		_, _ = c.(io.ReaderFrom).ReadFrom(up)
		_ = c.CloseWrite()
	})
	_, _ = c.(io.WriterTo).WriteTo(up)
	_ = up.CloseWrite()
	wg.Wait()
}

func (*bulk) UDP(ctx context.Context, src netip.AddrPort, in flow.PacketSource, out flow.PacketSink) {
	echoUDP(ctx, src, in, out)
}

func (*bulk) Echo(context.Context, netip.Addr, netip.Addr) (bool, flow.Reason) { return true, 0 }

// pattern fills b with what stands at an offset of the test's stream; any shift, loss or repetition changes it.
func pattern(b []byte, at int) {
	for i := range b {
		b[i] = byte((at + i) * 2654435761 >> 16)
	}
}

// TestKernelBulk moves up to 128 MB each way, checks every byte and logs the throughput.
func TestKernelBulk(t *testing.T) {
	for _, v := range []struct {
		variant
		queues int
	}{{variants()[0], 1}, {variants()[1], 1}, {variants()[2], 1}, {variants()[0], 2}} {
		t.Run(fmt.Sprintf("%s %d queue", v.name, v.queues), func(t *testing.T) {
			size := 128 << 20
			if race {
				size = 16 << 20
			}
			if !v.offload { // a packet at a time
				size /= 8
			}
			h := &bulk{ups: make(chan flow.Conn, 2)}
			k := startKernel(t, h, tun.Config{Name: "mprox0", NoOffload: !v.offload, Queues: v.queues})
			var l *net.TCPListener
			k.Do(func() {
				var err error
				if l, err = net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)}); err != nil {
					t.Error(err)
					return
				}
				for range 2 {
					up, err := net.DialTCP("tcp", nil, l.Addr().(*net.TCPAddr))
					if err != nil {
						t.Error(err)
						return
					}
					h.ups <- tcpUpstream{up}
				}
			})
			if t.Failed() {
				t.FailNow()
			}
			defer l.Close()
			for _, direction := range []string{"up", "down"} {
				server, err := l.Accept()
				if err != nil {
					t.Fatal(err)
				}
				client, err := k.dial("tcp", v.dst(80))
				if err != nil {
					t.Fatal(err)
				}
				from, to := client, server
				if direction == "down" {
					from, to = server, client
				}
				transfer(t, direction, from, to, size)
				_, _ = client.Close(), server.Close()
			}
			t.Logf("%+v", k.s.Stats())
		})
	}
}

// transfer sends size bytes and their end, and checks them.
func transfer(t *testing.T, direction string, from, to net.Conn, size int) {
	t.Helper()
	const chunk = 256 << 10
	var before, after syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &before)
	start := time.Now()
	piece := make([]byte, chunk) // size is a multiple, and the pattern repeats with it
	pattern(piece, 0)
	var wg sync.WaitGroup
	wg.Go(func() {
		for range size / chunk {
			if _, err := from.Write(piece); err != nil {
				t.Error(err)
				return
			}
		}
		_ = from.(*net.TCPConn).CloseWrite()
	})
	got := make([]byte, chunk)
	total := 0
	for {
		n, err := io.ReadFull(to, got)
		if !bytes.Equal(got[:n], piece[:n]) {
			t.Fatalf("%s: wrong bytes after %d", direction, total)
		}
		total += n
		if err != nil {
			break
		}
	}
	wg.Wait()
	if total != size {
		t.Fatalf("%s: %d bytes of %d", direction, total, size)
	}
	d := time.Since(start)
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &after)
	cpu := time.Duration(after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano())
	t.Logf("%s: %.1f Gbit/s, %.2f CPU-s/GB of application, engine and origin together", direction, float64(size)*8/d.Seconds()/1e9, cpu.Seconds()/float64(size)*1e9)
}

// TestKernelReject: what connect() returns for each reason (the table in flow/reason.go), at once.
func TestKernelReject(t *testing.T) {
	want := map[flow.Reason][2]unix.Errno{ // IPv4, IPv6
		flow.ReasonRefused:         {unix.ECONNREFUSED, unix.ECONNREFUSED},
		flow.ReasonHostUnreachable: {unix.EHOSTUNREACH, unix.EHOSTUNREACH},
		flow.ReasonNetUnreachable:  {unix.ENETUNREACH, unix.ENETUNREACH},
		flow.ReasonTimeout:         {unix.EHOSTUNREACH, unix.EHOSTUNREACH},
		flow.ReasonProhibited:      {unix.EHOSTUNREACH, unix.EACCES},
	}
	k := startKernel(t, &handler{
		tcp: func(_ context.Context, _, orig netip.AddrPort, p flow.Pending) {
			p.Reject(flow.Reason(orig.Port() - 1000))
		},
		udp: func(ctx context.Context, _ netip.AddrPort, in flow.PacketSource, out flow.PacketSink) {
			stop := context.AfterFunc(ctx, func() { _ = in.SetReadDeadline(time.Unix(1, 0)) })
			defer stop()
			ds := []flow.Datagram{{Buf: make([]byte, 100)}}
			for {
				ds[0].Buf = ds[0].Buf[:100]
				if _, err := in.ReadBatch(ds); err != nil {
					return
				}
				dst := ds[0].Addr.AddrPort()
				out.Unreachable(dst, ds[0].Buf, flow.Reason(dst.Port()-1000))
			}
		},
	}, tun.Config{Name: "mprox0"})
	for r, errnos := range want {
		for i, v := range variants()[:2] {
			start := time.Now()
			if _, err := k.dial("tcp", v.dst(1000+uint16(r))); !errors.Is(err, errnos[i]) || time.Since(start) > 900*time.Millisecond {
				t.Errorf("%s %s: tcp: %v after %v", v.name, r, err, time.Since(start))
			}
			if r != flow.ReasonRefused {
				continue // a connected UDP socket keeps to itself what is not a hard error
			}
			c, err := k.dial("udp", v.dst(1000+uint16(r)))
			if err != nil {
				t.Fatal(err)
			}
			_, _ = c.Write([]byte("x"))
			if _, err = c.Read(make([]byte, 10)); !errors.Is(err, errnos[i]) {
				t.Errorf("%s %s: udp: %v", v.name, r, err)
			}
		}
	}
}

// TestKernelUDP: datagrams of every kind of size there and back.
func TestKernelUDP(t *testing.T) {
	for _, v := range variants() {
		t.Run(v.name, func(t *testing.T) {
			k := startKernel(t, &bulk{}, tun.Config{Name: "mprox0", NoOffload: !v.offload})
			c, err := k.dial("udp", v.dst(5000))
			if err != nil {
				t.Fatal(err)
			}
			for _, size := range []int{0, 1, 1200, 1452, 1453, 1472, 1473, 9000, 65485, 65497, 65507, 65527} {
				if !v.v6 && size > 65507 {
					break
				}
				want := randomBytes(size)
				if _, err := c.Write(want); err != nil {
					t.Fatalf("%d: %v", size, err)
				}
				got := make([]byte, 1<<16)
				n, err := c.Read(got)
				if err != nil || !bytes.Equal(got[:n], want) {
					t.Fatalf("%d: got %d bytes, %v; %+v", size, n, err, k.s.Stats())
				}
			}
		})
	}
}

// TestKernelEcho pings with a raw socket, as ping(8) does.
func TestKernelEcho(t *testing.T) {
	k := startKernel(t, &bulk{}, tun.Config{Name: "mprox0"})
	for _, v := range variants()[:2] {
		for _, size := range []int{56, 8000} {
			family, proto := unix.AF_INET, unix.IPPROTO_ICMP
			sa := unix.Sockaddr(&unix.SockaddrInet4{Addr: [4]byte(v.dst(0).Addr().AsSlice()[:4])})
			if v.v6 {
				family, proto = unix.AF_INET6, unix.IPPROTO_ICMPV6
				sa = &unix.SockaddrInet6{Addr: v.dst(0).Addr().As16()}
			}
			fd := -1
			k.Do(func() {
				var err error
				if fd, err = unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, proto); err != nil {
					t.Error(err)
				}
			})
			if fd < 0 {
				t.FailNow()
			}
			_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5})
			payload := randomBytes(size)
			msg := echoMessage(variant{}, 3, payload)
			if v.v6 {
				msg[0] = 128 // the kernel computes the checksum
			}
			if err := unix.Sendto(fd, msg, 0, sa); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, 1<<16)
			for {
				n, _, err := unix.Recvfrom(fd, got, 0)
				if err != nil {
					t.Fatalf("%s %d: %v", v.name, size, err)
				}
				if bytes.HasSuffix(got[:n], payload) && (got[0] == 129 || !v.v6 && got[20] == 0) {
					break
				}
			}
			_ = unix.Close(fd)
		}
	}
}

// TestKernelReset: RST both ways between the kernel and a relay.
func TestKernelReset(t *testing.T) {
	conns := make(chan flow.Conn, 1)
	k := startKernel(t, &handler{tcp: func(ctx context.Context, _, _ netip.AddrPort, p flow.Pending) {
		c, err := p.Accept()
		if err != nil {
			t.Error(err)
			return
		}
		conns <- c
		<-ctx.Done()
	}}, tun.Config{Name: "mprox0"})
	for _, v := range variants()[:2] {
		c, err := k.dial("tcp", v.dst(80))
		if err != nil {
			t.Fatal(err)
		}
		ours := <-conns
		ours.Abort()
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("%s: application: %v", v.name, err)
		}
		if c, err = k.dial("tcp", v.dst(80)); err != nil {
			t.Fatal(err)
		}
		ours = <-conns
		_ = c.(*net.TCPConn).SetLinger(0)
		_ = c.Close()
		if _, err := ours.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("%s: we: %v", v.name, err)
		}
		ours.Close()
	}
	if os.Getenv("CI") == "" {
		t.Logf("%+v", k.s.Stats())
	}
}

// TestKernelConnections opens, uses and closes many connections: all succeed, and nothing of them is left.
func TestKernelConnections(t *testing.T) {
	const workers, each = 32, 50
	k := startKernel(t, &handler{tcp: func(_ context.Context, _, _ netip.AddrPort, p flow.Pending) {
		c, err := p.Accept()
		if err != nil {
			t.Errorf("accept: %v", err)
			return
		}
		defer c.Close()
		b := make([]byte, 64)
		if _, err := io.ReadFull(c, b); err == nil {
			_, _ = c.Write(b)
			_, _ = c.Read(b) // the end
		}
	}}, tun.Config{Name: "mprox0"})
	start := time.Now()
	for range each {
		var round [workers]net.Conn
		k.Do(func() { // dialling is bound to the namespace's thread, using is not
			for i := range round {
				c, err := net.DialTimeout("tcp", variants()[i%2].dst(80).String(), wait)
				if err != nil {
					t.Error(err)
					return
				}
				_ = c.SetDeadline(time.Now().Add(wait))
				round[i] = c
			}
		})
		var wg sync.WaitGroup
		for _, c := range round {
			if c == nil {
				continue
			}
			wg.Go(func() {
				defer c.Close()
				b := make([]byte, 64)
				if _, err := c.Write(b); err != nil {
					t.Error(err)
				}
				if _, err := io.ReadFull(c, b); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	}
	t.Logf("%.0f connections a second", workers*each/time.Since(start).Seconds())
	eventually(t, func() bool {
		st := k.s.Stats()
		return st.OpenTCP == 0 && st.PendingTCP == 0 && len(k.s.ns.RegisteredEndpoints()) == 0 && len(k.s.ns.CleanupEndpoints()) == 0
	})
}
