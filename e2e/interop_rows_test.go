// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/mutex-proxy/mutex/e2e/lab"
)

// The words of the cells. Failures are said as the application is told them.
const (
	works = "works"
	none  = "–" // does not apply
)

// interopRows are the rows of the matrix.
func interopRows() []row {
	return []row{
		{"TCP, IPv4", func(_ *testing.T, m *matrix, c *column) string { return m.echo(c.from, lab.OriginV4) }},
		{"TCP, IPv6", func(_ *testing.T, m *matrix, c *column) string { return m.echo(c.from, lab.OriginV6) }},
		{"TCP, by name (A)", func(_ *testing.T, m *matrix, c *column) string { return m.echo(c.from, m.names["v4"]) }},
		{"TCP, by name (AAAA)", func(_ *testing.T, m *matrix, c *column) string { return m.echo(c.from, m.names["v6"]) }},
		{"10 MB each way, SHA-256", func(_ *testing.T, m *matrix, c *column) string {
			return m.talk(c.from, lab.OriginV4, lab.PortSum, func(c net.Conn) error { return lab.Exchange(c, 10_000_000) })
		}},
		{"server speaks first", interopBanner},
		{"client ends first, still gets the answer", interopHalfClose},
		{"server ends first, still gets the rest", interopEarlyEnd},
		{"reset by the destination", interopReset},
		{"port closed", func(_ *testing.T, m *matrix, c *column) string { return m.fails(c.from, lab.OriginV4, lab.PortClosed) }},
		{"host unreachable", func(_ *testing.T, m *matrix, c *column) string { return m.fails(c.from, lab.UnreachableV4, 80) }},
		{"network unreachable", func(_ *testing.T, m *matrix, c *column) string { return m.fails(c.from, lab.NoNetV4, 80) }},
		{"destination silent", func(_ *testing.T, m *matrix, c *column) string { return m.fails(c.from, lab.BlackholeV4, 80) }},
		{"wrong password", variant("wrong password")},
		{"UDP, IPv4", func(_ *testing.T, m *matrix, c *column) string { return m.udp(c.from, lab.OriginV4) }},
		{"UDP, IPv6", func(_ *testing.T, m *matrix, c *column) string { return m.udp(c.from, lab.OriginV6) }},
		{"UDP, by name", func(_ *testing.T, m *matrix, c *column) string { return m.udp(c.from, m.names["v4"]) }},
		{"BIND (`mprox forward`)", interopBind},
		{"TLS, CA and `sni`", func(_ *testing.T, m *matrix, c *column) string {
			if !c.tls {
				return none
			}
			return m.echo(c.from, lab.OriginV4)
		}},
		{"TLS, CA unknown", variant("unknown CA")},
		{"TLS, another name", variant("other name")},
		{"TLS, `insecure=1`", variant("insecure")},
		{"TLS, client certificate wanted and shown", variant("certificate")},
		{"TLS, client certificate wanted, none shown", variant("no certificate")},
	}
}

// variant is the row of another way to reach the server.
func variant(what string) func(*testing.T, *matrix, *column) string {
	return func(_ *testing.T, m *matrix, c *column) string {
		from, ok := c.variants[what]
		if !ok {
			return none
		}
		w := m.echo(from, lab.OriginV4)
		if w == works || what == "no certificate" { // there, a reset may overtake the server's alert
			return w
		}
		return w + ", logged: " + m.logged(from[0])
	}
}

// logged says why the daemon's log says that the flow of a source address failed.
func (m *matrix) logged(from netip.Addr) string {
	var line string
	lab.Poll(lab.Patience, func() bool {
		for l := range strings.Lines(m.p.Log.String()) {
			if strings.Contains(l, fmt.Sprintf(`"src": "%s:`, from)) && strings.Contains(l, `"error"`) {
				line = l
			}
		}
		return line != ""
	})
	for _, reason := range [...][2]string{
		{"wrong user or password", "wrong password"},
		{"server says: 407", "407"},
		{"server says: 401", "401"},
		{"unknown authority", "unknown authority"},
		{"cannot validate certificate", "other name"},
	} {
		if strings.Contains(line, reason[0]) {
			return reason[1]
		}
	}
	return "nothing of it"
}

// word says an error in the cells' words.
func word(err error) string {
	for errno, w := range map[syscall.Errno]string{
		syscall.ECONNREFUSED: "refused", syscall.EHOSTUNREACH: "host unreachable", syscall.ENETUNREACH: "net unreachable",
		syscall.ECONNRESET: "reset", syscall.EPIPE: "reset",
	} {
		if errors.Is(err, errno) {
			return w
		}
	}
	switch {
	case err == nil:
		return works
	case isTimeout(err):
		return "silence"
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return "end"
	}
	return err.Error()
}

// pick returns the source address for a destination.
func pick(from [2]netip.Addr, dst netip.Addr) netip.Addr {
	if dst.Is4() {
		return from[0]
	}
	return from[1]
}

// talk connects and has a conversation.
func (m *matrix) talk(from [2]netip.Addr, dst netip.Addr, port uint16, f func(net.Conn) error) string {
	c, err := m.l.Client.DialFrom("tcp", pick(from, dst), netip.AddrPortFrom(dst, port).String(), 10*time.Second)
	switch {
	case errors.Is(err, syscall.ECONNRESET): // it came before connect(2) had looked
		return "connected, then reset"
	case err != nil:
		return word(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	if err := f(c); err != nil {
		return "connected, then " + word(err)
	}
	return works
}

func echoes(c net.Conn) error {
	if _, err := io.WriteString(c, "hello"); err != nil {
		return err
	}
	got := make([]byte, 5)
	if _, err := io.ReadFull(c, got); err != nil {
		return err
	}
	if string(got) != "hello" {
		return fmt.Errorf("%q came back", got)
	}
	return nil
}

func (m *matrix) echo(from [2]netip.Addr, dst netip.Addr) string {
	return m.talk(from, dst, lab.PortEcho, echoes)
}

// fails says how a connection that cannot be made fails.
func (m *matrix) fails(from [2]netip.Addr, dst netip.Addr, port uint16) string {
	return m.talk(from, dst, port, func(c net.Conn) error {
		_ = c.SetDeadline(time.Now().Add(6 * time.Second))
		_, err := c.Read(make([]byte, 1))
		return err
	})
}

// interopBanner makes eight connections at a time: the first bytes often come in one piece with the proxy's reply.
func interopBanner(_ *testing.T, m *matrix, c *column) string {
	out := make([]string, 8)
	var wg sync.WaitGroup
	for i := range out {
		wg.Go(func() {
			out[i] = m.talk(c.from, lab.OriginV4, lab.PortBanner, func(c net.Conn) error {
				line, err := bufio.NewReader(c).ReadString('\n')
				if err == nil && line != lab.Banner {
					err = fmt.Errorf("%q", line)
				}
				return err
			})
		})
	}
	wg.Wait()
	for _, w := range out {
		if w != works {
			return w
		}
	}
	return works
}

func interopHalfClose(_ *testing.T, m *matrix, c *column) string {
	const n = 1_000_000
	return m.talk(c.from, lab.OriginV4, lab.PortCount, func(c net.Conn) error {
		if _, err := io.Copy(c, lab.DataReader(n)); err != nil {
			return err
		}
		_ = c.(*net.TCPConn).CloseWrite()
		b, err := io.ReadAll(c)
		switch {
		case err != nil:
			return err
		case len(b) == 0:
			return io.EOF
		case string(b) != fmt.Sprintf("%d\n", n):
			return fmt.Errorf("%q", b)
		}
		return nil
	})
}

// interopEarlyEnd: only the origin can tell whether what was sent after its end has arrived, so it is asked by the source port it saw.
func interopEarlyEnd(_ *testing.T, m *matrix, c *column) string {
	n := 500_000 + int(c.from[0].As4()[3]) // tells the columns apart
	w := m.talk(c.from, lab.OriginV4, lab.PortEarlyEnd, func(c net.Conn) error {
		if b, err := io.ReadAll(c); err != nil || string(b) != "bye\n" {
			return errors.Join(fmt.Errorf("%q", b), err)
		}
		if _, err := io.Copy(c, lab.DataReader(int64(n))); err != nil {
			return err
		}
		return c.(*net.TCPConn).CloseWrite()
	})
	if w != works {
		return w
	}
	arrived := func() bool {
		return slices.Contains(m.l.Origin.AfterEnd(), int64(n))
	}
	if !lab.Poll(3*time.Second, arrived) {
		return "rest lost"
	}
	return works
}

func interopReset(_ *testing.T, m *matrix, c *column) string {
	w := m.talk(c.from, lab.OriginV4, lab.PortReset, func(c net.Conn) error {
		if _, err := io.WriteString(c, "x"); err != nil {
			return err
		}
		_, err := c.Read(make([]byte, 1))
		return err
	})
	return strings.TrimPrefix(w, "connected, then ")
}

func (m *matrix) udp(from [2]netip.Addr, dst netip.Addr) string {
	c, err := m.l.Client.DialFrom("udp", pick(from, dst), netip.AddrPortFrom(dst, lab.PortEcho).String(), time.Second)
	if err != nil {
		return word(err)
	}
	defer c.Close()
	buf := make([]byte, 2000)
	for range 3 {
		if _, err = c.Write(lab.Block(1200)); err != nil {
			return word(err)
		}
		_ = c.SetReadDeadline(time.Now().Add(2 * time.Second))
		var n int
		if n, err = c.Read(buf); err == nil && !bytes.Equal(buf[:n], lab.Block(1200)) {
			return "other bytes"
		}
		if err == nil || !isTimeout(err) {
			break
		}
	}
	return word(err)
}

// interopBind has `mprox forward` ask for a connection, and makes it from the origin. It runs on the LAN host, which is not captured.
func interopBind(t *testing.T, m *matrix, c *column) string {
	t.Helper()
	if !c.socks || strings.Contains(c.url, "127.0.0.1") {
		return none
	}
	echo, err := m.l.LAN.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err.Error()
	}
	defer echo.Close()
	go func() {
		if conn, err := echo.Accept(); err == nil {
			_, _ = io.Copy(conn, conn)
			_ = conn.Close()
		}
	}()
	p := lab.Start(t, "forward", m.l.LAN.Command(lab.Binary(t), "forward", "--upstream", c.url, "--bind", lab.OriginV4.String()+":0", echo.Addr().String()))
	defer p.Stop()
	lab.Poll(10*time.Second, func() bool { return p.Exited() || len(listening(p)) > 0 })
	as := listening(p)
	if len(as) == 0 {
		if strings.Contains(p.Log.String(), lab.Password) {
			t.Errorf("%s: the password is in the output of forward", c.name)
		}
		return "refused"
	}
	at := netip.AddrPortFrom(lab.ExitV4, netip.MustParseAddrPort(as[0]).Port())
	conn, err := m.l.OriginNS.Dial("tcp", at.String(), 5*time.Second)
	if err != nil {
		return word(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
	return word(echoes(conn))
}
