// SPDX-License-Identifier: GPL-3.0-or-later

package process

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"
)

const (
	// maxInspect bounds the description of one container; usual ones have 10 KB.
	maxInspect = 4 << 20
	// inspectTimeout bounds one question. A runtime that is busy with an image answers within tenths of a second.
	inspectTimeout = 5 * time.Second
	// eventsPause is the time between two tries to follow a runtime's events.
	eventsPause = time.Second
)

var (
	// ErrNoRuntime means that no socket of a container runtime answers.
	ErrNoRuntime = errors.New("no container runtime answers")
	// ErrNoContainer means that no running container has this name or ID.
	ErrNoContainer = errors.New("no such running container")
)

// Container is a running container as its runtime describes it.
type Container struct {
	ID   string
	Name string
	PID  int // its first process, in the PID namespace of the runtime
}

// Containers asks container runtimes that speak Docker's API over a unix socket: Docker, and Podman's service. Safe for concurrent use.
type Containers struct {
	sockets []string
}

// NewContainers returns one that asks the socket of dockerHost (DOCKER_HOST, `unix:///path`), or, where that is "", the usual ones.
func NewContainers(dockerHost string) (*Containers, error) {
	if dockerHost == "" {
		return &Containers{sockets: []string{"/var/run/docker.sock", "/run/podman/podman.sock"}}, nil
	}
	path, ok := strings.CutPrefix(dockerHost, "unix://")
	if !ok || !strings.HasPrefix(path, "/") {
		return nil, fmt.Errorf("DOCKER_HOST %q: want unix:///path: a runtime on another machine has no processes here", dockerHost)
	}
	return &Containers{sockets: []string{path}}, nil
}

// CheckContainer reports what is wrong with the name or ID of a container.
func CheckContainer(name string) error {
	bad := func(i int, r rune) bool {
		alnum := r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9'
		return !alnum && (i == 0 || !strings.ContainsRune("_.-", r))
	}
	for i, r := range name {
		if bad(i, r) {
			return fmt.Errorf("%q is not the name of a container: letters, digits, _ . and -", name)
		}
	}
	if name == "" || len(name) > 255 {
		return errors.New("the name of a container has 1 to 255 bytes")
	}
	return nil
}

// Find describes a running container by its name, its ID or an unambiguous beginning of that. ErrNoContainer, ErrNoRuntime.
func (c *Containers) Find(ctx context.Context, name string) (Container, error) {
	if err := CheckContainer(name); err != nil {
		return Container{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, inspectTimeout)
	defer cancel()
	err := fmt.Errorf("%w at %s (DOCKER_HOST names another)", ErrNoRuntime, strings.Join(c.sockets, ", "))
	for _, socket := range c.sockets {
		out, ferr := inspect(ctx, socket, name)
		if ferr == nil {
			return out, nil
		}
		if !errors.Is(ferr, ErrNoRuntime) {
			err = ferr // one that answers knows more than one that does not
		}
	}
	return Container{}, err
}

func inspect(ctx context.Context, socket, name string) (Container, error) {
	body, err := get(ctx, socket, "/containers/"+url.PathEscape(name)+"/json")
	if err != nil {
		if errors.Is(err, ErrNoContainer) {
			err = fmt.Errorf("%w: %s", err, name)
		}
		return Container{}, err
	}
	defer body.Close()
	b, err := io.ReadAll(io.LimitReader(body, maxInspect+1))
	if err != nil {
		return Container{}, fmt.Errorf("container runtime at %s: %w", socket, err)
	}
	out, err := parseContainer(b)
	if err != nil {
		return Container{}, fmt.Errorf("container runtime at %s: %w", socket, err)
	}
	if out.PID == 0 {
		return Container{}, fmt.Errorf("%w: %s is there, and does not run", ErrNoContainer, name)
	}
	return out, nil
}

// parseContainer reads the answer to GET /containers/NAME/json. PID is 0 when the container does not run.
func parseContainer(b []byte) (Container, error) {
	if len(b) > maxInspect {
		return Container{}, fmt.Errorf("a description of more than %d bytes", maxInspect)
	}
	var in struct {
		ID    string `json:"Id"`
		Name  string
		State struct {
			Running bool
			Pid     int
		}
	}
	if err := json.Unmarshal(b, &in); err != nil {
		return Container{}, fmt.Errorf("not the description of a container: %w", err)
	}
	name := strings.TrimPrefix(in.Name, "/")
	if err := errors.Join(CheckContainer(in.ID), CheckContainer(name)); err != nil {
		return Container{}, fmt.Errorf("not the description of a container: %w", err)
	}
	out := Container{ID: in.ID, Name: name}
	if in.State.Running && in.State.Pid > 0 {
		out.PID = in.State.Pid
	}
	return out, nil
}

// get asks the runtime behind one socket. The caller closes the body.
func get(ctx context.Context, socket, path string) (io.ReadCloser, error) {
	t := &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket) //nolint:forbidigo // a unix socket: nothing leaves, nothing to mark
		},
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://localhost"+path, http.NoBody)
	if err != nil {
		return nil, err
	}
	res, err := (&http.Client{Transport: t}).Do(req)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoRuntime, err)
	}
	switch res.StatusCode {
	case http.StatusOK:
		return res.Body, nil
	case http.StatusNotFound:
		err = ErrNoContainer
	default:
		err = fmt.Errorf("container runtime at %s: %s", socket, res.Status)
	}
	return nil, errors.Join(err, res.Body.Close())
}

// Follow calls started whenever a container may have been started, until ctx ends. It calls it too when events may have been missed, so that
// a runtime that does not answer leads to a call each second at most.
func (c *Containers) Follow(ctx context.Context, started func()) {
	var wg sync.WaitGroup
	for _, socket := range c.sockets {
		wg.Go(func() {
			for ctx.Err() == nil {
				if _, err := os.Stat(socket); err == nil {
					started()
					follow(ctx, socket, started)
				}
				select {
				case <-time.After(eventsPause):
				case <-ctx.Done():
				}
			}
		})
	}
	wg.Wait()
}

// follow reads one stream of events to its end. What they say does not matter: everybody who waits looks again.
func follow(ctx context.Context, socket string, started func()) {
	const filter = `{"type":["container"],"event":["start"]}`
	body, err := get(ctx, socket, "/events?filters="+url.QueryEscape(filter))
	if err != nil {
		return
	}
	defer body.Close()
	started() // what began before the stream
	buf := make([]byte, 16<<10)
	for {
		n, err := body.Read(buf)
		if n > 0 {
			started()
		}
		if err != nil {
			return
		}
	}
}
