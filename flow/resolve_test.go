// SPDX-License-Identifier: GPL-3.0-or-later

package flow

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"strings"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
)

// query is a message long enough to be one.
func query(s string) []byte { return []byte(s + strings.Repeat(".", max(0, minMessage-len(s)))) }

// dnsRig runs a DNS connection and returns the application's end of it.
func dnsRig(t *testing.T, n *names) (r *rig, app *memConn, done chan struct{}) {
	t.Helper()
	r = newRig(t, func(h *HandlerConfig, _ *TableConfig) { h.Names = n })
	r.SetDecider(always(Resolve, nil))
	app, near := memPipe()
	done = make(chan struct{})
	go func() {
		defer close(done)
		r.TCP(t.Context(), appAddr, webAddr, &pending{accept: func() (Conn, error) { return near, nil }})
	}()
	return r, app, done
}

func mustMessage(t *testing.T, r io.Reader, want string) {
	t.Helper()
	got, err := readMessage(r)
	if err != nil || string(got) != want {
		t.Fatalf("read %q, %v, want %q", got, err, want)
	}
}

func TestDNSOverTCP(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, app, done := dnsRig(t, &names{})
		for _, q := range []string{"first", "second"} {
			mustWrite(t, app, string(frame(query(q))))
			mustMessage(t, app, "re:"+string(query(q)))
		}
		begin := time.Now()
		mustEOF(t, app) // idle
		if took := time.Since(begin); took != dnsIdle {
			t.Errorf("closed after %v, want %v", took, dnsIdle)
		}
		<-done
		line := r.line(t)
		if line["result"] != ResultOK || line["upstream"] != "dns" || line["handshake"] != HandshakeEarly || line["bytes_up"] != uint64(28) {
			t.Error(line)
		}
	})
}

// Many queries at a time, each answered when it is ready; what was asked before the application half-closed is answered too.
func TestDNSOverTCPPipelined(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var most, now atomic.Int32
		n := &names{exchange: func(_ context.Context, _ *Flow, q []byte) ([]byte, error) {
			most.Store(max(most.Load(), now.Add(1)))
			defer now.Add(-1)
			if strings.HasPrefix(string(q), "slow") {
				<-time.After(5 * time.Second)
			}
			return q, nil
		}}
		_, app, done := dnsRig(t, n)
		mustWrite(t, app, string(frame(query("slow"))))
		mustWrite(t, app, string(frame(query("fast"))))
		mustMessage(t, app, string(query("fast")))
		mustMessage(t, app, string(query("slow")))
		for range maxPipelined + 10 {
			mustWrite(t, app, string(frame(query("slow"))))
		}
		_ = app.CloseWrite()
		for range maxPipelined + 10 {
			mustMessage(t, app, string(query("slow")))
		}
		mustEOF(t, app)
		<-done
		if most.Load() != maxPipelined {
			t.Errorf("%d at a time, want %d", most.Load(), maxPipelined)
		}
	})
}

func TestDNSOverTCPBadInput(t *testing.T) {
	for name, c := range map[string]struct {
		in   string
		then func(*memConn)
	}{
		"empty message":          {"\x00\x00", nil},
		"message below a header": {"\x00\x0babcdefghijk", nil},
		"cut in the length":      {"\x00", func(c *memConn) { _ = c.CloseWrite() }},
		"cut in the message":     {"\x00\x20abc", func(c *memConn) { _ = c.CloseWrite() }},
		"not dns":                {string(frame(query("bad"))), nil},
		"reset":                  {"\x00", (*memConn).Abort},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := &names{exchange: func(context.Context, *Flow, []byte) ([]byte, error) { return nil, errors.New("not dns") }}
				r, app, done := dnsRig(t, n)
				mustWrite(t, app, c.in)
				if c.then != nil {
					c.then(app)
				}
				if _, err := app.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
					t.Errorf("the application sees %v, want a reset", err)
				}
				<-done
				if line := r.line(t); line["result"] != ResultReset {
					t.Error(line)
				}
			})
		})
	}
}

func TestDNSOverTCPShutdown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &names{exchange: func(ctx context.Context, _ *Flow, _ []byte) ([]byte, error) {
			<-ctx.Done()
			return []byte("servfail"), nil
		}}
		r, app, done := dnsRig(t, n)
		mustWrite(t, app, string(frame(query("x"))))
		synctest.Wait()
		r.Close()
		<-done
		if line := r.line(t); line["result"] != ResultShutdown {
			t.Error(line)
		}
	})
}

func TestReadMessageSplitAnywhere(t *testing.T) {
	var stream []byte
	for _, q := range []string{"one", "two"} {
		stream = append(stream, frame(query(q))...)
	}
	r := iotest.OneByteReader(bytes.NewReader(stream))
	mustMessage(t, r, string(query("one")))
	mustMessage(t, r, string(query("two")))
	if _, err := readMessage(r); !errors.Is(err, io.EOF) {
		t.Errorf("at the end: %v", err)
	}
}

// A promised length costs nothing until the bytes are there.
func TestReadMessageGrows(t *testing.T) {
	r := &greedy{left: append([]byte{0xff, 0xff}, make([]byte, 100)...)}
	if _, err := readMessage(r); !errors.Is(err, io.ErrUnexpectedEOF) || r.most > 4<<10 {
		t.Errorf("%v, room for %d bytes was made when 100 had arrived", err, r.most)
	}
}

// greedy notes the largest buffer it was given.
type greedy struct {
	left []byte
	most int
}

func (g *greedy) Read(p []byte) (int, error) {
	g.most = max(g.most, len(p))
	if len(g.left) == 0 {
		return 0, io.EOF
	}
	n := copy(p, g.left)
	g.left = g.left[n:]
	return n, nil
}

// Whatever the stream, it is answered message by message exactly as an obvious parser cuts it.
func FuzzDNSOverTCP(f *testing.F) {
	f.Add(frame(query("a")), uint8(1))
	f.Add(append(frame(query("a")), frame(query("bc"))...), uint8(3))
	f.Add([]byte{0}, uint8(1))
	f.Add([]byte{0, 0}, uint8(1))
	f.Add([]byte{0, 11, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}, uint8(2))
	f.Add([]byte{0xff, 0xff, 1, 2, 3}, uint8(5))
	f.Fuzz(func(t *testing.T, stream []byte, chunk uint8) {
		var want [][]byte
		clean := true
		for s := stream; len(s) > 0; {
			if len(s) < 2 {
				clean = false
				break
			}
			n := int(binary.BigEndian.Uint16(s))
			if n < minMessage || len(s) < 2+n {
				clean = false
				break
			}
			want = append(want, s[2:2+n])
			s = s[2+n:]
		}
		r := &chunked{data: stream, size: int(chunk%16) + 1}
		for _, w := range want {
			got, err := readMessage(r)
			if err != nil || !bytes.Equal(got, w) {
				t.Fatalf("got %x, %v, want %x", got, err, w)
			}
			if again := frame(got); !bytes.Equal(again[2:], w) || int(binary.BigEndian.Uint16(again)) != len(w) {
				t.Fatalf("framed again: %x", again)
			}
		}
		if _, err := readMessage(r); err == nil || errors.Is(err, io.EOF) != clean {
			t.Fatalf("at the end: %v, clean %v", err, clean)
		}
	})
}

// chunked gives so many bytes a read.
type chunked struct {
	data []byte
	size int
}

func (c *chunked) Read(p []byte) (int, error) {
	if len(c.data) == 0 {
		return 0, io.EOF
	}
	n := copy(p, c.data[:min(len(c.data), c.size)])
	c.data = c.data[n:]
	return n, nil
}
