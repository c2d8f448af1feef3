// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"fmt"
	"strings"
	"testing"

	"github.com/mutex-proxy/mutex/dialers/dialertest"
	"github.com/mutex-proxy/mutex/flow"
)

func TestTrial(t *testing.T) {
	refuses := dialertest.Start(t)
	refuses.Close()
	for _, tt := range []struct {
		name, url string
		steps     []dialertest.Step
		want      string
	}{
		{
			"socks5", "socks5h://u:pqz@%s?udp=off",
			[]dialertest.Step{
				dialertest.Read(4), dialertest.Send("\x05\x02"), dialertest.Read(7), dialertest.Send("\x01\x00"),
				dialertest.Read(18), dialertest.Send("\x05\x00\x00\x01\x00\x00\x00\x00\x00\x00"), dialertest.Silent(),
			},
			"resolve:127.0.0.1 connect:ADDR greeting:user and password authentication:accepted request:succeeded",
		},
		{
			"wrong password", "socks5h://u:pqz@%s",
			[]dialertest.Step{
				dialertest.Read(4), dialertest.Send("\x05\x02"), dialertest.Read(7), dialertest.Send("\x01\x01"), dialertest.Silent(),
			},
			"resolve:127.0.0.1 connect:ADDR greeting:user and password authentication:refused!",
		},
		{
			"refused", "socks5h://%s",
			[]dialertest.Step{
				dialertest.Read(3), dialertest.Send("\x05\x00"), dialertest.Read(18), dialertest.Send("\x05\x05\x00\x01\x00\x00\x00\x00\x00\x00"), dialertest.Silent(),
			},
			"resolve:127.0.0.1 connect:ADDR greeting:no authentication request:connection refused!",
		},
		{
			"socks4", "socks4a://%s",
			[]dialertest.Step{
				dialertest.Read(9 + 12), dialertest.Send("\x00\x5b\x00\x00\x00\x00\x00\x00"), dialertest.Silent(),
			},
			"resolve:127.0.0.1 connect:ADDR request:rejected or failed!",
		},
		{
			"http", "http://u:pqz@%s",
			[]dialertest.Step{dialertest.ReadHead(), dialertest.Send("HTTP/1.1 502 No pqz here\r\n\r\n"), dialertest.Silent()},
			"resolve:127.0.0.1 connect:ADDR request:HTTP/1.1 502 No *** here!",
		},
		{
			"http with interim replies", "http://%s",
			[]dialertest.Step{
				dialertest.ReadHead(), dialertest.Send("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\nLink: x\r\n\r\nHTTP/1.1 200 Fine\r\n\r\n"), dialertest.Silent(),
			},
			"resolve:127.0.0.1 connect:ADDR request:HTTP/1.1 200 Fine",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := dialertest.Start(t, tt.steps...)
			d := dialer(t, fmt.Sprintf(tt.url, s.Addr))
			SetState(d, Disabled) // it can be tried all the same
			if got := trialText(Trial(testContext(t), d, addr(t, "example.com:443")), s.Addr.String()); got != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
			if st := StatusOf(d); st.Total != 0 || st.Active != 0 {
				t.Errorf("%+v", st)
			}
		})
	}
	down := dialer(t, "socks5h://"+refuses.Addr.String())
	if got := trialText(Trial(testContext(t), down, flow.Addr{Host: "a", Port: 1}), ""); got != "resolve:127.0.0.1 connect:!" {
		t.Error(got)
	}
}

// The two connections of a proxy that closes after a 407, and the members of a pool.
func TestTrialOfMany(t *testing.T) {
	p := &digestProxy{t: t, challenge: `, qop="auth", algorithm=SHA-256`, close: true}
	s := p.start()
	up := dialer(t, "http://u:p@"+s.Addr.String()+"?auth=digest")
	d, err := NewPool("eu", "", []flow.Dialer{up, dialer(t, "auto://u:p@"+s.Addr.String())}, PoolConfig{})
	if err != nil {
		t.Fatal(err)
	}
	steps := Trial(testContext(t), d, addr(t, "example.com:443"))
	want := "resolve:127.0.0.1 connect:ADDR request:HTTP/1.1 407 X connect:ADDR request:HTTP/1.1 200 OK " +
		"detect:http resolve:127.0.0.1 connect:ADDR request:HTTP/1.1 407 X connect:ADDR request:HTTP/1.1 200 OK"
	if got := trialText(steps, s.Addr.String()); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if steps[0].Upstream != "up" {
		t.Error(steps[0].Upstream)
	}
}

func trialText(steps []Step, at string) string {
	var out []string
	for _, s := range steps {
		text := s.Name + ":" + s.Says
		if s.Err != nil {
			text += "!"
		}
		if at != "" {
			text = strings.ReplaceAll(text, at, "ADDR")
		}
		out = append(out, text)
	}
	return strings.Join(out, " ")
}
