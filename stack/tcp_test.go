// SPDX-License-Identifier: GPL-3.0-or-later

package stack

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/mutex-proxy/mutex/flow"
)

func randomBytes(n int) []byte {
	b := make([]byte, n)
	r := rand.New(rand.NewSource(int64(n)))
	r.Read(b)
	return b
}

// TestRelayBulk moves data both ways at once, and ends one direction after the other.
func TestRelayBulk(t *testing.T) {
	const size = 4 << 20
	for _, v := range variants() {
		for _, kind := range []string{"socket", "opaque"} {
			t.Run(v.name+" "+kind, func(t *testing.T) {
				want := randomBytes(size)
				to := origin(t, func(c *net.TCPConn) {
					var wg sync.WaitGroup
					wg.Go(func() { _, _ = c.Write(want) })
					got, err := io.ReadAll(c)
					if err != nil || !bytes.Equal(got, want) {
						t.Errorf("origin got %d bytes, %v", len(got), err)
					}
					wg.Wait()
					_, _ = c.Write([]byte("after"))
				})
				var wrap func(*net.TCPConn) flow.Conn
				if kind == "opaque" {
					wrap = func(c *net.TCPConn) flow.Conn { return opaque{c} }
				}
				s, dev := startStack(t, &handler{tcp: relayTo(t, to, wrap)}, v.offload, nil)
				a := startApp(t, v, dev)
				c, err := a.dial(t, 80)
				if err != nil {
					t.Fatal(err)
				}
				var wg sync.WaitGroup
				wg.Go(func() {
					if _, err := c.Write(want); err != nil {
						t.Error(err)
					}
					_ = c.CloseWrite()
				})
				got, err := io.ReadAll(c)
				if err != nil || !bytes.Equal(got, append(want[:size:size], "after"...)) {
					t.Errorf("application got %d bytes (sha %x), %v", len(got), sha256.Sum256(got), err)
				}
				wg.Wait()
				if st := s.Stats(); st.Drops["checksum"]+st.Drops["malformed"]+st.Drops["netstack_tcp_checksum"] != 0 {
					t.Errorf("drops: %v", st.Drops)
				}
			})
		}
	}
}

// TestHonest: nothing at all is answered until the Handler decides.
func TestHonest(t *testing.T) {
	for _, v := range variants()[:2] {
		t.Run(v.name, func(t *testing.T) {
			asked, answer := make(chan netip.AddrPort, 1), make(chan struct{})
			_, dev := startStack(t, &handler{tcp: func(_ context.Context, _, orig netip.AddrPort, p flow.Pending) {
				asked <- orig
				<-answer
				c, err := p.Accept()
				if err != nil {
					t.Error(err)
					return
				}
				if _, err := p.Accept(); !errors.Is(err, errAnswered) {
					t.Errorf("second Accept: %v", err)
				}
				p.Reject(flow.ReasonRefused)
				_, _ = c.Write([]byte("hello")) // the server speaks first
				c.Close()
			}}, v.offload, nil)
			a := startApp(t, v, dev)
			done := make(chan string)
			go func() {
				c, err := a.dial(t, 443)
				if err != nil {
					done <- err.Error()
					return
				}
				b, err := io.ReadAll(c)
				if err != nil {
					done <- err.Error()
					return
				}
				done <- string(b)
			}()
			if got := <-asked; got != v.dst(443) {
				t.Errorf("asked for %v", got)
			}
			a.mu.Lock()
			if n := len(a.got); n != 0 {
				t.Errorf("%d packets before the answer", n)
			}
			a.mu.Unlock()
			close(answer)
			if got := <-done; got != "hello" {
				t.Errorf("got %q", got)
			}
		})
	}
}

func TestReject(t *testing.T) {
	type want struct {
		err        string // of the application's connect
		typ4, cod4 byte
		typ6, cod6 byte
	}
	cases := map[flow.Reason]want{
		flow.ReasonRefused:         {err: "connection was refused"},
		flow.ReasonHostUnreachable: {err: "no route to host", typ4: 3, cod4: 1, typ6: 1, cod6: 3},
		flow.ReasonTimeout:         {err: "no route to host", typ4: 3, cod4: 1, typ6: 1, cod6: 3},
		flow.ReasonNetUnreachable:  {err: "network is unreachable", typ4: 3, cod4: 0, typ6: 1, cod6: 0},
		flow.ReasonProhibited:      {err: "no route to host", typ4: 3, cod4: 13, typ6: 1, cod6: 1},
	}
	for _, v := range variants()[:2] {
		for r, w := range cases {
			t.Run(v.name+" "+r.String(), func(t *testing.T) {
				s, dev := startStack(t, &handler{tcp: func(_ context.Context, _, _ netip.AddrPort, p flow.Pending) { p.Reject(r) }}, v.offload, nil)
				a := startApp(t, v, dev)
				done := make(chan error, 1)
				ctx, cancel := context.WithCancel(t.Context())
				go func() {
					_, err := gonetDial(ctx, a, 81)
					done <- err
				}()
				b := a.packet(t, func([]byte) bool { return true })
				proto, payload := b[9], b[20:]
				if v.v6 {
					proto, payload = b[6], b[40:]
				}
				if r == flow.ReasonRefused {
					if proto != 6 || payload[13] != byte(header.TCPFlagRst|header.TCPFlagAck) {
						t.Fatalf("not a reset: % x", b)
					}
				} else {
					typ, code := w.typ4, w.cod4
					if v.v6 {
						typ, code = w.typ6, w.cod6
					}
					if payload[0] != typ || payload[1] != code {
						t.Fatalf("icmp type %d code %d, want %d %d", payload[0], payload[1], typ, code)
					}
					checkQuote(t, v, payload[8:], 81)
				}
				// gVisor, in the application's place, takes only some ICMPv6 codes to heart; the kernel's turn is in TestKernel.
				if v.v6 && r != flow.ReasonRefused && r != flow.ReasonNetUnreachable {
					cancel()
					<-done
				} else if err := <-done; err == nil || !strings.Contains(err.Error(), w.err) {
					t.Errorf("connect: %v, want %q", err, w.err)
				}
				cancel()
				eventually(t, func() bool { return s.Stats().PendingTCP == 0 })
			})
		}
	}
}

// checkQuote looks for the application's SYN in an ICMP error: addresses, ports, flags.
func checkQuote(t *testing.T, v variant, q []byte, port uint16) {
	t.Helper()
	l4 := 20
	if v.v6 {
		l4 = 40
		if got := netip.AddrFrom16([16]byte(q[8:24])); got != v.app() {
			t.Errorf("quoted source %v", got)
		}
	} else if got := netip.AddrFrom4([4]byte(q[12:16])); got != v.app() {
		t.Errorf("quoted source %v", got)
	}
	h := header.TCP(q[l4:])
	if len(h) < 20 || h.DestinationPort() != port || h.Flags() != header.TCPFlagSyn || h.SequenceNumber() == 0 {
		t.Errorf("quoted segment: % x", []byte(h))
	}
}

// TestSilence: dropped and unanswered requests get nothing, and leave nothing.
func TestSilence(t *testing.T) {
	calls := make(chan bool, 16)
	s, dev := startStack(t, &handler{tcp: func(_ context.Context, _, orig netip.AddrPort, p flow.Pending) {
		if orig.Port() == 1 {
			p.Reject(flow.ReasonDrop)
		}
		calls <- true // port 2: forgotten
	}}, true, nil)
	v := variants()[0]
	a := startApp(t, v, dev)
	for _, port := range []uint16{1, 2} {
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() {
			_, err := gonetDial(ctx, a, port)
			done <- err
		}()
		<-calls
		eventually(t, func() bool { return s.Stats().PendingTCP == 0 })
		cancel()
		if err := <-done; err == nil {
			t.Error("connected")
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.got) != 0 {
		t.Errorf("%d packets", len(a.got))
	}
}

// accepted starts a stack that hands out accepted connections, and dials one.
func accepted(t *testing.T, v variant) (*Stack, *app, net.Conn, flow.Conn) {
	t.Helper()
	conns := make(chan flow.Conn, 1)
	s, dev := startStack(t, &handler{tcp: func(ctx context.Context, _, _ netip.AddrPort, p flow.Pending) {
		c, err := p.Accept()
		if err != nil {
			t.Error(err)
			return
		}
		conns <- c
		<-ctx.Done()
	}}, v.offload, nil)
	a := startApp(t, v, dev)
	c, err := a.dial(t, 80)
	if err != nil {
		t.Fatal(err)
	}
	ours := <-conns
	_ = ours.SetDeadline(time.Now().Add(wait))
	return s, a, c, ours
}

func TestHalfClose(t *testing.T) {
	for _, v := range variants()[:2] {
		t.Run(v.name, func(t *testing.T) {
			_, _, theirs, ours := accepted(t, v)
			if err := theirs.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
				t.Fatal(err)
			}
			if n, err := ours.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
				t.Fatalf("after FIN: %d, %v", n, err)
			}
			if _, err := ours.Write([]byte("still")); err != nil {
				t.Fatal(err)
			}
			if err := ours.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			if b, err := io.ReadAll(theirs); err != nil || string(b) != "still" {
				t.Fatalf("%q, %v", b, err)
			}
			if _, err := ours.Write([]byte("x")); !errors.Is(err, unix.EPIPE) {
				t.Fatalf("write after CloseWrite: %v", err)
			}
		})
	}
}

func TestReset(t *testing.T) {
	t.Run("by the application", func(t *testing.T) {
		_, _, theirs, ours := accepted(t, variants()[0])
		reset(t, theirs)
		if _, err := ours.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
			t.Fatalf("read: %v", err)
		}
		if _, err := ours.Write([]byte("x")); err == nil {
			t.Fatal("write after reset")
		}
	})
	t.Run("by us", func(t *testing.T) {
		_, _, theirs, ours := accepted(t, variants()[1])
		ours.Abort()
		ours.Abort()
		if _, err := theirs.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
			t.Fatalf("read: %v", err)
		}
		if _, err := ours.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
			t.Fatalf("our read: %v", err)
		}
	})
	t.Run("after close", func(t *testing.T) {
		s, a, theirs, ours := accepted(t, variants()[0])
		if _, err := ours.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		ours.Close()
		ours.Abort()
		a.packet(t, func(b []byte) bool { return b[9] == 6 && b[33]&byte(header.TCPFlagRst) != 0 })
		ours.Close()
		ours.Abort()
		_ = theirs.Close()
		if n := s.Stats().OpenTCP; n != 0 {
			t.Errorf("%d open", n)
		}
	})
}

// reset closes with RST.
func reset(t *testing.T, c net.Conn) {
	t.Helper()
	ep := endpointOf(c)
	ep.SocketOptions().SetLinger(tcpip.LingerOption{Enabled: true})
	ep.Close()
}

// TestResetWhileBlocked: an application's RST ends a relay that waits for an upstream which stands still, in both directions.
func TestResetWhileBlocked(t *testing.T) {
	block := make(chan struct{})
	to := origin(t, func(*net.TCPConn) { <-block })
	defer close(block)
	dial := func(t *testing.T) *net.TCPConn {
		t.Helper()
		up, err := net.DialTCP("tcp", nil, net.TCPAddrFromAddrPort(to))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = up.Close() })
		return up
	}
	t.Run("ReadFrom", func(t *testing.T) {
		_, _, theirs, ours := accepted(t, variants()[0])
		up, done := dial(t), make(chan error)
		go func() {
			_, err := ours.(io.ReaderFrom).ReadFrom(up)
			done <- err
		}()
		reset(t, theirs)
		var op *net.OpError
		if err := <-done; !errors.Is(err, unix.ECONNRESET) || !errors.As(err, &op) || op.Op != "write" {
			t.Fatal(err)
		}
	})
	// netstack takes a reset after the application's FIN for an ordinary end. It is how a kernel answers a keep-alive for a socket that was
	// closed long ago, and says nothing else for as long as the upstream is silent.
	t.Run("ReadFrom after FIN", func(t *testing.T) {
		_, _, theirs, ours := accepted(t, variants()[0])
		if err := theirs.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if _, err := ours.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
			t.Fatal(err)
		}
		up, done := dial(t), make(chan error)
		go func() {
			_, err := ours.(io.ReaderFrom).ReadFrom(up)
			done <- err
		}()
		reset(t, theirs)
		var op *net.OpError
		if err := <-done; !errors.As(err, &op) || op.Op != "write" || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal(err)
		}
	})
	t.Run("WriteTo", func(t *testing.T) {
		_, _, theirs, ours := accepted(t, variants()[0])
		up, done := dial(t), make(chan error)
		counted := &flow.Counter{}
		ours.(flow.Counted).SetCounters(counted, &flow.Counter{})
		go func() {
			_, err := ours.(io.WriterTo).WriteTo(up)
			done <- err
		}()
		_ = theirs.SetWriteDeadline(time.Now().Add(time.Second / 2))
		n, err := theirs.Write(make([]byte, 64<<20)) // until every buffer on the way is full
		if err == nil {
			t.Fatalf("no backpressure: %d bytes", n)
		}
		reset(t, theirs)
		var op *net.OpError
		if err := <-done; !errors.Is(err, unix.ECONNRESET) || !errors.As(err, &op) || op.Op != "read" {
			t.Fatal(err)
		}
		if counted.Load() == 0 {
			t.Error("nothing counted")
		}
	})
	t.Run("Close", func(t *testing.T) {
		_, _, _, ours := accepted(t, variants()[0])
		up, done := dial(t), make(chan error)
		go func() {
			_, err := ours.(io.ReaderFrom).ReadFrom(up)
			done <- err
		}()
		ours.Close()
		if err := <-done; !errors.Is(err, net.ErrClosed) {
			t.Fatal(err)
		}
	})
}

// TestUpstreamReset: a reset by the upstream is an error the relay can tell from its end.
func TestUpstreamReset(t *testing.T) {
	to := origin(t, func(c *net.TCPConn) {
		_, _ = c.Read(make([]byte, 1)) // not before the relay runs
		_ = c.SetLinger(0)
	})
	s, dev := startStack(t, &handler{tcp: relayTo(t, to, nil)}, true, nil)
	a := startApp(t, variants()[0], dev)
	c, err := a.dial(t, 80)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = c.Write([]byte("x"))
	if _, err := io.ReadAll(c); err == nil {
		t.Fatal("a reset became an end of file")
	}
	eventually(t, func() bool { return s.Stats().OpenTCP == 0 })
}

// TestBackpressure: what nobody reads stays with its sender, beyond what the buffers hold.
func TestBackpressure(t *testing.T) {
	_, _, theirs, ours := accepted(t, variants()[0])
	for name, c := range map[string]net.Conn{"from the application": theirs, "to the application": ours} {
		_ = c.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
		n, err := c.Write(make([]byte, 32<<20))
		if err == nil || n > 8<<20 {
			t.Errorf("%s: %d bytes, %v", name, n, err)
		}
	}
}

func TestDeadlines(t *testing.T) {
	_, _, theirs, ours := accepted(t, variants()[0])
	done := make(chan error)
	go func() {
		_, err := ours.Read(make([]byte, 1))
		done <- err
	}()
	_ = ours.SetReadDeadline(time.Now().Add(-time.Second))
	var ne net.Error
	if err := <-done; !errors.As(err, &ne) || !ne.Timeout() {
		t.Fatal(err)
	}
	_ = ours.SetReadDeadline(time.Time{})
	go func() { _, _ = theirs.Write([]byte("x")) }()
	if n, err := ours.Read(make([]byte, 4)); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	_ = ours.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
	if _, err := ours.Read(make([]byte, 1)); !errors.As(err, &ne) || !ne.Timeout() {
		t.Fatal(err)
	}
}
