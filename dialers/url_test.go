// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

func TestParseURL(t *testing.T) {
	secret := cmp.Comparer(Secret.Equal)
	for _, tt := range []struct {
		raw, text string
		want      Spec
	}{
		{"socks5h://alice:pw@203.0.113.10:1080", "socks5h://alice:***@203.0.113.10:1080", Spec{
			Scheme: SchemeSOCKS5h, Host: "203.0.113.10", Port: 1080, HasUser: true, Username: "alice", HasPassword: true, Password: NewSecret("pw"),
		}},
		{"socks5://h", "socks5://h:1080", Spec{Scheme: SchemeSOCKS5, Host: "h", Port: 1080}},
		{"socks4a://[2001:db8::1]", "socks4a://[2001:db8::1]:1080", Spec{Scheme: SchemeSOCKS4a, Host: "2001:db8::1", Port: 1080}},
		{"http://[::1]:3128/", "http://[::1]:3128", Spec{Scheme: SchemeHTTP, Host: "::1", Port: 3128}},
		{"http://[fe80::1%25eth0]:1", "http://[fe80::1%eth0]:1", Spec{Scheme: SchemeHTTP, Host: "fe80::1%eth0", Port: 1}},
		{"http://proxy.example", "http://proxy.example:1080", Spec{Scheme: SchemeHTTP, Host: "proxy.example", Port: 1080}},
		{"HTTPS://Proxy.Example.", "https://proxy.example:443", Spec{Scheme: SchemeHTTPS, Host: "proxy.example", Port: 443}},
		{"proxy.example:8080", "http://proxy.example:8080", Spec{Scheme: SchemeHTTP, Host: "proxy.example", Port: 8080}},
		{"u:p@proxy.example", "http://u:***@proxy.example:1080", Spec{
			Scheme: SchemeHTTP, Host: "proxy.example", Port: 1080, HasUser: true, Username: "u", HasPassword: true, Password: NewSecret("p"),
		}},
		{"socks5://u:@h:", "socks5://u:***@h:1080", Spec{Scheme: SchemeSOCKS5, Host: "h", Port: 1080, HasUser: true, Username: "u", HasPassword: true}},
		{"socks5://u@h", "socks5://u@h:1080", Spec{Scheme: SchemeSOCKS5, Host: "h", Port: 1080, HasUser: true, Username: "u"}},
		{"socks5://:p@h", "socks5://:***@h:1080", Spec{Scheme: SchemeSOCKS5, Host: "h", Port: 1080, HasUser: true, HasPassword: true, Password: NewSecret("p")}},
		{"socks5://a%40b:p%3a%2F%25%23%3f:x@h", "socks5://a%40b:***@h:1080", Spec{
			Scheme: SchemeSOCKS5, Host: "h", Port: 1080, HasUser: true, Username: "a@b", HasPassword: true, Password: NewSecret("p:/%#?:x"),
		}},
		{"socks5://u:p@ss@h", "socks5://u:***@h:1080", Spec{
			Scheme: SchemeSOCKS5, Host: "h", Port: 1080, HasUser: true, Username: "u", HasPassword: true, Password: NewSecret("p@ss"),
		}},
		{
			"https://h?weight=3&priority=1&udp=off&auth=basic&sni=X.example&insecure=1&name=my%20proxy&password_file=/etc/x", "https://h:443",
			Spec{
				Scheme: SchemeHTTPS, Host: "h", Port: 443, Weight: 3, Priority: 1, UDP: UDPOff, Auth: "basic", SNI: "x.example", Insecure: true,
				Name: "my proxy", PasswordFile: "/etc/x",
			},
		},
		{"direct://", "direct://", Spec{Scheme: SchemeDirect}},
		{"reject://", "reject://", Spec{Scheme: SchemeReject}},
		{"drop://?name=x", "drop://", Spec{Scheme: SchemeDrop, Name: "x"}},
		{"auto://h:1", "auto://h:1", Spec{Scheme: SchemeAuto, Host: "h", Port: 1}},
		{"socks5s://h", "socks5s://h:1080", Spec{Scheme: SchemeSOCKS5s, Host: "h", Port: 1080}},
	} {
		t.Run(tt.raw, func(t *testing.T) {
			got, err := ParseURL(tt.raw)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(tt.want, got, secret, cmpopts.IgnoreUnexported(Spec{})); d != "" {
				t.Error(d)
			}
			if got.String() != tt.text {
				t.Errorf("String: %s, want %s", got, tt.text)
			}
		})
	}
}

func TestParseURLErrors(t *testing.T) {
	for raw, part := range map[string]string{
		"ftp://h":                               "scheme",
		"://h":                                  "scheme",
		"":                                      "host",
		"socks5://":                             "host",
		"socks5://u:hunter2@":                   "host",
		"socks5://h:0":                          "port",
		"socks5://h:65536":                      "port",
		"socks5://h:hunter2":                    "port",
		"socks5://h:+80":                        "port",
		"socks5://::1":                          "host",
		"socks5://[::1":                         "host",
		"socks5://[::1]80":                      "host",
		"socks5://[1.2.3.4]":                    "host",
		"socks5://1.2.3":                        "host",
		"socks5://1.2.3.256":                    "host",
		"socks5://a..b":                         "host",
		"socks5://bücher.example":               "host",
		"socks5://a!b":                          "host",
		"socks5://" + strings.Repeat("a", 64):   "host",
		"socks5://u:hunter2@h/x":                "path",
		"socks5://u:hun/ter2@h":                 "path",
		"socks5://u:hun?ter2@h":                 "port",
		"socks5://u:hun#ter2@h":                 "fragment",
		"socks5://u:hunter2%zz@h":               "userinfo",
		"socks5://u%2:hunter2@h":                "userinfo",
		"socks5://u:hunter2 x@h":                "url",
		"socks5://u:hunter2\n@h":                "url",
		"socks5://h?hunter2=1":                  "option",
		"socks5://h?name=%zz":                   "option",
		"socks5://h?weight=0":                   "weight",
		"socks5://h?weight=hunter2":             "weight",
		"socks5://h?priority=-1":                "priority",
		"socks5://h?udp=hunter2":                "udp",
		"socks5://h?auth=ntlm":                  "auth",
		"http://h?auth=bearer":                  "auth",
		"https://h?insecure=yes":                "insecure",
		"http://h?insecure=1":                   "insecure",
		"https://h?sni=a_b!":                    "sni",
		"socks5://h?name=":                      "name",
		"socks5://h?udp=on&udp=on":              "udp",
		"socks5://u:hunter2@h?password_file=/x": "password_file",
		"direct://h":                            "host",
		"drop://u:hunter2@":                     "host",
		"http://a%3ab:hunter2@h":                "userinfo",
		"socks5://" + strings.Repeat("u", 256) + ":hunter2@h": "userinfo",
		"socks5://h?name=" + strings.Repeat("x", maxURL):      "url",
	} {
		_, err := ParseURL(raw)
		var ue *URLError
		if !errors.As(err, &ue) {
			t.Errorf("%.60q: error %v", raw, err)
			continue
		}
		if ue.Part != part {
			t.Errorf("%.60q: part %q, want %q: %v", raw, ue.Part, part, err)
		}
		if strings.Contains(err.Error(), "hunter") || strings.Contains(err.Error(), "ter2") {
			t.Errorf("%.60q: the error gives the secret away: %v", raw, err)
		}
	}
}

func FuzzParseURL(f *testing.F) {
	for _, s := range []string{
		"socks5h://alice:pw@203.0.113.10:1080", "https://[2001:db8::1]:443/?insecure=1&sni=x", "h:1", "socks5://a%40b:p%3a@h", "direct://", "u:p@h",
		"socks5://[fe80::1%25eth0]", "http://u:hun?ter2@h", "socks5://%3A@a",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, raw string) {
		s, err := ParseURL(raw)
		if err != nil {
			return
		}
		other := s
		other.Password = NewSecret("another")
		if s.String() != other.String() {
			t.Errorf("%q: what is printed depends on the password: %s", raw, s)
		}
		again, err := ParseURL(s.String())
		if err != nil && len(s.String()) > maxURL { // bytes that are no text are printed three times as long
			return
		}
		if err != nil {
			t.Fatalf("%q printed as %q, which is no URL: %v", raw, s, err)
		}
		if again.Host != s.Host || again.Port != s.Port || again.Scheme != s.Scheme || again.Username != s.Username || again.HasPassword != s.HasPassword {
			t.Errorf("%q printed as %q", raw, s)
		}
	})
}
