// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"context"
	"io"
	"net"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

// talk sends a message and waits for its answer, twice, over a connection made by dial, and returns how many packets the server has got. last is
// called after the second message.
func talk(t *testing.T, dial func(context.Context, netip.AddrPort) (*TCPConn, error), last func(io.Writer)) uint32 {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	got := make(chan uint32, 1)
	go func() {
		defer close(got)
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		b := make([]byte, 3)
		for range 2 {
			if _, err := io.ReadFull(c, b); err != nil {
				return
			}
			_, _ = c.Write(b)
		}
		if _, err := io.ReadFull(c, b); err != nil { // it acknowledges what was sent last
			return
		}
		raw, _ := c.(*net.TCPConn).SyscallConn()
		_ = raw.Control(func(fd uintptr) {
			if info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
				got <- info.Segs_in
			}
		})
	}()
	c, err := dial(testContext(t), netip.MustParseAddrPort(l.Addr().String()))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	b := make([]byte, 3)
	for i := range 2 {
		_, _ = c.Write([]byte("abc"))
		if i == 1 {
			last(c)
		}
		if _, err := io.ReadFull(c, b); err != nil {
			t.Fatal(err)
		}
	}
	_, _ = c.Write([]byte("end"))
	return <-got
}

// Where we speak first, and many connections are being opened, neither the SYN-ACK nor an answer is acknowledged by a packet of its own, but for
// the answer that the server may follow with what the destination says.
func TestAcknowledgedWithData(t *testing.T) {
	few, many := NewNet(NetConfig{}), NewNet(NetConfig{})
	many.dialing.Store(manyDials)
	nothing := func(io.Writer) {}
	for try := 1; ; try++ { // a machine that is busy for 40 ms sends one more
		plain, alone := talk(t, many.dialTCP, nothing), talk(t, few.dialServer, lastQuestion)
		server, last := talk(t, many.dialServer, nothing), talk(t, many.dialServer, lastQuestion)
		switch {
		case alone == plain && server == plain-2 && last == server+1:
			return
		case try == 10:
			t.Fatalf("%d and %d packets, %d to a server, %d with one acknowledged at once; want the same, 2 less, 1 more", plain, alone, server, last)
		}
	}
}
