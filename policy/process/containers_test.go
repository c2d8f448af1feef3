// SPDX-License-Identifier: GPL-3.0-or-later

package process

import (
	"context"
	"errors"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
)

// runtime is a container runtime that describes one container, web, has others in its lists, and sends one event to whoever follows.
func newRuntime(t *testing.T) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /containers/{name}/json", func(w http.ResponseWriter, r *http.Request) {
		body, ok := map[string]string{
			"web":     `{"Id":"abc123","Name":"/web","State":{"Running":true,"Pid":4242},"More":[1]}`,
			"stopped": `{"Id":"abc124","Name":"/stopped","State":{"Running":false,"Pid":0}}`,
			"broken":  `{"Id":`,
			"evil":    `{"Id":"../../x","Name":"/web","State":{"Running":true,"Pid":1}}`,
			"huge":    `{"Id":"` + strings.Repeat("a", maxInspect) + `"}`,
		}[r.PathValue("name")]
		if r.PathValue("name") == "busy" {
			w.WriteHeader(http.StatusInternalServerError)
			return
		}
		if !ok {
			w.WriteHeader(http.StatusNotFound)
			return
		}
		_, _ = w.Write([]byte(body))
	})
	mux.HandleFunc("GET /events", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("{}\n")) })
	mux.HandleFunc("GET /containers/json", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(someContainers)) })
	mux.HandleFunc("GET /networks", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(someNetworks)) })
	srv := &http.Server{Handler: mux}
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.Serve(l) }()
	t.Cleanup(func() { _ = srv.Close(); <-done })
	return socket
}

func TestContainersFind(t *testing.T) {
	socket := newRuntime(t)
	c, err := NewContainers("unix://" + socket)
	if err != nil {
		t.Fatal(err)
	}
	got, err := c.Find(t.Context(), "web")
	if want := (Container{ID: "abc123", Name: "web", PID: 4242}); err != nil || got != want {
		t.Errorf("got %+v, %v", got, err)
	}
	for name, want := range map[string]error{"gone": ErrNoContainer, "stopped": ErrNoContainer, "broken": nil, "evil": nil, "huge": nil, "busy": nil, "../images": nil, "": nil} {
		if _, err := c.Find(t.Context(), name); err == nil || want != nil && !errors.Is(err, want) {
			t.Errorf("%q: %v", name, err)
		}
	}
	none := &Containers{sockets: []string{socket + "x"}}
	if _, err := none.Find(t.Context(), "web"); !errors.Is(err, ErrNoRuntime) {
		t.Errorf("no runtime: %v", err)
	}
	both := &Containers{sockets: []string{socket + "x", socket}}
	if _, err := both.Find(t.Context(), "web"); err != nil {
		t.Error(err)
	}
	for _, bad := range []string{"tcp://203.0.113.1:2375", "unix://relative", "/var/run/docker.sock"} {
		if _, err := NewContainers(bad); err == nil {
			t.Errorf("%s is taken", bad)
		}
	}
}

func TestContainersFollow(t *testing.T) {
	c := &Containers{sockets: []string{newRuntime(t)}}
	ctx, cancel := context.WithCancel(t.Context())
	calls := 0
	c.Follow(ctx, func() {
		if calls++; calls == 3 { // at first, when the stream is there, and for the event
			cancel()
		}
	})
	if calls < 3 {
		t.Errorf("%d calls", calls)
	}
}

func FuzzContainer(f *testing.F) {
	f.Add([]byte(`{"Id":"abc123","Name":"/web","State":{"Running":true,"Pid":4242}}`))
	f.Add([]byte(`{"Id":1}`))
	f.Add([]byte(`{"Id":"a","Name":"b","State":{"Running":true,"Pid":-1}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := parseContainer(b)
		if err == nil && (c.PID < 0 || CheckContainer(c.ID) != nil || CheckContainer(c.Name) != nil) {
			t.Errorf("%+v", c)
		}
	})
}
