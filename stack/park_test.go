// SPDX-License-Identifier: GPL-3.0-or-later

package stack

import (
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/flow"
)

// TestPark: a parked WriteTo has no goroutine while there is nothing to do, and is resumed for everything that would have ended its wait.
func TestPark(t *testing.T) {
	for _, v := range variants() {
		t.Run(v.name, func(t *testing.T) {
			open := func() (net.Conn, flow.Conn, chan struct{}) {
				_, _, app, c := accepted(t, v)
				resumed := make(chan struct{}, 8)
				c.(flow.Parker).Park(func() { resumed <- struct{}{} })
				return app, c, resumed
			}
			next := func(resumed chan struct{}) {
				t.Helper()
				select {
				case <-resumed:
				case <-time.After(wait):
					t.Fatal("not resumed")
				}
			}
			move := func(c flow.Conn, w io.Writer, want error) {
				t.Helper()
				if _, err := c.(io.WriterTo).WriteTo(w); !errors.Is(err, want) {
					t.Fatalf("WriteTo: %v, want %v", err, want)
				}
			}

			t.Run("bytes and end", func(t *testing.T) {
				app, c, resumed := open()
				for _, word := range []string{"one", "two"} {
					if _, err := io.WriteString(app, word); err != nil {
						t.Fatal(err)
					}
					next(resumed)
					got := &collected{}
					move(c, got, flow.ErrParked)
					if string(got.b) != word {
						t.Fatalf("got %q, want %q", got.b, word)
					}
				}
				if len(resumed) != 0 {
					t.Error("resumed for nothing")
				}
				_ = app.(interface{ CloseWrite() error }).CloseWrite()
				next(resumed)
				move(c, io.Discard, nil)
			})
			t.Run("close", func(*testing.T) {
				_, c, resumed := open()
				c.Abort()
				next(resumed)
				move(c, io.Discard, net.ErrClosed)
			})
			t.Run("deadline", func(t *testing.T) {
				_, c, resumed := open()
				_ = c.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
				next(resumed) // to look at the new deadline
				_, err := c.(io.WriterTo).WriteTo(io.Discard)
				if errors.Is(err, flow.ErrParked) {
					next(resumed)
					_, err = c.(io.WriterTo).WriteTo(io.Discard)
				}
				if !errors.Is(err, os.ErrDeadlineExceeded) {
					t.Fatal(err)
				}
			})
			t.Run("reset", func(t *testing.T) {
				app, c, resumed := open()
				reset(t, app)
				next(resumed)
				move(c, io.Discard, unix.ECONNRESET)
			})
		})
	}
}

// collected is a writer that is no socket.
type collected struct{ b []byte }

func (c *collected) Write(p []byte) (int, error) {
	c.b = append(c.b, p...)
	return len(p), nil
}
