// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"context"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/mutex-proxy/mutex/dialers/dialertest"
	"github.com/mutex-proxy/mutex/flow"
)

// exchange is one step of a conversation: what the server reads, and what it says then.
type exchange struct {
	read dialertest.Step
	send string
}

// goodConversations are whole ones ones, for each protocol.
func goodConversations() map[string][]exchange {
	challenge := "HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Digest realm=\"r\", qop=\"auth\", nonce=\"n\"\r\nContent-Length: 4\r\n\r\nno!\n"
	return map[string][]exchange{
		"socks4a://%s": {{dialertest.Read(8 + 1 + 12), "\x00\x5a\x04\xd2\x0a\x00\x00\x01"}},
		"socks5h://%s": {{dialertest.Read(3), "\x05\x00"}, {dialertest.Read(18), okReply}},
		"socks5h://bob:" + testSecret[:7] + "@%s":          {{dialertest.Read(4), "\x05\x02"}, {dialertest.Read(13), "\x01\x00"}, {dialertest.Read(18), okReply}},
		"http://bob:" + testSecret[:7] + "@%s":             {{dialertest.ReadHead(), "HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nX: y\r\n\r\n"}},
		"http://bob:" + testSecret[:7] + "@%s?auth=digest": {{dialertest.ReadHead(), challenge}, {dialertest.ReadHead(), "HTTP/1.1 200 OK\r\n\r\n"}},
	}
}

// cut returns the steps of a conversation that ends after n bytes of the server's, and whether that is all of it.
func cut(conv []exchange, n int, send func(string) dialertest.Step, end dialertest.Step) (steps []dialertest.Step, whole bool) {
	for _, x := range conv {
		k := min(n, len(x.send))
		steps = append(steps, x.read, send(x.send[:k]))
		if n -= k; k < len(x.send) {
			return append(steps, end), false
		}
	}
	return append(steps, end), true
}

func size(conv []exchange) (n int) {
	for _, x := range conv {
		n += len(x.send)
	}
	return n
}

// TestCutAnywhere ends good conversations after each byte, in three ways. The error comes in time, holds no credential, and leaves nothing
// open. Whole conversations work however they are cut up.
func TestCutAnywhere(t *testing.T) {
	ends := map[string]dialertest.Step{
		"closes": func(*dialertest.Conv) error { return nil }, "resets": dialertest.Reset(), "is silent": dialertest.Silent(),
	}
	for raw, conv := range goodConversations() {
		for end, step := range ends {
			t.Run(strings.ReplaceAll(raw, "/", "_")+" "+end, func(t *testing.T) {
				t.Parallel()
				for n := range size(conv) {
					steps, _ := cut(conv, n, dialertest.Send, step)
					cutDial(t, fmt.Sprintf("after %d bytes", n), raw, steps, end == "is silent")
				}
			})
		}
		t.Run(strings.ReplaceAll(raw, "/", "_")+" whole", func(t *testing.T) {
			t.Parallel()
			steps, _ := cut(conv, size(conv), dialertest.SendSlowly, dialertest.Echo())
			s := dialertest.Start(t, steps...)
			c, err := dialer(t, fmt.Sprintf(raw, s.Addr)).Dial(testContext(t), addr(t, "example.com:80"))
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			got := make([]byte, 5)
			if _, err := io.WriteString(c, "hello"); err != nil {
				t.Error(err)
			}
			if _, err := io.ReadFull(c, got); err != nil || string(got) != "hello" {
				t.Errorf("%q %v", got, err)
			}
		})
	}
}

// cutDial dials through a server that breaks off.
func cutDial(t *testing.T, what, raw string, steps []dialertest.Step, silent bool) {
	t.Helper()
	s := dialertest.Start(t, steps...)
	defer s.Close()
	d := dialer(t, fmt.Sprintf(raw, s.Addr))
	limit := 5 * time.Second
	if silent {
		limit = short / 5
	}
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	c, err := d.Dial(ctx, addr(t, "example.com:80"))
	switch {
	case err == nil:
		c.Close()
		t.Errorf("%s: connected", what)
	case silent != (flow.ReasonOf(err) == flow.ReasonTimeout):
		t.Errorf("%s: %v", what, err)
	case strings.Contains(err.Error(), testSecret[:7]):
		t.Errorf("%s: the error has the password: %v", what, err)
	}
	if st := StatusOf(d); st.Active != 0 {
		t.Errorf("%s: %+v", what, st)
	}
}
