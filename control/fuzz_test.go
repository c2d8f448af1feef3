// SPDX-License-Identifier: GPL-3.0-or-later

package control_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/mutex-proxy/mutex/control"
	"github.com/mutex-proxy/mutex/control/client"
	"github.com/mutex-proxy/mutex/control/controltest"
)

// FuzzDecodeLease: a request is refused with an API error, or within every bound.
func FuzzDecodeLease(f *testing.F) {
	for _, seed := range []string{
		`{"proxies":["socks5h://u:p@192.0.2.1:1080"]}`, `{"context":"default"}`, `{"proxies":[1]}`, `{"proxies":null}`, `[]`, `null`, ``, `{`,
		`{"proxies":["direct://"],"dns":["tcp://192.0.2.53"],"bypass":["local"],"name":"a","strategy":"random"}`,
		`{"PROXIES":["direct://"]}`, "\xff\xfe", `{"proxies":["direct://"]}x`, strings.Repeat("[", 1000),
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		r, err := control.DecodeLease(body)
		if err != nil {
			if _, ok := errors.AsType[*control.Error](err); !ok {
				t.Fatalf("not an API error: %v", err)
			}
			return
		}
		if len(r.Proxies) > 64 || len(r.DNS) > 256 || len(r.Bypass) > 256 || len(r.Name) > 64 || (r.Context == "") == (len(r.Proxies) == 0) {
			t.Fatalf("accepted %+v", r)
		}
		again, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := control.DecodeLease(again); err != nil {
			t.Fatalf("%s is accepted once and not twice: %v", again, err)
		}
	})
}

// FuzzRequest: whatever is asked is answered, in the shape of the API.
func FuzzRequest(f *testing.F) {
	for _, seed := range []string{
		"GET /v1/status HTTP/1.1\r\nHost: m\r\n\r\n",
		"GET /v1/explain?network=tcp&dest=[::1]:443&uid=0&pid=1 HTTP/1.1\r\nHost: m\r\n\r\n",
		"GET /v1/dns/query?name=example.com&type=MX HTTP/1.1\r\nHost: m\r\n\r\n",
		"GET /v1/dns/query?name=%00..&type=A HTTP/1.1\r\nHost: m\r\n\r\n",
		"DELETE /v1/flows/18446744073709551616 HTTP/1.1\r\nHost: m\r\n\r\n",
		"DELETE /v1/flows/1 HTTP/1.1\r\nHost: m\r\n\r\n",
		"POST /v1/reload HTTP/1.1\r\nHost: m\r\nContent-Length: 3\r\n\r\nabc",
		"POST /v1/leases HTTP/1.1\r\nHost: m\r\nContent-Length: 2\r\n\r\n{}",
		"GET /v1/stats?format=csv HTTP/1.1\r\nHost: m\r\n\r\n",
		"GET /v1/../v1/flows?watch=2 HTTP/1.1\r\nHost: m\r\n\r\n",
		"PUT /v1/%2e%2e HTTP/1.1\r\nHost: m\r\n\r\n",
		"GET //v1//status HTTP/1.1\r\nHost: m\r\n\r\n",
		"0 * HTTP/0.0\n0:\n\n",
	} {
		f.Add([]byte(seed))
	}
	handler := control.HandlerAs(control.NewServer(control.Config{Backend: controltest.New(), Now: controltest.Epoch}), true)
	f.Fuzz(func(t *testing.T, raw []byte) {
		r, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(raw)))
		if err != nil {
			return // net/http answers it
		}
		if strings.Contains(r.URL.RawQuery, "watch") || strings.Contains(r.URL.Path, "events") {
			return // streams need a connection
		}
		w := httptest.NewRecorder()
		handler.ServeHTTP(w, r)
		if w.Code < 300 {
			return
		}
		var body struct {
			Error *client.Error `json:"error"`
		}
		if err := json.Unmarshal(w.Body.Bytes(), &body); err != nil || body.Error == nil || body.Error.Code == "" {
			t.Fatalf("%d %q: %v", w.Code, w.Body, err)
		}
	})
}
