// SPDX-License-Identifier: GPL-3.0-or-later

package dns

import (
	"testing"

	"github.com/miekg/dns"
)

func TestOneLabel(t *testing.T) {
	for name, want := range map[string]bool{"web.": true, "web.example.": false, ".": false, `we\.b.`: true} {
		q, err := new(dns.Msg).SetQuestion(name, dns.TypeA).Pack()
		if err != nil {
			t.Fatal(err)
		}
		if got := oneLabel(q); got != want {
			t.Errorf("%s: %v", name, got)
		}
		for n := range q { // cut anywhere
			if oneLabel(q[:n]) && n < len(q)-4 {
				t.Errorf("%s: %d bytes of it are taken for one label", name, n)
			}
		}
	}
}

func FuzzOneLabel(f *testing.F) {
	f.Add([]byte("\x00\x01\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x03web\x00\x00\x01\x00\x01"))
	f.Add([]byte("\x00\x01\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\xc0\x0c\x00\x01\x00\x01"))
	f.Fuzz(func(_ *testing.T, b []byte) { _ = oneLabel(b) })
}
