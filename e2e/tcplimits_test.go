// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mutex-proxy/mutex/e2e/lab"
)

// TestBackpressure fills connections whose other end does not read: the sender is held up, memory stays bounded, and what was sent arrives.
func TestBackpressure(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, false)
	m := l.Mprox(t)
	m.Up("--proxy", s.URL())
	start := m.RSS()
	const conns = 10
	// Up: the origin does not read. Each sender must come to a stop.
	var sent atomic.Int64
	var wg sync.WaitGroup
	for range conns {
		c := dialOrigin(t, l, lab.OriginV4, lab.PortStuck)
		wg.Go(func() {
			_ = c.SetWriteDeadline(time.Now().Add(3 * time.Second))
			n, err := io.Copy(c, lab.DataReader(200_000_000))
			if !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("200 MB to somebody who does not read: %d bytes, %v", n, err)
			}
			sent.Add(n)
			if n > 64<<20 {
				t.Errorf("%d bytes were taken on one connection", n)
			}
		})
	}
	wg.Wait()
	up := m.RSS() - start
	// Down: the application does not read.
	var down []net.Conn
	for range conns {
		c := dialOrigin(t, l, lab.OriginV4, lab.PortHTTP)
		fmt.Fprintf(c, "GET /bytes/200000000 HTTP/1.0\r\n\r\n")
		down = append(down, c)
	}
	var last uint64
	lab.Eventually(t, 20*time.Second, "the downloads have stopped moving", func() bool {
		now := bytesDown(m)
		same := now == last && now > 0
		last = now
		lab.Poll(300*time.Millisecond, func() bool { return false })
		return same
	})
	both := m.RSS() - start
	t.Logf("RSS +%d KB with %d stuck senders (%d KB taken), +%d KB with %d stuck readers too", up>>10, conns, sent.Load()>>10, both>>10, conns)
	if both > conns*2*8<<20 {
		t.Errorf("%d connections hold %d MB", 2*conns, both>>20)
	}
	// Nothing was lost: the readers read on.
	r := bufio.NewReader(down[0])
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		if strings.TrimSpace(line) == "" {
			break
		}
	}
	if n, err := io.Copy(io.Discard, r); n != 200_000_000 {
		t.Errorf("read on: %d bytes, %v", n, err)
	}
}

func bytesDown(m *lab.Mprox) uint64 {
	var n uint64
	for _, f := range m.Flows() {
		n += f.BytesDown
	}
	return n
}

// TestFlowTableFull shows that the longest idle flow ends when there is no room for a new one, and is counted.
func TestFlowTableFull(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, false)
	m := l.Mprox(t)
	m.UpConfig(globalConfig(s, `"limits": { "flows": 16 },`))
	var conns []*bufio.ReadWriter
	open := func() {
		c := dialOrigin(t, l, lab.OriginV4, lab.PortHold)
		_ = c.SetDeadline(time.Now().Add(20 * time.Second))
		conns = append(conns, bufio.NewReadWriter(bufio.NewReader(c), bufio.NewWriter(c)))
	}
	say := func(i int) error {
		rw := conns[i]
		fmt.Fprintf(rw, "hello %d\n", i)
		if err := rw.Flush(); err != nil {
			return err
		}
		line, err := rw.ReadString('\n')
		if line != fmt.Sprintf("hello %d\n", i) && err == nil {
			err = fmt.Errorf("got %q", line)
		}
		return err
	}
	const most = 16 // the least that may be configured
	for i := range most {
		open()
		if err := say(i); err != nil {
			t.Fatal(err)
		}
	}
	if err := say(0); err != nil { // now 1 is the longest idle
		t.Fatal(err)
	}
	open()
	for i := range most + 1 {
		if i == 1 {
			continue
		}
		if err := say(i); err != nil {
			t.Errorf("flow %d: %v", i, err)
		}
	}
	if err := say(1); err == nil {
		t.Error("the longest idle flow still lives")
	}
	if n := m.Status().Contexts[0].FlowsActive; n > most {
		t.Errorf("%d flows with a limit of %d", n, most)
	}
}

// TestKeepAlive shows that the socket to the upstream has a keep-alive timer while nothing moves, so that idle connections live for hours.
func TestKeepAlive(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, false)
	m := l.Mprox(t)
	m.Up("--proxy", s.URL())
	c := dialOrigin(t, l, lab.OriginV4, lab.PortHold)
	fmt.Fprint(c, "x\n")
	if _, err := io.ReadFull(c, make([]byte, 2)); err != nil {
		t.Fatal(err)
	}
	if !lab.Poll(lab.Patience, func() bool {
		out, err := l.Client.Output(t.Context(), "ss", "-Htno", "state", "established", "dst", s.Addr.String())
		return err == nil && strings.Contains(out, "timer:(keepalive,")
	}) {
		t.Error("no keep-alive timer on the connection to the upstream")
	}
}

// TestManyConnections opens many connections at the same time; none may fail.
func TestManyConnections(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Microsocks(t, 1082) // one thread a connection: quicker than dante's processes
	m := l.Mprox(t)
	m.Up("--proxy", s.URL())
	const conns = 300
	errs := make(chan error, conns)
	for i := range conns {
		go func() {
			a := lab.OriginV4
			if i%2 == 1 {
				a = lab.OriginV6
			}
			c, err := l.Client.Dial("tcp", net.JoinHostPort(a.String(), fmt.Sprint(lab.PortSum)), 30*time.Second)
			if err != nil {
				errs <- err
				return
			}
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(60 * time.Second))
			errs <- lab.Exchange(c, 20_000)
		}()
	}
	failed := 0
	for range conns {
		if err := <-errs; err != nil {
			if failed++; failed < 5 {
				t.Error(err)
			}
		}
	}
	if failed > 0 {
		t.Errorf("%d of %d connections failed", failed, conns)
	}
}

// TestRealClients drives curl, iperf3, ssh and python3 through the proxy.
func TestRealClients(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, true)
	sshTo := l.SSHD(t, l.OriginNS, netipAddrPort("0.0.0.0:22"))
	iperf := lab.Start(t, "iperf3 -s", l.OriginNS.Command("iperf3", "-s", "--forceflush"))
	lab.Eventually(t, 10*time.Second, "iperf3 listens", func() bool { return strings.Contains(iperf.Log.String(), "listening") })
	m := l.Mprox(t)
	m.Up("--proxy", s.URL())
	l.Origin.Forget()

	down := l.Dir + "/down"
	mustCurl(t, l, "-o", down, originURL(false, "/bytes/100000000"))
	if r := lab.Exec(t, l.Client.Command("sha256sum", down)); !strings.HasPrefix(r.Stdout, lab.Checksum(100_000_000)) {
		t.Errorf("curl, 100 MB down: %v", r)
	}
	if out := mustCurl(t, l, "-T", down, originURL(true, "/sum")); strings.TrimSpace(out) != lab.Checksum(100_000_000) {
		t.Errorf("curl, 100 MB up: %q", out)
	}
	for _, args := range [][]string{
		{"iperf3", "-c", lab.OriginV4.String(), "-t", "1"},
		{"iperf3", "-c", lab.OriginV6.String(), "-t", "1", "-R", "-P", "4"},
		{"iperf3", "-c", lab.OriginV4.String(), "-t", "1", "-u", "-b", "50M"},
	} {
		if r := lab.Exec(t, l.Client.Command(args...)); r.Code != 0 {
			t.Errorf("%v: %v", args, r)
		} else {
			t.Logf("%v:\n%s", args, r.Stdout)
		}
	}
	if r := lab.Exec(t, l.Client.Command(append(sshTo, "root@"+lab.OriginV4.String(), "echo from $SSH_CLIENT; head -c 5000000 /dev/zero | wc -c")...)); r.Code != 0 ||
		!strings.Contains(r.Stdout, "from "+lab.ExitV4.String()) || !strings.Contains(r.Stdout, "5000000") {
		t.Errorf("ssh: %v", r)
	}
	script := `
import socket, sys, urllib.request
print(len(urllib.request.urlopen("http://198.51.100.80/bytes/123456", timeout=10).read()))
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(5)
s.sendto(b"python", ("198.51.100.80", 7)); print(s.recvfrom(100))
try:
    socket.create_connection(("198.51.100.80", 9099), 5); print("connected")
except ConnectionRefusedError:
    print("refused")
`
	r := lab.Exec(t, l.Client.Command("/usr/bin/python3", "-c", script))
	if r.Stdout != "123456\n(b'python', ('198.51.100.80', 7))\nrefused\n" {
		t.Errorf("python3: %v", r)
	}
	if bad := l.Origin.AllFrom(lab.ExitV4, lab.ExitV6); len(bad) > 0 {
		t.Errorf("reached the origin without the proxy: %v", bad)
	}
}
