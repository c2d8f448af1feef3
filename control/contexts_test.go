// SPDX-License-Identifier: GPL-3.0-or-later

package control_test

import (
	"errors"
	"net/http"
	"strings"
	"testing"

	"github.com/mutex-proxy/mutex/control"
)

func TestContextCalls(t *testing.T) {
	d := start(t)
	for _, c := range []struct {
		method, path, body string
		want               int
	}{
		{"POST", "/v1/contexts", `{"name":"work","proxies":["direct://"]}`, http.StatusOK},
		{"POST", "/v1/contexts", `{"name":"work","proxies":["direct://"]}`, http.StatusConflict},
		{"POST", "/v1/contexts", `{"name":"../x","proxies":["direct://"]}`, http.StatusBadRequest},
		{"POST", "/v1/contexts", `{"name":"x"}`, http.StatusBadRequest},
		{"POST", "/v1/contexts", `{"name":"x","proxies":["direct://"],"y":1}`, http.StatusBadRequest},
		{"POST", "/v1/contexts", `{"name":"x","proxies":["direct://"]}{}`, http.StatusBadRequest},
		{"POST", "/v1/contexts/work/disable", "", http.StatusNoContent},
		{"POST", "/v1/contexts/work/enable", "", http.StatusNoContent},
		{"POST", "/v1/contexts/work/enable", "{}", http.StatusBadRequest},
		{"POST", "/v1/contexts/none/enable", "", http.StatusNotFound},
		{"POST", "/v1/contexts/work/attach", `{"uid":[1000]}`, http.StatusNoContent},
		{"POST", "/v1/contexts/none/attach", `{"uid":[1000]}`, http.StatusNotFound},
		{"POST", "/v1/contexts/work/detach", `{"uid":[1000]}`, http.StatusNoContent},
		{"DELETE", "/v1/contexts/work", "", http.StatusNoContent},
		{"DELETE", "/v1/contexts/work", "", http.StatusNotFound},
		{"GET", "/v1/processes/77", "", http.StatusOK},
		{"GET", "/v1/processes/79", "", http.StatusNotFound},
		{"GET", "/v1/processes/0", "", http.StatusBadRequest},
		{"GET", "/v1/processes/x", "", http.StatusBadRequest},
	} {
		if status, body := d.do(t, c.method, c.path, c.body); status != c.want {
			t.Errorf("%s %s %s: %d %s, want %d", c.method, c.path, c.body, status, body, c.want)
		}
	}
}

func FuzzDecodeContext(f *testing.F) {
	for _, seed := range []string{
		`{"name":"work","proxies":["socks5h://192.0.2.1:1080"],"context":{"mode":"process"}}`, `{"name":"a","context":[]}`, `{"name":1}`, `null`, ``,
		`{"name":"a","context":{"default":"x"}}x`, strings.Repeat("[", 1000),
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		r, err := control.DecodeContext(body)
		if err != nil {
			if _, ok := errors.AsType[*control.Error](err); !ok {
				t.Fatalf("not an API error: %v", err)
			}
			return
		}
		if r.Name == "" || len(r.Name) > 64 || strings.ContainsAny(r.Name, "/. \n") || len(r.Proxies) > 64 {
			t.Fatalf("accepted %+v", r)
		}
	})
}
