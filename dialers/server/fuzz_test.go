// SPDX-License-Identifier: GPL-3.0-or-later

package server

import (
	"bufio"
	"io"
	"strings"
	"testing"
)

func FuzzRequests(f *testing.F) {
	for _, s := range []string{
		"\x05\x01\x00\x05\x01\x00\x01\x01\x02\x03\x04\x00\x50", "\x05\x02\x00\x02\x01\x03bob\x02pw\x05\x03\x00\x03\x01a\x00\x50",
		"\x05\x01\x00\x05\x01\x00\x04aaaaaaaaaaaaaaaa\x00\x50", "CONNECT [::1]:80 HTTP/1.1\r\nHost: a\r\nProxy-Authorization: Basic eA==\r\n\r\n", "GET / HTTP/1.1\n\n",
		"POST http://a:80/b HTTP/1.1\r\nHost: a\r\nX-Y: z\r\nContent-Length: 3\r\n\r\nabc", "GET http://a/ HTTP/1.0\r\nA: b\rC: d\r\n\r\n",
		"\x04\x01\x00\x50\x00\x00\x00\x01bob\x00localhost\x00",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		r := bufio.NewReaderSize(strings.NewReader(string(in)), readBuffer)
		if _, err := readGreeting(r); err == nil {
			if _, _, err := readPassword(r); err == nil {
				_, _, _ = readRequest(r)
			}
		}
		if _, dst, err := readRequest(strings.NewReader(string(in))); err == nil && dst.Host == "" && !dst.IP.IsValid() {
			t.Errorf("%x: no destination and no error", in)
		}
		if _, dst, err := readRequest4(bufio.NewReader(strings.NewReader(string(in)))); err == nil && dst.Host == "" && !dst.IP.IsValid() {
			t.Errorf("%x: no destination and no error", in)
		}
		r.Reset(strings.NewReader(string(in)))
		q, err := readHTTP(r)
		if err != nil {
			return
		}
		rest, _ := io.ReadAll(r)
		if !strings.HasSuffix(string(in), "\n"+string(rest)) {
			t.Errorf("%q: left %q", in, rest)
		}
		for line := range strings.Lines(q.fields) {
			if text, ok := strings.CutSuffix(line, "\r\n"); !ok || text == "" || strings.ContainsAny(text, "\r\n\x00") {
				t.Errorf("%q: passes %q on", in, line)
			}
		}
		if strings.ContainsAny(q.method+q.target+q.version, "\r\n\x00 ") {
			t.Errorf("%q: passes %q %q %q on", in, q.method, q.target, q.version)
		}
		if dst, err := parseTarget(q.target); err == nil && (dst.Port == 0 || strings.ContainsAny(dst.Host, "\r\n @/")) {
			t.Errorf("%q: %v", q.target, dst)
		}
	})
}
