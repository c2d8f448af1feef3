// SPDX-License-Identifier: GPL-3.0-or-later

package control

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/mutex-proxy/mutex/config"
	"github.com/mutex-proxy/mutex/control/client"
)

const (
	// maxLeases is how many contexts the mark layout has room for.
	maxLeases = 160
	// Bounds of a request; the longest legal proxy URL (a name of 253 bytes, user and password of 255) is far below.
	maxProxies  = 64
	maxEntries  = 256
	maxText     = 2048
	maxLeaseTag = 64
	// leaseNoise is how many bytes a caller may send on a lease's connection, where there is nothing to say, before that ends it.
	leaseNoise = 4096
)

// heldLease is a lease and the connection that holds it.
type heldLease struct {
	uid     uint32
	trusted bool
	context string   // "" until the backend has made it
	conn    net.Conn // nil until then
}

// leaseTable knows every lease. The zero value is ready.
type leaseTable struct {
	wg sync.WaitGroup // one per lease

	mu     sync.Mutex
	closed bool
	held   map[*heldLease]struct{}
}

// reserve takes a place before anything is made, so that the limits hold among concurrent requests too.
func (t *leaseTable) reserve(p Peer, trusted bool, each int) (*heldLease, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil, &Error{Code: client.CodeUnavailable, Message: "the daemon is stopping"}
	}
	own := 0
	for h := range t.held {
		if h.uid == p.UID {
			own++
		}
	}
	if len(t.held) >= maxLeases || !trusted && own >= each {
		return nil, &Error{Code: client.CodeTooMany, Message: fmt.Sprintf("%d leases are open, of which %d are yours: end one first", len(t.held), own)}
	}
	if t.held == nil {
		t.held = make(map[*heldLease]struct{})
	}
	h := &heldLease{uid: p.UID, trusted: trusted}
	t.held[h] = struct{}{}
	t.wg.Add(1)
	return h, nil
}

// attach records what the lease has become; false if the table was closed meanwhile.
func (t *leaseTable) attach(h *heldLease, contextName string, conn net.Conn) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	h.context, h.conn = contextName, conn
	return !t.closed
}

func (t *leaseTable) release(h *heldLease) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.held, h)
	t.wg.Done()
}

// contextsOf returns the names of a user's leased contexts.
func (t *leaseTable) contextsOf(uid uint32) map[string]bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	names := make(map[string]bool)
	for h := range t.held {
		if h.uid == uid && h.context != "" {
			names[h.context] = true
		}
	}
	return names
}

func (t *leaseTable) closeAll() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closed = true
	for h := range t.held {
		if h.conn != nil {
			h.conn.Close()
		}
	}
}

func (t *leaseTable) wait() { t.wg.Wait() }

// postLease makes a context and holds it until the connection ends: by its end the caller says, wants and can say nothing more, and the
// kernel says it for a caller that was killed. The connection is taken from net/http, which does not notice the end of one that has
// sent a byte too many.
func postLease(c *call) error {
	r, err := decodeLease(c.body)
	if err != nil {
		return err
	}
	if err := c.mayLease(r); err != nil {
		return err
	}
	held, err := c.leases.reserve(c.peer, c.trusted, c.cfg.UserLeases)
	if err != nil {
		return err
	}
	defer c.leases.release(held)
	peer := c.peer
	peer.Trusted = c.trusted
	lease, err := c.cfg.Backend.Lease(c.ctx, r, peer)
	if es, ok := errors.AsType[config.Errors](err); ok && len(es) > 0 {
		return badRequest(es[0].Path, "%s", es[0].Msg) // it is the request that is wrong, not the daemon's configuration
	}
	if err != nil {
		return err
	}
	defer c.endLease(lease)
	answer, err := json.Marshal(lease.Info())
	if err != nil {
		return err
	}
	conn, _, err := http.NewResponseController(c.w).Hijack()
	if err != nil {
		return err
	}
	defer conn.Close()
	if !c.leases.attach(held, lease.Info().Context, conn) {
		return nil
	}
	_ = conn.SetDeadline(time.Now().Add(writeTimeout))
	if _, err := fmt.Fprintf(conn, "HTTP/1.1 201 Created\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n%s\n", answer); err != nil {
		return nil // the caller has gone; the lease ends with the deferred calls
	}
	_ = conn.SetDeadline(time.Time{})
	c.audit("lease opened", zap.String("context", lease.Info().Context))
	c.Publish(Event{Kind: "lease_opened", Context: lease.Info().Context, UID: int64(c.peer.UID), Message: lease.Info().ID})
	hold(conn, lease)
	return nil
}

// hold returns when the connection or the lease has ended.
func hold(conn net.Conn, lease Lease) {
	over := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		select {
		case <-lease.Done():
			conn.Close()
		case <-over:
		}
	})
	_, _ = io.CopyN(io.Discard, conn, leaseNoise)
	close(over)
	wg.Wait()
}

func (c *call) endLease(lease Lease) {
	info := lease.Info()
	if err := lease.Close(); err != nil {
		c.log.Error("lease not undone", zap.String("context", info.Context), zap.Error(err))
	}
	c.audit("lease closed", zap.String("context", info.Context))
	c.Publish(Event{Kind: "lease_closed", Context: info.Context, UID: int64(c.peer.UID), Message: info.ID})
}

// decodeLease reads the body of a request for a lease, strictly.
func decodeLease(body []byte) (LeaseRequest, error) {
	var r LeaseRequest
	d := json.NewDecoder(bytes.NewReader(body))
	d.DisallowUnknownFields()
	if err := d.Decode(&r); err != nil {
		if ute, ok := errors.AsType[*json.UnmarshalTypeError](err); ok {
			return r, badRequest("$."+ute.Field, "a JSON %s cannot be used here", ute.Value)
		}
		return r, badRequest("$", "the body is not a lease request: %v", err)
	}
	if d.More() {
		return r, badRequest("$", "there is more after the lease request")
	}
	return r, checkLease(r)
}

func checkLease(r LeaseRequest) error {
	switch {
	case r.Context == "" && len(r.Proxies) == 0:
		return badRequest("$.proxies", "give at least one proxy, or the context to join")
	case r.Context != "" && len(r.Proxies)+len(r.DNS)+len(r.Bypass)+len(r.Name)+len(r.Strategy) > 0:
		return badRequest("$.context", "a lease that joins a context cannot change it")
	case len(r.Name) > maxLeaseTag || strings.ContainsFunc(r.Name, notNameRune):
		return badRequest("$.name", "a name has up to %d letters, digits, - and _", maxLeaseTag)
	case len(r.Context) > maxText || len(r.Strategy) > maxLeaseTag:
		return badRequest("$", "a value is longer than any name can be")
	case r.PID < 0:
		return badRequest("$.pid", "%d is not a process id", r.PID)
	case len(r.Proxies) > maxProxies:
		return badRequest("$.proxies", "more than %d", maxProxies)
	}
	for path, list := range map[string][]string{"$.proxies": r.Proxies, "$.dns": r.DNS, "$.bypass": r.Bypass} {
		if len(list) > maxEntries {
			return badRequest(path, "more than %d entries", maxEntries)
		}
		for i, text := range list {
			if text == "" || len(text) > maxText {
				return badRequest(fmt.Sprintf("%s[%d]", path, i), "empty, or longer than %d bytes", maxText)
			}
		}
	}
	return nil
}

func notNameRune(r rune) bool {
	return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '-' && r != '_'
}

// mayLease keeps callers without authority from what is not theirs: contexts of others, files that root would read, and the daemon's environment.
func (c *call) mayLease(r LeaseRequest) error {
	if c.trusted {
		return nil
	}
	if r.Context != "" && !c.leases.contextsOf(c.peer.UID)[r.Context] {
		return c.forbidden()
	}
	for i, raw := range r.Proxies {
		path := fmt.Sprintf("$.proxies[%d]", i)
		if strings.Contains(raw, "${") {
			return &Error{Code: client.CodeForbidden, Path: path, Message: "a lease cannot use the daemon's environment: expand the variable yourself"}
		}
		if key, ok := namesFile(raw); ok {
			return &Error{Code: client.CodeForbidden, Path: path, Message: key + " names a file, which the daemon would read as root: give the value itself"}
		}
	}
	return nil
}

// harmless are the options of a proxy URL that name no file. The list is of what is known to be harmless, so that an option of later
// versions is refused until it has been thought about.
func harmless(key string) bool {
	switch key {
	case "weight", "priority", "udp", "auth", "sni", "insecure", "name":
		return true
	}
	return false
}

// namesFile returns the first option of the URL that may name a file. A URL that cannot be parsed is for the backend to refuse.
func namesFile(raw string) (string, bool) {
	_, rawQuery, _ := strings.Cut(raw, "?")
	rawQuery, _, _ = strings.Cut(rawQuery, "#")
	query, err := url.ParseQuery(rawQuery)
	if err != nil {
		return "a query that cannot be parsed", true
	}
	for key := range query {
		if !harmless(key) {
			return key, true
		}
	}
	return "", false
}
