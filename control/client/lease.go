// SPDX-License-Identifier: GPL-3.0-or-later

package client

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"sync"
)

// HeldLease is a lease and the connection it lives on. When the connection ends, by Close, by Release of the daemon or with this process,
// the context's device and flows are gone; processes that are still in its cgroup are blocked, not freed.
type HeldLease struct {
	Lease

	body   io.ReadCloser
	cancel context.CancelFunc
	done   chan struct{}
	once   sync.Once
}

// Lease asks for a context of the caller's own. ctx bounds the asking only: the lease goes on until Close.
func (c *Client) Lease(ctx context.Context, r LeaseRequest) (*HeldLease, error) {
	held, cancel := context.WithCancel(context.WithoutCancel(ctx))
	unhook := context.AfterFunc(ctx, cancel)
	l, err := c.lease(held, r)
	if !unhook() && err == nil {
		// ctx ended while the answer came in; held is cancelled, so the lease is as good as gone.
		l.body.Close()
		err = context.Cause(ctx)
	}
	if err != nil {
		cancel()
		return nil, err
	}
	l.cancel = cancel
	go l.wait()
	return l, nil
}

func (c *Client) lease(ctx context.Context, r LeaseRequest) (*HeldLease, error) {
	resp, err := c.request(ctx, http.MethodPost, "/v1/leases", nil, r)
	if err != nil {
		return nil, err
	}
	l := &HeldLease{body: resp.Body, done: make(chan struct{})}
	line, err := bufio.NewReaderSize(io.LimitReader(resp.Body, maxEvent), maxEvent).ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, &l.Lease)
	}
	if err != nil {
		resp.Body.Close()
		return nil, fmt.Errorf("decode lease: %w", err)
	}
	return l, nil
}

// wait reads the connection until it ends. The daemon sends nothing on it after the lease itself, save line feeds.
func (l *HeldLease) wait() {
	defer close(l.done)
	_, _ = io.Copy(io.Discard, l.body)
}

// Done is closed when the lease has ended, whoever ended it.
func (l *HeldLease) Done() <-chan struct{} { return l.done }

// Close ends the lease and waits until its connection is closed. It is idempotent.
func (l *HeldLease) Close() error {
	l.once.Do(func() {
		l.cancel()
		l.body.Close()
	})
	<-l.done
	return nil
}
