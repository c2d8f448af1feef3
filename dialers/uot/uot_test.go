// SPDX-License-Identifier: GPL-3.0-or-later

package uot

import (
	"bytes"
	"errors"
	"io"
	"net/netip"
	"os"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/mutex-proxy/mutex/flow"
)

func addr(s string) flow.Addr { return flow.AddrFrom(netip.MustParseAddrPort(s)) }

// TestFormat holds the bytes of the specification.
func TestFormat(t *testing.T) {
	for _, tt := range []struct {
		addr flow.Addr
		want string
	}{
		{addr("192.0.2.1:53"), "\x00\xc0\x00\x02\x01\x00\x35\x00\x02hi"},
		{addr("[2001:db8::1]:53"), "\x01\x20\x01\x0d\xb8" + strings.Repeat("\x00", 11) + "\x01\x00\x35\x00\x02hi"},
		{flow.Addr{Host: "a.example", Port: 258}, "\x02\x09a.example\x01\x02\x00\x02hi"},
	} {
		got, err := Append(nil, tt.addr, []byte("hi"))
		if err != nil || string(got) != tt.want {
			t.Errorf("%v: %q, %v", tt.addr, got, err)
		}
	}
	if _, err := Append(nil, flow.Addr{Port: 1}, nil); err == nil {
		t.Error("no address was accepted")
	}
	if _, err := Append(nil, flow.Addr{Host: strings.Repeat("a", 256)}, nil); err == nil {
		t.Error("a long name was accepted")
	}
	if _, err := AppendConnected(nil, make([]byte, MaxPayload+1)); err == nil {
		t.Error("too large a datagram was accepted")
	}
}

func TestReader(t *testing.T) {
	var stream []byte
	var want []string
	for i, size := range []int{0, 1, 1200, 65507, 3, MaxPayload, 2048, 9000} {
		a := []flow.Addr{addr("192.0.2.1:53"), addr("[2001:db8::1]:53"), {Host: "a.example", Port: 1}}[i%3]
		payload := bytes.Repeat([]byte{byte(i)}, size)
		stream, _ = Append(stream, a, payload)
		want = append(want, a.String()+string(payload))
	}
	for name, r := range map[string]io.Reader{
		"whole": bytes.NewReader(stream), "bytewise": iotest.OneByteReader(bytes.NewReader(stream)), "halves": iotest.HalfReader(bytes.NewReader(stream)),
		"end with data": iotest.DataErrReader(bytes.NewReader(stream)), "time-outs": &stuttering{r: bytes.NewReader(stream)},
	} {
		rd := NewReader(r, false)
		for i, w := range want {
			a, p, err := rd.Next()
			for errors.Is(err, os.ErrDeadlineExceeded) {
				a, p, err = rd.Next()
			}
			if err != nil || a.String()+string(p) != w {
				t.Fatalf("%s: datagram %d: %v, %d bytes, %v", name, i, a, len(p), err)
			}
		}
		_, _, err := rd.Next()
		for errors.Is(err, os.ErrDeadlineExceeded) {
			_, _, err = rd.Next()
		}
		if !errors.Is(err, io.EOF) {
			t.Errorf("%s: at the end: %v", name, err)
		}
	}
}

// stuttering times out before each read of some bytes.
type stuttering struct {
	r    io.Reader
	turn bool
}

func (s *stuttering) Read(b []byte) (int, error) {
	if s.turn = !s.turn; s.turn {
		return 0, os.ErrDeadlineExceeded
	}
	return s.r.Read(b[:min(len(b), 1000)])
}

func TestReaderRefuses(t *testing.T) {
	for _, in := range []string{"\x03\x00", "\x02\x00", "\x00\xc0\x00\x02", "\x00\xc0\x00\x02\x01\x00\x35\x00\x02h"} {
		if _, _, err := NewReader(strings.NewReader(in), false).Next(); err == nil || errors.Is(err, io.EOF) {
			t.Errorf("%q: %v", in, err)
		}
	}
}

func FuzzReader(f *testing.F) {
	f.Add([]byte("\x00\xc0\x00\x02\x01\x00\x35\x00\x02hi"), false)
	f.Add([]byte("\x02\x01a\x00\x35\x00\x00\x01"), false)
	f.Add([]byte("\x00\x02hi\xff\xff"), true)
	f.Fuzz(func(t *testing.T, in []byte, connected bool) {
		r := NewReader(iotest.HalfReader(bytes.NewReader(in)), connected)
		var back []byte
		for {
			a, p, err := r.Next()
			if err != nil {
				break
			}
			if connected {
				back, err = AppendConnected(back, p)
			} else {
				back, err = Append(back, a, p)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		// What was read is a beginning of what was there, but for mapped addresses, which come back as IPv4.
		if !bytes.HasPrefix(in, back) && !bytes.Contains(in, []byte("\xff\xff")) {
			t.Errorf("%x read as %x", in, back)
		}
	})
}
