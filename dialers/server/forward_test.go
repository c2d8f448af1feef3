// SPDX-License-Identifier: GPL-3.0-or-later

package server

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
)

// TestForward makes requests in absolute form by Go's client.
func TestForward(t *testing.T) {
	origin := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		for _, hidden := range []string{"Proxy-Authorization", "Proxy-Connection", "Keep-Alive"} {
			if r.Header.Get(hidden) != "" {
				t.Errorf("the origin sees %s", hidden)
			}
		}
		fmt.Fprintf(w, "%s %s %s %s %s", r.Method, r.Host, r.URL, r.Header.Get("X-Mine"), b)
	}))
	defer origin.Close()
	_, at := start(t, Config{Users: map[string]string{"alice": secret}})
	host := strings.TrimPrefix(origin.URL, "http://")
	for password, want := range map[string]int{secret: 200, "wrong": 407} {
		tr := &http.Transport{Proxy: http.ProxyURL(&url.URL{Scheme: "http", Host: at.String(), User: url.UserPassword("alice", password)})}
		body := strings.Repeat("body", 50_000)
		if want != 200 {
			body = body[:lingerBytes/2] // of a larger one not all is read, and the client may see that before the reply
		}
		for range 2 {
			req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, origin.URL+"/a/b?c=d", strings.NewReader(body))
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("X-Mine", "kept")
			resp, err := tr.RoundTrip(req)
			if err != nil {
				t.Fatal(err)
			}
			b, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			if resp.StatusCode != want || want == 200 && (err != nil || string(b) != "POST "+host+" /a/b?c=d kept "+body) {
				t.Errorf("%s: %d %.80q %v", password, resp.StatusCode, b, err)
			}
		}
		tr.CloseIdleConnections()
	}
}

// TestForwardRefused: what cannot be passed on is refused, and the allow list counts.
func TestForwardRefused(t *testing.T) {
	allow, err := Destinations(nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	_, at := start(t, Config{Allow: allow})
	for request, want := range map[string]string{
		"GET http://127.0.0.1:1/ HTTP/1.1":          "403",
		"GET HTTP://[::ffff:127.0.0.1]:1/ HTTP/1.1": "403",
		"GET http://[::1]/ HTTP/1.1":                "403",
		"GET http://user@127.0.0.1/ HTTP/1.1":       "400",
		"GET http:///x HTTP/1.1":                    "400",
		"GET http://a:0/ HTTP/1.1":                  "400",
		"GET https://192.0.2.1/ HTTP/1.1":           "405",
		"GET / HTTP/1.1":                            "405",
		"GET http://192.0.2.1/ HTTP/1.1\r\nA : b":   "400",
		"GET http://192.0.2.1/ HTTP/1.1\r\n folded": "400",
		"CONNECT http://192.0.2.1:80/ HTTP/1.1":     "400",
	} {
		c := connect(t, at)
		if _, err := io.WriteString(c, request+"\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		_ = c.CloseWrite()
		if b, _ := io.ReadAll(c); !strings.HasPrefix(string(b), "HTTP/1.1 "+want) {
			t.Errorf("%s: %q", request, b)
		}
	}
}
