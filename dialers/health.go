// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/mutex-proxy/mutex/flow"
)

const (
	defaultInterval = 30 * time.Second
	defaultTimeout  = 5 * time.Second
	// firstChecks is within what time of the start all members are checked for the first time.
	firstChecks = 2 * time.Second
	// maxChecks bounds the checks of one pool that run at a time.
	maxChecks = 16
	// maxHealthHead bounds the header of an answer to a check.
	maxHealthHead = 8 << 10
)

// HealthConfig is how a pool checks its members without waiting for a flow to fail.
type HealthConfig struct {
	// Target is what a check reaches through the member: host:port (TCP: it is reached), or http://host/path or https://host/path (it
	// answers 2xx or 3xx). "" = no active checks. A name is sent to the member: members that take none need an address.
	Target string
	// UDPTarget is an address of a DNS server, asked through an association of the member: any answer will do. "" = no active checks of UDP.
	UDPTarget string
	Interval  time.Duration // between the checks of a member, give or take a tenth; 30 s
	Timeout   time.Duration // of one check; 5 s
}

// ParseTarget reads a Target and returns where it leads to; u is nil for host:port.
func ParseTarget(target string) (dst flow.Addr, u *url.URL, err error) {
	if !strings.Contains(target, "://") {
		dst, err = ParseAddr(target)
		return dst, nil, err
	}
	if u, err = url.Parse(target); err != nil {
		return dst, nil, errors.New("not a URL") // its own error repeats it
	}
	port := u.Port()
	switch {
	case u.Scheme == "http" && port == "":
		port = "80"
	case u.Scheme == "https" && port == "":
		port = "443"
	case u.Scheme != "http" && u.Scheme != "https":
		return dst, nil, errors.New("use host:port, http:// or https://")
	}
	if u.User != nil || u.Fragment != "" || u.Hostname() == "" {
		return dst, nil, errors.New("a URL with a host, and without user and fragment")
	}
	host := u.Hostname()
	if strings.Contains(host, ":") {
		host = "[" + host + "]"
	}
	dst, err = ParseAddr(host + ":" + port)
	return dst, u, err
}

// checks are the active checks of a pool.
type checks struct {
	dst flow.Addr
	url *url.URL // nil = TCP
	udp flow.Addr

	mu     sync.Mutex
	cancel context.CancelFunc // nil = not running
	done   sync.WaitGroup
}

func (p *poolState) prepareChecks() (err error) {
	h := &p.cfg.Health
	if h.Interval <= 0 {
		h.Interval = defaultInterval
	}
	if h.Timeout <= 0 {
		h.Timeout = defaultTimeout
	}
	if h.UDPTarget != "" {
		if p.checks.udp, err = parseUDPTarget(h.UDPTarget); err != nil {
			return fmt.Errorf("health udp: %w", err)
		}
	}
	if h.Target == "" {
		return nil
	}
	if p.checks.dst, p.checks.url, err = ParseTarget(h.Target); err != nil {
		return fmt.Errorf("health target: %w", err)
	}
	if p.checks.dst.Host != "" && !p.takesNames() {
		return errors.New("health target: a member takes no names: give an address")
	}
	return nil
}

// Start begins the active checks, if the pool has any. It is idempotent.
func (p *poolState) Start() {
	c := &p.checks
	c.mu.Lock()
	defer c.mu.Unlock()
	if p.cfg.Health.Target == "" && p.cfg.Health.UDPTarget == "" || c.cancel != nil {
		return
	}
	var ctx context.Context
	ctx, c.cancel = context.WithCancel(context.Background())
	c.done.Go(func() { p.checkAll(ctx) })
}

// Close ends the active checks and waits for them. Flows can still be dialled, and Start begins again.
func (p *poolState) Close() error {
	c := &p.checks
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cancel != nil {
		c.cancel()
		c.done.Wait()
		c.cancel = nil
	}
	return nil
}

// checkAll checks each member at times of its own, so that neither the target nor the uplink sees them all at once.
func (p *poolState) checkAll(ctx context.Context) {
	due := make([]time.Time, len(p.members))
	for i := range due {
		due[i] = p.cfg.Now().Add(rand.N(min(firstChecks, p.cfg.Health.Interval)))
	}
	var running sync.WaitGroup
	defer running.Wait()
	slots := make(chan struct{}, maxChecks)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case <-ctx.Done():
			return
		}
		now := p.cfg.Now()
		next := now.Add(p.cfg.Health.Interval)
		for i := range due {
			if !due[i].After(now) {
				select {
				case slots <- struct{}{}:
				case <-ctx.Done():
					return
				}
				running.Go(func() {
					defer func() { <-slots }()
					p.check(ctx, i)
				})
				due[i] = now.Add(p.cfg.Health.Interval*9/10 + rand.N(p.cfg.Health.Interval/5+1))
			}
			if due[i].Before(next) {
				next = due[i]
			}
		}
		timer.Reset(max(time.Millisecond, next.Sub(p.cfg.Now())))
	}
}

// check asks one member, by both carriages at once. Unlike with a flow, a destination that does not answer is the member's fault: that it can be
// reached is the point.
func (p *poolState) check(ctx context.Context, i int) {
	if p.members[i].off() {
		return
	}
	var both sync.WaitGroup
	defer both.Wait()
	if p.cfg.Health.Target != "" {
		both.Go(func() { p.checkBy(ctx, byTCP, i, p.reach) })
	}
	if p.cfg.Health.UDPTarget != "" {
		both.Go(func() { p.checkBy(ctx, byUDP, i, p.reachUDP) })
	}
}

func (p *poolState) checkBy(ctx context.Context, by carriage, i int, reach func(context.Context, flow.Dialer) error) {
	m := p.members[i]
	ctx, cancel := context.WithTimeoutCause(ctx, p.cfg.Health.Timeout, flow.ErrTimeout)
	defer cancel()
	err := reach(ctx, m.Dialer)
	switch {
	case err != nil && errors.Is(ctx.Err(), context.Canceled), errors.Is(err, errOff), errors.Is(err, errFull):
	case by == byUDP && errors.Is(err, errors.ErrUnsupported): // that is known of it already
	case err != nil:
		p.cfg.Log.Debug("health check failed", zap.String("pool", p.name), zap.String("upstream", m.Name()), zap.Stringer("by", by), zap.Error(err))
		p.punish(m, by, m.conditions[by].faults.Add(2), fmt.Errorf("health check: %w: %w", flow.ErrUpstream, err))
	default:
		p.note(ctx, by, i, nil)
	}
}

// reach connects to the target, and for HTTP asks for its status.
func (p *poolState) reach(ctx context.Context, d flow.Dialer) error {
	c, err := d.Dial(ctx, p.checks.dst)
	if err != nil {
		return err
	}
	defer c.Abort()
	u := p.checks.url
	if u == nil {
		return nil
	}
	return handshake(ctx, c, func() error {
		var rw io.ReadWriter = c
		if u.Scheme == "https" {
			tc := tls.Client(c, &tls.Config{ServerName: u.Hostname(), MinVersion: tls.VersionTLS12})
			if err := tc.HandshakeContext(ctx); err != nil {
				return fmt.Errorf("target: tls: %w", err)
			}
			rw = tc
		}
		return askStatus(rw, u)
	})
}

// askStatus makes a GET request and reads as much of the answer as the status takes.
func askStatus(c io.ReadWriter, u *url.URL) error {
	if _, err := fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: %s\r\nUser-Agent: mprox\r\nConnection: close\r\n\r\n", u.RequestURI(), u.Host); err != nil {
		return fmt.Errorf("target: %w", err)
	}
	head := make([]byte, 0, maxHealthHead)
	for len(head) < cap(head) && bytes.IndexByte(head, '\n') < 0 {
		n, err := c.Read(head[len(head):cap(head)])
		if head = head[:len(head)+n]; err != nil && bytes.IndexByte(head, '\n') < 0 {
			return fmt.Errorf("target: %w", noEOF(err))
		}
	}
	r, err := parseHead(head)
	if err != nil {
		return fmt.Errorf("target: %w", err)
	}
	if r.status/100 != 2 && r.status/100 != 3 {
		return errors.New("target: status " + strconv.Itoa(r.status))
	}
	return nil
}
