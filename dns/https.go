// SPDX-License-Identifier: GPL-3.0-or-later

package dns

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"

	"github.com/mutex-proxy/mutex/flow"
)

const (
	// maxHTTPConns bounds the connections to one server; over HTTP/2 one carries everything.
	maxHTTPConns = 8
	mediaType    = "application/dns-message"
)

// https asks one server over DoH (RFC 8484), HTTP/2 where the server speaks it.
type https struct {
	p      *profile
	via    flow.Dialer
	t      target
	client *http.Client
}

func newHTTPS(p *profile, via flow.Dialer, t target, roots *x509.CertPool) *https {
	h := &https{p: p, via: via, t: t}
	conf := tlsConfig(t.addr, roots, "h2")
	conf.NextProtos = nil // the transport's own list
	h.client = &http.Client{
		Transport: &http.Transport{
			DialContext:     h.dial, // and no Proxy: the environment has no say
			TLSClientConfig: conf, TLSHandshakeTimeout: dialTimeout, ForceAttemptHTTP2: true,
			HTTP2:           &http.HTTP2Config{SendPingTimeout: 15 * time.Second, PingTimeout: 5 * time.Second},
			MaxConnsPerHost: maxHTTPConns, MaxIdleConnsPerHost: maxHTTPConns, IdleConnTimeout: idleTimeout,
			ResponseHeaderTimeout: callTimeout, MaxResponseHeaderBytes: 64 << 10, DisableCompression: true,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return h
}

func (h *https) close() { h.client.CloseIdleConnections() }

// dial is called by the HTTP transport, also after the request that wanted the connection has ended: the connection's life is the
// profile's, and the profile waits until the transport has closed it.
func (h *https) dial(context.Context, string, string) (net.Conn, error) {
	h.p.mu.Lock()
	if h.p.ended {
		h.p.mu.Unlock()
		return nil, errClosed
	}
	h.p.wg.Add(1)
	h.p.mu.Unlock()
	ctx, cancel := context.WithTimeout(h.p.life, dialTimeout)
	defer cancel()
	conn, err := h.via.Dial(ctx, h.t.addr)
	if err != nil {
		h.p.wg.Done()
		return nil, err
	}
	stop := context.AfterFunc(h.p.life, func() { conn.Close() })
	return &httpsConn{Conn: conn, closed: sync.OnceFunc(func() {
		stop()
		h.p.wg.Done()
	})}, nil
}

// httpsConn tells when the HTTP transport has closed its connection.
type httpsConn struct {
	net.Conn
	closed func()
}

// Close implements net.Conn.
func (c *httpsConn) Close() error {
	defer c.closed()
	return c.Conn.Close()
}

func (h *https) ask(ctx context.Context, q question) (*dns.Msg, error) {
	wire, err := q.pack(0, true) // id 0: RFC 8484 section 4.1
	if err != nil {
		return nil, err
	}
	host := h.t.addr.String()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+host+h.t.path, bytes.NewReader(wire))
	if err != nil {
		return nil, errors.New("bad url") // its text has the path
	}
	if h.t.addr.Port == 443 {
		req.Host = strings.TrimSuffix(host, ":443")
	}
	req.Header = http.Header{
		"Content-Type": {mediaType}, "Accept": {mediaType},
		"User-Agent":      {""}, // none
		"Idempotency-Key": {},   // not sent; tells net/http that it may ask again when an idle connection turns out to be closed
	}
	resp, err := h.client.Do(req)
	if err != nil {
		return nil, withoutURL(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%w: http status %d", errServer, resp.StatusCode)
	}
	if ct, _, _ := strings.Cut(resp.Header.Get("Content-Type"), ";"); !strings.EqualFold(strings.TrimSpace(ct), mediaType) {
		return nil, fmt.Errorf("%w: content type is not %s", errMalformed, mediaType)
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, dns.MaxMsgSize+1))
	if err != nil {
		return nil, err
	}
	if len(body) > dns.MaxMsgSize {
		return nil, fmt.Errorf("%w: longer than 65535 bytes", errMalformed)
	}
	m, err := parseReply(q, 0, body)
	if err != nil {
		return nil, err
	}
	// A cache on the way has had it for so long (RFC 8484 section 5.1).
	if age, err := strconv.ParseUint(resp.Header.Get("Age"), 10, 31); err == nil {
		m = aged(m, time.Duration(age)*time.Second)
	}
	return m, nil
}

// withoutURL takes the URL out of an error of net/http: its path may name the customer.
func withoutURL(err error) error {
	if inner := errors.Unwrap(err); inner != nil {
		return inner
	}
	return err
}
