// SPDX-License-Identifier: GPL-3.0-or-later

package flow

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"net"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
)

// sockConn is a real socket as a Conn.
type sockConn struct{ *net.TCPConn }

func (c sockConn) Abort() {
	_ = c.SetLinger(0)
	_ = c.Close()
}

var _ syscall.Conn = sockConn{}

// plainConn hides everything but Conn.
type plainConn struct{ Conn }

// fastConn is what the stack's Conn looks like: it moves and counts by itself, and marks the errors of its writer.
type fastConn struct {
	Conn
	read, written *Counter
	used          *sync.Map
}

func (c *fastConn) SetCounters(r, w *Counter) { c.read, c.written = r, w }

func (c *fastConn) WriteTo(w io.Writer) (n int64, err error) {
	c.used.Store("WriteTo", true)
	return move(w, c.Conn, c.read)
}

func (c *fastConn) ReadFrom(r io.Reader) (n int64, err error) {
	c.used.Store("ReadFrom", true)
	return move(c.Conn, r, c.written)
}

func move(w io.Writer, r io.Reader, c *Counter) (total int64, err error) {
	buf := make([]byte, 16<<10)
	for {
		n, err := r.Read(buf)
		if n > 0 {
			if _, werr := w.Write(buf[:n]); werr != nil {
				return total, &WriteError{werr}
			}
			c.Add(uint64(n))
			total += int64(n)
		}
		if errors.Is(err, io.EOF) {
			return total, nil
		}
		if err != nil {
			return total, err
		}
	}
}

func tcpPair(t *testing.T) (a, b sockConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	x, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	y, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { x.Close(); y.Close() })
	deadline := time.Now().Add(30 * time.Second)
	_ = x.SetDeadline(deadline)
	return sockConn{x.(*net.TCPConn)}, sockConn{y.(*net.TCPConn)}
}

// newStaff returns a crew that is closed when the test ends.
func newStaff(t *testing.T) *crew {
	t.Helper()
	c := &crew{}
	t.Cleanup(c.close)
	return c
}

// relayRig is a relay between two real connections; app and up are the far ends.
type relayRig struct {
	app, up sockConn
	table   *Table
	e       *entry
	cancel  context.CancelCauseFunc
	err     chan error
}

func startRelay(t *testing.T, wrap func(Conn) Conn) *relayRig {
	t.Helper()
	r := &relayRig{table: NewTable(TableConfig{}), err: make(chan error, 1)}
	var appIn, upIn sockConn
	r.app, appIn = tcpPair(t)
	r.up, upIn = tcpPair(t)
	r.e = mustAdd(t, r.table, func(error) {})
	ctx, cancel := context.WithCancelCause(t.Context())
	r.cancel = cancel
	t.Cleanup(func() { cancel(nil) })
	pool := newBufferPool()
	staff := newStaff(t)
	go func() { r.err <- relay(ctx, wrap(appIn), upIn, nil, r.e, pool, staff) }()
	return r
}

// wait returns how the relay ended.
func (r *relayRig) wait(t *testing.T) error {
	t.Helper()
	select {
	case err := <-r.err:
		return err
	case <-time.After(20 * time.Second):
		t.Fatal("the relay does not end")
		return nil
	}
}

// eachRelay runs a test with a Conn that is copied and one that moves bytes by itself.
func eachRelay(t *testing.T, f func(t *testing.T, wrap func(Conn) Conn)) {
	t.Helper()
	t.Run("copied", func(t *testing.T) { f(t, func(c Conn) Conn { return plainConn{c} }) })
	t.Run("by itself", func(t *testing.T) {
		used := &sync.Map{}
		f(t, func(c Conn) Conn { return &fastConn{Conn: c, used: used} })
		for _, m := range []string{"WriteTo", "ReadFrom"} {
			if _, ok := used.Load(m); !ok {
				t.Errorf("%s was not used", m)
			}
		}
	})
}

func payload(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i * 7 >> 3)
	}
	return b
}

// Each side says all it has and half-closes, one long after the other.
func TestRelayHalfClose(t *testing.T) {
	eachRelay(t, func(t *testing.T, wrap func(Conn) Conn) {
		t.Helper()
		for name, swap := range map[string]bool{"application first": false, "upstream first": true} {
			t.Run(name, func(t *testing.T) {
				r := startRelay(t, wrap)
				first, second := r.app, r.up
				if swap {
					first, second = r.up, r.app
				}
				data := payload(3 << 20)
				go func() {
					_, _ = first.Write(data)
					_ = first.CloseWrite()
				}()
				got, err := io.ReadAll(second)
				if err != nil || sha256.Sum256(got) != sha256.Sum256(data) {
					t.Fatalf("%d bytes, %v, want %d", len(got), err, len(data))
				}
				go func() {
					_, _ = second.Write(data)
					_ = second.Close()
				}()
				got, err = io.ReadAll(first)
				if err != nil || !bytes.Equal(got, data) {
					t.Fatalf("back: %d bytes, %v, want %d", len(got), err, len(data))
				}
				if err := r.wait(t); err != nil {
					t.Errorf("relay: %v", err)
				}
				if r.e.up.Load() != uint64(len(data)) || r.e.down.Load() != uint64(len(data)) {
					t.Errorf("counted %d up, %d down", r.e.up.Load(), r.e.down.Load())
				}
			})
		}
	})
}

func TestRelayReset(t *testing.T) {
	eachRelay(t, func(t *testing.T, wrap func(Conn) Conn) {
		t.Helper()
		for name, swap := range map[string]bool{"by the application": false, "by the upstream": true} {
			t.Run(name, func(t *testing.T) {
				r := startRelay(t, wrap)
				from, to := r.app, r.up
				if swap {
					from, to = r.up, r.app
				}
				mustWrite(t, from, "x")
				mustRead(t, to, "x")
				from.Abort()
				if _, err := to.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
					t.Errorf("the other side sees %v, want a reset", err)
				}
				if err := r.wait(t); err == nil {
					t.Error("the relay reports no error")
				}
			})
		}
	})
}

// One side answers and closes for good while the other is still sending (HTTP 413, ssh exit): the answer arrives, whole.
func TestRelayEarlyClose(t *testing.T) {
	eachRelay(t, func(t *testing.T, wrap func(Conn) Conn) {
		t.Helper()
		for name, swap := range map[string]bool{"upstream closes": false, "application closes": true} {
			t.Run(name, func(t *testing.T) {
				r := startRelay(t, wrap)
				sender, closer := r.app, r.up
				if swap {
					sender, closer = r.up, r.app
				}
				answer := payload(1 << 20)
				stop := make(chan struct{})
				var wg sync.WaitGroup
				wg.Go(func() { // sends for ever, a little at a time
					for {
						select {
						case <-stop:
							return
						default:
						}
						if _, err := sender.Write(payload(512)); err != nil {
							return
						}
					}
				})
				wg.Go(func() {
					_, _ = closer.Write(answer)
					_ = closer.CloseWrite()
					awaitSent(t, closer) // closing with unread bytes is a reset, which forgets what has not left
					_ = closer.Close()
				})
				got := make([]byte, len(answer))
				if n, err := io.ReadFull(sender, got); err != nil || !bytes.Equal(got, answer) {
					t.Errorf("%d bytes of the answer, %v, want %d", n, err, len(answer))
				}
				close(stop)
				wg.Wait()
				_ = sender.Close()
				_ = r.wait(t)
			})
		}
	})
}

// awaitSent waits until the peer's kernel has everything that was written to c.
func awaitSent(t *testing.T, c sockConn) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Error(err)
		return
	}
	for tick := time.NewTicker(time.Millisecond); ; <-tick.C {
		queued := 1
		if err := raw.Control(func(fd uintptr) { queued, _ = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) }); err != nil || queued == 0 {
			tick.Stop()
			return
		}
	}
}

// A reader that does not read stops the writer, and nothing is lost when it goes on.
func TestRelayBackpressure(t *testing.T) {
	eachRelay(t, func(t *testing.T, wrap func(Conn) Conn) {
		t.Helper()
		r := startRelay(t, wrap)
		_ = r.up.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
		chunk, sent := payload(64<<10), 0
		for sent < 256<<20 {
			n, err := r.up.Write(chunk)
			sent += n
			if err != nil {
				break
			}
		}
		if sent >= 256<<20 {
			t.Fatal("256 MiB were taken from the upstream that nobody has read")
		}
		_ = r.up.SetWriteDeadline(time.Time{})
		_ = r.up.CloseWrite()
		n, err := io.Copy(io.Discard, r.app)
		if err != nil || n != int64(sent) {
			t.Errorf("%d bytes arrived, %v, want %d", n, err, sent)
		}
		_ = r.app.Close()
		_ = r.wait(t)
	})
}

func TestRelayKill(t *testing.T) {
	eachRelay(t, func(t *testing.T, wrap func(Conn) Conn) {
		t.Helper()
		r := startRelay(t, wrap)
		mustWrite(t, r.app, "x")
		mustRead(t, r.up, "x")
		mustWrite(t, r.up, "x")
		mustRead(t, r.app, "x")
		r.cancel(ErrKilled)
		if err := r.wait(t); !errors.Is(err, ErrKilled) {
			t.Errorf("relay: %v", err)
		}
		for _, c := range []sockConn{r.app, r.up} {
			if _, err := c.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("%v, want a reset", err)
			}
		}
	})
}

// memRelay is a relay in memory, for a bubble's clock.
func memRelay(t *testing.T, head string) (app, up *memConn, e *entry, result chan error) {
	t.Helper()
	app, appIn := memPipe()
	up, upIn := memPipe()
	e = mustAdd(t, NewTable(TableConfig{}), func(error) {})
	result = make(chan error, 1)
	staff := newStaff(t)
	go func() { result <- relay(t.Context(), appIn, upIn, []byte(head), e, newBufferPool(), staff) }()
	return app, up, e, result
}

func TestRelayIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		app, up, _, result := memRelay(t, "")
		<-time.After(72 * time.Hour)
		mustWrite(t, app, "still here")
		mustRead(t, up, "still here")
		_ = app.CloseWrite()
		mustEOF(t, up)
		half := time.Now()
		<-time.After(50 * time.Minute)
		mustWrite(t, up, "slow answer")
		mustRead(t, app, "slow answer")
		if err := <-result; !errors.Is(err, ErrIdle) || time.Since(half) != 110*time.Minute {
			t.Errorf("ended after %v: %v", time.Since(half), err)
		}
		if _, err := app.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("the application sees %v", err)
		}
	})
}

func TestRelayHead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		app, up, e, result := memRelay(t, "sniffed ")
		mustWrite(t, app, "and sent")
		mustRead(t, up, "sniffed and sent")
		_ = app.Close()
		_ = up.Close()
		if err := <-result; err != nil || e.up.Load() != 16 {
			t.Errorf("%v, %d bytes up", err, e.up.Load())
		}
	})
}

// An application that goes on sending to an upstream that is gone is not kept for longer than the answer may take.
func TestRelayDeafUpstreamLingers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		app, up, _, result := memRelay(t, "")
		mustWrite(t, up, "answer")
		_ = up.Close()
		synctest.Wait()
		mustWrite(t, app, "more")
		synctest.Wait()
		mustRead(t, app, "answer")
		mustEOF(t, app)
		begin := time.Now()
		if err := <-result; err == nil || time.Since(begin) != lingerTime {
			t.Errorf("ended after %v: %v", time.Since(begin), err)
		}
	})
}

// A download that the application has hung up on is not pulled through the line for as long as we linger.
func TestRelayDeafApplicationCostsLittle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		app, up, _, result := memRelay(t, "")
		_ = app.Close()
		sent := 0
		for chunk := make([]byte, 16<<10); ; {
			n, err := up.Write(chunk)
			if sent += n; err != nil {
				break
			}
		}
		if err := <-result; err == nil {
			t.Error("no error")
		}
		if limit := discardFast + int(lingerTime/discardPace+1)*bufferSize + 8*halfSize; sent < discardFast || sent > limit {
			t.Errorf("%d bytes were read for nobody, wanted %d to %d", sent, discardFast, limit)
		}
	})
}

func TestRelayDoesNotAllocatePerChunk(t *testing.T) {
	e := mustAdd(t, NewTable(TableConfig{}), func(error) {})
	r := &relaying{e: e, buffers: newBufferPool()}
	r.buffers.put(r.buffers.get())
	src := &repeater{}
	n := testing.AllocsPerRun(20, func() {
		src.left = 200
		if err := r.copy(io.Discard, src, true); err != nil {
			t.Error(err)
		}
	})
	if n > 1 { // the pool may be emptied by the collector
		t.Errorf("%v allocations for 200 chunks", n)
	}
}

// repeater is a reader of so many chunks.
type repeater struct{ left int }

func (r *repeater) Read(p []byte) (int, error) {
	if r.left == 0 {
		return 0, io.EOF
	}
	r.left--
	return len(p), nil
}
